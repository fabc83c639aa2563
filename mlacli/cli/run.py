"""`mlacli run`: answer one prompt, or talk."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

from mlacli.cli import console
from mlacli.cli.accepted import ACCEPTED
from mlacli.cli.flag_texts import NO_FLASH_ATTENTION, OUTPUT, PROMPT
from mlacli.cli.flags import run_settings
from mlacli.cli.options import StrictCommand, accepted_notes, flag, new_app, takes
from mlacli.cli.request import EXCLUSIVE, REQUEST_FLAGS, has_prompt, read_request
from mlacli.errors import UsageError
from mlacli.files import check_target
from mlacli.limits import Expression
from mlacli.settings import TEXT, notes

DEFAULT_DUMP = "tensors.npz"
INSIDE = "Looking inside"
_LEFT_BY_DUMP = {"n_predict": "-n", "prompt_cache": "--prompt-cache", "profile": "--profile"}
app = new_app()


class RunCommand(StrictCommand):
    rewrites = NO_FLASH_ATTENTION | {
        "--no-context-shift": "--context-shift off",
        "--repack": "-rtr",
        "--log-verbose": "-v",
        "--skip-chat-parsing": "--reasoning-format none",
    }
    accepted = ACCEPTED
    exclusive = (*StrictCommand.exclusive, *EXCLUSIVE, ("json", "jsonl"))


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

_DUMP = flag(
    "--dump-tensors",
    INSIDE,
    "REGEX",
    "Evaluate the prompt and write the intermediates whose llama.cpp names match; no answer.",
)
_DUMP_FILE = flag("--dump-file", INSIDE, "FILE.npz", "Where they are written.", DEFAULT_DUMP)


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
    dump_tensors: Annotated[str | None, _DUMP] = None,
    dump_file: Annotated[str | None, _DUMP_FILE] = None,
    **values: Any,
) -> int:
    """Answer a prompt (or continue it, with --no-cnv) and print the text as it is made."""
    settings = run_settings(values)
    dump = _dump(dump_tensors, dump_file)
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    asked = interactive or bool(values["waits"])
    talks = asked or (conversation and at_terminal and not has_prompt(values))
    if talks and not conversation:
        raise UsageError(
            f"{'-i' if interactive else '-if'}: needs the chat template, which --no-cnv leaves out"
        )
    if dump and talks:
        raise UsageError("--dump-tensors: needs a prompt (-p TEXT, -f FILE or standard input)")
    if dump and (json or jsonl):
        raise UsageError("--dump-tensors: shows no answer, which --json would write")
    if json and jsonl:
        raise UsageError("--json and --jsonl: give one of them, not both")
    request = read_request(
        values,
        raw=not conversation,
        talks=talks,
        output=TEXT if values["dry_run"] else "json" if json else "jsonl" if jsonl else TEXT,
        json_tokens=json_tokens,
    )
    for line in (*accepted_notes(), *notes(settings, request)):
        console.note(f"note: {line}")
    if values["dry_run"]:
        from mlacli.cli.report import dry_run

        return dry_run(settings, json=json or jsonl)
    if talks:
        from mlacli.cli.talk import talk

        return talk(settings, request)

    if dump:
        for name in (name for field, name in _LEFT_BY_DUMP.items() if values[field]):
            console.note(f"note: {name} has no effect with --dump-tensors: there is no answer")

        from mlacli.inside.dump import run_dump

        return run_dump(settings, request, *dump, write=console.write, note=console.note)

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


def _dump(expression: str | None, file: str | None) -> tuple[re.Pattern[str], Path] | None:
    """What is to be dumped and where to. Raises UsageError."""
    if expression is None:
        if file is not None:
            raise UsageError("--dump-file: needs --dump-tensors REGEX")
        return None
    pattern, path = Expression("--dump-tensors").parse(expression), Path(file or DEFAULT_DUMP)
    check_target("--dump-file", path, (".npz",))
    return pattern, path
