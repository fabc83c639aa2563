"""`mlacli run`: answer one prompt."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

from mlacli.cli import console
from mlacli.cli.flags import (
    NO_FLASH_ATTENTION,
    PROFILE_HELP,
    PROMPT,
    flags_of,
    given,
    run_settings,
)
from mlacli.cli.options import OTHER, StrictCommand, flag, new_app, parameter, takes
from mlacli.errors import UsageError
from mlacli.settings import Request, RunSettings, SamplingSettings, notes

MAX_PROMPT_BYTES = 64 << 20
app = new_app()


class RunCommand(StrictCommand):
    # This program never prints the prompt and runs nothing before it.
    rewrites = NO_FLASH_ATTENTION | {"--no-display-prompt": "", "--no-warmup": ""}


_PROMPT = flag("-p --prompt", PROMPT, "TEXT", "The prompt.")
_FILE = flag(
    "-f --file",
    PROMPT,
    "FILE",
    "A file with the prompt; without -p and -f it is read from standard input.",
)
_SYSTEM = flag("-sys --system-prompt", PROMPT, "TEXT", "System message for the chat template.")
_SYSTEM_FILE = flag("-sysf --system-prompt-file", PROMPT, "FILE", "A file with that message.")
_ESCAPE = flag(
    "-e/--no-escape --escape",
    PROMPT,
    "",
    r"Read \n, \t, \r, \", \', \\ and \x41 in -p and -sys, or take them as typed.",
    "on",
)
_CONVERSATION = flag(
    "-cnv/-no-cnv --cnv/--no-cnv --conversation/--no-conversation",
    PROMPT,
    "",
    "Put the prompt into the model's chat template, or continue it as it stands.",
    "on",
)
_PROFILE = parameter("profile", flag("--profile", OTHER, "", PROFILE_HELP), bool, False)


@app.command("run", cls=RunCommand)
@takes([*flags_of(Request, SamplingSettings, RunSettings), _PROFILE])
def run(
    prompt: Annotated[str | None, _PROMPT] = None,
    file: Annotated[str | None, _FILE] = None,
    system: Annotated[str | None, _SYSTEM] = None,
    system_file: Annotated[str | None, _SYSTEM_FILE] = None,
    escape: Annotated[bool, _ESCAPE] = True,
    conversation: Annotated[bool, _CONVERSATION] = True,
    **values: Any,
) -> int:
    """Answer a prompt (or continue it, with --no-cnv) and print the text as it is made."""
    settings = run_settings(values)
    sampling = SamplingSettings(**given(SamplingSettings, values))
    wanted = given(Request, values) | {"raw": not conversation, "sampling": sampling}
    before = _text(system, system_file, ("-sys", "-sysf"), escape) or ""
    text = _text(prompt, file, ("-p", "-f"), escape)
    request = Request(_from_stdin() if text is None else text, system=before, **wanted)
    for line in notes(settings, request):
        console.note(f"note: {line}")

    from mlacli.session import run_prompt

    return run_prompt(
        settings, request, write=console.write, note=console.note, profile=values["profile"]
    )


def _text(text: str | None, file: str | None, flags: tuple[str, str], escape: bool) -> str | None:
    """What one flag says or the other's file holds. Raises UsageError."""
    if text is not None and file is not None:
        raise UsageError(f"{flags[0]} and {flags[1]}: give one of them, not both")
    if file is None:
        return unescaped(text) if text is not None and escape else text
    try:
        with Path(file).open("rb") as stream:
            return _decoded(stream.read(MAX_PROMPT_BYTES + 1), f"{flags[1]} {file}")
    except OSError as problem:
        raise UsageError(f"{flags[1]}: {file}: {problem.strerror}") from problem


def _from_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no prompt: give -p TEXT, -f FILE or standard input")
    return _decoded(sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1), "standard input")


def _decoded(data: bytes, name: str) -> str:
    """Text of a file, which loses one newline at its end."""
    if len(data) > MAX_PROMPT_BYTES:
        raise UsageError(f"{name}: is longer than {MAX_PROMPT_BYTES >> 20} MiB")
    return data.removesuffix(b"\n").decode("utf-8", "surrogateescape")


def unescaped(text: str) -> str:
    r"""llama-cli's escapes read: `\n`, `\t`, `\r`, `\"`, `\'`, `\\`, and `\x41` for a byte.

    A backslash before anything else stays.
    """

    def character(found: re.Match[bytes]) -> bytes:
        byte, letter = found.groups()
        return bytes.fromhex(byte.decode()) if byte else _ESCAPES.get(letter, letter)

    data = text.encode("utf-8", "surrogateescape")
    data = re.sub(rb"\\(?:x([0-9a-fA-F]{2})|([ntr\"'\\]))", character, data)
    return data.decode("utf-8", "surrogateescape")


_ESCAPES = {b"n": b"\n", b"t": b"\t", b"r": b"\r"}
