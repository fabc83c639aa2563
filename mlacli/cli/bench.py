"""`mlacli bench`: speed of every combination of flags, in llama-bench's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mlacli import bench as benching
from mlacli.bench_pivot import PIVOTS, Pivot, pivot_of, pivoted
from mlacli.bench_records import WRITERS, record, with_samples
from mlacli.cli import console
from mlacli.cli.bench_flags import grid_of, list_flags
from mlacli.cli.bench_progress import BenchProgress
from mlacli.cli.flag_texts import NO_FLASH_ATTENTION, PROFILE_HELP
from mlacli.cli.options import StrictCommand, flag, new_app, takes
from mlacli.cli.peer_toggles import toggle_notes, toggles
from mlacli.cli.plots import Plot, PlotWith, plots_of
from mlacli.errors import UsageError
from mlacli.limits import Choice, Limit, Switch

if TYPE_CHECKING:
    from mlacli.bench_db import BenchDatabase

OUTPUT = "Output"
_REPETITIONS = Limit("-r", 1, 10_000)
_DELAY = Limit("--delay", 0, 86_400, float)
_WARMUP = Switch("-w")
_FORMATS = tuple(WRITERS)
app = new_app()


class BenchCommand(StrictCommand):
    rewrites = NO_FLASH_ATTENTION | {
        "--no-warmup": "-w 0",
        "--no-mmap": "-mmp 0",
        "-no-fmoe": "-fmoe 0",
    }


_REPEAT = flag("-r --repetitions", OUTPUT, "N", "Times that each test is run.", "5")
_WARM = flag("-w --warmup", OUTPUT, "[1|0]", "Run each test once before the clock starts.", "1")
_REST = flag("--delay", OUTPUT, "S", "Seconds of rest before each test.", "0")
_ROOF = flag("--roof", OUTPUT, "", "Measure the machine; column `limit`.")
_OUTPUT = flag("-o --output", OUTPUT, "|".join(WRITERS), "Format of the table.", "md")
_ERR = flag(
    "-oe --output-err", OUTPUT, "|".join(WRITERS), "The table in this format on stderr, too."
)
_DB = flag("--db", OUTPUT, "FILE", "-o sql: append the rows to this SQLite file instead.")
_PIVOT = flag(
    "--pivot",
    OUTPUT,
    "|".join(PIVOTS),
    "-o md: the values of this flag side by side, with the speedup.",
)
_STEPS = flag("--progress", OUTPUT, "", "A line on stderr for each run that begins.")
_PROFILE = flag("--profile", OUTPUT, "", PROFILE_HELP)
_VERBOSE = flag("-v --verbose", OUTPUT, "", "Say more on stderr.")


@app.command("bench", cls=BenchCommand)
@takes([*list_flags(), *toggles()], first=True)
def bench(
    repetitions: Annotated[str, _REPEAT] = "5",
    warmup: Annotated[str, _WARM] = "1",
    delay: Annotated[str, _REST] = "0",
    roof: Annotated[bool, _ROOF] = False,
    output: Annotated[str | None, _OUTPUT] = None,
    output_err: Annotated[str | None, _ERR] = None,
    db: Annotated[str | None, _DB] = None,
    pivot: Annotated[str | None, _PIVOT] = None,
    plot: Plot = None,
    plot_with: PlotWith = None,
    progress: Annotated[bool, _STEPS] = False,
    profile: Annotated[bool, _PROFILE] = False,
    verbose: Annotated[bool, _VERBOSE] = False,
    **values: Any,
) -> int:
    """Measure prompt processing and generation for every combination of the values given."""
    n, warm, rest = _REPETITIONS.parse(repetitions), _WARMUP.parse(warmup), _DELAY.parse(delay)
    format_name = output or ("sql" if db else "md")
    cases = benching.cases(grid_of(values))
    side_by_side = _pivot(pivot, format_name, roof, cases)
    writers = _writers(format_name, output_err, db, roof, side_by_side)
    plots = plots_of(plot, plot_with)
    plots.plan([record(benching.BenchRow(case)) for case in cases])
    for line in toggle_notes(values):
        console.note(line)

    from mlacli.bench_runner import EngineRunner

    runner = EngineRunner(
        cases, repetitions=n, warmup=warm, roof=roof, profile=profile, verbose=verbose, delay=rest
    )
    database = _database(db)
    rows: list[benching.BenchRow] = []
    try:
        with BenchProgress(len(cases), n + warm, lines=progress) as bar:
            runner.progress = bar.run
            for row in _measured(cases, runner, bar):
                rows.append(row)
                if database is not None:
                    database.add(row)
    finally:  # what was measured is shown even when the rest is stopped
        for line in runner.notes:
            console.note(f"note: {line}")
        if rows:
            _write(rows, writers, database)
            done = [with_samples(row) for row in rows if row.result]
            plots.show(done, ", ".join(dict.fromkeys(one["model_type"] for one in done)))
    return int(any(row.error for row in rows))


def _measured(
    cases: Sequence[benching.BenchCase], runner: benching.Runner, bar: BenchProgress
) -> Iterator[benching.BenchRow]:
    """Each row as it is measured, with a line on stderr."""

    def run(case: benching.BenchCase) -> benching.BenchResult:
        bar.test(case.test)
        return runner(case)

    for number, row in enumerate(benching.run_cases(cases, run), start=1):
        told = row.error or f"{row.avg_ts:.2f} t/s"
        bar.line(f"{number}/{len(cases)}: {row.case.test} {told}")
        for line in row.result.profile if row.result else ():
            bar.line(line)
        yield row


Writer = Callable[[Sequence[benching.BenchRow]], str]


def _writers(
    format_name: str, output_err: str | None, db: str | None, roof: bool, pivot: Pivot | None
) -> tuple[Writer | None, Writer | None]:
    """What makes the text for stdout and for stderr. Raises UsageError."""
    name = Choice("-o", _FORMATS).parse(format_name)
    if db and name != "sql":
        raise UsageError(f"--db: goes with -o sql, not -o {name} (-oe {name} shows it as well)")

    def writer(flag_name: str, format_name: str) -> Writer:
        make = WRITERS[Choice(flag_name, _FORMATS).parse(format_name)]
        if pivot is not None and format_name == "md":
            return lambda rows: pivoted(rows, pivot)
        return lambda rows: make(rows, roof)

    return None if db else writer("-o", name), writer("-oe", output_err) if output_err else None


def _pivot(
    word: str | None, format_name: str, roof: bool, cases: Sequence[benching.BenchCase]
) -> Pivot | None:
    """Raises UsageError."""
    if word is None:
        return None
    if format_name != "md":
        raise UsageError(f"--pivot: makes a table for people (-o md), not -o {format_name}")
    if roof:
        raise UsageError("--pivot and --roof: give one of them, not both")
    return pivot_of(Choice("--pivot", tuple(PIVOTS)).parse(word), cases)


def _database(path: str | None) -> BenchDatabase | None:
    """Raises UsageError."""
    if path is None:
        return None
    from mlacli.bench_db import BenchDatabase

    return BenchDatabase(Path(path))


def _write(
    rows: Sequence[benching.BenchRow],
    writers: tuple[Writer | None, Writer | None],
    database: BenchDatabase | None,
) -> None:
    out, err = writers
    if err is not None:
        console.note(err(rows).rstrip("\n"))
    if out is not None:
        console.write(out(rows))
    if database is not None:
        database.close()
        what = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
        console.note(f"note: {what} appended to {database.path}")
