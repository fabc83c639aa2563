"""The work of a step: multiply-adds, bytes that must be read, and the peak that applies to them.

Both the limit of a bench row (roofline.py) and that of each op (profile_table.py) are sums of
`Work`. Matrices count at the int8 peak when quantised, the bf16 peak for F16 and BF16, the f32 peak
for F32. K*Q counts at int8 for quantised caches, else bf16; P*V at bf16 (f32 caches: both f32). A
float peak is never taken as lower than the f32 one: without bf16 instructions the f32 units are the
way. Whatever is read is read once per step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from codegen.formats import BlockFormat
from mlacli.graph.matrix import Heads, Matrix
from mlacli.graph.node import Dim, Node
from mlacli.machine import Peaks
from mlacli.model.layers import Path


@dataclass(frozen=True)
class Work:
    """`multiply_adds` at the peak of `unit` ("int8", "bf16" or "f32"), and bytes to read."""

    multiply_adds: float
    nbytes: float
    unit: str

    def seconds(self, peaks: Peaks) -> float:
        """Least time: that of the slower of computing and reading."""
        peak = {
            "int8": peaks.int8,
            "bf16": max(peaks.bf16, peaks.f32),
            "f32": peaks.f32,
        }[self.unit]
        return max(self.multiply_adds / peak, self.nbytes / peaks.bandwidth)


@dataclass(frozen=True)
class Batch:
    """A step: `n_tokens` tokens, the last of the `n_kv` cached ones; logits of `n_out` of them."""

    n_tokens: int
    n_kv: int
    n_out: int

    @property
    def pairs(self) -> float:
        """(query token, visible row)."""
        n = self.n_tokens
        return n * (self.n_kv - n) + n * (n + 1) / 2

    def size(self, dim: Dim) -> int:
        return {Dim.N_TOKENS: self.n_tokens, Dim.N_KV: self.n_kv, Dim.N_OUT: self.n_out}[dim]


def unit_of(fmt: BlockFormat) -> str:
    """Which peak applies to products with such numbers."""
    if fmt.is_quantised:
        return "int8"
    return "f32" if fmt.name == "F32" else "bf16"


def matrix_work(
    fmt: BlockFormat, n_cols: int, n_rows: int, tokens: float, copies: float = 1.0
) -> Work:
    """`tokens` rows times a matrix, of which `copies` are read if there is any row."""
    nbytes = copies * n_rows * fmt.row_bytes(n_cols) if tokens else 0.0
    return Work(tokens * n_rows * n_cols, nbytes, unit_of(fmt))


def expert_work(
    fmt: BlockFormat, n_cols: int, n_rows: int, n_expert: int, n_used: int, tokens: int
) -> Work:
    """Each token times `n_used` of `n_expert` matrices. Those are read that are likely to be chosen
    by any token, if all are as likely."""
    copies = n_expert * -math.expm1(tokens * math.log1p(-n_used / n_expert + 1e-12))
    return matrix_work(fmt, n_cols, n_rows, tokens * n_used, copies)


def attention_work(
    heads: Heads, path: Path, pairs: float, n_head: int, key_bytes: float, value_bytes: float = 0.0
) -> tuple[Work, Work]:
    """(K*Q, P*V) of `n_head` heads; on the absorbed path both are against the cached rows c."""
    absorbed = path == "absorbed"
    fmt_v = heads.fmt_v if path == "standard" else heads.fmt_k
    d_k, d_v = (heads.c_width, heads.n_lora) if absorbed else (heads.q_width, heads.n_v)
    unit_v = "f32" if fmt_v.name == "F32" else "bf16"
    return (
        Work(pairs * n_head * d_k, key_bytes, unit_of(heads.fmt_k)),
        Work(pairs * n_head * d_v, value_bytes, unit_v),
    )


# -- of a graph's nodes ---------------------------------------------------------------------------

_FLASH: Mapping[str, Path] = {
    "flash_standard": "standard",
    "flash_absorbed": "absorbed",
    "flash_expanded": "expanded",
}


def node_work(node: Node, batch: Batch, row_bytes: Mapping[str, float]) -> list[Work]:
    """What a node has to do in a step: its matrices and its attention; none for elementwise ops.

    `row_bytes`: bytes of one cached token by the cache's kind.
    """
    cached = batch.n_kv * sum(
        row_bytes[i.storage.attrs["kind"]] for i in node.inputs if i.storage.op == "cache"
    )
    if node.op in _FLASH:
        heads: Heads = node.attrs["heads"]
        scores = attention_work(heads, _FLASH[node.op], batch.pairs, heads.n_head, cached)
        return [*scores, *_matrices(node, batch)]
    if node.op in ("kq", "kqv"):
        return [_plain_attention(node, batch, cached)]
    if node.op == "expand_head":  # for the keys and for the values of each head
        (work,) = _matrices(node, batch)
        share = cached / (2 * node.attrs["heads"].n_head)
        return [replace(work, nbytes=work.nbytes + share)]
    return [] if node.op == "embed" else _matrices(node, batch)


def _plain_attention(node: Node, batch: Batch, cached: float) -> Work:
    """K*Q or P*V of a slice of heads, with its part of what all heads read."""
    heads: Heads = node.attrs["heads"]
    scores = node if node.op == "kq" else node.inputs[0]
    n_slice = scores.shape[0]
    assert isinstance(n_slice, int)
    share = cached * n_slice / heads.n_head
    both = attention_work(heads, node.attrs["rows"], batch.pairs, n_slice, share, share)
    return both[node.op == "kqv"]


def _matrices(node: Node, batch: Batch) -> list[Work]:
    """The node's weights but for those of norms; the experts' are the ones chosen by a table."""
    tables = [i for i in node.inputs if i.dtype in ("routing", "groups")]
    found = []
    for w in node.inputs:
        if w.op != "weight" or w.attrs["matrix"].n_rows == 1:
            continue
        m: Matrix = w.attrs["matrix"]
        tokens = _rows(node, batch)
        if tables and m.n_mats > 1:
            n_used = tables[0].shape[-1]
            assert isinstance(n_used, int)
            found.append(expert_work(m.fmt, m.n_cols, m.n_rows, m.n_mats, n_used, tokens))
        else:
            n_mats = 1 if node.op == "expand_head" else m.n_mats
            found.append(matrix_work(m.fmt, m.n_cols, n_mats * m.n_rows, tokens))
    return found


def _rows(node: Node, batch: Batch) -> int:
    """How many rows the node multiplies: tokens, or cached rows that it expands."""
    dim = Dim.N_KV if node.op == "flash_expanded" else node.shape[0]
    assert isinstance(dim, Dim)
    return batch.size(dim)
