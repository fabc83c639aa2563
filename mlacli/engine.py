"""The engine: a model, its memory and its programs; tokens in, logits out.

`step` evaluates one batch: one native call, whatever the model. Nothing else runs Python per token.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from codegen.call import Call
from codegen.jit import Jit
from codegen.kernels.shift import shift_rows
from codegen.pool import Pool
from mlacli.cache import Cache
from mlacli.context import ContextPlan, plan_context
from mlacli.errors import UsageError
from mlacli.fit import check_plan
from mlacli.gguf.patch import patched
from mlacli.gguf.reader import GGUFFile, MappedFile, open_gguf
from mlacli.graph.lower import Lowering, launches_of
from mlacli.graph.node import Dim, Node
from mlacli.graph.ops import lower_graph
from mlacli.graph.program import Memory, Program
from mlacli.graph.watch import Step, Watcher
from mlacli.memory import allocate, copy_of
from mlacli.model.choose import FEW_TOKENS, MachineProfile, chooser
from mlacli.model.config import ModelConfig, read_config
from mlacli.model.inventory import check_tensors
from mlacli.model.repack import repack
from mlacli.model.rope import rope_notes, rope_overrides
from mlacli.model.weights import Weights
from mlacli.overrides import FROM_FILE, Override, RopeSettings
from mlacli.profile import Profile
from mlacli.progress import Progress
from mlacli.settings import RunSettings
from mlacli.work import Batch

Logits = npt.NDArray[np.float32]


class Cancelled(Exception):
    """The step was ended by `Engine.cancel`; its tokens are not in the cache."""


@dataclass(frozen=True)
class Model:
    """An open, checked model file. `notes` are oddities that do no harm, `overrides` the metadata
    that differs from the file's."""

    file: GGUFFile
    config: ModelConfig
    weights: Weights
    notes: tuple[str, ...]
    overrides: tuple[str, ...] = ()


def load_model(
    path: Path,
    *,
    mmap: bool = True,
    huge: bool = False,
    overrides: Iterable[Override] = (),
    rope: RopeSettings = FROM_FILE,
    progress: Progress | None = None,
) -> Model:
    """Open a file and check all of it but the numbers. Raises ModelError, SpaceError, UsageError.

    Without `mmap` the file is read into anonymous memory, in huge pages if asked for, and
    `progress` is told bytes.
    """
    file = open_gguf(path)
    overrides = list(overrides)
    found = rope_overrides(rope, patched(file.metadata, overrides).metadata)
    patch = patched(file.metadata, [*overrides, *found])
    file = replace(file, metadata=patch.metadata)
    config = read_config(file)
    notes = (*file.notes, *patch.notes, *rope_notes(rope, patch.metadata))
    notes = (*notes, *check_tensors(file, config))
    if not mmap:
        file = _copied(file, huge, progress)
    return Model(file, config, Weights(file, config), notes, patch.applied)


def _copied(file: GGUFFile, huge: bool, progress: Progress | None) -> GGUFFile:
    parts: list[MappedFile] = []
    for part in file.files:
        before, what = sum(p.bytes.size for p in parts), f"{part.path} (--no-mmap)"

        def done(n: int, before: int = before) -> None:
            if progress:
                progress(before + n, file.size_bytes)

        parts.append(replace(part, bytes=copy_of(part.bytes, what, huge=huge, done=done)))
    return replace(file, files=tuple(parts))


