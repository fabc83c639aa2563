"""Bench rows appended to an SQLite file, the table that `-o sql` describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlacli.bench import BenchRow
from mlacli.bench_records import SQL_TABLE, record, sql_columns
from mlacli.errors import SpaceError, UsageError

if TYPE_CHECKING:
    from sqlite3 import Connection

_FLAG = "--db"
_WAIT = 30  # seconds, while another process writes to the same file


class BenchDatabase:
    """An open file with the table `llama_bench`; every row is a transaction of its own."""

    def __init__(self, path: Path) -> None:
        """Open or create the file, its table and the columns that it lacks. Raises UsageError."""
        import sqlite3

        self.path = path
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{_FLAG}: {path}: there is no such folder")
        try:
            self._connection: Connection = sqlite3.connect(path, timeout=_WAIT)
            with self._connection as connection:
                connection.execute("BEGIN IMMEDIATE")  # a file that cannot be written says so now
                _make_table(connection)
        except sqlite3.Error as problem:
            raise UsageError(f"{_FLAG}: {path}: {problem}") from problem

    def add(self, row: BenchRow) -> None:
        """Append a row; it is on disk when this returns. Raises SpaceError."""
        import sqlite3

        values = record(row)
        marks = ", ".join("?" * len(values))
        statement = f"INSERT INTO {SQL_TABLE} ({', '.join(values)}) VALUES ({marks})"
        try:
            with self._connection as connection:
                connection.execute(statement, tuple(values.values()))
        except sqlite3.Error as problem:
            raise SpaceError(f"{_FLAG}: {self.path}: {problem}") from problem

    def close(self) -> None:
        self._connection.close()


def _make_table(connection: Connection) -> None:
    """What earlier versions and the peers made keeps its rows: the new columns are NULL there."""
    columns = sql_columns()
    text = ", ".join(f"{name} {kind}" for name, kind in columns.items())
    connection.execute(f"CREATE TABLE IF NOT EXISTS {SQL_TABLE} ({text})")
    have = {row[1] for row in connection.execute(f"PRAGMA table_info({SQL_TABLE})")}
    for name, kind in columns.items():
        if name not in have:
            connection.execute(f"ALTER TABLE {SQL_TABLE} ADD COLUMN {name} {kind}")
