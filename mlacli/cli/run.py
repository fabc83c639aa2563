"""`mlacli run`: answer one prompt, or talk."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from mlacli.cli import console
from mlacli.cli.flags import NO_FLASH_ATTENTION, OUTPUT, PROMPT, run_settings
from mlacli.cli.options import StrictCommand, flag, new_app, takes
from mlacli.cli.request import EXCLUSIVE, REQUEST_FLAGS, has_prompt, read_request
from mlacli.errors import UsageError
from mlacli.settings import TEXT, notes

app = new_app()


class RunCommand(StrictCommand):
    # This program runs nothing before a prompt.
    rewrites = NO_FLASH_ATTENTION | {"--no-warmup": ""}
    exclusive = EXCLUSIVE


_CONVERSATION = flag(
    "-cnv/-no-cnv --cnv/--no-cnv --conversation/--no-conversation",
    PROMPT,
    "",
    "Put the prompt into the model's chat template, or continue it as it stands.",
    "on",
)
_INTERACTIVE = flag(
    "-i --interactive",
    PROMPT,
    "",
    "Talk: a conversation, as without a prompt at a terminal (see mlacli chat).",
)


_JSON = flag("--json", OUTPUT, "", "Write one JSON object when the answer is done.")
_JSONL = flag("--jsonl", OUTPUT, "", "Write a JSON object per token, then that one.")
_TOKENS = flag("--json-tokens", OUTPUT, "", "Put token ids into it.")


@app.command("run", cls=RunCommand)
@takes(REQUEST_FLAGS)
def run(
    conversation: Annotated[bool, _CONVERSATION] = True,
    interactive: Annotated[bool, _INTERACTIVE] = False,
    json: Annotated[bool, _JSON] = False,
    jsonl: Annotated[bool, _JSONL] = False,
    json_tokens: Annotated[bool, _TOKENS] = False,
    **values: Any,
) -> int:
    """Answer a prompt (or continue it, with --no-cnv) and print the text as it is made."""
    settings = run_settings(values)
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    talks = interactive or (conversation and at_terminal and not has_prompt(values))
    if talks and not conversation:
        raise UsageError("-i: needs the chat template, which --no-cnv leaves out")
    if json and jsonl:
        raise UsageError("--json and --jsonl: give one of them, not both")
    request = read_request(
        values,
        raw=not conversation,
        talks=talks,
        output="json" if json else "jsonl" if jsonl else TEXT,
        json_tokens=json_tokens,
    )
    for line in notes(settings, request):
        console.note(f"note: {line}")
    if values["dry_run"]:
        from mlacli.cli.report import dry_run

        return dry_run(settings)
    if talks:
        from mlacli.cli.talk import talk

        return talk(settings, request)

    from mlacli.cli.answers import OUTPUTS
    from mlacli.cli.progress import bar
    from mlacli.session import run_prompt

    return run_prompt(
        settings,
        request,
        output=OUTPUTS[request.output](),
        note=console.note,
        watch=bar,
        profile=values["profile"],
    )
