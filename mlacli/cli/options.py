"""Flags: how a command declares them, how argv is read, how help shows them.

typer declares, dispatches and completes. Reading argv is ours, for two reasons. llama.cpp's flags
have several letters behind one dash, which getopt rules would take apart (`-ub256` as `-u -b 256`).
And typer hands every value to pydantic, which takes 0.1 s to import: here a command gets values as
they were typed, and the rules of limits.py read them.
"""

from __future__ import annotations

import inspect
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from mlacli.cli import console
from mlacli.cli.accepted import WITH_VALUE
from mlacli.cli.completion import brief, completer
from mlacli.cli.refused import REFUSED
from mlacli.debug import ENV
from mlacli.errors import MlaError, UsageError
from mlacli.suggest import suggestion

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter
    from typer._click.shell_completion import CompletionItem

HELP_NAMES = ["-h", "--help", "--usage"]
OTHER = "Other"
ACCEPTED = "Flags of llama.cpp and ik_llama.cpp that change nothing here"
_SETTINGS = "mlacli.settings"  # where a context keeps what was not typed
_ACCEPTED = "mlacli.accepted"  # and notes on what was typed in vain
_Command = TypeVar("_Command", bound=Callable[..., Any])
_Flags = Mapping[str, TyperOption | None]  # by name; None for help and for rewritten names


def flag(
    names: str,
    section: str,
    placeholder: str,
    text: str,
    default: str = "",
    choices: Sequence[str] = (),
) -> Any:
    """A typer option: `names` are split by spaces, `default` is only shown.

    A placeholder in brackets (`[on|off]`) is a value that may be left out: then it is the first
    of these words. None at all: the flag takes no value. A shell completes `choices`, or the words
    of a placeholder that lists them.
    """
    if not choices and "|" in placeholder:
        choices = [word for word in placeholder.strip("[]").split("|") if not word.isupper()]
    return typer.Option(
        *names.split(),
        metavar=placeholder or None,
        help=text,
        show_default=default or False,
        rich_help_panel=section,
        # typer takes such a function apart, which is not worth the time in a run
        autocompletion=completer(choices, placeholder) if ENV.completes else None,
    )


def commands_of(ctx: Context) -> dict[str, StrictCommand]:
    """The commands whose flags can be set elsewhere, by name; this imports all of them."""
    group = _group(ctx)
    found = {name: group.get_command(ctx, name) for name in group.list_commands(ctx)}
    return {n: c for n, c in found.items() if isinstance(c, StrictCommand) and c.reads_settings}


def _group(ctx: Context) -> TyperGroup:
    group = ctx.find_root().command
    assert isinstance(group, TyperGroup)
    return group


def parameter(
    name: str, option: Any, kind: Any = str | None, default: object = None
) -> inspect.Parameter:
    """A command's parameter that is set by `option`."""
    annotation = Annotated[kind, option]
    only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, only, default=default, annotation=annotation)


DEBUG = flag("--debug", OTHER, "", "After an internal error, print where it happened.")


def takes(
    parameters: Iterable[inspect.Parameter], *, first: bool = False
) -> Callable[[_Command], _Command]:
    """Decorator: these parameters are a command's `**values`.

    In help they come after those that the command names itself, or before them with `first`.
    """

    def decorate(function: _Command) -> _Command:
        own = inspect.signature(function, eval_str=True)
        named = [p.replace(kind=p.KEYWORD_ONLY) for p in own.parameters.values()][:-1]
        debug = parameter("debug", DEBUG, bool, False)  # __main__ looks for it
        every = [*parameters, *named] if first else [*named, *parameters]
        function.__signature__ = own.replace(parameters=[*every, debug])  # type: ignore[attr-defined]
        return function

    return decorate


