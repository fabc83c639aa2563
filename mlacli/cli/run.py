"""`mlacli run`: answer one prompt, or talk."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from mlacli.cli import console
from mlacli.cli.accepted import ACCEPTED
from mlacli.cli.flags import NO_FLASH_ATTENTION, PROMPT, run_settings
from mlacli.cli.options import StrictCommand, accepted_notes, flag, new_app, takes
from mlacli.cli.request import REQUEST_FLAGS, has_prompt, read_request
from mlacli.errors import UsageError
from mlacli.settings import notes

app = new_app()


class RunCommand(StrictCommand):
    # This program never prints the prompt.
    rewrites = NO_FLASH_ATTENTION | {
        "--no-display-prompt": "",
        "--no-context-shift": "--context-shift off",
        "--repack": "-rtr",
        "--skip-chat-parsing": "--reasoning-format none",
    }
    accepted = ACCEPTED


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


@app.command("run", cls=RunCommand)
@takes(REQUEST_FLAGS)
def run(
    conversation: Annotated[bool, _CONVERSATION] = True,
    interactive: Annotated[bool, _INTERACTIVE] = False,
    **values: Any,
) -> int:
    """Answer a prompt (or continue it, with --no-cnv) and print the text as it is made."""
    settings = run_settings(values)
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    asked = interactive or bool(values["waits"])
    talks = asked or (conversation and at_terminal and not has_prompt(values))
    if talks and not conversation:
        raise UsageError(
            f"{'-i' if interactive else '-if'}: needs the chat template, which --no-cnv leaves out"
        )
    request = read_request(values, raw=not conversation, talks=talks)
    for line in (*accepted_notes(), *notes(settings, request)):
        console.note(f"note: {line}")
    if talks:
        from mlacli.cli.talk import talk

        return talk(settings, request)

    from mlacli.session import run_prompt

    return run_prompt(
        settings, request, write=console.write, note=console.note, profile=values["profile"]
    )
