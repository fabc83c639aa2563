"""Draws tokens per second from files that `mlacli bench -o jsonl`, a llama-bench or a
llama-sweep-bench (--output-format jsonl) wrote.

    python scripts/plot_bench.py out.svg --x depth 'mlacli -mla 3=a.jsonl' 'ik=b.jsonl'

A file gives one line per kind of test in it (prompt or generation) and, if -mla was a list, per
mode. `--x` is what goes along: `depth` (tokens before the ones that are timed; for a llama-bench
without -d, the prompt of -gp), `prompt` or `ubatch`; `--kind` leaves the other kind of test out.
Rows of equal x become their median. Needs the extra `plot` (matplotlib).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlacli.results import Row, rows_of


@dataclass(frozen=True)
class Line:
    """One line of the picture: (x, tokens per second), x rising."""

    name: str
    points: tuple[tuple[int, float], ...]


def of_kind(rows: Iterable[Row], kind: str | None) -> list[Row]:
    return [row for row in rows if kind in (None, "generation" if row["n_gen"] else "prompt")]


def place(row: Row, x: str) -> int:
    if x == "ubatch":
        return int(row["n_ubatch"])
    if x == "prompt" or (row["n_gen"] and not row.get("n_depth")):
        return int(row["n_prompt"])
    return int(row.get("n_depth", 0))


def lines_of(name: str, rows: Iterable[Row], x: str) -> list[Line]:
    """One line per (prompt or generation, mode) of a file."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    rows = list(rows)
    modes = {row.get("mla", row.get("mla_attn")) for row in rows}
    kinds = {bool(row["n_gen"]) for row in rows}
    for row in rows:
        parts = [name]
        if len(modes) > 1:
            parts.append(f"-mla {row.get('mla', row.get('mla_attn'))}")
        if len(kinds) > 1:
            parts.append("generation" if row["n_gen"] else "prompt")
        found[" ".join(parts)][place(row, x)].append(float(row["avg_ts"]))
    return [
        Line(line, tuple((at, statistics.median(ts)) for at, ts in sorted(points.items())))
        for line, points in found.items()
    ]


KINDS = ("prompt", "generation")
LABELS = {
    "depth": "tokens in the cache",
    "prompt": "tokens of the prompt",
    "ubatch": "tokens of a micro-batch",
}


def draw(lines: Sequence[Line], x: str, title: str, out: Path) -> None:
    """Write the picture. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for line in lines:
        axes.plot(*zip(*line.points, strict=True), marker="o", markersize=3, label=line.name)
    axes.set(xlabel=LABELS[x], ylabel="tokens per second", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help=".svg, .png or .pdf")
    parser.add_argument("files", nargs="+", metavar="name=file.jsonl")
    parser.add_argument("--x", choices=LABELS, default="depth")
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--title", default="")
    given = parser.parse_args(argv)
    lines: list[Line] = []
    for text in given.files:
        name, equals, path = text.rpartition("=")
        if not equals:
            parser.error(f"{text!r}: 'name=file.jsonl' is wanted")
        try:
            lines += lines_of(name, of_kind(rows_of(Path(path)), given.kind), given.x)
        except (OSError, ValueError) as problem:
            parser.error(str(problem))
    draw(lines, given.x, given.title, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
