"""Bench rows side by side: a line per test, a column per value of one setting, and the speedup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from mlacli.bench import BenchCase, BenchRow
from mlacli.bench_table import Column, footer, plain, rate, shown_columns, table
from mlacli.errors import UsageError

# --pivot's words, the setting of each, and what it is called at the head of a column.
PIVOTS = {
    "fa": ("flash_attn", "FA"),
    "mla": ("mla", "mla"),
    "ctk": ("type_k", "ctk"),
    "ctv": ("type_v", "ctv"),
    "rtr": ("rtr", "rtr"),
    "fmoe": ("fmoe", "fmoe"),
    "thp": ("thp", "thp"),
    "mmp": ("mmap", "mmap"),
    "amb": ("amb_mib", "amb"),
    "ser": ("ser", "ser"),
}


@dataclass(frozen=True)
class Pivot:
    """The setting that goes across, and its values from left to right; the first is the base."""

    word: str
    values: tuple[object, ...]

    @property
    def field(self) -> str:
        return PIVOTS[self.word][0]

    def value(self, case: BenchCase) -> object:
        return getattr(case.settings, self.field)

    def label(self, value: object) -> str:
        """`no FA` and `FA`, `mla 1`, `q8_KV`."""
        name = PIVOTS[self.word][1]
        if isinstance(value, bool):
            return name if value else f"no {name}"
        return plain(value) if self.word in ("ctk", "ctv") else f"{name} {plain(value)}"


def pivot_of(word: str, cases: Iterable[BenchCase]) -> Pivot:
    """Off before on, other values in the order given. Raises UsageError for a single value."""
    values = list(dict.fromkeys(getattr(case.settings, PIVOTS[word][0]) for case in cases))
    if len(values) < 2:
        raise UsageError(
            f"--pivot: {word} has one value only ({plain(values[0])}): give -{word} two or more"
        )
    if isinstance(values[0], bool):
        values.sort()
    return Pivot(word, tuple(values))


def pivoted(rows: Sequence[BenchRow], pivot: Pivot) -> str:
    """llama-bench's table, but with columns such as t/s (no FA), t/s (FA) and speedup."""
    groups: dict[tuple[object, ...], dict[object, BenchRow]] = {}
    for row in rows:
        groups.setdefault(_key(row.case, pivot), {})[pivot.value(row.case)] = row
    *shown, test, _ = (c for c in shown_columns(rows) if c.field != pivot.field)
    base, *others = pivot.values
    columns = [*shown, test]
    columns += [Column(f"t/s ({pivot.label(value)})", 16, rate) for value in pivot.values]
    for value in others:
        name = "speedup" if len(others) == 1 else f"speedup ({pivot.label(value)})"
        columns.append(Column(name, 7, rate))
    cells = []
    for group in groups.values():
        first = next(iter(group.values()))
        cells.append(
            [
                *(column.cell(first) for column in (*shown, test)),
                *(rate(group[value]) if value in group else "" for value in pivot.values),
                *(_speedup(group, base, value) for value in others),
            ]
        )
    return table(columns, cells) + footer(rows)


def _key(case: BenchCase, pivot: Pivot) -> tuple[object, ...]:
    """What two rows that belong side by side have in common."""
    settings = case.settings
    same = (getattr(settings, f.name) for f in fields(settings) if f.name != pivot.field)
    return (*same, case.n_prompt, case.n_gen, case.n_depth, case.n_fill)


def _speedup(group: Mapping[object, BenchRow], base: object, value: object) -> str:
    """The ratio of the mean rates; empty where one of them is missing."""
    first, second = group.get(base), group.get(value)
    if first is None or second is None or first.result is None or second.result is None:
        return ""
    return f"{second.avg_ts / first.avg_ts:.2f}"
