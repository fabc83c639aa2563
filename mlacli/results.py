"""Reading what bench and sweep wrote (also llama-bench and llama-sweep-bench), and comparing it."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
# What a row is named by besides its test, where a file has several values of it.
_AXES = (
    *("model_filename", "n_threads", "n_batch", "n_ubatch", "type_k", "type_v", "flash_attn"),
    *("mla", "mla_attn", "amb", "attn_max_batch", "rtr", "repack", "fmoe", "fused_moe", "thp"),
)


def rows_of(path: Path) -> list[Row]:
    """Rows of a .jsonl file. Raises ValueError naming the file and the line."""
    rows: list[Row] = []
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            found = swept(row) if "speed_pp" in row else [row]
            for one in found:
                one["avg_ts"], one["n_prompt"], one["n_gen"]
        except (ValueError, KeyError, TypeError) as problem:
            raise ValueError(f"{path}:{number}: not a row of a bench ({problem})") from problem
        rows += found
    return rows


def swept(row: Row) -> list[Row]:
    """llama-sweep-bench times a prompt and generation behind n_kv tokens."""
    common = {"n_depth": row["n_kv"], "n_ubatch": row["n_ubatch"]}
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
    varied = _varied(first) | _varied(second)
    found = [_by_test(rows, [axis for axis in _AXES if axis in varied]) for rows in (first, second)]
    return [
        Compared(name, tuple(samples), tuple(found[1][name]))
        for name, samples in found[0].items()
        if name in found[1]
    ]


def _varied(rows: Iterable[Row]) -> set[str]:
    """The axes that have more than one value."""
    values: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for axis in _AXES:
            values[axis].add(str(row.get(axis)))
    return {axis for axis, seen in values.items() if len(seen) > 1}


def _by_test(rows: Iterable[Row], axes: Sequence[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        named = [f"{axis}={row[axis]}" for axis in axes if axis in row]
        found[" ".join([name_of_test(row), *named])] += samples_of(row)
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
