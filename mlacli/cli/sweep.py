"""`mlacli sweep`: speed along the context, in llama-sweep-bench's table."""

from __future__ import annotations

from typing import Annotated, Any

from mlacli.cli import console
from mlacli.cli.flags import NO_FLASH_ATTENTION, flags_of, run_settings
from mlacli.cli.options import StrictCommand, flag, new_app, takes
from mlacli.errors import Interrupted
from mlacli.limits import Choice, Limit
from mlacli.settings import RunSettings, notes

OUTPUT = "Output"
_GENERATED = Limit("-n", 1, 1 << 20)
_REPETITIONS = Limit("-nrep", 1, 10_000)
_STRIDE = Limit("--sweep-stride", 1, 1 << 20)
_FORMAT = Choice("--output-format", ("table", "jsonl"))
app = new_app()


class SweepCommand(StrictCommand):
    rewrites = NO_FLASH_ATTENTION | {"--no-warmup": ""}


_N = flag("-n --predict --n-predict", OUTPUT, "N", "Tokens generated per step.", "-ub / 4")
_NREP = flag("-nrep --n-repetitions", OUTPUT, "N", "Times that the first step is run.", "1")
_EVERY = flag("--sweep-stride", OUTPUT, "N", "Measure every N-th step.", "1")
_WARM = flag("-wb --warmup-batch", OUTPUT, "", "Run a batch before the clock starts.", "off")
_OUTPUT = flag("--output-format", OUTPUT, "table|jsonl", "Format of the steps.", "table")


@app.command("sweep", cls=SweepCommand)
@takes(flags_of(RunSettings), first=True)
def sweep(
    generated: Annotated[str | None, _N] = None,
    repetitions: Annotated[str, _NREP] = "1",
    stride: Annotated[str, _EVERY] = "1",
    warmup: Annotated[bool, _WARM] = False,
    output: Annotated[str, _OUTPUT] = "table",
    **values: Any,
) -> int:
    """Measure prompt batches and generation behind more and more tokens, until -c is full."""
    settings = run_settings(values)
    as_json = _FORMAT.parse(output) == "jsonl"
    n_gen = _GENERATED.parse(generated) if generated else max(1, settings.n_ubatch // 4)
    times, every = _REPETITIONS.parse(repetitions), _STRIDE.parse(stride)
    for line in notes(settings):
        console.note(f"note: {line}")

    from mlacli import sweep as sweeping
    from mlacli.engine import Cancelled
    from mlacli.loading import model_for
    from mlacli.machine import make_jit
    from mlacli.report import context_size
    from mlacli.session import start_engine
    from mlacli.signals import EXIT_OF_SIGNAL, stop_on_signals

    model = model_for(settings)
    n_ctx = context_size(model.config, settings, note=console.note)
    engine = start_engine(model, settings, make_jit(), n_ctx)
    engine.prepare(*engine.plan.graphs)
    if not as_json:
        head = (sweeping.head_line(engine), "", sweeping.COLUMNS, sweeping.LINE)
        console.write("\n".join(head) + "\n")
    with stop_on_signals(engine) as received:
        try:
            for step in sweeping.sweep(
                engine, n_gen, repetitions=times, stride=every, warmup=warmup
            ):
                console.write((step.json_line(engine) if as_json else step.table_line) + "\n")
        except Cancelled as problem:
            raise Interrupted(EXIT_OF_SIGNAL[received[0]]) from problem
    return 0