def new_app() -> typer.Typer:
    """An app for one command, without anything that would load rich or pydantic."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class StrictCommand(TyperCommand):
    """A command that reads argv by the rules of `normalise` and lists its flags by section.

    `rewrites` maps a flag to the words that stand for it (`-no-fa` -> `-fa off`); no words when
    there is nothing to switch off. `accepted` are flags that change nothing, with a note about each
    or none (accepted.py); `accepted_notes` gives those of a command line. `operands` names the
    parameter that takes the words that belong to no flag, where there may be any. `refuses` are
    flags of other commands: name and reason. Flags that are not typed may be set elsewhere
    (sources.py) unless `reads_settings` is off; of the parameters of an `exclusive` group only
    those count that are set nearest to the command line; those of `typed_only` mean something of
    this command's own and are never set elsewhere. `creates_config`: the configuration file need
    not exist, even if it was named.
    """

    rewrites: ClassVar[Mapping[str, str]] = {}
    accepted: ClassVar[Mapping[str, str]] = {}
    operands: ClassVar[str] = ""
    refuses: ClassVar[Mapping[str, str]] = {}
    reads_settings: ClassVar[bool] = True
    creates_config: ClassVar[bool] = False
    exclusive: ClassVar[Sequence[Collection[str]]] = (
        ("model", "hf_repo"),
        ("load_mode", "mmap"),
        ("load_mode", "mlock"),
    )
    typed_only: ClassVar[Collection[str]] = ()

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # a shell asks what could follow
            return super().parse_args(ctx, args)
        flags = self.flags()
        given = list(
            normalise(
                args, flags, self.rewrites, operands=bool(self.operands), refuses=self.refuses
            )
        )
        if any(name in HELP_NAMES for name, _ in given):
            return super().parse_args(ctx, ["--help"])
        typed = self._typed(given, flags)
        ctx.params |= {option.name: option.default for option in self.options()}
        ctx.params |= self._settings(ctx, typed) | typed
        if self.accepted:
            ctx.meta[_ACCEPTED] = [
                f"{name} has no effect: {self.accepted[name]}"
                for name in dict.fromkeys(name for name, _ in given)
                if self.accepted.get(name)
            ]
        return []

    def _typed(self, given: Iterable[tuple[str, str | None]], flags: _Flags) -> dict[str, Any]:
        """Parameters that the command line sets."""
        found: dict[str, Any] = {}
        for name, value in given:
            if name in self.accepted:
                continue
            option = flags[name] if name else None
            if option is None:
                found[self.operands] = [*found.get(self.operands, ()), value]
            elif option.is_flag:
                found[option.name] = name in option.opts
            elif option.multiple:
                found[option.name] = [*found.get(option.name, ()), value]
            else:
                found[option.name] = value
        return found

    def _settings(self, ctx: Context, typed: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters that the configuration file and variables set. Raises UsageError."""
        if not self.reads_settings:
            return {}
        from mlacli.cli import sources
        from mlacli.settings import default_model

        found = sources.collect(
            self,
            ctx.info_name or "",
            typed,
            _group(ctx).list_commands(ctx),
            lambda: commands_of(ctx),
            default_model(),
        )
        for line in found.notes:
            console.note(f"note: {line}")
        ctx.meta[_SETTINGS] = found.settings
        values = {name: setting.value for name, setting in found.settings.items()}
        if typed.get("verbose", values.get("verbose")):
            options = {option.name: option.opts[0] for option in self.options()}
            for name, setting in found.settings.items():
                console.note(f"note: {options[name]} is from {setting.origin}")
            for name, setting in found.overridden.items():
                console.note(f"note: {options[name]} from {setting.origin} is overridden")
        return values

    def invoke(self, ctx: Context) -> Any:
        """Run the command; an error that comes of a value that was not typed says so."""
        settings = ctx.meta.get(_SETTINGS)
        try:
            return super().invoke(ctx)
        except MlaError as problem:
            if not settings:
                raise
            from mlacli.cli import sources

            line = sources.explained(problem, settings, self.options())
            raise type(problem)(line) from problem

    def shell_complete(self, ctx: Context, incomplete: str) -> list[CompletionItem]:
        """The flags that begin so, also those that stand for others."""
        from typer._click.shell_completion import CompletionItem

        found = super().shell_complete(ctx, incomplete)
        for item in found:
            item.help = brief(item.help or "")
        if incomplete.startswith("-"):
            found += [CompletionItem(n) for n in self.rewrites if n.startswith(incomplete)]
        return found

    def options(self) -> Iterator[TyperOption]:
        """The flags but for help, in the order of help."""
        for option in self.params:
            assert isinstance(option, TyperOption)
            yield option

    def flags(self) -> dict[str, TyperOption | None]:
        """Every name that this command knows."""
        found: dict[str, TyperOption | None] = dict.fromkeys(
            [*HELP_NAMES, *self.rewrites, *self.accepted]
        )
        for option in self.options():
            found |= dict.fromkeys((*option.opts, *option.secondary_opts), option)
        return found

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        for section, rows in self.sections().items():
            with formatter.section(section):
                formatter.write_dl(
                    [
                        (names, f"{text} [{default}]" if default else text)
                        for names, default, text in rows
                    ]
                )

    def sections(self) -> dict[str, list[tuple[str, str, str]]]:
        """Section -> (names and placeholder, default, meaning) of its flags, for help and docs."""
        found: dict[str, list[tuple[str, str, str]]] = {}
        for option in self.options():
            default = option.show_default if isinstance(option.show_default, str) else ""
            row = (_names(option), default, option.help or "")
            found.setdefault(option.rich_help_panel or OTHER, []).append(row)
        found.setdefault(OTHER, []).append((", ".join(HELP_NAMES), "", "Show this and exit."))
        same: dict[str, list[str]] = {}
        for name, words in self.rewrites.items():
            same.setdefault(words, []).append(name)
        for words, names in same.items():
            text = f"The same as {words}." if words else "Accepted: there is nothing to switch off."
            found[OTHER].append((", ".join(names), "", text))
        notes: dict[str, list[str]] = {}
        for name, note in self.accepted.items():
            notes.setdefault(note, []).append(name)
        for note, names in notes.items():
            text = f"Accepted: {note}." if note else "Accepted: so it is."
            found.setdefault(ACCEPTED, []).append((", ".join(names), "", text))
        return found

    def get_help_option_names(self, ctx: Context) -> list[str]:
        return HELP_NAMES


