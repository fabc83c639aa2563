"""Draws a profile under the machine's roof: each op's operations per byte and per second.

    mlacli bench -m model.gguf -p 512 -n 64 --profile 2> profile.txt
    python scripts/plot_roofline.py profile.txt out.svg [--share 1]

Every table in the file becomes a series of points, one for each op that takes `--share` percent of
the time; their areas grow with that share. The roof is that of the last table's machine. Needs the
extra `plot` (matplotlib).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlacli.profile_table import HEADER

CLOSE = 1.25  # points whose coordinates differ by less share a name
_TITLE = re.compile(r"profile of ([^\s:]+)")
_MACHINE = re.compile(r"machine: int8 ([\d.]+) TOP/s.* read ([\d.]+) GB/s")


@dataclass(frozen=True)
class Point:
    """An op: operations per byte, operations per second, share of the time in percent."""

    op: str
    intensity: float
    rate: float
    share: float


@dataclass
class Table:
    """One profile; the machine's int8 operations and bytes per second."""

    title: str
    points: list[Point] = field(default_factory=list)
    peak: float = 0.0
    bandwidth: float = 0.0


def tables(text: str) -> list[Table]:
    """Raises ValueError when there is none, or one without its machine."""
    found: list[Table] = []
    for line in text.splitlines():
        cells = dict(
            zip(HEADER, (cell.strip() for cell in line.strip("|").split("|")), strict=False)
        )
        if title := _TITLE.match(line):
            found.append(Table(title.group(1)))
        elif found and (machine := _MACHINE.match(line)):
            found[-1].peak, found[-1].bandwidth = (float(x) for x in machine.groups())
        elif found and len(cells) == len(HEADER) and (point := _point(cells)):
            found[-1].points.append(point)
    if not found or not all(table.peak and table.points for table in found):
        raise ValueError("no profile with ops and a line 'machine: ...' in it")
    return found


def _point(cells: dict[str, str]) -> Point | None:
    """None for a line without work: headings, norms, barriers, the sum."""
    try:
        mb, gop, rate = (float(cells[name]) for name in ("MB", "GOP", "TOP/s"))
    except ValueError:
        return None
    if cells["op"] == "total" or not mb:
        return None
    return Point(cells["op"], 1e3 * gop / mb, rate, float(cells["share"].rstrip(" %")))


def apart(points: Sequence[Point]) -> list[Point]:
    """Those that there is room to name, the most important ones first."""
    named: list[Point] = []
    for p in sorted(points, key=lambda point: -point.share):
        pairs = (((p.intensity, q.intensity), (p.rate, q.rate)) for q in named)
        if not any(all(max(ab) < CLOSE * min(ab) for ab in pair) for pair in pairs):
            named.append(p)
    return named


def draw(found: Sequence[Table], share: float, out: Path) -> None:
    """Write the picture. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for table in found:
        points = [p for p in table.points if p.share >= share]
        xs, ys = [p.intensity for p in points], [p.rate for p in points]
        axes.scatter(xs, ys, s=[12 * p.share for p in points], alpha=0.6, label=table.title)
        for p in apart(points):
            axes.annotate(p.op.split()[-1], (p.intensity * CLOSE, p.rate), fontsize=7)
    machine = found[-1]
    ridge = 1e3 * machine.peak / machine.bandwidth
    ends = (1.0, ridge, 1e4)
    roof = [min(machine.peak, x * machine.bandwidth / 1e3) for x in ends]
    label = f"{machine.bandwidth:.0f} GB/s read, {machine.peak:.2f} TOP/s int8"
    axes.plot(ends, roof, color="black", label=label)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TOP/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("out", type=Path, help=".svg, .png or .pdf")
    parser.add_argument("--share", type=float, default=1.0, help="percent (1)")
    given = parser.parse_args(argv)
    try:
        found = tables(given.profile.read_text())
    except (OSError, ValueError) as problem:
        parser.error(f"{given.profile}: {problem}")
    draw(found, given.share, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
