"""Mixture of experts around the expert matmuls: choose experts, sort slots by expert, add up.

A slot is one (token, rank) pair: slot = token * n_used + rank. Sources: DeepSeek-V2 and V3 papers
(group-limited routing; the bias takes part in the choice only), ik_llama.cpp (smart expert
reduction).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from codegen.dtypes import f32, i32, i64, u8, u32
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.blocks import BLOCK
from codegen.kernels.rows import row_tiles, store_vectors, vectors
from codegen.values import Pointer, Value
from codegen.vecmath import LOG2_E, exp2, sigmoid

if TYPE_CHECKING:
    from codegen.builder import Kernel

SMALLEST_SUM = 6.1e-5  # weights are normalised by at least this, as in DeepSeek's own code
NEVER = float("nan")  # a score that no comparison prefers
NO_INDEX = 0x7FFFFFFF
SUM_COLUMNS = 1024  # columns of one token that a thread adds up at a time


@dataclass(frozen=True)
class Routing:
    """How experts are chosen. `ser_min` > 0 turns smart expert reduction on: a rank from ser_min on
    is kept only if its selection score is above ser_threshold times the best one's."""

    n_expert: int
    n_used: int
    gating: Literal["softmax", "sigmoid"]
    biased: bool = False
    n_group: int = 1
    n_group_used: int = 1
    group_score: Literal["max", "top2"] = "max"
    normalise: bool = False
    scale: float = 1.0
    ser_min: int = 0
    ser_threshold: float = 0.0