def _names(option: TyperOption) -> str:
    names = ", ".join(option.opts)
    if option.secondary_opts:
        names += " / " + ", ".join(option.secondary_opts)
    return names if option.is_flag else f"{names} {option.metavar}"


def normalise(
    argv: Sequence[str],
    flags: _Flags,
    rewrites: Mapping[str, str],
    *,
    operands: bool = False,
    refuses: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, str | None]]:
    """(name, value or None) of every flag in argv; names as declared, bare flags with a value.

    With `operands`, words that belong to no flag come with an empty name.

    Raises UsageError for an unknown flag, a missing value, a value where none belongs, an
    attached value (`-ub256`) and a word that belongs to no flag.
    """
    words = deque(argv)
    while words:
        if operands and not re.match(r"-(?!\d)", words[0]):
            yield "", words.popleft()
            continue
        name, value = _split(words.popleft(), flags, REFUSED | dict(refuses or {}))
        option = flags[name]
        if option is not None and not option.is_flag:
            yield name, _value(name, value, option.metavar or "", flags, words)
        elif option is None and name in WITH_VALUE:
            yield name, _value(name, value, "", flags, words)
        elif value is not None:
            raise UsageError(f"{name}: takes no value (got {value!r})")
        elif name in rewrites:
            words.extendleft(reversed(rewrites[name].split()))
        else:
            yield name, None


def _value(name: str, value: str | None, placeholder: str, flags: _Flags, words: deque[str]) -> str:
    if value is not None:
        return value
    optional = re.match(r"\[(\w+)", placeholder)
    follows = words[0] if words else None
    if optional and (follows is None or follows.startswith("-")):
        return optional[1]
    if follows is None:
        raise UsageError(f"{name}: needs a value")
    if _long(follows) in flags:
        raise UsageError(f"{name}: needs a value, but the flag {follows} follows")
    return words.popleft()


def _long(word: str) -> str:
    return word.replace("_", "-") if word.startswith("--") else word


def _split(word: str, flags: _Flags, refused: Mapping[str, str]) -> tuple[str, str | None]:
    """(flag, value attached to it or None)."""
    if not word.startswith("-") or word in ("-", "--"):
        raise UsageError(f"{word!r}: belongs to no flag (a value with spaces needs quotes)")
    name, equals, value = word.partition("=")
    name = _long(name)
    if name in flags:
        return name, value if equals else None
    if name in refused:
        raise UsageError(f"{name}: {refused[name]}")
    short = re.fullmatch(r"(-[a-zA-Z])(-?\d+)", word)
    if short and short[1] in flags:  # -c4096, as getopt has it
        return short[1], short[2]
    attached = max((f for f in flags if name.startswith(f)), key=len, default="")
    rest = word[len(attached) :]
    if attached and not rest[0].isalpha() and not attached.startswith("--"):
        raise UsageError(f"{word}: write a space before the value: {attached} {rest}")
    raise UsageError(f"{name}: no such flag{suggestion(name, flags)}")


def accepted_notes() -> list[str]:
    """What is noted about the flags of the command line that change nothing."""
    from typer._click.globals import get_current_context

    notes: list[str] = get_current_context().meta.get(_ACCEPTED, [])
    return notes
