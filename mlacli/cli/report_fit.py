"""`mlacli report --fit`: what was picked, the command that uses it, and its report."""

from __future__ import annotations

import json as json_format
import shlex
from collections.abc import Collection
from dataclasses import asdict, replace
from typing import Any

from mlacli.cli import console
from mlacli.cli.flags import words_of
from mlacli.engine import Model
from mlacli.errors import SpaceError
from mlacli.fit_flags import Fitted, fit_flags
from mlacli.free_memory import available_bytes
from mlacli.loading import model_for
from mlacli.report import PAGES, Report, report_of
from mlacli.report_format import format_report
from mlacli.report_grid import FLAGS, Row
from mlacli.settings import RunSettings
from mlacli.units import size_text

_LABEL = 30  # width of the first column, as in the report


def fit(
    settings: RunSettings,
    names: Collection[str],
    memory: int | None,
    margin: int,
    least: int,
    *,
    json: bool,
) -> Row:
    """Pick and print. `names` are the fields that were given; `margin` bytes stay free.

    Raises SpaceError when nothing fits.
    """
    model = model_for(replace(settings, mmap=True))
    available = available_bytes() if memory is None else memory
    limit = available - margin
    best = fit_flags(model, settings, names, limit, least=least)
    found = report_of(model, best.settings, available)
    resident = None
    if found.memory.verdict == PAGES:
        resident = _resident(model, settings, names, limit, least)
    if json:
        console.write(json_format.dumps(_facts(best, names, found, resident), indent=2) + "\n")
    else:
        lines = _lines(best, names, limit, resident)
        console.write("\n".join([*lines, "", format_report(found)]))
    return Row({}, found)


def _resident(
    model: Model, settings: RunSettings, names: Collection[str], limit: int, least: int
) -> Fitted | None:
    """The largest context beside which the weights stay in memory, if there is one."""
    if limit <= model.file.size_bytes:
        return None
    try:
        return fit_flags(model, settings, names, limit, least=least, with_weights=True)
    except SpaceError:  # then they page beside any context
        return None


def command_of(best: Fitted, names: Collection[str]) -> str:
    """The command line that runs a model so."""
    fields = {"n_ctx", *names, *(step.field for step in best.steps)}
    return shlex.join(["mlacli", "run", *words_of(best.settings, fields)])


def _lines(best: Fitted, names: Collection[str], limit: int, resident: Fitted | None) -> list[str]:
    n_ctx = best.settings.n_ctx
    lines = [f"{'fit':<{_LABEL}}{n_ctx} of {best.n_wanted} tokens in {size_text(limit)}"]
    for step in best.steps:
        label = f"  {FLAGS[step.field]} {step.after}"
        before = f"{step.n_before} tokens" if step.n_before else "nothing"
        lines.append(f"{label:<{_LABEL}}{before} with {step.before}, {step.n_after} so")
    lines.append(f"{'command':<{_LABEL}}{command_of(best, names)}")
    if resident is not None:
        label = "  without paging weights"
        lines.append(f"{label:<{_LABEL}}{command_of(resident, names)}")
    return lines


def _facts(
    best: Fitted, names: Collection[str], found: Report, resident: Fitted | None
) -> dict[str, Any]:
    def facts(one: Fitted) -> dict[str, Any]:
        steps = [{"flag": FLAGS[step.field], **asdict(step)} for step in one.steps]
        command = command_of(one, names)
        return {"command": command, "n_ctx": one.settings.n_ctx, "steps": steps}

    return {
        **facts(best),
        "n_wanted": best.n_wanted,
        "without_paging": facts(resident) if resident else None,
        "report": asdict(found),
    }
