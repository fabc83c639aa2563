"""Reading what bench and sweep wrote (also llama-bench and llama-sweep-bench), and comparing it."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlacli.gguf.problem import printable

Row = Mapping[str, Any]
# What a row is named by besides its test, where a file has several values of it: the flag, and the
# keys under which mlacli and the peers write it.
AXES: dict[str, tuple[str, ...]] = {
    "-m": ("model_filename",),
    "-t": ("n_threads",),
    "-tb": ("n_threads_batch",),
    "-b": ("n_batch",),
    "-ub": ("n_ubatch",),
    "-ctk": ("type_k",),
    "-ctv": ("type_v",),
    "-fa": ("flash_attn",),
    "-mla": ("mla_attn", "mla"),
    "-amb": ("attn_max_batch", "amb"),
    "-ser": ("ser",),
    "-lm": ("load_mode",),
    "-mmp": ("use_mmap",),
    "-rtr": ("repack", "rtr"),
    "-thp": ("use_thp", "thp"),
    "-fmoe": ("fused_moe", "fmoe"),
}

_NUMBERS = ("n_prompt", "n_gen", "n_depth", "n_batch", "n_ubatch", "n_threads")


def rows_of(path: Path) -> list[Row]:
    """Rows of a .jsonl file, or of a .json array, without tests that failed.

    Raises OSError, and ValueError naming the file and the line.
    """
    text = path.read_text(errors="replace")
    if text.lstrip().startswith("["):
        return [row for one in _parsed(f"{path}", text) for row in _rows_in(f"{path}", one)]
    return [
        row
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
        for row in _rows_in(f"{path}:{number}", _parsed(f"{path}:{number}", line))
    ]


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as problem:
        raise ValueError(f"{place}: not a row of a bench ({problem})") from problem


def _rows_in(place: str, row: Any) -> list[Row]:
    """The rows that one object stands for, checked: none where nothing was measured."""
    try:
        found = swept(row) if "speed_pp" in row else [_behind_prompt(row)]
        for one in found:
            one["n_prompt"], one["n_gen"]
            for key in _NUMBERS:
                int(one.get(key) or 0)
        measured = [one for one in found if one["avg_ts"] is not None]
        return [one for one in measured if all(0 < x < math.inf for x in samples_of(one))]
    except (ValueError, KeyError, TypeError, OverflowError) as problem:
        raise ValueError(f"{place}: not a row of a bench ({problem})") from problem


def _behind_prompt(row: Row) -> Row:
    """ik_llama.cpp's -gp: its prompt is not timed, so it is a depth like any other."""
    if "@pp" in str(row.get("test", "")) and row["n_prompt"]:
        return {**row, "n_prompt": 0, "n_depth": row["n_prompt"]}
    return row


def swept(row: Row) -> list[Row]:
    """llama-sweep-bench times a prompt and generation behind n_kv tokens."""
    kept = ("n_batch", "n_ubatch", "flash_attn", "n_threads", "n_threads_batch")
    common = {"n_depth": row["n_kv"]} | {key: row[key] for key in kept if key in row}
    return [
        {"n_prompt": row["pp"], "n_gen": 0, "avg_ts": row["speed_pp"], **common},
        {"n_prompt": 0, "n_gen": row["tg"], "avg_ts": row["speed_tg"], **common},
    ]


@dataclass(frozen=True)
class Compared:
    """A test's tokens per second in two files, medians and all samples."""

    test: str
    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return middle(self.second) / middle(self.first)

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the greatest ratio of two samples."""
        return min(self.second) / max(self.first), max(self.second) / min(self.first)


def middle(samples: Sequence[float]) -> float:
    """Their median."""
    return statistics.median(samples)


def compare(first: Sequence[Row], second: Sequence[Row]) -> list[Compared]:
    """The tests that both have, in the order of the first."""
    varied = varied_axes(first) | varied_axes(second)
    axes = [axis for axis in AXES if axis in varied]
    found = [_by_test(rows, axes) for rows in (first, second)]
    return [
        Compared(name, tuple(samples), tuple(found[1][name]))
        for name, samples in found[0].items()
        if name in found[1]
    ]


def varied_axes(rows: Iterable[Row]) -> set[str]:
    """The axes that have more than one value."""
    values: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for axis in AXES:
            values[axis].add(value_of(row, axis))
    found = {axis for axis, seen in values.items() if len(seen) > 1}
    return found - {"-mmp"} if "-lm" in found else found  # it says more


def value_of(row: Row, axis: str) -> str:
    """What a row has for an axis, as its flag takes it; "" where the row does not say."""
    found = next((row[key] for key in AXES[axis] if key in row), "")
    if isinstance(found, bool):
        return str(int(found))
    return printable(Path(str(found)).stem if axis == "-m" else str(found), 80)


def named_axes(row: Row, axes: Iterable[str]) -> list[str]:
    """`-mla 3` and the like, of those that the row has; a model's name stands for itself."""
    found = ((axis, value_of(row, axis)) for axis in axes)
    return [value if axis == "-m" else f"{axis} {value}" for axis, value in found if value]


def _by_test(rows: Iterable[Row], axes: Sequence[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        found[" ".join([name_of_test(row), *named_axes(row, axes)])] += samples_of(row)
    return found


def samples_of(row: Row) -> list[float]:
    """Its repetitions, or the mean alone where they are not told."""
    samples = row.get("samples_ts")
    return [float(x) for x in samples] if samples else [float(row["avg_ts"])]


def name_of_test(row: Row) -> str:
    """`pp512`, `tg128`, `pp512+tg128`, with ` @ d4096` behind other tokens."""
    parts = [f"{kind}{row[key]}" for kind, key in (("pp", "n_prompt"), ("tg", "n_gen")) if row[key]]
    depth = row.get("n_depth") or 0
    return "+".join(parts) + (f" @ d{depth}" if depth else "")
