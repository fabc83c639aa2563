"""`mlacli run`: answer one prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from mlacli.cli import console
from mlacli.cli.flags import NO_FLASH_ATTENTION, PROMPT, flags_of, given, run_settings
from mlacli.cli.options import StrictCommand, flag, new_app, takes
from mlacli.errors import UsageError
from mlacli.settings import Request, RunSettings, SamplingSettings, notes

MAX_PROMPT_BYTES = 64 << 20
app = new_app()


class RunCommand(StrictCommand):
    rewrites = NO_FLASH_ATTENTION


_PROMPT = flag("-p --prompt", PROMPT, "TEXT", "The prompt.")
_FILE = flag(
    "-f --file",
    PROMPT,
    "FILE",
    "A file with the prompt; without -p and -f it is read from standard input.",
)
_CONVERSATION = flag(
    "-cnv/-no-cnv --cnv/--no-cnv --conversation/--no-conversation",
    PROMPT,
    "",
    "Put the prompt into the model's chat template, or continue it as it stands.",
    "on",
)


@app.command("run", cls=RunCommand)
@takes(flags_of(Request, SamplingSettings, RunSettings))
def run(
    prompt: Annotated[str | None, _PROMPT] = None,
    file: Annotated[str | None, _FILE] = None,
    conversation: Annotated[bool, _CONVERSATION] = True,
    **values: Any,
) -> int:
    """Answer a prompt (or continue it, with --no-cnv) and print the text as it is made."""
    settings = run_settings(values)
    sampling = SamplingSettings(**given(SamplingSettings, values))
    wanted = given(Request, values) | {"raw": not conversation, "sampling": sampling}
    request = Request(read_prompt(prompt, file), **wanted)
    for line in notes(settings):
        console.note(f"note: {line}")

    from mlacli.session import run_prompt

    return run_prompt(settings, request, write=console.write, note=console.note)


def read_prompt(text: str | None, file: str | None) -> str:
    """The prompt of -p, -f or standard input; files lose one newline at their end.

    Raises UsageError for two prompts, none, or a file that cannot be read.
    """
    if text is not None and file is not None:
        raise UsageError("-p and -f: give one of them, not both")
    if text is not None:
        return text
    if file is not None:
        try:
            with Path(file).open("rb") as stream:
                return _decoded(stream.read(MAX_PROMPT_BYTES + 1), f"-f {file}")
        except OSError as problem:
            raise UsageError(f"-f: {file}: {problem.strerror}") from problem
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no prompt: give -p TEXT, -f FILE or standard input")
    return _decoded(sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1), "standard input")


def _decoded(data: bytes, name: str) -> str:
    if len(data) > MAX_PROMPT_BYTES:
        raise UsageError(f"{name}: is longer than {MAX_PROMPT_BYTES >> 20} MiB")
    return data.removesuffix(b"\n").decode("utf-8", "surrogateescape")
