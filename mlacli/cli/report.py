"""`mlacli report`: what a model needs with these flags, from its headers alone."""

from __future__ import annotations

from typing import Any

from mlacli.cli import console
from mlacli.cli.flags import MODEL, flags_of, run_settings
from mlacli.cli.options import Flag, StrictCommand
from mlacli.settings import RunSettings, notes


def report(**values: Any) -> int:
    """Print the cache and compute buffers, bytes per token and work per token of a model.

    Reads the file's headers only: no weight is touched.
    """
    settings = run_settings(values)
    for line in notes(settings):
        console.note(f"note: {line}")

    from mlacli.report import report_json, report_text

    console.write(report_json(settings) if values["json"] else report_text(settings))
    return 0


command = StrictCommand(
    "report",
    callback=report,
    help=report.__doc__,
    rewrites={"-no-fa": "-fa off", "--no-flash-attn": "-fa off"},
    params=[
        *flags_of(RunSettings),
        Flag("--json json", MODEL, is_flag=True, help="Print JSON."),
    ],
)
