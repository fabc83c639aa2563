"""An attention kernel of one's own in place of the built-in one, checked against it.

    python docs/examples/own_attention.py

docs/own-kernel.md explains it line by line.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from codegen.call import Call
from codegen.dtypes import DType, f32, i32, i64, u8
from codegen.kernel import dim, kernel, ptr
from codegen.pool import Pool
from codegen.values import Pointer, Value
from codegen.vecmath import LOG2_E, exp2
from mlacli import Lowering, Model, load
from mlacli.graph.lower import At, Launch, Lower
from mlacli.graph.node import Dim, Node
from mlacli.machine import make_jit

if TYPE_CHECKING:
    from codegen.builder import Kernel

TILE = 64  # cache rows whose scores are kept before they are used
Row = NDArray[np.float32]
PROMPT = "What does json.dumps do?"
TOLERANCE = 1e-3  # of |logits|^2: activations of 8 bits turn the least difference into a larger one


@kernel(
    q=ptr(f32), cache=ptr(u8), pos=ptr(i32), seq=ptr(i32), cell_pos=ptr(i32), cell_seq=ptr(i32),
    out=ptr(f32), n_tokens=dim(), n_kv=dim(),
)  # fmt: skip
def own_attention(
    k: Kernel, q: Pointer, cache: Pointer, pos: Pointer, seq: Pointer, cell_pos: Pointer,
    cell_seq: Pointer, out: Pointer, n_tokens: Value, n_kv: Value,
    *, n_head: int, n_lora: int, n_rope: int, number: DType, scale: float,
) -> None:  # fmt: skip
    """out[t, h] = sum_j softmax_j(scale q[t, h] . c[j]) c[j, :n_lora] over the visible rows j."""
    lanes, width = k.target.lanes, n_lora + n_rope
    together = gcd(n_head, 4)  # heads that share what is loaded of a cache row
    scores, rows = k.stack(f32, together * TILE), k.stack(i64, TILE)
    cells = cache.cast(number)

    def load_row(row: Value, column: Value) -> Value:
        return cells.at(row * width + column).load(number * lanes).to(f32)

    with k.tiles(n_tokens * (n_head // together)) as item:
        token, head = item // (n_head // together), item % (n_head // together) * together
        queries = [q.at((token * n_head + head + h) * width) for h in range(together)]
        outputs = [out.at((token * n_head + head + h) * n_lora) for h in range(together)]
        top = [k.var(k.const(-1e30, f32)) for _ in range(together)]
        total = [k.var(k.zeros(f32)) for _ in range(together)]
        for o in outputs:
            with k.loop(0, n_lora, lanes) as column:
                o.at(column).store(k.zeros(f32 * lanes))
        with k.loop(0, n_kv, TILE) as first:
            # 1. Which rows of this tile does the token see?
            n = k.var(k.const(0, i64))
            with k.loop(first, k.minimum(first + TILE, n_kv)) as row:
                with k.when(cell_seq[row].eq(seq[token]) & (cell_pos[row] <= pos[token])):
                    rows[n.get()] = row
                    n += 1
            # 2. Their scores, in log2 units, and the highest so far.
            old = [t.get() for t in top]
            with k.loop(0, n.get()) as i:
                sums = [k.var(k.zeros(f32 * lanes)) for _ in range(together)]
                with k.loop(0, width, lanes) as column:
                    c = load_row(rows[i], column)
                    for h in range(together):
                        sums[h] += queries[h].at(column).load(f32 * lanes) * c
                for h in range(together):
                    score = sums[h].get().sum() * (scale * LOG2_E)
                    scores[i * together + h] = score
                    top[h].set(k.maximum(top[h].get(), score))
            # 3. Scores become weights; what was added before shrinks with the new maximum.
            keep = [exp2(k, old[h] - top[h].get()) for h in range(together)]
            for h in range(together):
                total[h].set(total[h].get() * keep[h])
            with k.loop(0, n.get()) as i:
                for h in range(together):
                    weight = exp2(k, scores[i * together + h] - top[h].get())
                    scores[i * together + h] = weight
                    total[h] += weight
            # 4. Weighted rows are added to the outputs, a vector of columns at a time.
            with k.loop(0, n_lora, lanes) as column:
                sums = [k.var(outputs[h].at(column).load(f32 * lanes) * keep[h])
                        for h in range(together)]  # fmt: skip
                with k.loop(0, n.get()) as i:
                    c = load_row(rows[i], column)
                    for h in range(together):
                        sums[h] += c * scores[i * together + h]
                for h in range(together):
                    outputs[h].at(column).store(sums[h].get())
        for h in range(together):
            with k.loop(0, n_lora, lanes) as column:
                at = outputs[h].at(column)
                at.store(at.load(f32 * lanes) * (1.0 / total[h].get()))


def launches(lower: Lower, node: Node) -> list[Launch]:
    """The kernel with this model's sizes, and where each of its parameters comes from."""
    q, cache, *cells = node.inputs
    heads = node.attrs["heads"]
    spec = own_attention(
        n_head=heads.n_head,
        n_lora=heads.n_lora,
        n_rope=heads.n_rope,
        number=heads.fmt_k.fields[0].type,
        scale=heads.scale,
    )
    inputs = [At(q), At(cache), *map(At, cells)]
    return [Launch(node, spec, (*inputs, At(node), Dim.N_TOKENS, Dim.N_KV))]