class Engine:
    """A context over a model. One step at a time; `cancel` may come from any thread.

    While there is a `profile`, it is told the times of every step; while there is a `watcher`, it
    is shown the nodes that it asks for instead.
    """

    def __init__(
        self,
        model: Model,
        settings: RunSettings,
        jit: Jit,
        profile: MachineProfile | None,
        *,
        n_ctx: int,
        n_out_max: int = 1,
        pool: Pool | None = None,
        keep: tuple[str, ...] = (),
        kernels: Mapping[str, Lowering] | None = None,
    ) -> None:
        self.model, self.settings = model, settings
        self.plan = plan_context(
            model.config,
            model.weights,
            settings,
            jit.target,
            n_ctx=n_ctx,
            n_out_max=n_out_max,
            keep=keep,
            kernels=kernels,
        )
        integer = model.weights.v_b(0).fmt.integer_dot
        self.chooser = chooser(settings, model.config, profile, integer=integer)
        check_plan(self.plan)
        self.n_ctx = self.plan.n_ctx
        self.cache = Cache(self.plan.layout, huge=settings.thp)
        self.pool = pool or Pool(jit, max(settings.n_threads, settings.n_threads_batch))
        self._policies = settings.policy(batch=True), settings.policy()  # [few tokens]
        self.profile: Profile | None = None
        self.watcher: Watcher | None = None
        self._jit = jit
        self._arena = allocate(self.plan.arena_bytes, "the compute buffer", huge=settings.thp)
        self._output = allocate(self.plan.output_bytes, "the output buffer")
        self._inputs = _inputs(self.plan, model.config.n_rope, self.cache)
        self._dims = np.zeros(len(Dim), np.int64)
        self._frequencies = model.config.rope_frequencies()
        self._programs: dict[str, Program] = {}

    # -- evaluation ---------------------------------------------------------------------------

    def eval(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int] | None = None,
        *,
        wanted: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Logits:
        """Evaluate tokens in micro-batches; logits of the `wanted` ones, which rise (default: the
        last). The result is only valid until the next call. A micro-batch ends early where it would
        give more logits than are planned. `progress` is told tokens.

        Raises SpaceError when the context is full, Cancelled after `cancel`: the micro-batches
        before the one that was cancelled stay in the cache.
        """
        wanted = [len(tokens) - 1] if wanted is None else list(wanted)
        sequences = [0] * len(tokens) if sequences is None else sequences
        rows: list[Logits] = []
        n_ubatch, n_out_max, start = self.plan.n_tokens_max, self.plan.n_out_max, 0
        if progress:
            progress(0, len(tokens))
        while start < len(tokens):
            stop = min(start + n_ubatch, len(tokens))
            part = [w - start for w in wanted if start <= w < stop]
            if len(part) > n_out_max:
                stop, part = start + part[n_out_max], part[:n_out_max]
            logits = self.step(
                tokens[start:stop], positions[start:stop], sequences[start:stop], part
            )
            if progress:
                progress(stop, len(tokens))
            if part or stop == len(tokens):
                rows.append(logits.copy() if stop < len(tokens) else logits)
            start = stop
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def step(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[int],
    ) -> Logits:
        """One micro-batch; returns a view of the output buffer, one row per wanted token."""
        n, limit = len(tokens), self.plan.n_out_max
        if len(wanted) > limit:
            raise UsageError(f"logits of {len(wanted)} tokens wanted, at most {limit} planned")
        start = time.perf_counter_ns()
        name = self.graph_name(n)
        program = self.program(name)
        cells = self.cache.allocate(positions, sequences)
        sizes = {Dim.N_TOKENS: n, Dim.N_KV: self.cache.n_rows, Dim.N_OUT: len(wanted)}
        few = n <= FEW_TOKENS
        threads = self.settings.n_threads if few else self.settings.n_threads_batch
        try:
            self._fill(tokens, positions, sequences, cells, wanted, sizes)
            self.pool.follow(self._policies[few])
            records = self.profile.records(program, threads) if self.profile else None
            if self.watcher:
                seen = self.watcher.begin(Step(name, tokens, positions, cells, sizes))
                is_done = program.run_watched(self.pool, threads, seen, self.watcher.see)
            else:
                is_done = program.run(self.pool, threads, records)
            if not is_done:
                self.pool.clear_cancel()
                raise Cancelled
        except BaseException:  # also what a signal handler raises: these rows count for nothing
            self.cache.release(cells)
            raise
        if self.profile and not self.watcher:
            batch = Batch(n, self.cache.n_rows, len(wanted))
            self.profile.add(program, batch, time.perf_counter_ns() - start)
        vocab = self.model.config.n_vocab
        return self._output[: 4 * len(wanted) * vocab].view(np.float32).reshape(-1, vocab)

    def graph_name(self, n_tokens: int) -> str:
        """Which of the context's graphs evaluates a batch of this size."""
        if n_tokens <= FEW_TOKENS:
            return "few"
        return self.chooser.path(n_tokens, self.cache.n_used + n_tokens)

    def _fill(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        cells: npt.NDArray[np.int32],
        wanted: Sequence[int],
        sizes: Mapping[Dim, int],
    ) -> None:
        n, inputs = len(tokens), self._inputs
        inputs["tokens"][:n] = tokens
        inputs["pos"][:n] = positions
        inputs["seq"][:n] = sequences
        inputs["cells"][:n] = cells
        inputs["out_rows"][: len(wanted)] = wanted
        inputs["rope"][:n] = self._rotations(positions)
        for i, dim in enumerate(Dim):
            self._dims[i] = sizes[dim]

    def _rotations(self, positions: Sequence[int]) -> npt.NDArray[np.float32]:
        """Of each position the cosine and sine of each pair's angle, side by side."""
        angles = np.outer(np.asarray(positions, np.float64), self._frequencies)
        rope = np.empty((len(positions), 2 * self._frequencies.size), np.float32)
        rope[:, 0::2], rope[:, 1::2] = np.cos(angles), np.sin(angles)
        return rope

    def shift(self, first: int, n: int) -> None:
        """Context shift: drop n tokens from position `first` on and move the later ones up.

        What is kept are the rows as they were computed: they still know of the dropped tokens.
        """
        cells = self.cache.shift(0, first, n)
        self.pool.follow(self._policies[True])
        layout = self.plan.layout
        kind, n_heads, n_before = "c", 1, layout.kv_lora_rank
        if not layout.latent:
            kind, n_heads, n_before = "k", layout.n_head, layout.n_nope
        rope = self._rotations([-n])
        spec = shift_rows(
            n_heads=n_heads, n_before=n_before, n_rope=layout.n_rope, fmt=layout.fmt_k
        )
        for layer in range(layout.n_layer):
            rows = self.cache.parts(kind, layer)
            if not Call(self._jit, spec, [rows, rope, cells, len(cells)]).run(
                self.pool, self.settings.n_threads
            ):
                # The rows of some layers are at their new places: none can be used any more.
                self.pool.clear_cancel()
                self.cache.clear()
                raise Cancelled

    def own_kernels(self) -> list[str]:
        """The kernels that take the place of built-in ones."""
        planned = self.plan.graphs.values()
        ops = {n.op: (p, n) for p in planned for n in p.graph.operations if p.lower.replaced(n)}
        found = (launch for p, node in ops.values() for launch in launches_of(p.lower, node))
        return sorted({launch.spec.symbol for launch in found})

    def cancel(self) -> None:
        """End the step under way, or the next one if there is none; from any thread."""
        self.pool.cancel()

    # -- programs -----------------------------------------------------------------------------

    def repack(self, progress: Progress | None = None) -> None:
        """With -rtr, copy the weights that are interleaved, if that has not been done: programs
        need them. `progress` is told (bytes done, bytes in all). Raises SpaceError, Cancelled."""
        weights, huge = self.model.weights, self.settings.thp
        wanted = self.plan.derived()
        if not repack(weights, wanted, self._jit, self.pool, huge=huge, progress=progress):
            self.pool.clear_cancel()
            raise Cancelled

    def prepare(self, *names: str, progress: Progress | None = None) -> None:
        """Have these programs ready before they are timed, their kernels compiled together;
        `progress` is told kernels, if any must be compiled."""
        planned = {name: self.plan.graphs[name] for name in names if name not in self._programs}
        if not planned:
            return
        self.repack()
        launches = {name: lower_graph(p.lower, p.graph) for name, p in planned.items()}
        specs = (launch.spec for each in launches.values() for launch in each)
        self._jit.load_all(specs, progress)
        dims = {d: self._dims.ctypes.data + 8 * i for i, d in enumerate(Dim)}
        memory = Memory(self._arena.ctypes.data, self._outside, dims)
        for name, p in planned.items():
            self._programs[name] = Program(launches[name], p.plan, p.lower, memory, self._jit)

    def program(self, name: str) -> Program:
        """One of the context's programs, compiled on first use."""
        if name not in self._programs:
            self.prepare(name)
        return self._programs[name]

    def _outside(self, node: Node) -> int:
        """Address of what lies outside the arena."""
        if node.op == "weight":
            return self.model.weights.address(node.attrs["matrix"])
        if node.op == "cache":
            kind, layer = node.name.removeprefix("cache_").rsplit("-", 1)
            return self.cache.address(kind, int(layer))
        if node.op == "input":
            return int(self._inputs[node.name].ctypes.data)
        return int(self._output.ctypes.data)


def _inputs(plan: ContextPlan, n_rope: int, cache: Cache) -> dict[str, npt.NDArray[np.generic]]:
    n = plan.n_tokens_max
    named: dict[str, npt.NDArray[np.generic]] = {
        name: np.zeros(n, np.int32) for name in ("tokens", "pos", "seq", "cells", "out_rows")
    }
    named["slot_index"] = np.arange(FEW_TOKENS * max(1, plan.n_expert_used), dtype=np.int32)
    named["rope"] = np.zeros((n, n_rope), np.float32)
    named["cell_pos"], named["cell_seq"] = cache.pos, cache.seq
    return named
