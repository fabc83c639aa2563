"""Lowering of attention without flash: K*Q, softmax and the weighted sum are nodes of their own."""

from __future__ import annotations

from codegen.dtypes import DType
from codegen.formats import F32, BlockFormat, transposed_type
from codegen.kernels import attention_plain
from codegen.kernels.attention import ABSORBED, STANDARD
from codegen.kernels.attention_few import kq_few
from codegen.kernels.attention_plain import kq_scratch_bytes
from codegen.kernels.expand import HEAD_CHUNK, Part, expand_head, latent_pitch
from mlacli.graph.lower import At, Launch, Lower, Operand, Scratch, lowers
from mlacli.graph.lower_dense import panel_scratch
from mlacli.graph.matrix import Heads, Matrix
from mlacli.graph.node import Dim, Node


def _kind(node: Node) -> str:
    """Rows of an absorbed cache serve all heads, and so do the rows of the one head that an
    expanded slice has: only the standard cache has a row per head."""
    return STANDARD if node.attrs["rows"] == "standard" else ABSORBED


def _key_rows(node: Node) -> tuple[int, BlockFormat]:
    """Width and format of the rows that K*Q reads."""
    h: Heads = node.attrs["heads"]
    match node.attrs["rows"]:
        case "absorbed":
            return h.c_width, h.fmt_k
        case "expanded":
            return h.q_width, F32
    return h.q_width, h.fmt_k


def _values_type(node: Node) -> DType:
    """Numbers of the transposed values that the weighted sum reads."""
    h: Heads = node.attrs["heads"]
    return transposed_type(h.fmt_v if node.attrs["rows"] == "standard" else h.fmt_k)


def _is_streamed(lower: Lower, node: Node) -> bool:
    """A few tokens over rows per head: nothing is shared, and so nothing is decoded to scratch."""
    return lower.few and _kind(node) == STANDARD


def _kq_scratch(lower: Lower, node: Node) -> int:
    if _is_streamed(lower, node):
        return 0
    return kq_scratch_bytes(
        lower.bounds[Dim.N_TOKENS],
        lower.n_threads,
        kind=_kind(node),
        n_slice=lower.size(node, 0),
        d_k=_key_rows(node)[0],
    )


@lowers("kq", scratch=_kq_scratch)
def _kq(lower: Lower, node: Node) -> list[Launch]:
    """s[h, t, j] = scale q[t, h] . k[j(, h)] for a slice of heads, masked."""
    q, k, *cells = node.inputs
    h: Heads = node.attrs["heads"]
    width, fmt = _key_rows(node)
    sizes = {"n_head": h.n_head, "n_slice": lower.size(node, 0), "d_k": width, "fmt_k": fmt}
    arrays: tuple[Operand, ...] = (At(node), At(q), At(k), *(At(n) for n in cells))
    rest = (int(node.attrs["first"]), Dim.N_TOKENS, Dim.N_KV)
    if _is_streamed(lower, node):
        return [Launch(node, kq_few(**sizes, scale=h.scale), (*arrays, *rest))]
    spec = attention_plain.kq(
        **sizes, kind=_kind(node), max_tokens=lower.bounds[Dim.N_TOKENS], scale=h.scale
    )
    return [Launch(node, spec, (*arrays, Scratch(node), *rest))]


@lowers("soft_max")
def _soft_max(lower: Lower, node: Node) -> list[Launch]:
    spec = attention_plain.soft_max(n_slice=lower.size(node, 0))
    return [Launch(node, spec, (At(node), Dim.N_TOKENS, Dim.N_KV))]


@lowers("kqv")
def _kqv(lower: Lower, node: Node) -> list[Launch]:
    """out[t, h] = sum over j of s[h, t, j] v[j(, h)], v transposed."""
    p, v, *_ = node.inputs
    h: Heads = node.attrs["heads"]
    copied = v.op in ("transpose_c", "transpose_v")
    spec = attention_plain.kqv(
        kind=_kind(node),
        n_head=h.n_head,
        n_slice=lower.size(p, 0),
        d_v=h.n_lora if node.attrs["rows"] == "absorbed" else h.n_v,
        copied=copied,
        vt_type=_values_type(node),
    )
    stride = 0 if copied else lower.size(v, 0)
    operands = (At(node), At(p), At(v), stride, int(node.attrs["first"]))
    return [Launch(node, spec, (*operands, Dim.N_TOKENS, Dim.N_KV))]


@lowers("transpose_c")
def _transpose_c(lower: Lower, node: Node) -> list[Launch]:
    cache, cells = node.inputs
    h: Heads = node.attrs["heads"]
    spec = attention_plain.transpose_c(
        n_lora=h.n_lora, n_rope=h.n_rope, fmt=h.fmt_k, vt_type=transposed_type(h.fmt_k)
    )
    return [Launch(node, spec, (At(node), At(cache), At(cells), Dim.N_KV))]


@lowers("transpose_v")
def _transpose_v(lower: Lower, node: Node) -> list[Launch]:
    """One head's expanded values, f32 rows, as columns."""
    v, cells = node.inputs
    h: Heads = node.attrs["heads"]
    spec = attention_plain.transpose_c(
        n_lora=lower.size(node, 0), n_rope=0, fmt=F32, vt_type=transposed_type(h.fmt_k)
    )
    return [Launch(node, spec, (At(node), At(v), At(cells), Dim.N_KV))]


def _part(node: Node) -> Part:
    m: Matrix = node.inputs[1].attrs["matrix"]
    return Part(1, m.n_rows, m.n_cols, m.pitch, m.fmt)


def _rows_bytes(node: Node) -> int:
    part = _part(node)
    return -(-HEAD_CHUNK * latent_pitch(part.fmt, part.n_lora) // 64) * 64


def _expand_scratch(lower: Lower, node: Node) -> int:
    panel = panel_scratch(lower, node.inputs[1].attrs["matrix"])
    return _rows_bytes(node) + lower.n_threads * panel


@lowers("expand_head", scratch=_expand_scratch)
def _expand_head(lower: Lower, node: Node) -> list[Launch]:
    """One head's keys or values for all cached rows, f32."""
    cache, w = node.inputs
    h: Heads = node.attrs["heads"]
    m: Matrix = w.attrs["matrix"]
    spec = expand_head(
        part=_part(node),
        n_rope=h.n_rope,
        with_rope=node.attrs["with_rope"],
        fmt=h.fmt_k,
        panel_bytes=panel_scratch(lower, m),
    )
    matrix = At(w, int(node.attrs["head"]) * m.pitch)
    scratch = (Scratch(node), Scratch(node, _rows_bytes(node)))
    return [Launch(node, spec, (At(node), At(cache), matrix, *scratch, Dim.N_KV))]
