"""`mlacli tune`: flags that suit a model on this machine, measured and written down."""

from __future__ import annotations

from typing import Annotated, Any

from mlacli.cli import console
from mlacli.cli.flag_texts import NO_FLASH_ATTENTION
from mlacli.cli.flags import flags_of, given_settings
from mlacli.cli.options import StrictCommand, flag, new_app, takes
from mlacli.config_file import MODELS, ConfigFile, change, read_config_file
from mlacli.debug import ENV
from mlacli.errors import UsageError
from mlacli.limits import Choice, Limit, parse_list
from mlacli.settings import RunSettings, default_model, fitted, notes

TUNING, NAMES = "Tuning", ("t", "tb", "ub", "mla-threshold")
_TUNED = ("n_threads", "n_threads_batch", "n_ubatch", "mla_threshold", "n_ctx")
_SECONDS = Limit("--time", 1, 86_400)
_ONLY = Choice("--only", NAMES)
app = new_app()


class TuneCommand(StrictCommand):
    rewrites = NO_FLASH_ATTENTION
    creates_config = True


_TIME = flag("--time", TUNING, "SECONDS", "Most time that measuring takes.", "60")
_SOME = flag("--only", TUNING, "LIST", "Some of the flags.", ",".join(NAMES), NAMES)
_DRY = flag("--dry-run", TUNING, "", "Show what was found, and write nothing.")


@app.command("tune", cls=TuneCommand)
@takes((p for p in flags_of(RunSettings) if p.name not in _TUNED), first=True)
def tune(
    only: Annotated[str, _SOME] = ",".join(NAMES),
    time: Annotated[str, _TIME] = "60",
    dry_run: Annotated[bool, _DRY] = False,
    **values: Any,
) -> int:
    """Find -t, -tb, -ub and --mla-threshold for a model on this machine by measuring.

    The values take turns, and the default stays unless another is faster by more than the noise.
    What is found is written to the configuration file, for files of the model's name.
    """
    seconds, names = _SECONDS.parse(time), parse_list(_ONLY, only)
    settings = {"model": default_model()} | given_settings(values)
    file = None if dry_run else _file()
    for line in notes(fitted(**settings)):
        console.note(f"note: {line}")

    from tabulate import tabulate

    from mlacli.bench_runner import EngineRunner
    from mlacli.tune import Tuner
    from mlacli.tune_table import HEADS, changes, table_lines, value_text

    runner = EngineRunner([], repetitions=1, warmup=False, roof=False, keeps=8)
    tuner = Tuner(settings, runner, runner.chooser, console.note, seconds)
    found = tuner.tune(names)
    for line in runner.notes:
        console.note(f"note: {line}")
    table = tabulate(table_lines(found), HEADS, "github", disable_numparse=True)
    console.write(f"{table}\n\n")
    for tuned in found:
        console.write(f"{tuned.flag} {value_text(tuned.chosen)}: {tuned.reason}\n")
    if file is not None:
        model = settings["model"].name
        own = {entry.key: entry.value for entry in file.for_model_name(model).values()}
        elsewhere = file.keys_for_all_models()
        console.write(_written(file, model, changes(found, own, elsewhere, tuner.default_t)))
    return 0


def _file() -> ConfigFile:
    """The file to change, checked before anything is measured. Raises UsageError."""
    path = ENV.config_file
    if path is None:
        raise UsageError("MLACLI_CONFIG: is empty, so there is no file to write to (or --dry-run)")
    return read_config_file(path)


def _written(file: ConfigFile, model: str, values: dict[str, int | None]) -> str:
    """What was done to the file. Raises SpaceError."""
    table = (MODELS, model)
    change(file.path, table, values)
    kept = {key: value for key, value in values.items() if value is not None}
    if not kept:
        return f"{file.path}: the defaults stay, so nothing is set for {model}\n"
    lines = "".join(f"{key} = {value}\n" for key, value in kept.items())
    return f'written to {file.path}:\n[{MODELS}."{model}"]\n{lines}'
