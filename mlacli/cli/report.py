"""`mlacli report`: what a model needs with these flags, from its headers alone."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator, Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

from mlacli.cli import console
from mlacli.cli.flag_texts import MODEL, NO_FLASH_ATTENTION
from mlacli.cli.flags import flags_of, given_settings
from mlacli.cli.options import StrictCommand, flag, new_app, takes
from mlacli.errors import SpaceError, UsageError
from mlacli.limits import ByteSize, Limit, Switch, parse_list, rules
from mlacli.report_grid import AXES, Row, as_dict, combinations, notes_of, rows, table
from mlacli.settings import RunSettings, fitted, notes
from mlacli.units import size_text

OUTPUT = "Output"
_MEMORY, _FIT = ByteSize("--memory"), Switch("--fit")
_FIT_TARGET, _FIT_CONTEXT = Limit("-fitt", 0, 2**30), Limit("-fitc", 1, 2**30)
_LEFT_FREE = 256  # MiB: what Python and the compiler take beside the buffers
_MAX_BARS = 64
_OF_MODEL = ("model", "overrides", "rope", "check_tensors")
app = new_app()


class ReportCommand(StrictCommand):
    rewrites = NO_FLASH_ATTENTION
    typed_only = ("--fit",)  # run's -fit is another one


def _listed() -> Iterator[Parameter]:
    """The flags of RunSettings; those that can have several values say so."""
    for parameter in flags_of(RunSettings):
        if parameter.name in AXES:
            parameter.annotation.__metadata__[0].metavar += ",..."
        if parameter.name != "fit":  # it picks flags here
            yield parameter


_SIZE = flag(
    "--memory", MODEL, "SIZE", "Reckon with this much memory: 64GiB, 512MiB, 16G.", "what there is"
)
_WANTS_FIT = flag(
    "-fit --fit",
    MODEL,
    "[on|off]",
    "Pick the largest context that fits, up to -c, and the -ctk, -ub and -amb for it.",
    "off",
)
_TARGET = flag(
    "-fitt --fit-target",
    MODEL,
    "MIB",
    "Memory that --fit leaves free.",
    f"{_LEFT_FREE}, 0 with --memory",
)
_LEAST = flag("-fitc --fit-ctx", MODEL, "N", "The least context that --fit may pick.", "1")
_PLOT = flag("--plot", OUTPUT, "FILE", "Draw what each combination takes (.png, .svg, .pdf).")


@app.command("report", cls=ReportCommand)
@takes(_listed(), first=True)
def report(
    memory: Annotated[str | None, _SIZE] = None,
    wants_fit: Annotated[str | None, _WANTS_FIT] = None,
    fit_target: Annotated[str | None, _TARGET] = None,
    fit_context: Annotated[str | None, _LEAST] = None,
    json: Annotated[bool, flag("--json", OUTPUT, "", "Print JSON.")] = False,
    plot: Annotated[str | None, _PLOT] = None,
    **values: Any,
) -> int:
    """Print the cache and compute buffers, bytes per token and work per token of a model.

    Reads the file's headers only: no weight is touched. Flags that memory depends on take lists
    (-c 4096,65536 -ctk f16,q8_KV); several combinations give a table with a row for each.
    """
    available = _MEMORY.parse(memory) if memory is not None else None
    margin = 0 if memory is not None else _LEFT_FREE
    margin = _FIT_TARGET.parse(fit_target) if fit_target is not None else margin
    least = _FIT_CONTEXT.parse(fit_context) if fit_context is not None else 1
    fixed, chosen = _combinations(values)
    picture = _picture(plot, len(chosen))
    if wants_fit is not None and _FIT.parse(wants_fit):
        if len(chosen) > 1:
            raise UsageError(f"--fit: takes one value of each flag ({len(chosen)} combinations)")
        settings = _settings(fixed, chosen[0])

        from mlacli.cli.report_fit import fit

        names = {*fixed, *chosen[0]}
        found = [fit(settings, names, available, margin * 2**20, least, json=json)]
    else:
        found = _reports(fixed, chosen, available, json=json)
    if picture is not None:
        _draw(found, picture)
    return 0


def dry_run(settings: RunSettings, *, json: bool = False) -> int:
    """Print the report of what `run` would take. Raises SpaceError when that does not fit."""
    from mlacli.report import TOO_LARGE, make_report, report_json
    from mlacli.report_format import format_report

    found = make_report(settings)
    console.write(report_json(found) if json else format_report(found))
    memory = found.memory
    if memory.verdict == TOO_LARGE:
        raise SpaceError(
            f"-c {found.n_ctx}: needs {size_text(memory.needed_bytes)}, "
            f"{size_text(memory.available_bytes)} available"
        )
    return 0


def _picture(plot: str | None, n_bars: int) -> Path | None:
    """Where to draw. Raises UsageError."""
    if plot is None:
        return None
    if n_bars > _MAX_BARS:
        raise UsageError(f"--plot: {n_bars} combinations are too many to draw ({_MAX_BARS})")

    from mlacli.pictures import check_picture

    check_picture("--plot", Path(plot))
    return Path(plot)


def _combinations(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what all combinations have in common, the combinations), by field. Raises UsageError."""
    known = rules(RunSettings)
    axes = {f: parse_list(known[f], values[f]) for f in AXES if values[f] is not None}
    fixed = given_settings({f: value for f, value in values.items() if f not in axes})
    return fixed, combinations(axes)


def _settings(fixed: Mapping[str, Any], chosen: Mapping[str, Any]) -> RunSettings:
    """Of one combination, whose flags without effect are noted. Raises UsageError."""
    settings = fitted(**fixed, **chosen)
    for line in notes(settings):
        console.note(f"note: {line}")
    return settings


def _reports(
    fixed: Mapping[str, Any], chosen: Sequence[dict[str, Any]], available: int | None, *, json: bool
) -> list[Row]:
    """Print the report of one combination, or the table of several."""
    alone = _settings(fixed, chosen[0]) if len(chosen) == 1 else None

    from mlacli.free_memory import available_bytes
    from mlacli.loading import model_for
    from mlacli.report import report_json, report_of
    from mlacli.report_format import format_report

    model = model_for(RunSettings(**{name: fixed[name] for name in _OF_MODEL if name in fixed}))
    available = available_bytes() if available is None else available
    if alone is not None:
        single = report_of(model, alone, available)
        console.write(report_json(single) if json else format_report(single))
        return [Row(chosen[0], single)]
    found = list(rows(fixed, chosen, lambda settings: report_of(model, settings, available)))
    if json:
        console.write(json_format.dumps([as_dict(row) for row in found], indent=2) + "\n")
    else:
        console.write(table(found))
    for line in notes_of(found, fixed):
        console.note(f"note: {line}")
    if not any(row.report for row in found):
        raise UsageError(f"none of {len(found)} combinations can work: {found[0].error}")
    return found


def _draw(found: Sequence[Row], path: Path) -> None:
    """Raises SpaceError."""
    from mlacli.report_picture import draw

    drawn = [row for row in found if row.report]
    if len(drawn) < len(found):
        n = len(found) - len(drawn)
        console.note(f"note: --plot leaves out {n} combinations that cannot work")
    draw(drawn, path, "--plot")
