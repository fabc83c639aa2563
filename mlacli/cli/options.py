"""Flags: their spelling, their help, and argv in the many forms that people write it.

click does the parsing. (typer coerces values through pydantic, which adds 0.1 s to every run.)
llama.cpp's flags have several letters behind one dash, which getopt rules would take apart
(`-ub256` as `-u -b 256`), so `normalise` first brings argv into one form and refuses the rest.
"""

from __future__ import annotations

import difflib
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import click

from mlacli.errors import UsageError

DEBUG_HELP = "After an internal error, print where it happened."
HELP_NAMES = ("-h", "--help", "--usage")


class Flag(click.Option):
    """An option with a section in the help; `bare` is its value when none follows."""

    def __init__(
        self, names: str, section: str, *, bare: str | None = None, **attributes: Any
    ) -> None:
        super().__init__(names.split(), **attributes)
        self.section = section
        self.bare = bare


class StrictCommand(click.Command):
    """A command that parses a normalised argv and lists its flags by section.

    `rewrites` maps a flag to the words that stand for it (`-no-fa` -> `-fa off`).
    """

    def __init__(self, name: str, *, rewrites: Mapping[str, str] | None = None, **rest: Any):
        super().__init__(name, context_settings={"help_option_names": HELP_NAMES}, **rest)
        self.params.append(
            Flag("--debug", "Other", is_flag=True, expose_value=False, help=DEBUG_HELP)
        )
        self.rewrites = rewrites or {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, normalise(args, self))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def normalise(argv: Sequence[str], command: StrictCommand) -> list[str]:
    """argv with `name value` pairs only, long names with `-`, and bare flags given their value.

    Raises UsageError for an unknown flag, a missing value, a value where none belongs, an
    attached value (`-ub256`) and a word that belongs to no flag.
    """
    flags = _flags_by_name(command)
    words, done = deque(argv), list[str]()
    while words:
        name, value = _split(words.popleft(), flags)
        if name in command.rewrites and value is None:
            done += command.rewrites[name].split()
        elif name in HELP_NAMES:
            done.append(name)
        else:
            done += _with_value(name, value, flags, words)
    return done


def _flags_by_name(command: StrictCommand) -> dict[str, click.Option | None]:
    flags: dict[str, click.Option | None] = dict.fromkeys([*HELP_NAMES, *command.rewrites])
    for option in command.params:
        assert isinstance(option, click.Option)
        flags |= dict.fromkeys((*option.opts, *option.secondary_opts), option)
    return flags


def _with_value(
    name: str, value: str | None, flags: dict[str, click.Option | None], words: deque[str]
) -> list[str]:
    option = flags[name]
    assert option is not None
    if option.is_flag:
        if value is not None:
            raise UsageError(f"{name}: takes no value (got {value!r})")
        return [name]
    if value is None:
        bare = getattr(option, "bare", None)
        follows = words[0] if words else None
        if bare is not None and (follows is None or follows.startswith("-")):
            value = bare
        elif follows is None:
            raise UsageError(f"{name}: needs a value")
        elif _long(follows) in flags:
            raise UsageError(f"{name}: needs a value, but the flag {follows} follows")
        else:
            value = words.popleft()
    return [name, value]


def _long(word: str) -> str:
    return word.replace("_", "-") if word.startswith("--") else word


def _split(word: str, flags: Mapping[str, object]) -> tuple[str, str | None]:
    """(flag, value attached to it or None)."""
    if not word.startswith("-") or word in ("-", "--"):
        raise UsageError(f"{word!r}: belongs to no flag (a value with spaces needs quotes)")
    name, equals, value = word.partition("=")
    name = _long(name)
    if name in flags:
        return name, value if equals else None
    short = re.fullmatch(r"(-[a-zA-Z])(-?\d+)", word)
    if short and short[1] in flags:  # -c4096, as getopt has it
        return short[1], short[2]
    attached = max((f for f in flags if name.startswith(f)), key=len, default="")
    rest = word[len(attached) :]
    if attached and not rest[0].isalpha() and not attached.startswith("--"):
        raise UsageError(f"{word}: write a space before the value: {attached} {rest}")
    raise UsageError(f"{name}: no such flag{suggestion(name, flags)}")


def suggestion(word: str, known: Mapping[str, object] | Sequence[str]) -> str:
    """`; did you mean X?` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    if not near and word.startswith("--"):
        near = [k for k in known if len(k) > 4 and (word.startswith(k) or k.startswith(word))]
    return f"; did you mean {near[0]}?" if near else ""
