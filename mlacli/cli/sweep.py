"""`mlacli sweep`: speed along the context, in llama-sweep-bench's table."""

from __future__ import annotations

import json
from typing import Annotated, Any

from mlacli.cli import console
from mlacli.cli.flag_texts import NO_FLASH_ATTENTION
from mlacli.cli.flags import flags_of, run_settings
from mlacli.cli.options import StrictCommand, flag, new_app, takes
from mlacli.cli.plots import Plot, PlotWith, plots_of
from mlacli.errors import Interrupted
from mlacli.limits import Choice, Limit
from mlacli.settings import RunSettings, notes

OUTPUT = "Output"
_GENERATED = Limit("-n", 1, 1 << 20)
_REPETITIONS = Limit("-nrep", 1, 10_000)
_STRIDE = Limit("--sweep-stride", 1, 1 << 20)
_FORMAT = Choice("--output-format", ("table", "md", "jsonl"))
app = new_app()


class SweepCommand(StrictCommand):
    rewrites = NO_FLASH_ATTENTION | {"--no-warmup": ""}
    typed_only = ("--n-predict",)  # per step here


_N = flag("-n --predict --n-predict", OUTPUT, "N", "Tokens generated per step.", "-ub / 4")
_NREP = flag("-nrep --n-repetitions", OUTPUT, "N", "Times that the first step is run.", "1")
_EVERY = flag("--sweep-stride", OUTPUT, "N", "Measure every N-th step.", "1")
_WARM = flag("-wb --warmup-batch", OUTPUT, "", "Run a batch before the clock starts.", "off")
_OUTPUT = flag("--output-format", OUTPUT, "table|md|jsonl", "Format of the steps.", "table")
_MEMORY = flag("--sweep-memory", OUTPUT, "", "Columns for the most memory held so far, in MiB.")


@app.command("sweep", cls=SweepCommand)
@takes(flags_of(RunSettings), first=True)
def sweep(
    generated: Annotated[str | None, _N] = None,
    repetitions: Annotated[str, _NREP] = "1",
    stride: Annotated[str, _EVERY] = "1",
    warmup: Annotated[bool, _WARM] = False,
    output: Annotated[str, _OUTPUT] = "table",
    memory: Annotated[bool, _MEMORY] = False,
    plot: Plot = None,
    plot_with: PlotWith = None,
    **values: Any,
) -> int:
    """Measure prompt batches and generation behind more and more tokens, until -c is full."""
    settings = run_settings(values)
    as_json = _FORMAT.parse(output) == "jsonl"
    n_gen = _GENERATED.parse(generated) if generated else max(1, settings.n_ubatch // 4)
    times, every = _REPETITIONS.parse(repetitions), _STRIDE.parse(stride)
    plots = plots_of(plot, plot_with)
    for line in notes(settings):
        console.note(f"note: {line}")

    from mlacli import sweep as sweeping
    from mlacli.bench_runner import facts
    from mlacli.cli.progress import bar
    from mlacli.context import padded_context
    from mlacli.engine import Cancelled
    from mlacli.loading import memory_notes, start_engine, watched_load
    from mlacli.machine import make_jit
    from mlacli.report import context_size
    from mlacli.results import Row, swept
    from mlacli.signals import EXIT_OF_SIGNAL, stop_on_signals

    model = watched_load(settings, bar)
    n_ctx = context_size(model.config, settings, note=console.note)
    sweeping.check_room(n_gen, padded_context(n_ctx, flash=settings.flash_attn))
    engine = start_engine(model, settings, make_jit(), n_ctx)
    with bar("compiling", "kernels") as progress:
        engine.prepare(*engine.plan.graphs, progress=progress)
    for line in (*memory_notes(model, settings), *(f"note: {n}" for n in engine.pool.notes)):
        console.note(line)
    if not as_json:
        console.write(sweeping.head(engine, memory))
    rows: list[Row] = []
    with (
        stop_on_signals(engine) as received,
        bar("sweep", "positions", background=False) as progress,
    ):
        try:
            for step in sweeping.sweep(
                engine,
                n_gen,
                repetitions=times,
                stride=every,
                warmup=warmup,
                memory=memory,
                progress=progress,
            ):
                told = step.json_line(engine)
                console.write((told if as_json else step.table_line) + "\n")
                rows += swept(json.loads(told))
        except Cancelled as problem:
            raise Interrupted(EXIT_OF_SIGNAL[received[0]]) from problem
        finally:  # what was measured is drawn even when the rest is stopped
            plots.show(rows, facts(model).description)
    return 0
