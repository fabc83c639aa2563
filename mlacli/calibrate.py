"""Rates of the kernels between which -mla 3 chooses, measured on small made-up data.

Shapes are DeepSeek-V2-Lite's; rates hardly depend on them. Takes about 0.2 s once the kernels are
compiled, and is done once per machine and type of cache (mlacli/machine.py keeps the result).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from codegen.call import Call, aligned_bytes
from codegen.formats import CACHE_FORMATS, F32, Q8_0, BlockFormat
from codegen.jit import Jit
from codegen.kernels import attention
from codegen.kernels.activations import row_bytes
from codegen.kernels.attention import ABSORBED, STANDARD, flash_scratch_bytes
from codegen.kernels.matmul import Shape, matmul
from codegen.kernels.panel import panel_bytes
from codegen.pool import Pool
from mlacli.model.choose import MachineProfile

HEADS, LORA, ROPE, NOPE, VALUE = 16, 512, 64, 128, 128
TOKENS, ROWS, EXPANDED_ROWS = 128, 1024, 256  # near where both paths take the same time
_RUNS = 7


def measure_profile(jit: Jit, pool: Pool, n_threads: int, type_k: str) -> MachineProfile:
    """Multiply-adds per second of the absorbed and expanded inner loops and of the expansion."""
    fmt = CACHE_FORMATS[type_k]
    return MachineProfile(
        absorbed_rate=_attention_rate(jit, pool, n_threads, ABSORBED, LORA + ROPE, LORA, fmt),
        # Expanded keys and values are codes of as many bits as those of Q8_0 rows.
        expanded_rate=_attention_rate(jit, pool, n_threads, STANDARD, NOPE + ROPE, VALUE, Q8_0),
        expansion_rate_int8=_expansion_rate(jit, pool, n_threads, Q8_0),
        expansion_rate_f32=_expansion_rate(jit, pool, n_threads, F32),
    )


def _attention_rate(
    jit: Jit, pool: Pool, n_threads: int, kind: str, d_k: int, d_v: int, fmt: BlockFormat
) -> float:
    """Flash attention of TOKENS tokens over ROWS visible rows."""
    sizes: dict[str, Any] = {"kind": kind, "n_head": HEADS, "d_k": d_k, "d_v": d_v}
    spec = attention.flash_attn(**sizes, max_tokens=TOKENS, fmt_k=fmt, fmt_v=fmt, scale=1.0)
    per_row = 1 if kind == ABSORBED else HEADS
    keys, values = (aligned_bytes(ROWS * per_row * fmt.row_bytes(d)) for d in (d_k, d_v))
    scratch = flash_scratch_bytes(TOKENS, ROWS, n_threads, **sizes)
    arrays: list[npt.NDArray[Any]] = [
        aligned_bytes(4 * TOKENS * HEADS * d_k),
        keys,
        keys if kind == ABSORBED else values,
        np.full(TOKENS, ROWS, np.int32),
        np.zeros(TOKENS, np.int32),
        np.zeros(ROWS, np.int32),
        np.zeros(ROWS, np.int32),
        aligned_bytes(4 * TOKENS * HEADS * d_v),
        aligned_bytes(scratch),
    ]
    call = Call(jit, spec, [*arrays, TOKENS, ROWS])
    return TOKENS * ROWS * HEADS * (d_k + d_v) / _seconds(call, pool, n_threads)


def _expansion_rate(jit: Jit, pool: Pool, n_threads: int, fmt: BlockFormat) -> float:
    """kv_b of all heads times EXPANDED_ROWS latent rows."""
    n_rows = NOPE + VALUE
    pitch = row_bytes(LORA) if fmt.integer_dot else 4 * LORA
    shape = Shape(
        n_rows=n_rows,
        n_cols=LORA,
        n_heads=HEADS,
        w_pitch=n_rows * fmt.row_bytes(LORA),
        x_token=pitch,
        x_head=0,
        y_token=HEADS * n_rows,
        y_head=n_rows,
    )
    panel = -(-panel_bytes(jit.target, fmt, LORA) // 64) * 64
    out: npt.NDArray[Any] = aligned_bytes(4 * EXPANDED_ROWS * HEADS * n_rows)
    arrays = [
        out,
        aligned_bytes(HEADS * shape.w_pitch),
        aligned_bytes(EXPANDED_ROWS * pitch),
        out,
        aligned_bytes(n_threads * panel),
    ]
    spec = matmul(shape=shape, fmt=fmt, scratch_bytes=panel)
    call = Call(jit, spec, [*arrays, EXPANDED_ROWS])
    return EXPANDED_ROWS * HEADS * n_rows * LORA / _seconds(call, pool, n_threads)


def _seconds(call: Call, pool: Pool, n_threads: int) -> float:
    """The shortest of a few runs, after one to warm up."""
    call.run(pool, n_threads)
    taken = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        call.run(pool, n_threads)
        taken.append(time.perf_counter() - start)
    return min(taken)
