"""A picture of what combinations of flags take: a bar each, stacked, beside what there is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlacli.pictures import new_figure, save_figure
from mlacli.report_grid import FLAGS, Row, varied
from mlacli.units import GIB, MIB, size_text

if TYPE_CHECKING:
    from mlacli.report import Report

_FAR = 3  # a line so many times as high as the bars would make them too small to see
_RED, _SMALL = "#b02a2a", 8


def _weights(report: Report) -> int:
    """Bytes of the file that stay in use: what -rtr copies is read once."""
    copied = sum(d.nbytes for d in report.derived if d.is_copy) if report.flags.mmap else 0
    return report.memory.weight_bytes - copied


# From the bottom up; weights last, as they are what can be paged.
_PARTS: dict[str, tuple[str, Callable[[Report], int]]] = {
    "KV cache": ("#3b6fb6", lambda r: r.cache.nbytes),
    "compute": ("#e0803a", lambda r: r.compute_bytes),
    "derived and output": ("#6aa84f", lambda r: r.derived_bytes + r.output_bytes),
    "weights": ("#c9ccd1", _weights),
}


def draw(rows: Sequence[Row], path: Path, flag: str) -> None:
    """A bar for each row, all of which have a report. Raises SpaceError naming `flag`."""
    reports = [row.report for row in rows if row.report]
    totals = [sum(size(report) for _, size in _PARTS.values()) for report in reports]
    unit, name = (GIB, "GiB") if max(totals) >= GIB else (MIB, "MiB")
    figure = new_figure(max(6.0, 1.4 + 0.62 * len(reports)), 4.8)
    axes = figure.add_subplot()
    bottom = [0.0] * len(reports)
    for label, (colour, size) in _PARTS.items():
        heights = [size(report) / unit for report in reports]
        axes.bar(range(len(reports)), heights, 0.74, bottom, label=label, color=colour)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    _draw_available(axes, reports[0].memory.available_bytes, max(totals), unit)
    _draw_labels(axes, rows)
    axes.set_ylabel(name)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    title = f"Memory of {reports[0].model.name} ({reports[0].model.file_type})"
    figure.suptitle(title, parse_math=False)  # the file chose the name
    figure.legend(loc="outside lower center", ncols=len(_PARTS), fontsize=_SMALL)
    save_figure(figure, path, flag)


def _draw_available(axes: Any, available: int, most: int, unit: int) -> None:
    """A line at the memory that there is, or words if it lies far above all bars."""
    text = f"{size_text(available)} available"
    if available > _FAR * most:
        axes.set_ylim(0, 1.15 * most / unit)
        place, line, text = (0.01, 0.96), "axes fraction", text + ", far above"
    else:
        axes.set_ylim(0, 1.1 * max(most, available) / unit)
        axes.axhline(available / unit, color=_RED, linestyle="--", linewidth=1.2)
        place, line = (0.01, available / unit), "data"
    axes.annotate(
        text,
        place,
        xycoords=("axes fraction", line),
        xytext=(0, 3),
        textcoords="offset points",
        color=_RED,
        fontsize=_SMALL,
    )


def _draw_labels(axes: Any, rows: Sequence[Row]) -> None:
    """Under each bar the flag that changes fastest, under groups of bars the others."""
    fields = varied(rows) or ["n_ctx"]
    words = [[f"{FLAGS[field]} {row.text(field)}" for field in fields] for row in rows]
    axes.set_xticks(range(len(rows)), [own[-1] for own in words], fontsize=_SMALL)
    axes.tick_params("x", length=0)
    for depth in range(len(fields) - 1, 0, -1):
        groups = _runs([own[:depth] for own in words])
        centres = [(group[0] + group[-1]) / 2 for group in groups]
        texts = ["\n" * (len(fields) - depth) + words[group[0]][depth - 1] for group in groups]
        outer = axes.secondary_xaxis(0)
        outer.set_xticks(centres, texts, fontsize=_SMALL)
        outer.tick_params("x", length=0)
        outer.spines[:].set_visible(False)
        for group in groups[1:]:
            axes.axvline(group[0] - 0.5, color="black", alpha=0.25, linewidth=2.0 / depth)


def _runs(values: Sequence[list[str]]) -> list[list[int]]:
    """The places of equal values that lie side by side."""
    found = itertools.groupby(range(len(values)), values.__getitem__)
    return [list(places) for _, places in found]
