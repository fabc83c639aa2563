"""`mlacli chat`: a conversation."""

from __future__ import annotations

from typing import Any

from mlacli.cli import console
from mlacli.cli.flags import run_settings
from mlacli.cli.options import accepted_notes, new_app, takes
from mlacli.cli.request import REQUEST_FLAGS, read_request
from mlacli.cli.run import RunCommand
from mlacli.settings import notes

app = new_app()


class ChatCommand(RunCommand):
    refuses = dict.fromkeys(
        ("--json", "--jsonl", "--json-tokens"), "is for one answer (mlacli run), not a conversation"
    )
    # It is one anyway.
    accepted = RunCommand.accepted | dict.fromkeys(
        ("-cnv", "--cnv", "--conversation", "-i", "--interactive"), ""
    )


@app.command("chat", cls=ChatCommand)
@takes(REQUEST_FLAGS)
def chat(**values: Any) -> int:
    """Talk with a model: answers as they are made, /help for what else can be typed.

    Lines of standard input that is no terminal are one message each.
    """
    settings = run_settings(values)
    request = read_request(values, raw=False, talks=True)
    for line in (*accepted_notes(), *notes(settings, request)):
        console.note(f"note: {line}")
    if values["dry_run"]:
        from mlacli.cli.report import dry_run

        return dry_run(settings)

    from mlacli.cli.talk import talk

    return talk(settings, request)
