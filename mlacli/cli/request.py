"""What `run` and `chat` read from their flags and from standard input: the request."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlacli.cli.flag_texts import PROFILE_HELP, PROMPT, SAMPLING
from mlacli.cli.flags import flags_of, given
from mlacli.cli.options import OTHER, flag, parameter
from mlacli.errors import UsageError
from mlacli.sampling_settings import SamplingSettings
from mlacli.settings import TEXT, Grammar, Request, RunSettings

MAX_PROMPT_BYTES = 64 << 20

# parameter: (flags, section, placeholder, help)
_TEXTS = {
    "prompt": ("-p --prompt", PROMPT, "TEXT", "The prompt; of a conversation the first message."),
    "file": (
        "-f --file",
        PROMPT,
        "FILE",
        "A file with the prompt; without -p and -f it is read from standard input.",
    ),
    "binary_file": ("-bf --binary-file", PROMPT, "FILE", "The same, its bytes as they are."),
    "system": ("-sys --system-prompt", PROMPT, "TEXT", "System message for the chat template."),
    "system_file": ("-sysf -spf --system-prompt-file", PROMPT, "FILE", "A file with that message."),
    "template": (
        "--chat-template",
        PROMPT,
        "NAME|JINJA",
        "A template instead of the file's: deepseek2, deepseek3, kimi-k2, chatml, or its text.",
    ),
    "template_file": ("--chat-template-file", PROMPT, "FILE", "A file with such a text."),
    "template_kwargs": ("--chat-template-kwargs", PROMPT, "JSON", "More variables for it."),
    "reasoning_effort": (
        "--reasoning-effort",
        PROMPT,
        "LEVEL",
        "The variable reasoning_effort for it, as low or high; default: none.",
    ),
    "grammar": ("--grammar", SAMPLING, "GBNF", "A grammar that the answer keeps to."),
    "grammar_file": ("--grammar-file", SAMPLING, "FILE", "A file with a grammar."),
    "json_schema": ("-j --json-schema", SAMPLING, "JSON", "A schema that the answer keeps to."),
    "json_schema_file": ("-jf --json-schema-file", SAMPLING, "FILE", "A file with a schema."),
    "regex": ("--regex", SAMPLING, "EXPR", "An expression that the answer keeps to."),
}
_ESCAPE = flag(
    "-e/--no-escape --escape",
    PROMPT,
    "",
    r"Read \n, \t, \r, \", \', \\ and \x41 in -p, -sys and the like, or take them as typed.",
    "on",
)
_DRY_RUN = flag(
    "-dr --dry-run", OTHER, "", "Only report the memory that this takes; exit code 5: too much."
)
_PRESERVE = flag(
    "--reasoning-preserve/--no-reasoning-preserve",
    PROMPT,
    "",
    "The variable preserve_reasoning for it: whether thoughts stay in the conversation.",
)
_PROFILE = flag("--profile", OTHER, "", PROFILE_HELP)
# kind of grammar: its two flags
_GRAMMARS = {
    "gbnf": ("grammar", "--grammar", "--grammar-file"),
    "json": ("json_schema", "-j", "-jf"),
    "regex": ("regex", "--regex", ""),
}
# Parameters of which one is given.
EXCLUSIVE = (
    ("system", "system_file"),
    ("template", "template_file"),
    ("grammar", "grammar_file", "json_schema", "json_schema_file", "regex"),
    ("samplers", "sampling_seq"),
)
REQUEST_FLAGS = [
    *(parameter(name, flag(*words)) for name, words in _TEXTS.items()),
    parameter("reasoning_preserve", _PRESERVE, bool | None),
    parameter("escape", _ESCAPE, bool, True),
    *flags_of(Request, SamplingSettings, RunSettings),
    parameter("profile", _PROFILE, bool, False),
    parameter("dry_run", _DRY_RUN, bool, False),
]


def read_request(
    values: Mapping[str, Any],
    *,
    raw: bool,
    talks: bool,
    output: str = TEXT,
    json_tokens: bool = False,
) -> Request:
    """The request that the flags give; `talks`: it begins a conversation. Raises UsageError."""
    escape = values["escape"]
    chosen = given(SamplingSettings, values)
    wanted = given(Request, values)
    if escape:
        for found, names in ((chosen, ("dry_sequence_breaker",)), (wanted, ("reverse_prompt",))):
            found |= {n: tuple(map(unescaped, found[n])) for n in names if n in found}
        for name in ("in_prefix", "in_suffix", "reasoning_message"):
            if name in wanted:
                wanted[name] = unescaped(wanted[name])
    if "prompt_cache" in wanted:
        wanted["prompt_cache"] = Path(wanted["prompt_cache"])
    text = _prompt(values, escape)
    if text is None and not talks and not values["dry_run"]:
        text = _from_stdin()
    source = _text(values, "template", ("--chat-template", "--chat-template-file"), False)
    if source is not None and values["template"] is not None:
        from mlacli.text.templates import template_source

        source = template_source(source)
    wanted |= {
        "prompt": text or "",
        "raw": raw,
        "talks": talks or values["dry_run"],
        "output": output,
        "json_tokens": json_tokens,
        "system": _text(values, "system", ("-sys", "-sysf"), escape) or "",
        "sampling": SamplingSettings(**chosen),
        "grammar": _grammar(values),
        "template": source,
        "template_kwargs": _kwargs(values),
    }
    return Request(**wanted)


def has_prompt(values: Mapping[str, Any]) -> bool:
    """Whether a flag gives one."""
    return any(values[name] is not None for name in ("prompt", "file", "binary_file"))


def _prompt(values: Mapping[str, Any], escape: bool) -> str | None:
    """What -p, -f or -bf gives. Raises UsageError."""
    text = _text(values, "prompt", ("-p", "-f"), escape, "file")
    file = values["binary_file"]
    if file is None:
        return text
    if text is not None:
        given = "-p" if values["prompt"] is not None else "-f"
        raise UsageError(f"{given} and -bf: give one of them, not both")
    return read_text(Path(file), f"-bf: {file}", whole=True)


def _kwargs(values: Mapping[str, Any]) -> dict[str, Any]:
    """Variables for the chat template. Raises UsageError."""
    name, text = "--chat-template-kwargs", values["template_kwargs"]
    try:
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError) as problem:
        raise UsageError(f"{name}: is not JSON ({problem})") from problem
    if not isinstance(found, dict):
        raise UsageError(f"{name}: is not a JSON object")
    if values["reasoning_effort"] not in (None, "default"):
        found["reasoning_effort"] = values["reasoning_effort"]
    if values["reasoning_preserve"] is not None:
        found["preserve_reasoning"] = values["reasoning_preserve"]
    return found


def _grammar(values: Mapping[str, Any]) -> Grammar | None:
    """The constraint that one of the flags gives. Raises UsageError."""
    found = []
    for kind, (name, *flags) in _GRAMMARS.items():
        read = _text(values, name, (flags[0], flags[1]), escape=False)
        if read is not None:
            found.append(Grammar(kind, read, flags[values[name] is None]))
    if len(found) > 1:
        raise UsageError(f"{found[0].flag} and {found[1].flag}: give one of them, not both")
    return found[0] if found else None


def _text(
    values: Mapping[str, Any], name: str, flags: tuple[str, str], escape: bool, other: str = ""
) -> str | None:
    """What one flag says or the other's file holds. Raises UsageError."""
    text, file = values[name], values.get(other or f"{name}_file")
    if text is not None and file is not None:
        raise UsageError(f"{flags[0]} and {flags[1]}: give one of them, not both")
    if file is None:
        return unescaped(text) if text is not None and escape else text
    return read_text(Path(file), f"{flags[1]}: {file}")


def read_text(path: Path, name: str, *, whole: bool = False) -> str:
    """A file's text without its last newline, or the `whole` of it. Raises UsageError, which
    begins with `name`."""
    try:
        with path.open("rb") as stream:
            return _decoded(stream.read(MAX_PROMPT_BYTES + 1), name, whole=whole)
    except OSError as problem:
        raise UsageError(f"{name}: {problem.strerror}") from problem


def _from_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no prompt: give -p TEXT, -f FILE or standard input")
    return read_stdin()


def read_stdin(*, whole: bool = False) -> str:
    """The text of standard input, which may be typed. Raises UsageError."""
    if sys.stdin is None:
        raise UsageError("standard input: is closed")
    return _decoded(sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1), "standard input", whole=whole)


def _decoded(data: bytes, name: str, *, whole: bool = False) -> str:
    """Text of a file, which loses one newline at its end but for the `whole` of it."""
    if len(data) > MAX_PROMPT_BYTES:
        raise UsageError(f"{name}: is longer than {MAX_PROMPT_BYTES >> 20} MiB")
    data = data if whole else data.removesuffix(b"\n")
    return data.decode("utf-8", "surrogateescape")


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
