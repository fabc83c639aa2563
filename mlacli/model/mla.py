"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), its variants side by side.

    c_kv = norm(W_DKV x), k_pe = rope(W_KR x): what is cached, one row c = [c_kv | k_pe] per token
    standard  k_h = [w_uk_h c_kv | k_pe], v_h = v_b_h c_kv are cached instead          (-mla 0)
    absorbed  q_latent_h = k_b_h q_nope_h; attend to c itself; out_h = v_b_h (sum p c_kv)
    expanded  k_h and v_h are made from the cached c, a chunk of rows at a time

All three give the same result. Without flash attention K*Q is a node of its own (kq, soft_max,
kqv), cut into slices of heads so that it stays under -amb.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from codegen.formats import transposed_type
from mlacli.graph.node import Dim, Node
from mlacli.model.layers import Builder, Path, T, linear, rms_norm


def attention(b: Builder, layer: int, x: Node) -> Node:
    """x + W_O attention(norm(x)), by the path that the options name."""
    blk = f"blk.{layer}."
    h = rms_norm(b, x, blk + "attn_norm.weight", f"attn_norm-{layer}")
    q = query(b, layer, h)
    kv_a = linear(b, h, blk + "attn_kv_a_mqa.weight", f"kv_a-{layer}")  # (T, R + rope)
    out = PATHS[b.options.path](b, layer, q, kv_a)  # (T, H * v)
    return linear(b, out, blk + "attn_output.weight", f"attn_out-{layer}", residual=x)


def query(b: Builder, layer: int, h: Node) -> Node:
    """q (T, H * (nope + rope)), through the low-rank pair when the model has one."""
    blk = f"blk.{layer}."
    if b.config.q_lora_rank:
        a = linear(b, h, blk + "attn_q_a.weight", f"q_a-{layer}")
        a = rms_norm(b, a, blk + "attn_q_a_norm.weight", f"q_a_norm-{layer}")
        return linear(b, a, blk + "attn_q_b.weight", f"q-{layer}")
    return linear(b, h, blk + "attn_q.weight", f"q-{layer}")


def _cells(b: Builder) -> tuple[Node, ...]:
    """What the mask is computed from: (position, sequence) of the tokens and of the cells."""
    n_ctx = b.options.n_ctx
    return (
        b.input("pos", "i32", T),
        b.input("seq", "i32", T),
        b.input("cell_pos", "i32", n_ctx),
        b.input("cell_seq", "i32", n_ctx),
    )


def _cache(b: Builder, layer: int, kind: str) -> Node:
    return b.graph.leaf("cache", "cache", (b.options.n_ctx,), f"cache_{kind}-{layer}", kind=kind)


def _rope(b: Builder) -> Node:
    return b.input("rope", "f32", T, b.config.n_rope)


def _store_latent(b: Builder, layer: int, kv_a: Node) -> tuple[Node, Node | None]:
    """Write this batch's rows c; with a transposed cache also the columns of kv^T."""
    w = b.tensor(f"blk.{layer}.attn_kv_a_norm.weight")
    cells = b.input("cells", "i32", T)
    inputs = [_cache(b, layer, "c"), kv_a, w, _rope(b), cells]
    if b.options.transposed_cache:
        inputs.append(_cache(b, layer, "kv_t"))
    c = b.graph.add(
        "store_latent", "cache", (b.options.n_ctx,), *inputs,
        name=f"c-{layer}", inplace=0, heads=b.heads, eps=b.config.rms_eps,
    )  # fmt: skip
    return c, inputs[5] if b.options.transposed_cache else None


def absorbed(b: Builder, layer: int, q: Node, kv_a: Node) -> Node:
    """out_h = v_b_h (softmax(c [k_b_h q_nope | rope(q_pe)]) c_kv): all heads share the rows c."""
    c, g = b.config, b.graph
    cache, kv_t = _store_latent(b, layer, kv_a)
    k_b = b.weight(b.weights.k_b(layer))
    q_nope = q
    if k_b.attrs["matrix"].fmt.integer_dot:
        shape = (T, c.n_head, c.n_nope)
        q_nope = g.add("quantize", "a8", shape, q, name=f"q_nope-{layer}", stride=c.head_dim)
    q_c = g.add(
        "absorb_q", "f32", (T, c.n_head * c.c_width), k_b, q_nope, q, _rope(b),
        name=f"q_c-{layer}", heads=b.heads,
    )  # fmt: skip
    latent = (T, c.n_head, c.kv_lora_rank)
    if b.options.flash:
        sums = g.add(
            "flash_absorbed", "f32", latent, q_c, cache, *_cells(b),
            name=f"kqv-{layer}", heads=b.heads,
        )  # fmt: skip
    else:
        if kv_t is None:
            turned, cells = (c.kv_lora_rank, Dim.N_KV), b.input("cell_seq", "i32", b.options.n_ctx)
            dtype = str(transposed_type(b.options.fmt_k))
            kv_t = g.add(
                "transpose_c", dtype, turned, cache, cells, name=f"kv_t-{layer}", heads=b.heads
            )
        sums = _plain(b, layer, q_c, cache, kv_t, latent)
    v_b = b.weight(b.weights.v_b(layer))
    return g.add(
        "matmul_heads",
        "f32",
        (T, c.n_head * c.n_v),
        v_b,
        b.activations(sums, v_b),
        name=f"attn_v-{layer}",
    )


