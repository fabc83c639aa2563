"""`mlacli doctor`: what this machine offers to mlacli, and what to do about what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from mlacli.cli import console
from mlacli.cli.flag_texts import MODEL
from mlacli.cli.options import DEBUG, StrictCommand, flag, new_app

app = new_app()
_MODEL = flag("-m --model", MODEL, "FILE", "Also look at this GGUF file.")
_JSON = flag("--json", "Output", "", "Print JSON.")


@app.command("doctor", cls=StrictCommand)
def doctor(
    model: Annotated[str | None, _MODEL] = None,
    json: Annotated[bool, _JSON] = False,
    debug: Annotated[bool, DEBUG] = False,
) -> int:
    """Look at the processor, memory, caches and limits that mlacli works with, and measure them.

    Each line is ok, a note (something is to be gained: -> says how) or a problem, which keeps
    mlacli from running and sets the exit code.
    """
    from mlacli.doctor import examine
    from mlacli.findings import exit_code_of, lines_of

    findings = []
    for finding in examine(Path(model) if model is not None else None):
        findings.append(finding)
        if not json:
            first, *others = lines_of(finding)
            mark = console.marked(first[: len(finding.status)], finding.status)
            console.write("\n".join([mark + first[len(finding.status) :], *others]) + "\n")
    if json:
        from json import dumps

        console.write(dumps([finding.record() for finding in findings], indent=2) + "\n")
    return exit_code_of(findings)
