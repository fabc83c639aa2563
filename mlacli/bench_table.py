"""Bench rows as llama-bench's Markdown table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlacli import __version__
from mlacli.bench import BenchRow
from mlacli.settings import RunSettings

_GIB = 1 << 30


@dataclass(frozen=True)
class Column:
    """A column of the Markdown table; `field` names the setting whose change makes it appear."""

    header: str
    width: int
    cell: Callable[[BenchRow], str]
    field: str = ""
    right: bool = True

    def is_shown(self, rows: Sequence[BenchRow]) -> bool:
        """Always, or when its setting is not the default or not the same in all rows."""
        if not self.field:
            return True
        default = getattr(RunSettings, self.field)
        return any(getattr(row.case.settings, self.field) != default for row in rows)


def _setting(header: str, width: int, field: str) -> Column:
    return Column(header, width, lambda row: plain(getattr(row.case.settings, field)), field=field)


def plain(value: object) -> str:
    """A setting as the user would type it."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return "-1,0" if value is None else str(value)


def cpu_mask(settings: RunSettings) -> str:
    """llama.cpp's form of -C; no mask is 0x0."""
    return f"{settings.cpu_mask or 0:#x}"


def load_mode(settings: RunSettings) -> str:
    """llama.cpp's word for how the file is read."""
    return "+".join(["mmap"] * settings.mmap + ["mlock"] * settings.mlock) or "none"


def model_name(row: BenchRow) -> str:
    """What the file holds, or its name where it could not be loaded."""
    return row.result.model.description if row.result else row.case.settings.model.stem


def _size(row: BenchRow) -> str:
    if row.result is None:
        return ""
    size = row.result.model.size
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / (1 << 20):.2f} MiB"


def _params(row: BenchRow) -> str:
    if row.result is None:
        return ""
    count = row.result.model.n_params
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def rate(row: BenchRow) -> str:
    """The mean and the sample deviation; starred where weights were read from disk."""
    if row.result is None:
        return "failed"
    mark = " *" if row.result.major_faults else ""
    return f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}{mark}"


def _limit(row: BenchRow) -> str:
    return "" if row.limit_percent is None else f"{row.limit_percent:.1f} %"


_COLUMNS = (
    Column("model", 30, model_name, right=False),
    Column("size", 10, _size),
    Column("params", 10, _params),
    Column("backend", 10, lambda row: "CPU", right=False),
    Column("threads", 7, lambda row: str(row.case.n_threads)),
    Column("cpu_mask", 10, lambda row: cpu_mask(row.case.settings), field="cpu_mask", right=False),
    _setting("cpu_strict", 10, "cpu_strict"),
    _setting("poll", 10, "poll"),
    _setting("prio", 4, "prio"),
    Column("numa", 10, lambda row: row.case.settings.numa or "", field="numa", right=False),
    _setting("n_batch", 7, "n_batch"),
    _setting("n_ubatch", 8, "n_ubatch"),
    _setting("type_k", 6, "type_k"),
    _setting("type_v", 6, "type_v"),
    _setting("fa", 2, "flash_attn"),
    _setting("mla", 3, "mla"),
    _setting("amb", 5, "amb_mib"),
    _setting("ser", 10, "ser"),
    _setting("mmap", 4, "mmap"),
    Column("lm", 10, lambda row: load_mode(row.case.settings), field="mlock"),
    _setting("rtr", 3, "rtr"),
    _setting("thp", 3, "thp"),
    _setting("fmoe", 4, "fmoe"),
    Column("test", 13, lambda row: row.case.test),
    Column("t/s", 16, rate),
)


def markdown(rows: Sequence[BenchRow], roof: bool = False) -> str:
    """llama-bench's table; `roof` adds the column `limit`. Ends with notes and the build line."""
    shown = shown_columns(rows)
    if roof:
        shown.append(Column("limit", 7, _limit))
    return table(shown, [[c.cell(row) for c in shown] for row in rows]) + footer(rows)


def shown_columns(rows: Sequence[BenchRow]) -> list[Column]:
    """The columns that say something of these rows."""
    return [column for column in _COLUMNS if column.is_shown(rows)]


def table(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> str:
    """Lines of cells below the columns' headers, in llama-bench's layout."""
    import tabulate

    lines = [[column.header for column in columns], *cells]
    # The rule under the header is a row of its own, which gives each column its least width.
    widths = [
        max(column.width, *(len(line[i]) for line in lines)) for i, column in enumerate(columns)
    ]
    rule = ["-" * (w - c.right) + ":" * c.right for c, w in zip(columns, widths, strict=True)]
    text = tabulate.tabulate(
        [lines[0], rule, *lines[1:]],
        tablefmt=_pipes(tabulate),
        colalign=["right" if column.right else "left" for column in columns],
        disable_numparse=True,
    )
    return text + "\n"


def footer(rows: Sequence[BenchRow]) -> str:
    """Notes on rows that are not what they seem, and the build line."""
    return "\n".join([*_footnotes(rows), "", f"build: mlacli {__version__}"]) + "\n"


def _pipes(tabulate: Any) -> Any:
    return tabulate.TableFormat(
        lineabove=None,
        linebelowheader=None,
        linebetweenrows=None,
        linebelow=None,
        headerrow=None,
        datarow=tabulate.DataRow("| ", " | ", " |"),
        padding=0,
        with_header_hide=None,
    )


def _footnotes(rows: Sequence[BenchRow]) -> list[str]:
    faults = sum(row.result.major_faults for row in rows if row.result)
    notes = []
    if faults:
        notes.append(f"* {faults} major page faults while timed: weights were read from disk")
    notes += [f"{row.case.test} failed: {row.error}" for row in rows if row.error]
    return ["", *notes] if notes else []