def standard(b: Builder, layer: int, q: Node, kv_a: Node) -> Node:
    """-mla 0: K (H * (nope + rope)) and V (H * v) are expanded once and cached."""
    c, g = b.config, b.graph
    norm = f"blk.{layer}.attn_kv_a_norm.weight"
    c_kv = rms_norm(b, kv_a, norm, f"c_kv-{layer}", n=c.kv_lora_rank)
    w_uk, v_b = b.weight(b.weights.w_uk(layer)), b.weight(b.weights.v_b(layer))
    rows = b.activations(c_kv, w_uk)
    kv_shape = (T, c.n_head * (c.n_nope + c.n_v))
    kv = g.add("expand_kv", "f32", kv_shape, w_uk, v_b, rows, name=f"kv-{layer}", heads=b.heads)
    kind = "v" if b.options.flash else "v_t"
    cells = b.input("cells", "i32", T)
    k_cache, v_cache = _cache(b, layer, "k"), _cache(b, layer, kind)
    shape = (b.options.n_ctx,)
    k = g.add(
        "store_kv", "cache", shape, k_cache, v_cache, kv, kv_a, _rope(b), cells,
        name=f"k-{layer}", inplace=0, heads=b.heads, transposed=not b.options.flash,
    )  # fmt: skip
    name = f"q_rope-{layer}"
    q = g.add("rope_q", "f32", q.shape, q, _rope(b), name=name, inplace=0, heads=b.heads)
    out = (T, c.n_head * c.n_v)
    if b.options.flash:
        return g.add(
            "flash_standard", "f32", out, q, k, v_cache, *_cells(b),
            name=f"kqv-{layer}", heads=b.heads,
        )  # fmt: skip
    return _plain(b, layer, q, k, v_cache, out)


def expanded(b: Builder, layer: int, q: Node, kv_a: Node) -> Node:
    """Standard attention on K and V made from the cached c; one op, its chunk loop is inside."""
    c, g = b.config, b.graph
    cache, _ = _store_latent(b, layer, kv_a)
    name = f"q_rope-{layer}"
    q = g.add("rope_q", "f32", q.shape, q, _rope(b), name=name, inplace=0, heads=b.heads)
    w_uk, v_b = b.weight(b.weights.w_uk(layer)), b.weight(b.weights.v_b(layer))
    out = (T, c.n_head * c.n_v)
    if b.options.flash:
        return g.add(
            "flash_expanded", "f32", out, q, cache, w_uk, v_b, *_cells(b),
            name=f"kqv-{layer}", heads=b.heads, chunk_bytes=b.options.chunk_bytes,
        )  # fmt: skip
    return _plain_expanded(b, layer, q, cache, w_uk, v_b)


def _plain(
    b: Builder, layer: int, q: Node, k: Node, v: Node, out_shape: tuple[Dim | int, ...]
) -> Node:
    """softmax(scale q k) v with K*Q in the arena, one slice of heads after another."""
    sums: Node | None = None
    per_slice = heads_per_slice(b)
    for first in range(0, b.config.n_head, per_slice):
        n = min(per_slice, b.config.n_head - first)
        tag = f"-{layer}" if n == b.config.n_head else f"-{layer}.{first}"
        sums = _slice(b, tag, q, k, v, sums, out_shape, first, n, rows=b.options.path)
    assert sums is not None
    return sums


def _plain_expanded(b: Builder, layer: int, q: Node, cache: Node, w_uk: Node, v_b: Node) -> Node:
    """The same with K and V of one head at a time made from the cached rows."""
    c, g = b.config, b.graph
    sums: Node | None = None
    for head in range(c.n_head):
        tag = f"-{layer}.{head}"
        width = c.n_nope + c.n_rope
        k = g.add(
            "expand_head", "f32", (Dim.N_KV, width), cache, w_uk,
            name="k" + tag, heads=b.heads, head=head, with_rope=True,
        )  # fmt: skip
        v = g.add(
            "expand_head", "f32", (Dim.N_KV, c.n_v), cache, v_b,
            name="v" + tag, heads=b.heads, head=head, with_rope=False,
        )  # fmt: skip
        cells = b.input("cell_seq", "i32", b.options.n_ctx)
        dtype, turned = str(transposed_type(b.options.fmt_k)), (c.n_v, Dim.N_KV)
        v_t = g.add("transpose_v", dtype, turned, v, cells, name="v_t" + tag, heads=b.heads)
        out = (T, c.n_head * c.n_v)
        sums = _slice(b, tag, q, k, v_t, sums, out, head, 1, rows="expanded")
    assert sums is not None
    return sums


def _slice(
    b: Builder,
    tag: str,
    q: Node,
    k: Node,
    v: Node,
    sums: Node | None,
    out_shape: tuple[Dim | int, ...],
    first: int,
    n: int,
    *,
    rows: Path,
) -> Node:
    """kq, soft_max and kqv for heads first .. first + n - 1; results join those of `sums`."""
    g = b.graph
    heads: dict[str, Any] = {"first": first, "rows": rows, "heads": b.heads}
    shape = (n, T, Dim.N_KV)
    kq = g.add("kq", "f32", shape, q, k, *_cells(b), name="kq" + tag, **heads)
    p = g.add("soft_max", "f32", shape, kq, name="soft_max" + tag, inplace=0)
    inputs, inplace = ((p, v, sums), 2) if sums else ((p, v), None)
    return g.add("kqv", "f32", out_shape, *inputs, name="kqv" + tag, inplace=inplace, **heads)


def heads_per_slice(b: Builder) -> int:
    """As many heads as keep a K*Q slice under -amb; at least one."""
    per_head = 4 * b.n_tokens_max * b.options.n_ctx
    limit = b.options.amb_bytes
    return b.config.n_head if not limit else max(1, min(b.config.n_head, limit // per_head))


PATHS: dict[str, Callable[[Builder, int, Node, Node], Node]] = {
    "standard": standard,
    "absorbed": absorbed,
    "expanded": expanded,
}
