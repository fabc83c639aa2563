"""Reports of every combination of flags as one table.

What makes a report is plugged in, so that the flags can be checked before anything is loaded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mlacli.errors import UsageError
from mlacli.limits import rules
from mlacli.settings import RunSettings, fitted, notes
from mlacli.units import MIB, size_text

if TYPE_CHECKING:
    from mlacli.report import Report

MAX_COMBINATIONS = 1024
# The settings that may have several values, outermost loop first.
AXES = (
    *("mla", "flash_attn", "type_k", "type_v", "n_batch", "n_ubatch", "amb_mib"),
    *("n_threads", "n_threads_batch", "n_ctx"),
)
FLAGS = {name: rules(RunSettings)[name].flag for name in AXES}


@dataclass(frozen=True)
class Row:
    """One combination: values by field, and the report or the reason why there is none."""

    values: Mapping[str, Any]
    report: Report | None = None
    error: str = ""

    def text(self, field: str) -> str:
        """What stands for a field of AXES, as it is typed; `-` where nothing does."""
        if self.report is None:
            value = self.values.get(field)
        elif field == "type_v" and self.report.mla:
            value = None  # has no effect
        elif field in ("mla", "flash_attn", "n_ctx"):
            value = getattr(self.report, field)
        else:
            value = getattr(self.report.flags, field)
        if isinstance(value, bool):
            return "on" if value else "off"
        return "-" if value is None else str(value)


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The cross product of all values by field, -c innermost. Raises UsageError when it is huge."""
    names = [name for name in AXES if name in axes]
    count = math.prod(len(axes[name]) for name in names)
    if count > MAX_COMBINATIONS:
        raise UsageError(f"{count} combinations of flags are too many ({MAX_COMBINATIONS})")
    products = itertools.product(*(axes[name] for name in names))
    return [dict(zip(names, values, strict=True)) for values in products]


def rows(
    fixed: Mapping[str, Any],
    chosen: Iterable[Mapping[str, Any]],
    report_of: Callable[[RunSettings], Report],
) -> Iterator[Row]:
    """A row for each combination beside the `fixed` values. One that cannot work says why."""
    for values in chosen:
        try:
            yield Row(values, report_of(fitted(**fixed, **values)))
        except UsageError as problem:
            yield Row(values, error=str(problem))


def notes_of(found: Iterable[Row], fixed: Mapping[str, Any]) -> list[str]:
    """All notes on the rows, each once."""
    said: dict[str, None] = {}
    for row in found:
        if row.report is not None:
            said |= dict.fromkeys((*notes(fitted(**fixed, **row.values)), *row.report.notes))
    return list(said)


def as_dict(row: Row) -> dict[str, Any]:
    """For JSON: the report, or the combination with what is wrong."""
    if row.report is not None:
        return asdict(row.report)
    return {"flags": dict(row.values), "error": row.error}


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.2f}"


_NUMBERS: dict[str, Callable[[Report], str]] = {
    "cache MiB": lambda r: _mib(r.cache.nbytes),
    "compute MiB": lambda r: _mib(r.compute_bytes),
    "output MiB": lambda r: _mib(r.output_bytes),
    "derived MiB": lambda r: _mib(r.derived_bytes),
    "needed MiB": lambda r: _mib(r.memory.needed_bytes),
    "KV B/token": lambda r: str(r.cache.bytes_per_token),
}


def varied(found: Sequence[Row]) -> list[str]:
    """The fields that have more than one value, in the order of AXES."""
    values = {name: {row.text(name) for row in found} - {"-"} for name in AXES}
    return [name for name in AXES if len(values[name]) > 1]


def table(found: Sequence[Row]) -> str:
    """The model, and a line for each row: the flags that differ, sizes, verdict."""
    import tabulate

    shown = {"type_k", "n_ctx", *varied(found)}
    axes = [n for n in AXES if n in shown or (n == "type_v" and _has_v(found))]
    heads = [*(FLAGS[name] for name in axes), *_NUMBERS, "verdict"]
    lines = [[*(row.text(name) for name in axes), *_results(row)] for row in found]
    align = ["right"] * (len(heads) - 1) + ["left"]
    text = tabulate.tabulate(lines, heads, "simple", colalign=align, disable_numparse=True)
    return "\n".join([*_head(found), *(line.rstrip() for line in text.splitlines())]) + "\n"


def _has_v(found: Iterable[Row]) -> bool:
    return any(row.report and row.report.mla == 0 for row in found)


def _results(row: Row) -> list[str]:
    """Numbers and verdict; only the reason where there are none."""
    if row.report is None:
        return ["-"] * len(_NUMBERS) + [row.error]
    return [*(cell(row.report) for cell in _NUMBERS.values()), row.report.memory.verdict]


def _head(found: Iterable[Row]) -> list[str]:
    report = next((row.report for row in found if row.report), None)
    if report is None:
        return []
    model, memory = report.model, report.memory
    weights, available = size_text(memory.weight_bytes), size_text(memory.available_bytes)
    return [f"{model.name} ({model.file}): {weights} of weights, {available} available", ""]
