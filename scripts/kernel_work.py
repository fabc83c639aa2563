"""What scripts/kernel_bench.py times: kernels with arguments, and how much work they do.

Shapes are DeepSeek-V2-Lite's. Further kernels: add a maker to `MAKERS` and lines to `cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from codegen.call import aligned_bytes
from codegen.formats import CACHE_FORMATS, WEIGHT_FORMATS, BlockFormat
from codegen.kernel import KernelSpec
from codegen.kernels import attention, matmul, moe, moe_few
from codegen.kernels.activations import row_bytes
from codegen.kernels.blocks import BLOCK
from codegen.kernels.panel import panel_bytes
from codegen.targets.base import Target
from mlacli.inside.kernel_data import Array, cache_rows, coded_rows, floats, routing

N_EXPERT, N_USED = 64, 6
POOL_BYTES = 128 << 20  # of caches that take turns


@dataclass(frozen=True)
class Case:
    """A product to time: `maker` builds it from the other fields."""

    maker: str
    label: str
    fmt: BlockFormat
    n_rows: int
    n_cols: int
    n_tokens: int = 1
    n_mats: int = 1  # heads or experts

    @property
    def name(self) -> str:
        mats = f"{self.n_mats}x" if self.n_mats > 1 else ""
        shape = f"{mats}{self.n_rows}x{self.n_cols}"
        return f"{self.maker:15} {self.label:8} {self.fmt.name:6} {shape:13} t{self.n_tokens}"

    @property
    def matrix_bytes(self) -> int:
        return self.n_rows * self.fmt.row_bytes(self.n_cols)


@dataclass(frozen=True)
class Work:
    """A kernel, its arguments, and what it does.

    `weights` names the arguments that are moved through the pool, each of `weight_bytes`; calls
    take the ones of `in_turn` one after another. `unit` is the peak that counts for the work.
    """

    spec: KernelSpec
    arguments: dict[str, Array | int]
    weights: tuple[str, ...]
    weight_bytes: int
    multiply_adds: float
    read_bytes: float
    in_turn: dict[str, list[Array]] = field(default_factory=dict)
    unit: str = ""


# -- inputs ---------------------------------------------------------------------------------------


def inputs(case: Case, n_rows: int) -> Array:
    """Activation rows of small numbers: a8, or f32 for float formats."""
    if not case.fmt.integer_dot:
        rows = aligned_bytes(4 * n_rows * case.n_cols)
        rows.view(np.float32)[:] = 0.5
        return rows
    return coded_rows(n_rows, case.n_cols)


def hidden_rows(case: Case, n: int) -> Array:
    """Room for what up and gate give: a8 if the matrix that reads it is of the same format."""
    pitch = row_bytes(case.n_rows) if case.fmt.integer_dot else 4 * case.n_rows
    return aligned_bytes(n * pitch)


def scratch(case: Case, target: Target, n_threads: int, coded_tokens: int = 0) -> tuple[Array, int]:
    room = -(-panel_bytes(target, case.fmt, case.n_cols) // 64) * 64
    room += moe.waiting_bytes(target, coded_tokens)
    return aligned_bytes(room * n_threads), room


# -- kernels --------------------------------------------------------------------------------------


def products(case: Case, target: Target, n_threads: int) -> Work:
    """matvec or matmul, with or without heads."""
    x = inputs(case, case.n_tokens * case.n_mats)
    pitch = x.size // (case.n_tokens * case.n_mats)
    shape = matmul.Shape(
        n_rows=case.n_rows,
        n_cols=case.n_cols,
        n_heads=case.n_mats,
        w_pitch=case.matrix_bytes,
        x_token=case.n_mats * pitch,
        x_head=pitch,
        y_token=case.n_mats * case.n_rows,
        y_head=case.n_rows,
    )
    y = floats(case.n_tokens, case.n_mats, case.n_rows)
    arguments: dict[str, Array | int] = {"y": y, "w": 0, "x": x, "residual": 0}
    if case.maker == "matvec":
        spec = matmul.matvec(shape=shape, fmt=case.fmt)
    else:
        arguments["scratch"], room = scratch(case, target, n_threads)
        spec = matmul.matmul(shape=shape, fmt=case.fmt, scratch_bytes=room)
    arguments["n_tokens"] = case.n_tokens
    read = case.n_mats * case.matrix_bytes
    return Work(
        spec, arguments, ("w",), read,
        case.n_tokens * case.n_mats * case.n_rows * case.n_cols, read,
    )  # fmt: skip


def dense_gate(case: Case, target: Target, n_threads: int) -> Work:
    """up_gate or up_gate_vec."""
    y, x = hidden_rows(case, case.n_tokens), inputs(case, case.n_tokens)
    coded = case.n_tokens if case.fmt.integer_dot else 0
    sizes = {
        "coded_tokens": coded,
        "n_rows": case.n_rows,
        "n_cols": case.n_cols,
        "fmt_gate": case.fmt,
        "fmt_up": case.fmt,
    }
    arguments: dict[str, Array | int] = {"y": y, "gate": 0, "up": 0, "x": x}
    if case.maker == "up_gate_vec":
        spec = moe_few.up_gate_vec(**sizes)
    else:
        arguments["scratch"], room = scratch(case, target, n_threads, coded)
        spec = moe.up_gate(**sizes, scratch_bytes=room)
    arguments["n_tokens"] = case.n_tokens
    madds = 2 * case.n_tokens * case.n_rows * case.n_cols
    return Work(spec, arguments, ("gate", "up"), case.matrix_bytes, madds, 2 * case.matrix_bytes)


def experts(case: Case, target: Target, n_threads: int) -> Work:
    """The moe_ kernels. Of a stack, only the experts that are chosen are read."""
    ids, offsets, order = routing(case.n_tokens, N_EXPERT, N_USED)
    few, gated = case.maker.endswith("_vec"), "up_gate" in case.maker
    n_slots, n_read = ids.size, len(np.unique(ids))
    by_token = few and case.label != "down"
    sizes: dict[str, Any] = {"n_rows": case.n_rows, "n_cols": case.n_cols}
    sizes |= {"fmt_gate": case.fmt, "fmt_up": case.fmt} if gated else {"fmt": case.fmt}
    down = "down" in case.maker
    y = floats(case.n_tokens if down else n_slots, case.n_rows)
    coded = 0
    if gated:
        y, coded = hidden_rows(case, n_slots), case.n_tokens if case.fmt.integer_dot else 0
        sizes |= {"coded": coded > 0} if few else {"coded_tokens": coded}
    weights = ("gate", "up") if gated else ("w",)
    arguments: dict[str, Array | int] = {"y": y, **dict.fromkeys(weights, 0)}
    arguments["x"] = inputs(case, case.n_tokens if by_token else n_slots)
    in_turn: dict[str, list[Array]] = {}
    if few:
        sizes["n_used"] = N_USED
        in_turn["ids"] = [routing(case.n_tokens, N_EXPERT, N_USED, seed)[0] for seed in range(64)]
        if case.maker == "moe_matmul_vec":
            sizes["per_slot"] = not by_token
    else:
        arguments["offsets"] = offsets
        sizes["n_expert"] = N_EXPERT
        if down:
            sizes["n_used"], arguments["order"] = N_USED, order
    if down:
        arguments["weights"] = np.full(ids.shape, 0.1, np.float32)
    if few:
        arguments["n_tokens"] = case.n_tokens
    else:
        room = scratch(case, target, n_threads, coded)
        arguments["scratch"], sizes["scratch_bytes"] = room
    spec = getattr(moe_few if few else moe, case.maker)(**sizes)
    madds = len(weights) * n_slots * case.n_rows * case.n_cols
    read = len(weights) * n_read * case.matrix_bytes
    return Work(spec, arguments, weights, N_EXPERT * case.matrix_bytes, madds, read, in_turn)


def flash(case: Case, target: Target, n_threads: int) -> Work:
    """The last tokens of n_rows cached ones attend to them: flash_absorbed or flash_standard."""
    absorbed, n_kv, n_head = case.maker == "flash_absorbed", case.n_rows, case.n_mats
    d_k, d_v = case.n_cols, 512 if absorbed else 128
    sizes: dict[str, Any] = {"n_head": n_head, "d_k": d_k, "d_v": d_v}
    sizes["kind"] = attention.ABSORBED if absorbed else attention.STANDARD
    fmt, n_tokens, heads = case.fmt, case.n_tokens, 1 if absorbed else n_head
    words = attention.flash_scratch_bytes(n_tokens, n_kv, n_threads, **sizes) // 4
    pos = np.arange(n_kv - n_tokens, n_kv, dtype=np.int32)
    q = floats(n_tokens, n_head, d_k)
    q[...] = 0.1
    arguments: dict[str, Array | int] = {
        "q": q,
        "v_cache": cache_rows(fmt, n_kv * heads, d_v),
        "pos": pos,
        "seq": np.zeros(n_tokens, np.int32),
        "cell_pos": np.arange(n_kv, dtype=np.int32),
        "cell_seq": np.zeros(n_kv, np.int32),
        "out": floats(n_tokens, n_head, d_v),
        "scratch": floats(words),
        "n_tokens": n_tokens,
        "n_kv": n_kv,
    }
    keys = cache_rows(fmt, n_kv * heads, d_k)
    copies = max(1, min(16, POOL_BYTES // keys.nbytes))
    in_turn = {"k_cache": [keys, *(keys.copy() for _ in range(copies - 1))]}
    spec = attention.flash_attn(**sizes, max_tokens=n_tokens, fmt_k=fmt, fmt_v=fmt, scale=0.05)
    madds = n_head * (d_k + d_v) * float((pos + 1).sum())
    read = keys.nbytes if absorbed else keys.nbytes + n_kv * n_head * fmt.row_bytes(d_v)
    unit = "f32" if fmt is CACHE_FORMATS["f32"] else "int16"
    return Work(spec, arguments, (), 0, madds, read, in_turn, unit)


Maker = Callable[[Case, Target, int], Work]
MAKERS: dict[str, Maker] = {
    "matvec": products,
    "matmul": products,
    "up_gate": dense_gate,
    "up_gate_vec": dense_gate,
    "flash_absorbed": flash,
    "flash_standard": flash,
    **{f"moe_{name}": experts for name in ("up_gate", "matmul", "down")},
    **{f"moe_{name}_vec": experts for name in ("up_gate", "matmul")},
}


def cases(shrink: int) -> Iterator[Case]:
    """The table: what is timed."""
    formats = [WEIGHT_FORMATS[name] for name in ("IQ4_NL", "Q8_0", "Q4_0", "F16", "F32")]
    few = [f for f in formats if f.is_quantised]

    def n(size: int) -> int:
        return max(size // shrink // BLOCK, 1) * BLOCK

    for fmt in formats:
        yield Case("matvec", "attn_q", fmt, n(3072), 2048)
        yield Case("matvec", "shexp", fmt, n(2048), 2816)
    for fmt in formats[:2]:
        yield Case("matvec", "attn_q", fmt, n(3072), 2048, 2)
        yield Case("matvec", "attn_q", fmt, n(3072), 2048, 4)
        yield Case("matvec", "output", fmt, n(102400), 2048)
        yield Case("matvec", "k_b", fmt, n(512), 128, 1, 16)
        yield Case("matvec", "v_b", fmt, n(128), 512, 1, 16)
    yield Case("matvec", "gate_inp", WEIGHT_FORMATS["F32"], 64, 2048)
    for fmt in few[:2]:
        yield Case("up_gate_vec", "dense", fmt, n(10944), 2048)
        yield Case("up_gate_vec", "shexp", fmt, n(2816), 2048)
        yield Case("moe_up_gate_vec", "exps", fmt, n(1408), 2048, 1, N_EXPERT)
        yield Case("moe_matmul_vec", "exps", fmt, n(1408), 2048, 1, N_EXPERT)
        yield Case("moe_matmul_vec", "down", fmt, n(2048), 1408, 1, N_EXPERT)
    for fmt in formats:
        for tokens in (5, 16, 48, 512):
            yield Case("matmul", "shexp", fmt, n(2816), 2048, tokens)
    for name in ("q8_KV", "q8_0", "f16", "f32"):
        for tokens, depth in ((1, 4096), (4, 4096), (64, 1024)):
            fmt, tokens = CACHE_FORMATS[name], min(tokens, n(depth))
            yield Case("flash_absorbed", "attn", fmt, n(depth), 576, tokens, 16)
        yield Case("flash_standard", "attn", CACHE_FORMATS[name], n(1024), 192, n(256), 16)
    for fmt in few[:2]:
        yield Case("matmul", "k_b", fmt, n(512), 128, n(512), 16)
        yield Case("matmul", "v_b", fmt, n(128), 512, n(512), 16)
        yield Case("matmul", "kv_b", fmt, n(4096), 512, n(512))
        yield Case("up_gate", "shexp", fmt, n(2816), 2048, n(512))
        yield Case("moe_up_gate", "exps", fmt, n(1408), 2048, n(512), N_EXPERT)
        yield Case("moe_matmul", "exps", fmt, n(1408), 2048, n(512), N_EXPERT)
        yield Case("moe_down", "exps", fmt, n(2048), 1408, n(512), N_EXPERT)