@kernel(ids=ptr(i32), weights=ptr(f32), logits=ptr(f32), bias=ptr(f32), n_tokens=dim())
def route(
    k: Kernel,
    ids: Pointer,
    weights: Pointer,
    logits: Pointer,
    bias: Pointer,
    n_tokens: Value,
    *,
    routing: Routing,
) -> None:
    """ids, weights [T][n_used] = the top experts by gate(logits) + bias, and scale * gate(logits).

    Of equal scores the lower id wins. A slot dropped by smart expert reduction has id -1, weight 0.
    bias is read only when `routing.biased`.
    """
    r, lanes = routing, k.target.lanes
    padded = -(-r.n_expert // lanes) * lanes
    probs, scores = k.stack(f32, padded), k.stack(f32, padded)
    chosen = k.stack(f32, r.n_used)
    with row_tiles(k, n_tokens, 8 * r.n_expert) as t:
        gate(k, probs, logits.at(t * r.n_expert), r)
        selection_scores(k, scores, probs, bias, r)
        if r.n_group > 1:
            keep_best_groups(k, scores, r)
        best, total = k.var(k.zeros(f32)), k.var(k.zeros(f32))
        with k.loop(0, r.n_used) as rank:
            top, expert = highest(k, scores, padded, r.n_expert)
            best.set(k.select(rank.eq(0), top, best.get()))
            kept = is_kept(k, rank, top, best.get(), r)
            scores[expert] = NEVER
            chosen[rank] = k.select(kept, probs[expert], k.zeros(f32))
            total += chosen[rank]
            ids[t * r.n_used + rank] = k.select(kept, expert.to(i32), k.const(-1, i32))
        factor = k.const(r.scale, f32)
        if r.normalise:
            factor = factor / k.maximum(SMALLEST_SUM, total.get())
        with k.loop(0, r.n_used) as rank:
            weights[t * r.n_used + rank] = chosen[rank] * factor


def gate(k: Kernel, probs: Pointer, logits: Pointer, r: Routing) -> None:
    """probs = softmax or sigmoid of one token's logits; what lies behind the end is any number."""
    if r.gating == "sigmoid":
        each_vector(k, r.n_expert, probs, lambda i, tail: sigmoid(k, load(k, logits, i, tail, 0.0)))
        return
    lanes = k.target.lanes
    top = k.var(k.const(-3.0e38, f32 * lanes))

    def find_top(i: Value, tail: int) -> Value:
        v = load(k, logits, i, tail, -3.0e38)
        top.set(k.maximum(top.get(), v))
        return v

    each_vector(k, r.n_expert, probs, find_top)
    highest_logit = k.splat(top.get().max(), lanes)
    sums = k.var(k.zeros(f32 * lanes))

    def raise_and_add(i: Value, tail: int) -> Value:
        v = exp2(k, (probs.at(i).load(f32 * lanes) - highest_logit) * LOG2_E)
        sums.set(sums.get() + (first_lanes(k, v, tail, 0.0) if tail else v))
        return v

    each_vector(k, r.n_expert, probs, raise_and_add)
    share = 1.0 / sums.get().sum()
    each_vector(k, r.n_expert, probs, lambda i, tail: probs.at(i).load(f32 * lanes) * share)


def selection_scores(k: Kernel, scores: Pointer, probs: Pointer, bias: Pointer, r: Routing) -> None:
    """scores = probs + bias, and NEVER behind the last expert."""

    def score(i: Value, tail: int) -> Value:
        v = probs.at(i).load(f32 * k.target.lanes)
        if r.biased:
            v = v + load(k, bias, i, tail, 0.0)
        return first_lanes(k, v, tail, NEVER) if tail else v

    each_vector(k, r.n_expert, scores, score)


def each_vector(k: Kernel, n: int, to: Pointer, make: Callable[[Value, int], Value]) -> None:
    """to[i:] = make(i, tail) for the vectors of n values; tail counts the lanes of a last, partial
    vector and is 0 for whole ones."""
    lanes, tail = k.target.lanes, n % k.target.lanes
    with k.loop(0, n - tail, lanes) as i:
        to.at(i).store(make(i, 0))
    if tail:
        end = k.const(n - tail, i64)
        to.at(end).store(make(end, tail))


def load(k: Kernel, p: Pointer, i: Value, tail: int, behind: float) -> Value:
    """A vector at p[i]; of a partial one only the first `tail` lanes are touched."""
    lanes = k.target.lanes
    if not tail:
        return p.at(i).load(f32 * lanes)
    part = k.load_part(p.at(i), f32 * lanes, k.const(tail, i64))
    return first_lanes(k, part, tail, behind)


def first_lanes(k: Kernel, v: Value, count: int, behind: float) -> Value:
    """v with every lane from `count` on replaced."""
    lanes = k.vector(list(range(v.type.lanes)), i32)
    return k.select(lanes < count, v, k.const(behind, v.type))


def keep_best_groups(k: Kernel, scores: Pointer, r: Routing) -> None:
    """Of n_group runs of experts only the n_group_used best stay; the others' scores become
    -infinity. A group counts by its best expert, or by the sum of its two best."""
    size = r.n_expert // r.n_group
    first = [k.var(k.const(-float("inf"), f32)) for _ in range(r.n_group)]
    second = [k.var(k.const(-float("inf"), f32)) for _ in range(r.n_group)]
    with k.loop(0, size) as i:
        for g, (one, two) in enumerate(zip(first, second, strict=True)):
            v = scores[i + g * size]
            two.set(k.maximum(two.get(), k.minimum(one.get(), v)))
            one.set(k.maximum(one.get(), v))
    top2 = r.group_score == "top2" and size > 1
    group = [a.get() + b.get() if top2 else a.get() for a, b in zip(first, second, strict=True)]
    for g, mine in enumerate(group):
        better = k.const(0, i32)
        for h, other in enumerate(group):
            if h != g:
                wins = other >= mine if h < g else other > mine
                better = better + wins.to(i32)
        with k.when(better >= r.n_group_used):
            with k.loop(g * size, (g + 1) * size) as i:
                scores[i] = -float("inf")


def highest(k: Kernel, scores: Pointer, padded: int, n_expert: int) -> tuple[Value, Value]:
    """(score, index) of the highest score, of equals the lowest index.

    From the last vector to the first, so that in each lane a lower index replaces an equal one.
    Always a valid index, even where nothing can be compared.
    """
    lanes = k.target.lanes
    best = k.var(k.const(-float("inf"), f32 * lanes))
    index = k.var(k.const(NO_INDEX, i32 * lanes))
    with k.loop(0, padded, lanes) as back:
        i = (padded - lanes) - back
        v = scores.at(i).load(f32 * lanes)
        higher = v >= best.get()
        here = k.splat(i.to(i32), lanes) + k.vector(list(range(lanes)), i32)
        best.set(k.select(higher, v, best.get()))
        index.set(k.select(higher, here, index.get()))
    top = best.get().max()
    candidates = k.select(best.get().eq(k.splat(top, lanes)), index.get(), NO_INDEX)
    lowest = -((-candidates).max())
    return top, k.minimum(lowest, n_expert - 1).to(i64)


def is_kept(k: Kernel, rank: Value, score: Value, best: Value, r: Routing) -> Value:
    if not r.ser_min:
        return rank >= 0
    return (rank < r.ser_min) | (score > best * r.ser_threshold)


# -- slots by expert ----------------------------------------------------------------------------


@kernel(offsets=ptr(i32), order=ptr(i32), place=ptr(i32), ids=ptr(i32), n_tokens=dim())
def group_tokens(
    k: Kernel,
    offsets: Pointer,
    order: Pointer,
    place: Pointer,
    ids: Pointer,
    n_tokens: Value,
    *,
    n_expert: int,
    n_used: int,
) -> None:
    """Counting sort of the slots by expert, tokens in order inside each; thread 0 does it.

    Expert e has the sorted positions offsets[e] .. offsets[e + 1] - 1; order maps a position to its
    slot, place a slot to its position. Dropped slots have place -1; order ends in that many -1.
    """
    n_slots = n_tokens * n_used
    cursor = k.stack(i32, n_expert)
    with k.when(k.thread.eq(0)):
        with k.loop(0, n_expert) as e:
            cursor[e] = 0
        with k.loop(0, n_slots) as slot:
            expert = ids[slot].to(i64)
            with k.when(expert >= 0):
                cursor[expert] = cursor[expert] + 1
        position = k.var(k.const(0, i32))
        with k.loop(0, n_expert) as e:
            count = cursor[e]
            offsets[e] = position.get()
            cursor[e] = position.get()
            position += count
        offsets[n_expert] = position.get()
        with k.loop(0, n_slots) as slot:
            expert = ids[slot].to(i64)
            with k.either(expert >= 0) as (chosen, dropped):
                with chosen:
                    at = cursor[expert]
                    cursor[expert] = at + 1
                    order[at.to(i64)] = slot.to(i32)
                    place[slot] = at
                with dropped:
                    place[slot] = -1
        with k.loop(position.get().to(i64), n_slots) as rest:
            order[rest] = -1


@kernel(y=ptr(u8), x=ptr(u8), order=ptr(i32), offsets=ptr(i32))
def gather_rows(
    k: Kernel,
    y: Pointer,
    x: Pointer,
    order: Pointer,
    offsets: Pointer,
    *,
    pitch: int,
    n_used: int,
    n_expert: int,
) -> None:
    """y[i] = x[order[i] // n_used] for every sorted position: rows of `pitch` bytes, a multiple of
    64, such as a8 rows."""
    step = 4 * k.target.lanes
    with row_tiles(k, offsets[n_expert].to(i64), pitch // 4) as i:
        source = x.bytes((order[i].to(i64) // n_used) * pitch)
        with k.loop(0, pitch, step) as at:
            y.bytes(i * pitch + at).store(source.bytes(at).load(u8 * step))


@kernel(y=ptr(f32), z=ptr(f32), weights=ptr(f32), place=ptr(i32), n_tokens=dim())
def moe_sum(
    k: Kernel,
    y: Pointer,
    z: Pointer,
    weights: Pointer,
    place: Pointer,
    n_tokens: Value,
    *,
    n: int,
    n_used: int,
) -> None:
    """y[t] += weight * z[position] for the token's slots, one after another by rising expert id.

    z has a row per sorted position. Rows of dropped slots are never read.
    """
    parts = -(-n // SUM_COLUMNS)
    rows, factors = k.stack(i32, n_used), k.stack(f32, n_used)
    with row_tiles(k, n_tokens * parts, n, n) as index:
        t, first = index // parts, index % parts * SUM_COLUMNS
        n_kept = by_position(k, rows, factors, place.at(t * n_used), weights.at(t * n_used), n_used)
        with k.loop(first, k.minimum(first + SUM_COLUMNS, n), BLOCK) as column:
            sums = [k.var(v) for v in vectors(k, y.at(t * n + column), BLOCK)]
            with k.loop(0, n_kept) as s:
                source = z.at(rows[s].to(i64) * n + column)
                for total, v in zip(sums, vectors(k, source, BLOCK), strict=True):
                    total += v * factors[s]
            store_vectors(y.at(t * n + column), [total.get() for total in sums])


def by_position(
    k: Kernel,
    rows: Pointer,
    factors: Pointer,
    place: Pointer,
    weights: Pointer,
    n_used: int,
) -> Value:
    """Sort a token's slots by position, dropped ones (-1, the highest unsigned) last; returns how
    many there are. A slot's rank is the number of lower positions."""
    places = [place[i].to(u32) for i in range(n_used)]
    n_kept = k.const(0, i64)
    for i, mine in enumerate(places):
        rank = k.const(0, i64)
        for other in places:
            rank = rank + (other < mine).to(u32).to(i64)
        rows[rank] = mine.to(i32)
        factors[rank] = weights[i]
        n_kept = n_kept + mine.ne(0xFFFFFFFF).to(u32).to(i64)
    return n_kept
