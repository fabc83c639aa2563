"""Attention without flash: scores, softmax and weighted sum as kernels of their own, for a slice of
heads, with the scores of the whole cache in memory.

    kq        s[h, t, j] = scale * q[t, h] . k[j(, h)],  MASKED where t does not see j
    soft_max  s[h, t] = softmax over j of s[h, t], in place
    kqv       out[t, h, d] = sum over j of s[h, t, j] * vt[(h,) d, j]
    transpose_c  builds vt from cached rows (absorbed only; other modes keep vt beside the cache)

Heads h count from 0 in the slice, which starts at `head_start` of the model's. A row of s has
n_kv rounded up to 16 columns (`padded`); the columns past n_kv weigh 0. vt holds f16, or f32 when
the cache does (formats.transposed_type).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen.dtypes import DType, f32, i32, i64, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr, value
from codegen.kernels import tile
from codegen.kernels.attention_block import (
    ABSORBED,
    TILE_KEYS,
    Block,
    Cells,
    Sizes,
    Workspace,
    decode,
    make_sizes,
    open_block,
    touch,
    visible_cells,
    workspace,
)
from codegen.kernels.attention_f32 import Rows, pack_block, score_tile
from codegen.kernels.attention_row import score_row
from codegen.kernels.blocks import BLOCK
from codegen.values import Pointer, Value, Var
from codegen.vecmath import LOG2_E, softmax_weight, transpose_sum

if TYPE_CHECKING:
    from codegen.builder import Kernel

MASKED = -1e30  # the score of a cell that is not seen
STILL_MASKED = -1e29
ROW_STEP = 16
NEVER_SEEN = -3  # neither an empty cell's sequence nor that of a block's unused rows
ITEM_KEYS = 4 * TILE_KEYS
BLOCK_ROWS, BLOCK_CELLS = 64, 1024  # of s per item of kqv: stays in the L2
DOT_COLUMNS = 4  # rows of vt at once
COPY_CELLS = 64  # per item of transpose_c: whole cache lines of vt


def padded(n_kv: Value) -> Value:
    """Columns of a row of scores, and of vt where it is a copy."""
    return tile.round_up(n_kv, ROW_STEP)


def kq_scratch_bytes(
    n_tokens_max: int, n_threads: int, *, kind: str, n_slice: int, d_k: int
) -> int:
    """Bytes of `scratch` that `kq` needs."""
    return 4 * n_threads * make_sizes(kind, n_slice, d_k, BLOCK, n_tokens_max).thread_words


@kernel(
    s=ptr(f32),
    q=ptr(f32),
    k_cache=ptr(u8),
    pos=ptr(i32),
    seq=ptr(i32),
    cell_pos=ptr(i32),
    cell_seq=ptr(i32),
    scratch=ptr(f32),
    head_start=value(i64),
    n_tokens=dim(),
    n_kv=dim(),
)
def kq(
    k: Kernel,
    s: Pointer,
    q: Pointer,
    k_cache: Pointer,
    pos: Pointer,
    seq: Pointer,
    cell_pos: Pointer,
    cell_seq: Pointer,
    scratch: Pointer,
    head_start: Value,
    n_tokens: Value,
    n_kv: Value,
    *,
    kind: str,
    n_head: int,
    n_slice: int,
    d_k: int,
    max_tokens: int,
    fmt_k: BlockFormat,
    scale: float,
) -> None:
    """s[h, t, j] = scale * q[t, head_start + h] . k[j(, h)], masked; h < n_slice of n_head."""
    sizes = make_sizes(kind, n_slice, d_k, BLOCK, max_tokens)
    w, cells = workspace(k, sizes, scratch), Cells(cell_pos, cell_seq, pos, seq)
    n_blocks, n_parts = sizes.n_blocks(n_tokens), (n_kv + (ITEM_KEYS - 1)) // ITEM_KEYS
    row_bytes = fmt_k.row_bytes(d_k)

    def q_row(row: Value) -> Pointer:
        head = head_start + row % n_slice
        return q.at((row // n_slice * n_head + head) * d_k)

    with k.tiles(n_blocks * n_parts) as item:
        block = open_block(k, sizes, w, cells, n_tokens, item // n_parts)
        pack_block(k, sizes, w, block, q_row)
        head = block.first % n_slice + head_start

        def row(cell: Value, head: Value = head) -> Pointer:
            at = cell if kind == ABSORBED else cell * n_head + head
            return k_cache.bytes(at * row_bytes)

        rows = Rows(
            key=lambda cell, column: decode(k, fmt_k, row(cell), column, sizes.key_slab),
            value=lambda cell, column: [],
            prefetch=lambda cell, column, n: touch(k, row(cell), column, n, row_bytes, d_k),
        )
        start = item % n_parts * ITEM_KEYS
        with k.loop(start, k.minimum(start + ITEM_KEYS, n_kv), TILE_KEYS) as first:
            last = k.minimum(first + TILE_KEYS, n_kv)
            n_seen = visible_cells(k, sizes, w, cells, first, last)
            n_keys = list_all(k, w, cells, first, last)
            with k.when(n_seen > 0):
                if sizes.block_rows == 1:
                    score_row(k, sizes, w, n_keys, rows)
                else:
                    score_tile(k, sizes, w, block.n_rows, n_keys, last, rows)
            store = store_row if sizes.block_rows == 1 else store_scores
            store(k, sizes, w, block, s.at(first), n_keys, n_tokens, padded(n_kv), scale)


def list_all(k: Kernel, w: Workspace, cells: Cells, first: Value, last: Value) -> Value:
    """Lists the cells first..last, seen or not, and what pads them to a multiple of 16."""
    n_keys = padded(last - first)
    with k.loop(0, n_keys) as i:
        cell = k.minimum(first + i, last - 1)
        w.key_cell[i] = cell.to(i32)
        w.key_pos[i] = cells.cell_pos[cell]
        w.key_seq[i] = k.select(first + i < last, cells.cell_seq[cell], NEVER_SEEN)
    return n_keys


def score_address(s: Pointer, sizes: Sizes, row: Value, n_tokens: Value, stride: Value) -> Pointer:
    """s[h, t] of a row that counts (token, head of the slice) pairs."""
    return s.at((row % sizes.n_head * n_tokens + row // sizes.n_head) * stride)


def store_scores(
    k: Kernel,
    sizes: Sizes,
    w: Workspace,
    block: Block,
    s: Pointer,
    n_keys: Value,
    n_tokens: Value,
    stride: Value,
    scale: float,
) -> None:
    """Scale, mask and transpose a tile of scores into rows of s (given at the tile's column)."""
    lanes = k.target.lanes
    with k.loop(0, block.n_rows, lanes) as row:
        pos, seq = (p.at(row).load(i32 * lanes) for p in (w.row_pos, w.row_seq))
        to = [score_address(s, sizes, block.row(row + i), n_tokens, stride) for i in range(lanes)]
        with k.loop(0, n_keys, lanes) as key:
            scores = []
            for i in range(lanes):
                seen = seq.eq(w.key_seq[key + i]) & (pos >= w.key_pos[key + i])
                score = w.scores.at((key + i) * sizes.block_rows + row).load(f32 * lanes)
                scores.append(k.select(seen, score * scale, MASKED))
            for i, vector in enumerate(tile.transpose(k, scores)):
                with k.when(row + i < block.n_rows):
                    to[i].at(key).store(vector)


def store_row(
    k: Kernel,
    sizes: Sizes,
    w: Workspace,
    block: Block,
    s: Pointer,
    n_keys: Value,
    n_tokens: Value,
    stride: Value,
    scale: float,
) -> None:
    """store_scores for a block of one row, whose scores lie in order."""
    lanes = k.target.lanes
    to = score_address(s, sizes, block.first, n_tokens, stride)
    with k.loop(0, n_keys, lanes) as key:
        seen = w.key_seq.at(key).load(i32 * lanes).eq(w.row_seq[0])
        seen = seen & (w.key_pos.at(key).load(i32 * lanes) <= w.row_pos[0])
        score = w.scores.at(key).load(f32 * lanes) * scale
        to.at(key).store(k.select(seen, score, MASKED))


@kernel(s=ptr(f32), n_tokens=dim(), n_kv=dim())
def soft_max(k: Kernel, s: Pointer, n_tokens: Value, n_kv: Value, *, n_slice: int) -> None:
    """s[h, t] = softmax(s[h, t]) in place; MASKED cells weigh 0, a row of them becomes zeros."""
    lanes, width = k.target.lanes, padded(n_kv)
    steps = k.vector(list(range(lanes)), i32)
    with k.tiles(n_tokens * n_slice) as index:
        row = s.at(index * width)
        tops, sums = (k.var(k.const(x, f32 * lanes)) for x in (MASKED, 0.0))
        with k.loop(0, width, lanes) as j:
            inside = steps < k.splat((n_kv - j).to(i32), lanes)
            score = k.select(inside, row.at(j).load(f32 * lanes), MASKED)
            row.at(j).store(score)
            tops.set(k.maximum(score, tops.get()))
        top = tops.get().max()
        with k.loop(0, width, lanes) as j:
            score = row.at(j).load(f32 * lanes)
            weight = softmax_weight(k, (score - top) * LOG2_E)
            weight = k.select(score <= STILL_MASKED, 0.0, weight)
            row.at(j).store(weight)
            sums += weight
        total = sums.get().sum()
        factor = k.select(total.eq(0.0), 0.0, 1.0 / total)
        with k.loop(0, width, lanes) as j:
            row.at(j).store(row.at(j).load(f32 * lanes) * factor)


@kernel(
    out=ptr(f32),
    s=ptr(f32),
    vt=ptr(u8),
    vt_stride=value(i64),
    head_start=value(i64),
    n_tokens=dim(),
    n_kv=dim(),
)
def kqv(
    k: Kernel,
    out: Pointer,
    s: Pointer,
    vt: Pointer,
    vt_stride: Value,
    head_start: Value,
    n_tokens: Value,
    n_kv: Value,
    *,
    kind: str,
    n_head: int,
    n_slice: int,
    d_v: int,
    copied: bool,
    vt_type: DType,
) -> None:
    """out[t, head_start + h, d] = sum over j of s[h, t, j] * vt[d, j]; standard: vt[head, d, j].

    A row of vt has `vt_stride` columns, or padded(n_kv) when it is a copy made by transpose_c.
    """
    stride, vt = padded(n_kv), vt.cast(vt_type)
    vt_stride = stride if copied else vt_stride
    heads = 1 if kind == ABSORBED else n_slice  # that differ in vt
    n_rows = n_tokens * (n_slice // heads)
    n_blocks = (n_rows + (BLOCK_ROWS - 1)) // BLOCK_ROWS
    # Few rows: narrow items, so that all threads have work; many: wide ones, that reread s less.
    width = k.select(n_blocks * heads < 16, k.const(BLOCK, i64), 4 * BLOCK)
    n_parts = (d_v + width - 1) // width
    with k.tiles(n_blocks * heads * n_parts) as item:
        index, part = item // n_parts, item % n_parts
        head, first = index // n_blocks, index % n_blocks * BLOCK_ROWS
        last = k.minimum(first + BLOCK_ROWS, n_rows)
        scores = s.at(head * n_rows * stride)
        values = vt if kind == ABSORBED else vt.at((head_start + head) * d_v * vt_stride)

        def result(row: Value, head: Value = head) -> Pointer:
            to = head_start + head + row // n_tokens
            return out.at((row % n_tokens * n_head + to) * d_v)

        with k.loop(0, stride, BLOCK_CELLS) as cell:
            column = part * width
            with k.loop(column, k.minimum(column + width, d_v), DOT_COLUMNS) as d:
                v_rows = [values.at((d + i) * vt_stride + cell) for i in range(DOT_COLUMNS)]
                n_cells = k.minimum(n_kv - cell, BLOCK_CELLS)
                rows_at_once = 4 if k.target.registers >= 32 else 2
                with k.loop(first, last, rows_at_once) as row:
                    rows = [k.minimum(row + i, last - 1) for i in range(rows_at_once)]
                    sums = dot_rows(
                        k, [scores.at(r * stride + cell) for r in rows], v_rows, n_cells
                    )
                    for i, total in enumerate(sums):
                        to = result(rows[i]).at(d)
                        with k.when(row + i < last):
                            old = to.load(f32 * DOT_COLUMNS)
                            to.store(k.select(cell > 0, old, 0.0) + total)


def dot_rows(k: Kernel, rows: list[Pointer], v_rows: list[Pointer], n_cells: Value) -> list[Value]:
    """For each row the dot products with four rows of vt, as one vector of four lanes.

    Rows are read to a multiple of the lanes; what lies past n_cells in vt is not used.
    """
    lanes = k.target.lanes
    sums = [[k.var(k.zeros(f32 * lanes)) for _ in v_rows] for _ in rows]
    whole = n_cells // lanes * lanes

    def step(cell: Value, inside: Value | None) -> None:
        vectors = [p.at(cell).load(p.elem * lanes).to(f32) for p in v_rows]
        if inside is not None:
            vectors = [k.select(inside, v, 0.0) for v in vectors]
        for acc, p in zip(sums, rows, strict=True):
            weight = p.at(cell).load(f32 * lanes)
            for total, vector in zip(acc, vectors, strict=True):
                total += weight * vector

    with k.loop(0, whole, lanes) as cell:
        step(cell, None)
    with k.when(whole < n_cells):
        steps = k.vector(list(range(lanes)), i32)
        step(whole, steps < k.splat((n_cells - whole).to(i32), lanes))
    return group_sums(k, [total for acc in sums for total in acc])


def group_sums(k: Kernel, sums: list[Var]) -> list[Value]:
    """The horizontal sums, four to a vector."""
    lanes, totals = k.target.lanes, []
    for start in range(0, len(sums), lanes):
        whole = transpose_sum(k, [v.get() for v in sums[start : start + lanes]])
        totals += [whole.lanes(i, i + DOT_COLUMNS) for i in range(0, lanes, DOT_COLUMNS)]
    return totals


@kernel(vt=ptr(u8), c=ptr(u8), cell_seq=ptr(i32), n_kv=dim())
def transpose_c(
    k: Kernel,
    vt: Pointer,
    c: Pointer,
    cell_seq: Pointer,
    n_kv: Value,
    *,
    n_lora: int,
    n_rope: int,
    fmt: BlockFormat,
    vt_type: DType,
) -> None:
    """vt[d][j] = c[j][d], d < n_lora; a row has padded(n_kv) columns, empty cells are 0."""
    vt = vt.cast(vt_type)
    lanes, stride, row_bytes = k.target.lanes, padded(n_kv), fmt.row_bytes(n_lora + n_rope)
    rows = k.stack(f32, lanes * BLOCK)
    with k.tiles((stride + (COPY_CELLS - 1)) // COPY_CELLS) as item:
        start = item * COPY_CELLS
        with k.loop(0, n_lora, BLOCK) as column:
            with k.loop(start, k.minimum(start + COPY_CELLS, stride), lanes) as first:
                with k.loop(0, lanes) as i:
                    cell = k.minimum(first + i, n_kv - 1)
                    used = (first + i < n_kv) & (cell_seq[cell] >= 0)
                    decoded = decode(k, fmt, c.bytes(cell * row_bytes), column, BLOCK)
                    for j, v in enumerate(decoded):
                        rows.at(i * BLOCK + j * lanes).store(k.select(used, v, 0.0))
                with k.loop(0, BLOCK, lanes) as part:
                    cells = [rows.at(part + i * BLOCK).load(f32 * lanes) for i in range(lanes)]
                    for row, v in enumerate(tile.transpose(k, cells)):
                        vt.at((column + part + row) * stride + first).store(v.to(vt_type))
