"""One kernel of a model timed alone, beside what the machine can do.

It is called as the graph calls it, on made-up numbers: no weight of the model is read. Weights and
cached rows are walked through, so that they come from memory. The limit is that of --profile: the
least time that the work takes at the peaks of the machine, which are measured in turn with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from codegen.call import aligned_bytes
from codegen.formats import transposed_type
from codegen.jit import Jit
from codegen.pool import Pool
from mlacli.context import ContextPlan
from mlacli.errors import SpaceError
from mlacli.fit import size_text
from mlacli.free_memory import available_bytes
from mlacli.graph.lower import At, Launch, Lower, Scratch, scratch_bytes
from mlacli.graph.matrix import Matrix
from mlacli.graph.node import Dim, Node
from mlacli.inside.kernel_data import Array, cache_rows, coded_rows, routing, weight_pool
from mlacli.inside.kernel_facts import KernelUse
from mlacli.inside.kernel_time import Arguments, passes
from mlacli.machine import Peaks, Roof
from mlacli.profile_table import machine_line
from mlacli.work import Batch, Work, node_work

POOL_BYTES = 768 << 20  # of weights: more than caches hold
CACHE_BYTES = 128 << 20  # of cached rows that take turns
_MOST_COPIES, _ROUTINGS, _REPEATS = 4096, 64, 8


@dataclass
class Memory:
    """Made-up contents of nodes. `turns`: of what several copies take turns, all of them."""

    plan: ContextPlan
    lower: Lower
    batch: Batch
    pool_bytes: int
    turns: dict[Node, list[Array]] = field(default_factory=dict)

    def turns_of(self, node: Node) -> list[Array]:
        """The copies of a node's memory, made when first asked for. Raises SpaceError."""
        owner = node.storage
        if owner not in self.turns:
            self.turns[owner] = self._made(owner)
        return self.turns[owner]

    def _made(self, node: Node) -> list[Array]:
        bounds = self.lower.bounds
        if node.op == "weight":
            return self._weights(node.attrs["matrix"])
        if node.op == "cache":
            one = self._cached(node.attrs["kind"])
            n = max(1, min(16, min(CACHE_BYTES, self.pool_bytes) // one.nbytes))
            return [one, *(one.copy() for _ in range(n - 1))]
        if node.op == "input":
            return [self._input(node)]
        match node.dtype:
            case "a8":
                last = node.shape[-1]
                assert isinstance(last, int)
                return [coded_rows(node.rows(bounds), last)]
            case "routing":
                seeds = range(_ROUTINGS if self.lower.few else 1)
                return [self._routing(node, seed) for seed in seeds]
            case "groups":
                return [self._groups(node)]
        kind = np.float16 if node.dtype == "f16" else np.float32
        return [_numbers(node.nbytes(bounds) // np.dtype(kind).itemsize, kind)]

    def _weights(self, m: Matrix) -> list[Array]:
        span = (m.n_mats - 1) * m.pitch + m.n_rows * m.fmt.row_bytes(m.n_cols)
        copies = max(1, min(_MOST_COPIES, self.pool_bytes // span))
        if (needed := copies * span) > (available := available_bytes()):
            have = size_text(available)
            raise SpaceError(f"--bench: {m.name} takes {size_text(needed)}, {have} available")
        data = weight_pool(m.fmt, needed)
        return [data[i * span : (i + 1) * span] for i in range(copies)]

    def _cached(self, kind: str) -> Array:
        """One layer's memory of a kind of cached row (mlacli/cache.py)."""
        at = self.plan.layout
        nbytes = at.bytes_per_layer()[kind]
        if kind in ("kv_t", "v_t"):
            fmt = at.fmt_k if kind == "kv_t" else at.fmt_v
            wide = np.float32 if transposed_type(fmt).nbytes == 4 else np.float16
            return _numbers(nbytes // np.dtype(wide).itemsize, wide)
        width = {
            "c": at.kv_lora_rank + at.n_rope,
            "k": at.n_nope + at.n_rope,
            "v": at.n_v,
        }[kind]
        fmt = at.fmt_v if kind == "v" else at.fmt_k
        rows = cache_rows(fmt, nbytes // fmt.row_bytes(width), width)
        made = aligned_bytes(nbytes)
        made[:] = rows.reshape(-1)
        return made

    def _input(self, node: Node) -> Array:
        n, n_kv = self.batch.n_tokens, self.batch.n_kv
        made = aligned_bytes(node.nbytes(self.lower.bounds))
        if node.dtype == "f32":
            made.view(np.float32)[:] = 0.5
            return made
        words = made.view(np.int32)
        match node.name:
            case "tokens":
                words[:] = np.random.default_rng(0).integers(0, self.plan.n_vocab, words.size)
            case "pos" | "cells":
                words[:n] = np.arange(n_kv - n, n_kv)
            case "cell_pos" | "slot_index":
                words[:] = np.arange(words.size)
            case "out_rows":
                words[:] = n - 1
        return made

    def _routing(self, node: Node, seed: int) -> Array:
        made = aligned_bytes(node.nbytes(self.lower.bounds))
        ids, _, _ = self._routed(node, seed)
        made.view(np.int32)[: ids.size] = ids.ravel()
        made[made.nbytes // 2 :].view(np.float32)[:] = 1 / ids.shape[1]
        return made

    def _groups(self, node: Node) -> Array:
        """offsets, order, place (mlacli/graph/lower_moe.py)."""
        words = aligned_bytes(node.nbytes(self.lower.bounds)).view(np.int32)
        _, offsets, order = self._routed(node, 0)
        slots = (words.size - offsets.size) // 2
        words[: offsets.size] = offsets
        words[offsets.size :][: order.size] = order
        words[offsets.size + slots :][: order.size][order] = np.arange(order.size)
        return words.view(np.uint8)

    def _routed(self, node: Node, seed: int) -> tuple[Array, Array, Array]:
        table = node if node.op == "route" else node.inputs[0]
        rule = table.attrs["routing"]
        first = node.shape[0]
        assert isinstance(first, Dim)
        return routing(self.batch.size(first), rule.n_expert, rule.n_used, seed)


def _numbers(n: int, kind: type) -> Array:
    values: Array = np.random.default_rng(0).normal(0, 0.5, min(n, 1 << 16)).astype(kind)
    made = aligned_bytes(n * values.itemsize)
    made.view(kind)[:] = np.resize(values, n)
    return made


@dataclass(frozen=True)
class Timed:
    """A kernel's time for one launch of a batch, of which it computes `n_rows` tokens; its work
    and the machine's peaks."""

    graphs: str
    batch: Batch
    n_rows: int
    seconds: float
    work: list[Work]
    peaks: Peaks

    def line(self) -> str:
        """Time, rates, and the share of the limit; elementwise kernels have none."""
        tokens = f"{self.n_rows} token{'s' * (self.n_rows > 1)} of {self.batch.n_kv}"
        first = f"{self.graphs}, {tokens}: {1e6 * self.seconds:.1f} us"
        limit = sum(part.seconds(self.peaks) for part in self.work)
        if not limit:
            return f"{first} (neither a matrix nor attention: no limit)"
        madds = sum(part.multiply_adds for part in self.work)
        nbytes = sum(part.nbytes for part in self.work)
        reads = nbytes / self.peaks.bandwidth
        bound = "reading" if reads >= 0.99 * limit else "computing"
        return (
            f"{first}, {2e-12 * madds / self.seconds:.3f} TOP/s, "
            f"{1e-9 * nbytes / self.seconds:.1f} GB/s, {100 * limit / self.seconds:.1f} % of "
            f"the limit ({1e6 * limit:.1f} us of {bound})"
        )


def bench_lines(
    plan: ContextPlan, use: KernelUse, jit: Jit, *, pool_bytes: int = POOL_BYTES
) -> Iterator[str]:
    """For each size of batch that launches the kernel a line, and what the machine can do."""
    sizes: dict[bool, list[str]] = {}
    for name in use.launches:
        sizes.setdefault(plan.graphs[name].lower.few, []).append(name)
    for names in sizes.values():
        pool = Pool(jit, plan.graphs[names[0]].lower.n_threads)
        try:
            timed = _timed(plan, names, use.launches[names[0]][0], jit, pool, pool_bytes)
        finally:
            pool.close()
        yield timed.line()
        yield f"{machine_line(timed.peaks)} ({timed.peaks.n_threads} threads, {jit.target.name})"


def _timed(
    plan: ContextPlan, graphs: list[str], launch: Launch, jit: Jit, pool: Pool, pool_bytes: int
) -> Timed:
    lower = plan.graphs[graphs[0]].lower
    n = 1 if lower.few else lower.bounds[Dim.N_TOKENS]
    batch = Batch(n, plan.n_ctx, 1)
    memory = Memory(plan, lower, batch, pool_bytes)
    scratch = aligned_bytes(max(1, scratch_bytes(lower, launch.node)))

    def arguments(i: int) -> Arguments:
        given: Arguments = {}
        for param, operand in zip(launch.spec.params, launch.operands, strict=True):
            match operand:
                case At(node, offset):
                    copies = memory.turns_of(node)
                    given[param] = copies[i % len(copies)].view(np.uint8)[offset:]
                case Scratch(_, offset):
                    given[param] = scratch[offset:]
                case Dim():
                    given[param] = batch.size(operand)
                case _:
                    given[param] = operand
        return given

    roof = Roof(jit, pool, lower.n_threads, read_bytes=min(256 << 20, pool_bytes))
    rounds = []
    for table, calls in passes(jit, pool, launch.spec, arguments, lower.n_threads, _REPEATS):
        seconds = table.seconds(pool, lower.n_threads, time.perf_counter) / calls
        rounds.append((roof.measure(), seconds))
    best = rounds[0][0]
    for peaks, _ in rounds[1:]:
        kinds = ("int8", "bf16", "f32", "bandwidth")
        best = replace(best, **{k: max(getattr(best, k), getattr(peaks, k)) for k in kinds})
    shortest = min(seconds for _, seconds in rounds)
    first = launch.node.shape[0]
    n_rows = 1 if first is Dim.N_OUT else n
    work = launch_work(plan, launch, batch)
    return Timed(", ".join(graphs), batch, n_rows, shortest, work, best)


def launch_work(plan: ContextPlan, launch: Launch, batch: Batch) -> list[Work]:
    """The launch's part of its node's work: that of the weights that it reads."""
    layout, node = plan.layout, launch.node
    row_bytes = {kind: n / layout.n_ctx for kind, n in layout.bytes_per_layer().items()}
    read = {operand.node for operand in launch.operands if isinstance(operand, At)}
    return node_work(
        replace(node, inputs=tuple(i for i in node.inputs if i in read)), batch, row_bytes
    )
