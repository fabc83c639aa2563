"""`mlacli config`: what is set where, and setting it."""

from __future__ import annotations

import json as jsons
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from mlacli.cli import console, sources
from mlacli.cli.flag_texts import MODEL
from mlacli.cli.options import StrictCommand, commands_of, flag, new_app, parameter, takes
from mlacli.config_file import MODELS, Scalar, Value, change
from mlacli.debug import ENV
from mlacli.errors import UsageError
from mlacli.limits import Limit, Switch, rules
from mlacli.sampling_settings import SamplingSettings
from mlacli.settings import Request, RunSettings, default_model

if TYPE_CHECKING:
    from typer._click import Context
    from typer._click.shell_completion import CompletionItem
    from typer.core import TyperOption

SET, UNSET = "set", "unset"
app = new_app()


class ConfigCommand(StrictCommand):
    operands = "words"
    reads_settings = False

    def shell_complete(self, ctx: Context, incomplete: str) -> list[CompletionItem]:
        from typer._click.shell_completion import CompletionItem

        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        words = [*commands_of(ctx), SET, UNSET]
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]


class Row(NamedTuple):
    """A setting in force. `source` is default, file or variable; `origin` says which."""

    command: str
    key: str
    flag: str
    value: str | bool | Sequence[str] | None
    source: str
    origin: str


_WORDS = parameter(
    "words",
    flag("--words", "Words", "WORD", "May also be given without the flag: see above."),
    list[str] | None,
)
_JSON = flag("--json", "Output", "", "Print JSON.")
_PATH = flag("--path", "Output", "", "Print the path of the file.")
_MODEL = flag("-m --model", MODEL, "FILE", "What holds for this model, or is set for it alone.")


@app.command("config", cls=ConfigCommand)
@takes([_WORDS], first=True)
def config(
    ctx: typer.Context,
    model: Annotated[str | None, _MODEL] = None,
    json: Annotated[bool, _JSON] = False,
    path: Annotated[bool, _PATH] = False,
    **values: Any,
) -> int:
    """Show the settings in force and where they come from, or change the configuration file.

    mlacli config [COMMAND]: every flag's value. mlacli config set KEY VALUE ..., with KEY a flag's
    long name without dashes, or COMMAND.KEY. mlacli config unset KEY.
    """
    words = values["words"] or []
    if path:
        console.write(f"{_file()}\n")
        return 0
    commands = commands_of(ctx)
    if words and words[0] in (SET, UNSET):
        _change(words, model, commands)
        return 0
    if len(words) > 1 or not commands.keys() >= set(words):
        known = ", ".join((*commands, SET, UNSET))
        raise UsageError(f"config: {' '.join(words)!r} is not one of {known}")
    rows = [row for name in words or commands for row in _rows(name, commands, model)]
    if json:
        listed = [row._asdict() for row in rows]
        console.write(jsons.dumps(listed, indent=2) + "\n")
    else:
        console.write(_table(rows, one=bool(words)))
    return 0


def _file() -> Path:
    """Raises UsageError."""
    if ENV.config_file is None:
        raise UsageError("MLACLI_CONFIG: is empty, so there is no configuration file")
    return ENV.config_file


def _rows(name: str, commands: Mapping[str, StrictCommand], model: str | None) -> Iterator[Row]:
    """Raises UsageError."""
    typed = {"model": model} if model else {}
    found = sources.collect(
        commands[name], name, typed, [*commands], lambda: commands, default_model()
    )
    for option in commands[name].options():
        if not _is_settable(option):
            continue
        place = (name, sources.main_key(option), option.opts[-1])
        if option.name in typed:
            yield Row(*place, model, "command line", "-m")
        elif option.name in found.settings:
            value, origin = found.settings[option.name]
            source = "variable" if origin in ENV.settings else "file"
            yield Row(*place, value, source, origin)
        else:
            yield Row(*place, _default(option), "default", "default")


def _is_settable(option: TyperOption) -> bool:
    return sources.TYPED_ONLY.isdisjoint(option.opts)


def _default(option: TyperOption) -> str | bool | None:
    """As help shows it; None for a flag without."""
    if isinstance(option.show_default, str):
        return {"on": True, "off": False}.get(option.show_default, option.show_default)
    return bool(option.default) if option.is_flag else None


def _table(rows: Iterable[Row], *, one: bool) -> str:
    """What is set first; rows that are the same for several commands are one."""
    same: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        value = row.value
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        elif isinstance(value, bool):
            value = "on" if value else "off"
        text = "" if value is None else str(value)
        same.setdefault((row.key, text, row.origin), []).append(row.command)

    from tabulate import tabulate

    heads = ["setting", "value", "from", *["commands"] * (not one)]
    lines = [[*place, *[", ".join(names)] * (not one)] for place, names in same.items()]
    lines.sort(key=lambda line: line[2] == "default")
    return tabulate(lines, heads, "simple", disable_numparse=True) + "\n"


def _change(words: Sequence[str], model: str | None, commands: Mapping[str, StrictCommand]) -> None:
    """Set or unset a key of the file. Raises UsageError, SpaceError."""
    verb, *rest = words
    if not rest or (verb == SET) != (len(rest) > 1):
        raise UsageError(f"config {verb}: takes KEY{' VALUE' * (verb == SET)} (got {len(rest)})")
    name, texts = rest[0].replace("_", "-"), rest[1:]
    command, dot, key = name.partition(".")
    if not dot:
        command, key = "", name
    elif command not in commands:
        raise UsageError(f"{name}: {command!r} is not one of {', '.join(commands)}")
    if model and (command or key == "model"):
        raise UsageError(f"{name}: cannot be set for one model")
    known = sources.keys_of(commands[command]) if command else sources.every_key(commands)
    if key not in known:
        raise UsageError(f"{key}: {sources.no_such_key(key, known)}")
    value = _value(key, known[key], texts) if verb == SET else None
    option = known[key].option
    others = [other for other in known if known[other].option.opts == option.opts]
    if model == "":
        raise UsageError("-m: the name is empty")
    table = [MODELS, Path(model).name] if model else [command] if command else []
    change(_file(), table, dict.fromkeys(others) | {key: value})


def _value(key: str, place: sources.Key, texts: Sequence[str]) -> Value:
    """What the file is to hold. Raises UsageError."""
    value: list[Scalar] = []
    for text in texts:
        if not text.isascii() and text != text.encode(errors="ignore").decode():
            raise UsageError(f"{key}: {text[:40]!r} is not UTF-8")
        rule = _RULES.get(place.option.name)
        if place.option.is_flag or (isinstance(rule, Switch) and not place.option.multiple):
            value.append(Switch(key).parse(text))
        elif rule and not place.option.multiple:
            rule.parse(text)
            value.append(_number(text) if isinstance(rule, Limit) else text)
        else:
            value.append(_number(text))
    one: Value = value if len(value) > 1 else value[0]
    sources.read(place, one, key)
    return one


_RULES = rules(RunSettings) | rules(Request) | rules(SamplingSettings)


def _number(text: str) -> Scalar:
    """A number where the text is one as TOML writes it."""
    if re.fullmatch(r"-?(0|[1-9]\d{0,17})", text, re.ASCII):
        return int(text)
    if re.fullmatch(r"-?(0|[1-9]\d{0,17})\.\d{1,17}", text, re.ASCII):
        return float(text)
    return text
