"""`run --dump-tensors`: a prompt evaluated, its intermediates written as an npz file.

Every micro-batch has its own arrays: those of the first one bear llama.cpp's names, those of the
next ones the same with .1, .2 and so on behind. inp_tokens and inp_pos say what was evaluated.
"""

from __future__ import annotations

import difflib
import io
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlacli.engine import Cancelled, Engine
from mlacli.errors import SpaceError, UsageError
from mlacli.files import write_whole
from mlacli.fit import size_text
from mlacli.free_memory import available_bytes
from mlacli.graph.node import Dim, Node
from mlacli.graph.watch import Step
from mlacli.inside.tensors import Tensor, tensors
from mlacli.inside.values import Array, Reader
from mlacli.model.choose import FEW_TOKENS
from mlacli.session import open_session, prompt_tokens
from mlacli.settings import Request, RunSettings
from mlacli.signals import EXIT_OF_SIGNAL, stop_on_signals

FLAG, FILE_FLAG = "--dump-tensors", "--dump-file"
_SHOWN = 5


@dataclass
class Dumper:
    """Sees the nodes that the wanted tensors are made of. `arrays`: what came of all steps."""

    engine: Engine
    pattern: re.Pattern[str]
    arrays: dict[str, Array] = field(default_factory=dict)
    _values: dict[Node, Array] = field(default_factory=dict)
    _reader: Reader | None = None
    _wanted: dict[str, list[Tensor]] = field(default_factory=dict)  # by graph

    def wanted(self, graph: str) -> list[Tensor]:
        """The tensors of one of the context's graphs whose names match."""
        if graph not in self._wanted:
            known = self._all(graph)
            self._wanted[graph] = [t for name, t in known.items() if self.pattern.search(name)]
        return self._wanted[graph]

    def _all(self, graph: str) -> dict[str, Tensor]:
        return tensors(self.engine.plan.graphs[graph].graph, self.engine.model.config)

    def check(self, graphs: Collection[str], n_tokens: int) -> None:
        """Raise UsageError when no tensor of these graphs is wanted, SpaceError when those of a
        prompt are more than there is memory for."""
        if not any(self.wanted(graph) for graph in graphs):
            known = list(dict.fromkeys(name for graph in graphs for name in self._all(graph)))
            raise UsageError(
                f"{FLAG}: no tensor matches {self.pattern.pattern!r}{_near(self, known)}"
            )
        sizes = {Dim.N_TOKENS: n_tokens, Dim.N_KV: n_tokens, Dim.N_OUT: 1}
        needed = max(sum(_nbytes(t, sizes) for t in self.wanted(graph)) for graph in graphs)
        if needed > (available := available_bytes()):
            raise SpaceError(
                f"{FLAG}: these tensors take {size_text(needed)}, {size_text(available)} available"
            )

    def dump(self, tokens: Sequence[int]) -> None:
        """Evaluate a prompt in an empty context. Raises Cancelled."""
        self.engine.watcher = self
        try:
            for i, (start, stop, graph) in enumerate(_steps(self.engine, len(tokens))):
                wanted = [stop - start - 1] if stop == len(tokens) else []
                part = tokens[start:stop]
                self.engine.step(part, range(start, stop), [0] * len(part), wanted)
                self._finish(graph, i, part, start)
        finally:
            self.engine.watcher = None

    def _finish(self, graph: str, index: int, tokens: Sequence[int], first: int) -> None:
        """Keep what the step just done has given."""
        behind = f".{index}" if index else ""
        self.arrays["inp_tokens" + behind] = np.array(tokens, np.int32)
        self.arrays["inp_pos" + behind] = np.arange(first, first + len(tokens), dtype=np.int32)
        for tensor in self.wanted(graph):
            values = tensor.make(self._values)
            if values.size:  # logits and the like are there for the last token of all only
                self.arrays[tensor.name + behind] = np.array(values, order="C")

    # -- a graph.watch.Watcher ----------------------------------------------------------------

    def begin(self, step: Step) -> Collection[Node]:
        bounds = self.engine.plan.graphs[step.graph].lower.bounds
        self._reader = Reader(bounds, step.sizes, step.cells)
        self._values.clear()
        return {node for tensor in self.wanted(step.graph) for node in tensor.needs}

    def see(self, node: Node, address: int) -> None:
        assert self._reader is not None
        self._values[node] = self._reader.read(node, address)


def _near(dumper: Dumper, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(dumper.pattern.pattern, known, n=_SHOWN, cutoff=0.3)
    return (
        f" (nearest: {', '.join(near)})"
        if near
        else f" (there are {', '.join(known[:_SHOWN])} ...)"
    )


def _nbytes(tensor: Tensor, sizes: Mapping[Dim, int]) -> int:
    return sum(node.nbytes(sizes) for node in tensor.needs if node.dtype != "cache")


def run_dump(
    settings: RunSettings,
    request: Request,
    pattern: re.Pattern[str],
    path: Path,
    *,
    write: Callable[[str], None],
    note: Callable[[str], None],
) -> int:
    """Evaluate a prompt and write what `pattern` matches; the exit code tells of a signal.

    Lists the tensors with their sums, as llama.cpp's eval callback does. Raises MlaError.
    """
    with open_session(settings, request, note) as session:
        engine = session.engine
        tokens = prompt_tokens(session, note)
        dumper = Dumper(engine, pattern)
        graphs = dict.fromkeys(graph for _, _, graph in _steps(engine, len(tokens)))
        dumper.check(graphs, len(tokens))
        session.announce(note)
        engine.prepare(*graphs)
        with stop_on_signals(engine) as received:
            try:
                dumper.dump(tokens)
            except Cancelled:
                return EXIT_OF_SIGNAL[received[0]]
    try:
        size = write_whole(path, npz_parts(dumper.arrays))
    except OSError as problem:
        raise SpaceError(f"{FILE_FLAG}: {path}: {problem.strerror}") from problem
    for line in _listed(dumper.arrays):
        write(line + "\n")
    names = ", ".join(graphs)
    note(
        f"dump: {len(dumper.arrays)} arrays of {len(tokens)} tokens ({names} graph), "
        f"{size_text(size)} in {path}"
    )
    return 0


def _steps(engine: Engine, n_tokens: int) -> Iterator[tuple[int, int, str]]:
    """(first token, one past the last, graph) of each micro-batch from an empty cache."""
    for start in range(0, n_tokens, engine.plan.n_tokens_max):
        stop = min(start + engine.plan.n_tokens_max, n_tokens)
        few = stop - start <= FEW_TOKENS
        yield start, stop, "few" if few else engine.chooser.path(stop - start, stop)


def _listed(arrays: Mapping[str, Array]) -> Iterator[str]:
    width = max(map(len, arrays))
    for name, values in arrays.items():
        shape = " x ".join(map(str, values.shape))
        total = f"{values.sum(dtype=np.float64):.6f}"
        yield f"{name:{width}} {values.dtype!s:7} {shape:>16}   sum = {total}"


def npz_parts(arrays: Mapping[str, Array]) -> Iterator[bytes]:
    """The bytes of an npz file, an array at a time."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
            yield sink.take()
    yield sink.take()


class _Sink(io.RawIOBase):
    """Takes what is written, to be fetched piece by piece."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        piece = bytes(memoryview(data))  # type: ignore[arg-type]
        self._pieces.append(piece)
        return len(piece)

    def take(self) -> bytes:
        taken = b"".join(self._pieces)
        self._pieces.clear()
        return taken
