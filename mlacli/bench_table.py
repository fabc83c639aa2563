"""Bench rows as text: llama-bench's Markdown table, JSON, JSON lines, CSV and SQL."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlacli import __version__
from mlacli.bench import BenchRow
from mlacli.settings import RunSettings

_GIB = 1 << 30
SQL_TABLE = "llama_bench"  # the name that llama.cpp's own comparison script looks for


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
    return Column(header, width, lambda row: _plain(getattr(row.case.settings, field)), field=field)


def _plain(value: object) -> str:
    """A setting as the user would type it."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return "-1,0" if value is None else str(value)


def _mask(row: BenchRow) -> str:
    return f"{row.case.settings.cpu_mask or 0:#x}"


def _name(row: BenchRow) -> str:
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


def _rate(row: BenchRow) -> str:
    if row.result is None:
        return "failed"
    mark = " *" if row.result.major_faults else ""
    return f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}{mark}"


def _limit(row: BenchRow) -> str:
    return "" if row.limit_percent is None else f"{row.limit_percent:.1f} %"


_COLUMNS = (
    Column("model", 30, _name, right=False),
    Column("size", 10, _size),
    Column("params", 10, _params),
    Column("backend", 10, lambda row: "CPU", right=False),
    Column("threads", 7, lambda row: str(row.case.settings.n_threads)),
    Column("cpu_mask", 10, _mask, field="cpu_mask", right=False),
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
    _setting("rtr", 3, "rtr"),
    _setting("thp", 3, "thp"),
    _setting("fmoe", 4, "fmoe"),
    Column("test", 13, lambda row: row.case.test),
    Column("t/s", 16, _rate),
)


def markdown(rows: Sequence[BenchRow], roof: bool = False) -> str:
    """llama-bench's table; `roof` adds the column `limit`. Ends with notes and the build line."""
    import tabulate

    shown = [column for column in _COLUMNS if column.is_shown(rows)]
    if roof:
        shown.append(Column("limit", 7, _limit))
    lines = [[column.header for column in shown], *([c.cell(row) for c in shown] for row in rows)]
    # The rule under the header is a row of its own, which gives each column its least width.
    widths = [
        max(column.width, *(len(line[i]) for line in lines)) for i, column in enumerate(shown)
    ]
    rule = ["-" * (w - c.right) + ":" * c.right for c, w in zip(shown, widths, strict=True)]
    table = tabulate.tabulate(
        [lines[0], rule, *lines[1:]],
        tablefmt=_pipes(tabulate),
        colalign=["right" if column.right else "left" for column in shown],
        disable_numparse=True,
    )
    return "\n".join([table, *_footnotes(rows), "", f"build: mlacli {__version__}"]) + "\n"


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


def record(row: BenchRow) -> dict[str, Any]:
    """A row with llama-bench's keys (those of ik_llama.cpp for its own flags)."""
    settings, result = row.case.settings, row.result
    return {
        "build_commit": __version__,
        "build_number": 0,
        "cpu_info": result.cpu_info if result else "",
        "backends": "CPU",
        "model_filename": str(settings.model),
        "model_type": _name(row),
        "model_size": result.model.size if result else 0,
        "model_n_params": result.model.n_params if result else 0,
        "n_batch": settings.n_batch,
        "n_ubatch": settings.n_ubatch,
        "n_threads": settings.n_threads,
        "cpu_mask": _mask(row),
        "cpu_strict": settings.cpu_strict,
        "poll": settings.poll,
        "prio": settings.prio,
        "numa": settings.numa or "",
        "type_k": settings.type_k,
        "type_v": settings.type_v,
        "flash_attn": settings.flash_attn,
        "mla_attn": settings.mla,
        "attn_max_batch": settings.amb_mib,
        "ser": _plain(settings.ser),
        "use_mmap": settings.mmap,
        "repack": settings.rtr,
        "use_thp": settings.thp,
        "fused_moe": settings.fmoe,
        "n_prompt": row.case.n_prompt,
        "n_gen": row.case.n_gen,
        "n_depth": row.case.n_depth + row.case.n_fill,
        "test": row.case.test,
        "test_time": result.test_time if result else "",
        "avg_ns": row.avg_ns if result else None,
        "stddev_ns": row.stddev_ns if result else None,
        "avg_ts": row.avg_ts if result else None,
        "stddev_ts": row.stddev_ts if result else None,
        "limit_ts": result.limit_ts if result else None,
        "major_faults": result.major_faults if result else 0,
        "error": row.error,
    }


def _with_samples(row: BenchRow) -> dict[str, Any]:
    samples = list(row.result.samples_ns) if row.result else []
    return record(row) | {"samples_ns": samples, "samples_ts": row.samples_ts}


def as_json(rows: Sequence[BenchRow], roof: bool = False) -> str:
    """An array of objects."""
    return json.dumps([_with_samples(row) for row in rows], indent=2, allow_nan=False) + "\n"


def json_lines(rows: Sequence[BenchRow], roof: bool = False) -> str:
    """One object per line."""
    return "".join(json.dumps(_with_samples(row), allow_nan=False) + "\n" for row in rows)


def comma_separated(rows: Sequence[BenchRow], roof: bool = False) -> str:
    """A header line, then every field in quotes; no samples."""
    if not rows:
        return ""
    text = io.StringIO()
    text.write(",".join(record(rows[0])) + "\n")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for row in rows:
        writer.writerow([_flat(value) for value in record(row).values()])
    return text.getvalue()


def _flat(value: object) -> object:
    """Booleans as 0 and 1, as llama-bench writes them; nothing measured as an empty field."""
    if isinstance(value, bool):
        return int(value)
    return "" if value is None else value


def sql(rows: Sequence[BenchRow], roof: bool = False) -> str:
    """CREATE TABLE IF NOT EXISTS and one INSERT per row."""
    if not rows:
        return ""
    records = [record(row) for row in rows]
    columns = ",\n".join(f"  {key} {_sql_type(key)}" for key in records[0])
    lines = [f"CREATE TABLE IF NOT EXISTS {SQL_TABLE} (\n{columns}\n);\n"]
    for values in records:
        literals = ", ".join(_literal(value) for value in values.values())
        lines.append(f"INSERT INTO {SQL_TABLE} ({', '.join(values)}) VALUES ({literals});")
    return "\n".join(lines) + "\n"


_REAL = frozenset({"avg_ts", "stddev_ts", "limit_ts"})
_TEXT = frozenset({"build_commit", "cpu_info", "backends", "model_filename", "model_type"})
_TEXT |= {"cpu_mask", "numa", "type_k", "type_v", "ser", "test", "test_time", "error"}


def _sql_type(key: str) -> str:
    return "REAL" if key in _REAL else "TEXT" if key in _TEXT else "INTEGER"


def _literal(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(int(value) if isinstance(value, bool) else value)


WRITERS: dict[str, Callable[..., str]] = {
    "md": markdown,
    "json": as_json,
    "jsonl": json_lines,
    "csv": comma_separated,
    "sql": sql,
}
