"""`mlacli run`: answer one prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mlacli.cli import console
from mlacli.cli.flags import PROMPT, flags_of, request, run_settings
from mlacli.cli.options import Flag, StrictCommand
from mlacli.errors import UsageError
from mlacli.settings import Request, RunSettings, SamplingSettings, notes

MAX_PROMPT_BYTES = 64 << 20


def run(**values: Any) -> int:
    """Answer a prompt (or continue it, with --no-cnv) and print the text as it is made."""
    settings = run_settings(values)
    prompt = read_prompt(values["prompt"], values["file"])
    wanted = request(values | {"raw": not values["conversation"]}, prompt)
    for line in notes(settings):
        console.note(f"note: {line}")

    from mlacli.session import run_prompt

    return run_prompt(settings, wanted, write=console.write, note=console.note)


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt of -p, -f or standard input; files lose one newline at their end.

    Raises UsageError for two prompts, none, or a file that cannot be read.
    """
    if text is not None and file is not None:
        raise UsageError("-p and -f: give one of them, not both")
    if text is not None:
        return text
    if file is not None:
        try:
            with file.open("rb") as stream:
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


_PROMPT_FLAGS = (
    Flag("-p --prompt prompt", PROMPT, metavar="TEXT", help="The prompt."),
    Flag(
        "-f --file file",
        PROMPT,
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="A file with the prompt; without -p and -f it is read from standard input.",
    ),
    Flag(
        "-cnv/-no-cnv --cnv/--no-cnv --conversation/--no-conversation conversation",
        PROMPT,
        default=True,
        help="Put the prompt into the model's chat template, or continue it as it stands [on]",
    ),
)

command = StrictCommand(
    "run",
    callback=run,
    help=run.__doc__,
    rewrites={"-no-fa": "-fa off", "--no-flash-attn": "-fa off"},
    params=[
        *_PROMPT_FLAGS,
        *flags_of(Request),
        *flags_of(SamplingSettings),
        *flags_of(RunSettings),
    ],
)
