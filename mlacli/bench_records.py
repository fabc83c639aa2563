"""Bench rows as data: JSON, JSON lines, CSV and SQL, with the peers' keys."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from mlacli import __version__
from mlacli.bench import BenchCase, BenchRow
from mlacli.bench_table import cpu_mask, load_mode, markdown, model_name, plain
from mlacli.settings import RunSettings

SQL_TABLE = "llama_bench"  # the name that llama.cpp's own comparison script looks for


def record(row: BenchRow) -> dict[str, Any]:
    """A row with llama-bench's keys (those of ik_llama.cpp for its own flags), then our own.

    What llama.cpp tells of GPUs and the like is there as well: its own rows then fit into the same
    SQL table, and its comparison script finds the columns that it asks for.
    """
    settings, result = row.case.settings, row.result
    return {
        "build_commit": __version__,
        "build_number": 0,
        "cpu_info": result.cpu_info if result else "",
        "gpu_info": "",
        "backends": "CPU",
        "model_filename": str(settings.model),
        "model_type": model_name(row),
        "model_size": result.model.size if result else 0,
        "model_n_params": result.model.n_params if result else 0,
        "n_batch": settings.n_batch,
        "n_ubatch": settings.n_ubatch,
        "n_threads": row.case.n_threads,
        "cpu_mask": cpu_mask(settings),
        "cpu_strict": settings.cpu_strict,
        "poll": settings.poll,
        "prio": settings.prio,
        "numa": settings.numa or "",
        "type_k": settings.type_k,
        "type_v": settings.type_v,
        "n_gpu_layers": 0,
        "n_cpu_moe": 0,
        "split_mode": "none",
        "main_gpu": 0,
        "no_kv_offload": False,
        "flash_attn": settings.flash_attn,
        "mla_attn": settings.mla,
        "attn_max_batch": settings.amb_mib,
        "ser": plain(settings.ser),
        "devices": "none",
        "tensor_split": "0.00",
        "tensor_buft_overrides": "none",
        "use_mmap": settings.mmap,
        "load_mode": load_mode(settings),
        "lazy_mode": "off",
        "embeddings": False,
        "no_op_offload": 0,
        "no_host": False,
        "repack": settings.rtr,
        "use_thp": settings.thp,
        "fused_moe": settings.fmoe,
        "fit_target": 0,
        "fit_min_ctx": 0,
        "n_prompt": row.case.n_prompt,
        "n_gen": row.case.n_gen,
        "n_depth": row.case.n_depth + row.case.n_fill,
        "test_time": result.test_time if result else "",
        "avg_ns": row.avg_ns if result else None,
        "stddev_ns": row.stddev_ns if result else None,
        "avg_ts": _rounded(row.avg_ts) if result else None,
        "stddev_ts": _rounded(row.stddev_ts) if result else None,
        "test": row.case.test,
        "limit_ts": _rounded(result.limit_ts) if result and result.limit_ts else None,
        "major_faults": result.major_faults if result else 0,
        "error": row.error,
    }


def _rounded(rate: float) -> float:
    """Six digits behind the point, as the peers write."""
    return round(rate, 6)


def with_samples(row: BenchRow) -> dict[str, Any]:
    """The same, and what each repetition took."""
    samples = list(row.result.samples_ns) if row.result else []
    rates = [_rounded(rate) for rate in row.samples_ts]
    return record(row) | {"samples_ns": samples, "samples_ts": rates}


def as_json(rows: Sequence[BenchRow], roof: bool = False) -> str:
    """An array of objects."""
    return json.dumps([with_samples(row) for row in rows], indent=2, allow_nan=False) + "\n"


def json_lines(rows: Sequence[BenchRow], roof: bool = False) -> str:
    """One object per line."""
    return "".join(json.dumps(with_samples(row), allow_nan=False) + "\n" for row in rows)


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
    """As llama-bench writes it: booleans as 0 and 1, rates with six digits behind the point.

    What was not measured is an empty field.
    """
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return f"{value:.6f}"
    return "" if value is None else value


def sql(rows: Sequence[BenchRow], roof: bool = False) -> str:
    """CREATE TABLE IF NOT EXISTS and one INSERT per row."""
    if not rows:
        return ""
    columns = ",\n".join(f"  {name} {kind}" for name, kind in sql_columns().items())
    lines = [f"CREATE TABLE IF NOT EXISTS {SQL_TABLE} (\n{columns}\n);\n"]
    for values in map(record, rows):
        literals = ", ".join(_literal(value) for value in values.values())
        lines.append(f"INSERT INTO {SQL_TABLE} ({', '.join(values)}) VALUES ({literals});")
    return "\n".join(lines) + "\n"


def sql_columns() -> dict[str, str]:
    """Name -> SQL type of every column, in order."""
    some = record(BenchRow(BenchCase(RunSettings(), 1, 0)))
    return {key: _REAL.get(key) or _sql_type(value) for key, value in some.items()}


_REAL = dict.fromkeys(("avg_ts", "stddev_ts", "limit_ts"), "REAL")


def _sql_type(value: object) -> str:
    return "TEXT" if isinstance(value, str) else "INTEGER"


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
