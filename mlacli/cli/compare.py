"""`mlacli compare`: results of bench or sweep side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlacli.cli import console
from mlacli.cli.options import StrictCommand, flag, new_app, parameter, takes
from mlacli.errors import UsageError

app = new_app()


class CompareCommand(StrictCommand):
    operands = "file"


_FILE = flag("--file", "Files", "FILE", "A .jsonl file; may also be given without the flag.")


@app.command("compare", cls=CompareCommand)
@takes([parameter("file", _FILE, list[str] | None)])
def compare(**values: Any) -> int:
    """Compare files that bench -o jsonl, sweep or a peer's bench wrote: mlacli compare A B [C ...].

    Each test that both have: the medians, their ratio, and the least and greatest ratio of two
    samples. The first file is what the others are compared with.
    """
    files = values["file"] or []
    if len(files) < 2:
        raise UsageError(f"compare: needs two files or more (got {len(files)})")

    from tabulate import tabulate

    from mlacli import results

    try:
        first, *others = (results.rows_of(Path(name)) for name in files)
    except OSError as problem:
        raise UsageError(f"compare: {problem.filename}: {problem.strerror}") from problem
    except ValueError as problem:
        raise UsageError(f"compare: {problem}") from problem
    for name, rows in zip(files[1:], others, strict=True):
        compared = results.compare(first, rows)
        if not compared:
            raise UsageError(f"compare: {files[0]} and {name} have no test in common")
        lines = [
            (
                one.test,
                f"{results.middle(one.first):.2f}",
                f"{results.middle(one.second):.2f}",
                f"{one.ratio:.2f} ({one.spread[0]:.2f} .. {one.spread[1]:.2f})",
            )
            for one in compared
        ]
        heads = ("test", Path(files[0]).stem, Path(name).stem, "ratio (spread)")
        console.write(tabulate(lines, heads, "github", disable_numparse=True) + "\n")
    return 0