def suits(lower: Lower, node: Node) -> bool:
    """Generated tokens, and a cache of plain numbers: the built-in kernels do the rest."""
    return lower.few and not node.attrs["heads"].fmt_k.is_quantised


OWN = {"flash_absorbed": Lowering(launches, where=suits)}


def check_alone(n_head: int = 8, n_lora: int = 128, n_rope: int = 32, n_kv: int = 100) -> float:
    """The kernel on random numbers against the formula in f64: the largest relative error."""
    random, width = np.random.default_rng(1), n_lora + n_rope
    q, c = (random.normal(size=(n, width)).astype(np.float32) for n in (n_head, n_kv))
    out, scale = np.empty((n_head, n_lora), np.float32), width**-0.5
    place, zero = np.arange(n_kv, dtype=np.int32), np.zeros(n_kv, np.int32)
    token = np.array([n_kv - 11], np.int32)  # so that the last ten rows are in its future
    jit = make_jit()
    pool = Pool(jit, 2)
    spec = own_attention(n_head=n_head, n_lora=n_lora, n_rope=n_rope, number=f32, scale=scale)
    Call(jit, spec, [q, c, token, zero, place, zero, out, 1, n_kv]).run(pool, 2)
    pool.close()
    seen = c[: n_kv - 10].astype(np.float64)
    scores = scale * q @ seen.T
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = (weights / weights.sum(axis=1, keepdims=True)) @ seen[:, :n_lora]
    return float(abs(out - expected).max() / abs(expected).max())


@dataclass(frozen=True)
class Comparison:
    """Two models on the same tokens, one after another: `error` is the median over the tokens of
    |a - b|^2 / |b|^2 of their logits, `ms` the best time of a token."""

    error: float
    same_text: bool
    ms: tuple[float, float]


def compare(a: Model, b: Model, depth: int = 1000, n: int = 16) -> Comparison:
    """n tokens behind `depth` others in both models by turns, and a greedy answer of both."""
    tokens = a.tokenize(Path(threading.__file__).read_text())[: depth + n]
    rows: tuple[list[Row], list[Row]] = ([], [])
    best = [float("inf"), float("inf")]
    for model in (a, b):
        model.logits(tokens[:depth])  # the cache holds them from here on
    for end in range(depth + 1, depth + n + 1):
        for i, model in enumerate((a, b)):
            start = time.perf_counter()
            rows[i].append(model.logits(tokens[:end]))  # evaluates the last token
            best[i] = min(best[i], time.perf_counter() - start)
    x, y = map(np.array, rows)
    error = float(np.median(((x - y) ** 2).sum(axis=1) / (y**2).sum(axis=1)))
    texts = {model.generate(PROMPT, temp=0).text for model in (a, b)}
    return Comparison(error, len(texts) == 1, (1e3 * best[0], 1e3 * best[1]))


def main() -> None:
    print(f"the kernel alone: {check_alone():.1e} off the formula")
    with load(flash_attn=False) as plain, load() as built_in, load(kernels=OWN) as own:
        print(f"layer 0 attends by {own.kernels()['kqv-0'][0]}")
        print(f"built-in:          {built_in.kernels()['kqv-0'][0]}")
        found = compare(own, built_in, n=64)
        print(f"logits against the built-in: {found.error:.1e} (at most {TOLERANCE:g})")
        print(f"  and of -fa off against it: {compare(plain, built_in).error:.1e}")
        print(f"same greedy answer: {'yes' if found.same_text else 'no'}")
        print("ms per token behind 1000: own {:.2f}, built-in {:.2f}".format(*found.ms))
        sys.exit(0 if found.error <= TOLERANCE and found.same_text else 1)


if __name__ == "__main__":
    main()
