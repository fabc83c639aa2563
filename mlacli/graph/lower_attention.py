"""Lowering of attention: cache writes, rotation, absorption, and every way to attend."""

from __future__ import annotations

from typing import Any

from codegen.kernels import attention, cache, layers
from codegen.kernels.attention import ABSORBED, STANDARD, flash_scratch_bytes
from codegen.kernels.attention_expanded import Expanded
from codegen.kernels.expand import Part
from codegen.kernels.flash_expanded import Layout, flash_expanded, layout, rows_per_chunk
from codegen.kernels.matmul import Shape
from mlacli.graph.lower import At, Launch, Lower, Operand, Scratch, lowers
from mlacli.graph.lower_dense import matrix_scratch, multiply, row_pitch
from mlacli.graph.matrix import Heads, Matrix
from mlacli.graph.node import Dim, Node

F32 = 4


def _heads(node: Node) -> Heads:
    heads: Heads = node.attrs["heads"]
    return heads


def _stored(heads: Heads) -> cache.Heads:
    return cache.Heads(heads.n_head, heads.n_nope, heads.n_rope, heads.n_v, heads.n_lora)


@lowers("store_latent")
def _store_latent(lower: Lower, node: Node) -> list[Launch]:
    rows, kv_a, w, rope, cells, *kv_t = node.inputs
    h = _heads(node)
    latent = cache.Latent(h.n_lora, h.n_rope, node.attrs["eps"])
    inputs = (At(kv_a), At(w), At(rope), At(cells))
    if not kv_t:
        spec = cache.store_latent(latent=latent, fmt=h.fmt_k)
        return [Launch(node, spec, (At(rows), *inputs, Dim.N_TOKENS))]
    spec = cache.store_latent_both_ways(latent=latent, fmt=h.fmt_k)
    n_ctx = lower.size(node, 0)
    return [Launch(node, spec, (At(rows), At(kv_t[0]), *inputs, n_ctx, Dim.N_TOKENS))]


@lowers("store_kv")
def _store_kv(lower: Lower, node: Node) -> list[Launch]:
    k_rows, v_rows, kv, kv_a, rope, cells = node.inputs
    h = _heads(node)
    operands = (At(k_rows), At(v_rows), At(kv), At(kv_a), At(rope), At(cells))
    if node.attrs["transposed"]:
        spec = cache.store_kv_transposed(heads=_stored(h), fmt_k=h.fmt_k, fmt_v=h.fmt_v)
        return [Launch(node, spec, (*operands, lower.size(node, 0), Dim.N_TOKENS))]
    spec = cache.store_kv(heads=_stored(h), fmt_k=h.fmt_k, fmt_v=h.fmt_v)
    return [Launch(node, spec, (*operands, Dim.N_TOKENS))]


@lowers("rope_q")
def _rope_q(lower: Lower, node: Node) -> list[Launch]:
    """Rotate the last n_rope values of every head, in place."""
    h = _heads(node)
    return [_rotate(node, node.inputs[0], node.inputs[1], h, h.q_width, h.n_nope)]


def _rotate(node: Node, q: Node, rope: Node, heads: Heads, y_stride: int, y_offset: int) -> Launch:
    spec = layers.rope_q(
        n_heads=heads.n_head,
        n_rope=heads.n_rope,
        x_stride=heads.q_width,
        x_offset=heads.n_nope,
        y_stride=y_stride,
        y_offset=y_offset,
    )
    return Launch(node, spec, (At(node), At(q), At(rope), Dim.N_TOKENS))


@lowers("absorb_q", scratch=matrix_scratch)
def _absorb_q(lower: Lower, node: Node) -> list[Launch]:
    """q_c[t, h] = [k_b[h] q_nope[t, h] | rope(q_pe[t, h])]."""
    k_b, q_nope, q, rope = node.inputs
    h, m = _heads(node), k_b.attrs["matrix"]
    if q_nope is q:  # plain f32: the nope parts lie inside q
        x_token, x_head = F32 * h.n_head * h.q_width, F32 * h.q_width
    else:
        x_head = row_pitch(q_nope, h.n_nope)
        x_token = h.n_head * x_head
    shape = Shape(
        n_rows=h.n_lora,
        n_cols=h.n_nope,
        n_heads=h.n_head,
        w_pitch=m.pitch,
        x_token=x_token,
        x_head=x_head,
        y_token=h.n_head * h.c_width,
        y_head=h.c_width,
    )
    turn = _rotate(node, q, rope, h, h.c_width, h.n_lora)
    return [multiply(lower, node, k_b, q_nope, At(node), shape, 0), turn]


