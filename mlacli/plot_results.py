"""Rows of bench and sweep, and of the peers', as lines: tokens per second along what varies."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlacli.errors import UsageError
from mlacli.pictures import new_figure, save_figure
from mlacli.results import AXES, Row, middle, named_axes, samples_of, varied_axes

# What may go along the picture, the likeliest first, and how it is told.
X_LABELS = {
    "depth": "tokens in the cache",
    "prompt": "tokens of the prompt",
    "ubatch": "tokens of a micro-batch",
    "generated": "tokens generated",
    "batch": "tokens of a batch",
    "threads": "threads",
}
KINDS = ("prompt", "generation", "prompt + generation")
_FLAGS = {"ubatch": "-ub", "batch": "-b", "threads": "-t"}
_HEIGHT = 20  # of a plot in a terminal, in rows
_SYMBOLS = "ox+*abcdefghijklmnpqrstuvwyz"  # where lines cannot be told apart by colour
_COLOURS = ("blue+", "red+", "green+", "magenta+", "cyan+", "orange+")


@dataclass(frozen=True)
class Line:
    """One line of a picture: (x, tokens per second), x rising."""

    name: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Panel:
    """The lines of one kind of test; rates of prompts and of generation lie far apart."""

    kind: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Picture:
    """Everything that is drawn, on paper or in a terminal."""

    title: str
    x: str  # of X_LABELS
    panels: tuple[Panel, ...]


def kind_of(row: Row) -> str:
    """One of KINDS; without depths (an old llama-bench) a prompt before generation is a depth."""
    if not int(row["n_gen"]):
        return KINDS[0]
    return KINDS[2] if int(row["n_prompt"]) and "n_depth" in row else KINDS[1]


def place(row: Row, x: str) -> int:
    """Where a row lies along `x`."""
    if x == "depth":
        behind = int(row["n_prompt"]) if kind_of(row) == KINDS[1] else 0
        return int(row.get("n_depth") or behind)
    key = {"prompt": "n_prompt", "generated": "n_gen"}.get(x, f"n_{x}")
    return int(row.get(key) or 0)


def what_varies(files: Iterable[Iterable[Row]]) -> str | None:
    """The first of X_LABELS of which some file has several values for one kind of test."""
    for x in X_LABELS:
        for rows in files:
            seen: dict[str, set[int]] = defaultdict(set)
            for row in rows:
                seen[kind_of(row)].add(place(row, x))
            if any(len(places) > 1 for places in seen.values()):
                return x
    return None


def lines_of(name: str, rows: Sequence[Row], x: str) -> list[Line]:
    """A line per configuration of these rows, all of one kind, through the medians of samples.

    Lines are named by what differs among the rows, besides what goes along.
    """
    varied = varied_axes(rows) - {_FLAGS.get(x)}
    if x == "threads":
        varied -= {"-tb"}
    axes = [axis for axis in AXES if axis in varied]
    tests = [key for key in ("prompt", "generated", "depth") if key != x and _differ(rows, key)]
    short = {"prompt": "pp", "generated": "tg", "depth": "d"}
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        parts = [name, *named_axes(row, axes), *(f"{short[t]}{place(row, t)}" for t in tests)]
        found[" ".join(filter(None, parts))][place(row, x)] += samples_of(row)
    return [
        Line(line, tuple((at, middle(ts)) for at, ts in sorted(points.items())))
        for line, points in found.items()
    ]


def _differ(rows: Iterable[Row], x: str) -> bool:
    return len({place(row, x) for row in rows}) > 1


def picture_of(
    files: Mapping[str, Sequence[Row]], x: str, title: str = "", kinds: Sequence[str] = KINDS
) -> Picture:
    """The lines of all files; a name that is empty is left out of the lines' names."""
    panels = []
    for kind in kinds:
        lines: list[Line] = []
        for name, rows in files.items():
            lines += lines_of(name, [row for row in rows if kind_of(row) == kind], x)
        if lines:
            panels.append(Panel(kind, tuple(lines)))
    return Picture(title, x, tuple(panels))


def draw(picture: Picture, path: Path, flag: str) -> None:
    """Write the picture through matplotlib, a panel beside the other. Raises SpaceError."""
    n = len(picture.panels)
    figure = new_figure(width=7.0 if n == 1 else 5.0 * n)
    for i, panel in enumerate(picture.panels, start=1):
        axes = figure.add_subplot(1, n, i)
        for line in panel.lines:
            label = line.name or None
            axes.plot(*zip(*line.points, strict=True), marker="o", markersize=3, label=label)
        axes.set(xlabel=X_LABELS[picture.x], ylabel="tokens per second", title=panel.kind)
        axes.set_xticks(_ticks([x for line in panel.lines for x, _ in line.points], 9))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if any(line.name for line in panel.lines):
            axes.legend()
    if picture.title:
        figure.suptitle(picture.title)
    save_figure(figure, path, flag)


def terminal_plot(picture: Picture, width: int, colours: bool) -> str:
    """The picture as lines of text, a panel below the other.

    Lines are told apart by colours, or without them by the characters they are drawn with.
    """
    return "".join(_terminal_panel(picture, panel, width, colours) for panel in picture.panels)


def _terminal_panel(picture: Picture, panel: Panel, width: int, colours: bool) -> str:
    from plotext import colorize, figure, marker

    figure.clear()
    figure.plot_size(width, _HEIGHT)
    figure.theme("colorless")  # the terminal's own background
    names = []
    for number, line in enumerate(panel.lines):
        symbol = _SYMBOLS[number % len(_SYMBOLS)]
        colour = _COLOURS[number % len(_COLOURS)] if colours else None
        mark = marker("hd", colour) if colours else symbol
        signal = figure.signal(*zip(*line.points, strict=True), marker=mark)
        figure.draw(signal.lines())
        name = f" {'━━' if colours else symbol} {line.name}"
        names.append(colorize(name, colour).string() if colours else name)
    _scales(figure, [point for line in panel.lines for point in line.points], width)
    figure.title(
        " ".join(filter(None, (f"{picture.title}:" * bool(picture.title), panel.kind, "t/s")))
    )
    figure.label(X_LABELS[picture.x])
    text = figure.build().string(colorless=not colours)
    figure.clear()
    shown = names if any(line.name for line in panel.lines) else []
    return "\n".join(row.rstrip() for row in [*text.splitlines(), *shown]) + "\n"


def _scales(figure: Any, points: Sequence[tuple[int, float]], width: int) -> None:
    """Ticks at places that were measured, as far as they can be told apart; rates from 0 on."""
    shown = _ticks([x for x, _ in points], width // 8)
    figure.ruler("x").ticks(shown, [str(x) for x in shown])
    top = max(y for _, y in points)
    figure.ruler("y").lim(0, 1.05 * top)
    digits = max(0, 2 - math.floor(math.log10(top)))
    figure.ruler("y").ticks(
        [top * i / 4 for i in range(5)], [f"{top * i / 4:.{digits}f}" for i in range(5)]
    )


def _ticks(places: Sequence[int], most: int) -> list[int]:
    """Places that were measured, as far as `most` labels can be told apart."""
    first, *rest = sorted(set(places))
    shown = [first]
    for x in rest:
        if (x - shown[-1]) * most >= rest[-1] - first:
            shown.append(x)
    return shown


def no_x(flag: str) -> UsageError:
    """What is said where nothing could go along a picture."""
    return UsageError(
        f"{flag}: nothing varies that could go along it: give -d, -p, -n, -ub, -b or -t two values"
    )
