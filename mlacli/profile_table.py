"""A profile as a table: time, work and fraction of the limit of each op.

An op's time is the mean over the threads; its wait is the time before it, mostly at a barrier. The
limit is the least time that its work takes at the machine's peaks; ops without a matrix have none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from codegen.kernels.roof import OPERATIONS
from mlacli.cache import CacheLayout
from mlacli.graph.node import Node
from mlacli.machine import Peaks
from mlacli.profile import Profile
from mlacli.work import Batch, node_work

HEADER = ("op", "calls", "ms", "share", "wait ms", "MB", "GOP", "GB/s", "TOP/s", "limit")
_LAYER = re.compile(r"-(\d+)(?:\.\d+)?")  # in a node's name; the slice of heads behind the dot


@dataclass
class Line:
    """Sums over all steps: launches, nanoseconds, multiply-adds, bytes, seconds at the limit."""

    calls: int = 0
    run_ns: float = 0.0
    wait_ns: float = 0.0
    multiply_adds: float = 0.0
    nbytes: float = 0.0
    limit: float = 0.0

    def join(self, other: Line) -> None:
        """Add another's sums."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def node_lines(
    profile: Profile, row_bytes: Mapping[str, float], peaks: Peaks
) -> list[tuple[Node, Line]]:
    """A line for each node of every program that ran; `row_bytes` as for `node_work`."""
    found: dict[Node, Line] = {}
    for times in profile.programs.values():
        n_steps = times.batches.total()
        for node, run, wait in zip(times.nodes, times.run, times.wait, strict=True):
            line = Line(calls=n_steps, run_ns=float(run), wait_ns=float(wait))
            found.setdefault(node, Line()).join(line)
        for node in dict.fromkeys(times.nodes):
            for batch, n in times.batches.items():
                found[node].join(_work_line(node, batch, n, row_bytes, peaks))
    return list(found.items())


def _work_line(
    node: Node, batch: Batch, n_steps: int, row_bytes: Mapping[str, float], peaks: Peaks
) -> Line:
    parts = node_work(node, batch, row_bytes)
    return Line(
        multiply_adds=n_steps * sum(w.multiply_adds for w in parts),
        nbytes=n_steps * sum(w.nbytes for w in parts),
        limit=n_steps * sum(w.seconds(peaks) for w in parts),
    )


def table(
    profile: Profile, row_bytes: Mapping[str, float], peaks: Peaks, *, by_layer: bool = False
) -> list[list[str]]:
    """Rows under `HEADER`, the longest first, each op's numbers per step; then what is no op.

    Nodes of the same op are told apart by what they make (`matmul q`), with `by_layer` also by the
    layer (`matmul q-3`).
    """
    lines: dict[str, Line] = {}
    total = Line()
    for node, line in node_lines(profile, row_bytes, peaks):
        total.join(line)
        name = node.name if by_layer else _LAYER.sub("", node.name)
        label = name if name == node.op else f"{node.op} {name}"
        lines.setdefault(label, Line()).join(line)
    total.run_ns, total.wait_ns = profile.wall_ns, profile.wait_ns
    n, wall = profile.n_steps, profile.wall_ns
    longest = sorted(lines.items(), key=lambda item: -item[1].run_ns)
    return [
        *(_cells(label, line, n, wall) for label, line in longest),
        _time("barriers", profile.wait_ns, n, wall),
        _time("unaccounted", profile.unaccounted_ns, n, wall),
        _cells("total", total, n, wall),
    ]


def _cells(label: str, line: Line, n_steps: int, wall_ns: float) -> list[str]:
    first = [label, f"{line.calls / n_steps:g}", *_time("", line.run_ns, n_steps, wall_ns)[2:4]]
    first.append(f"{line.wait_ns / n_steps / 1e6:.3f}")
    if not line.limit or not line.run_ns:
        return [*first, *["-"] * 5]
    seconds = line.run_ns / 1e9
    return [
        *first,
        _number(line.nbytes / n_steps / 1e6),
        _number(2 * line.multiply_adds / n_steps / 1e9),
        _number(line.nbytes / seconds / 1e9),
        _number(2 * line.multiply_adds / seconds / 1e12),
        f"{100 * line.limit / seconds:.1f} %",
    ]


def _time(label: str, ns: float, n_steps: int, wall_ns: float) -> list[str]:
    share = f"{100 * ns / wall_ns:.1f} %"
    return [label, "", f"{ns / n_steps / 1e6:.3f}", share, *[""] * 6]


def _number(x: float) -> str:
    """Three digits, at most three behind the point."""
    return f"{x:.{3 - (x >= 1) - (x >= 10) - (x >= 100)}f}"


def profile_lines(
    title: str, profile: Profile, layout: CacheLayout, peaks: Peaks, *, by_layer: bool = False
) -> list[str]:
    """Headings and tables; nothing for a profile without steps."""
    if not profile.n_steps:
        return []
    import tabulate

    row_bytes = {kind: n / layout.n_ctx for kind, n in layout.bytes_per_layer().items()}
    lines = []
    for layers in (False, True) if by_layer else (False,):
        rows = table(profile, row_bytes, peaks, by_layer=layers)
        lines += [
            "",
            f"profile of {title}{' by layer' if layers else ''}: {_unit(profile)}",
            *tabulate.tabulate(
                rows,
                HEADER,
                tablefmt="github",
                colalign=["left"] + ["right"] * (len(HEADER) - 1),
                disable_numparse=True,
            ).splitlines(),
        ]
    return [*lines, machine_line(peaks), ""]


def machine_line(peaks: Peaks) -> str:
    """What limits are made of; an operation is a multiplication or an addition."""
    kinds = ((kind, getattr(peaks, kind)) for kind in OPERATIONS)
    rates = ", ".join(f"{kind} {_number(2 * rate / 1e12)} TOP/s" for kind, rate in kinds)
    return f"machine: {rates}, read {peaks.bandwidth / 1e9:.1f} GB/s"


def _unit(profile: Profile) -> str:
    """What ms, MB and GOP are per."""
    per_step = profile.n_tokens / profile.n_steps
    if per_step == 1:
        return f"per token, mean of {profile.n_steps}"
    return f"per batch, mean of {profile.n_steps} batches of {per_step:g} tokens"