@lowers("expand_kv", scratch=matrix_scratch)
def _expand_kv(lower: Lower, node: Node) -> list[Launch]:
    """kv[t, h] = [w_uk[h] c_kv[t] | v_b[h] c_kv[t]]."""
    w_uk, v_b, x = node.inputs
    h = _heads(node)
    launches = []
    for w, first in ((w_uk, 0), (v_b, h.n_nope)):
        m: Matrix = w.attrs["matrix"]
        shape = Shape(
            n_rows=m.n_rows,
            n_cols=m.n_cols,
            n_heads=h.n_head,
            w_pitch=m.pitch,
            x_token=row_pitch(x, m.n_cols),
            x_head=0,
            y_token=h.n_head * (h.n_nope + h.n_v),
            y_head=h.n_nope + h.n_v,
        )
        launches.append(multiply(lower, node, w, x, At(node, F32 * first), shape, 0))
    return launches


def _flash_sizes(node: Node) -> dict[str, Any]:
    h = _heads(node)
    if node.op == "flash_absorbed":
        return {"kind": ABSORBED, "n_head": h.n_head, "d_k": h.c_width, "d_v": h.n_lora}
    return {"kind": STANDARD, "n_head": h.n_head, "d_k": h.q_width, "d_v": h.n_v}


def _flash_scratch(lower: Lower, node: Node) -> int:
    bounds = lower.bounds
    return flash_scratch_bytes(
        bounds[Dim.N_TOKENS], bounds[Dim.N_KV], lower.n_threads, **_flash_sizes(node)
    )


@lowers("flash_absorbed", scratch=_flash_scratch)
@lowers("flash_standard", scratch=_flash_scratch)
def _flash(lower: Lower, node: Node) -> list[Launch]:
    q, *caches = node.inputs[:-4]
    h = _heads(node)
    spec = attention.flash_attn(
        **_flash_sizes(node),
        max_tokens=lower.bounds[Dim.N_TOKENS],
        fmt_k=h.fmt_k,
        fmt_v=h.fmt_v if len(caches) > 1 else h.fmt_k,
        scale=h.scale,
    )
    cells = [At(n) for n in node.inputs[-4:]]
    operands: tuple[Operand, ...] = (
        At(q),
        At(caches[0]),
        At(caches[-1]),
        *cells,
        At(node),
        Scratch(node),
    )
    return [Launch(node, spec, (*operands, Dim.N_TOKENS, Dim.N_KV))]


def _expanded(lower: Lower, node: Node) -> tuple[Expanded, tuple[Part, Part], Layout]:
    h = _heads(node)
    w_uk, v_b = node.inputs[2:4]
    expanded = Expanded(h.n_head, h.n_nope, h.n_rope, h.n_v, h.n_lora, lower.bounds[Dim.N_TOKENS])
    uk, uv = (
        Part(h.n_head, m.n_rows, h.n_lora, m.pitch, m.fmt)
        for m in (w_uk.attrs["matrix"], v_b.attrs["matrix"])
    )
    n_rows = rows_per_chunk(
        node.attrs["chunk_bytes"], h.n_head, h.n_nope, h.n_v, lower.bounds[Dim.N_KV]
    )
    parts = (uk, uv)
    return expanded, parts, layout(lower.target, expanded, parts, n_rows, lower.n_threads, h.fmt_k)


def _expanded_scratch(lower: Lower, node: Node) -> int:
    return _expanded(lower, node)[2].size


@lowers("flash_expanded", scratch=_expanded_scratch)
def _flash_expanded(lower: Lower, node: Node) -> list[Launch]:
    expanded, parts, at = _expanded(lower, node)
    h = _heads(node)
    spec = flash_expanded(
        expanded=expanded,
        parts=parts,
        fmt=h.fmt_k,
        scale=h.scale,
        chunk_rows=at.chunk_rows,
        panel_bytes=at.panel_bytes,
    )
    operands: list[Operand] = [*map(At, node.inputs), At(node)]
    operands += [Scratch(node, o) for o in (at.attend, at.state, at.rows, at.kv, at.panels)]
    return [Launch(node, spec, (*operands, Dim.N_TOKENS, Dim.N_KV))]
