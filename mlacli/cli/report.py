"""`mlacli report`: what a model needs with these flags, from its headers alone."""

from __future__ import annotations

from typing import Annotated, Any

from mlacli.cli import console
from mlacli.cli.flags import NO_FLASH_ATTENTION, flags_of, run_settings
from mlacli.cli.options import StrictCommand, flag, new_app, takes
from mlacli.settings import RunSettings, notes

app = new_app()


class ReportCommand(StrictCommand):
    rewrites = NO_FLASH_ATTENTION


@app.command("report", cls=ReportCommand)
@takes(flags_of(RunSettings), first=True)
def report(
    json: Annotated[bool, flag("--json", "Output", "", "Print JSON.")] = False, **values: Any
) -> int:
    """Print the cache and compute buffers, bytes per token and work per token of a model.

    Reads the file's headers only: no weight is touched.
    """
    settings = run_settings(values)
    for line in notes(settings):
        console.note(f"note: {line}")

    from mlacli.report import report_json, report_text

    console.write(report_json(settings) if json else report_text(settings))
    return 0
