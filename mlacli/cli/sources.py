"""Values of flags that were not typed: from the configuration file and from variables.

A key is a flag's name without dashes, of at least two letters. In rising order count: the file (for
every command, for this one, for this model), LLAMA_ARG_* variables, MLACLI_* variables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlacli.config_file import ConfigFile, Entry, Value, read_config_file
from mlacli.debug import ENV, VARIABLES
from mlacli.errors import ModelError, UsageError
from mlacli.limits import Switch
from mlacli.suggest import suggestion

if TYPE_CHECKING:
    from typer.core import TyperOption

    from mlacli.cli.options import StrictCommand

# What a script does must not depend on these being set elsewhere: a prompt that nobody gave, a
# conversation that waits for someone to type.
TYPED_ONLY = {"--prompt", "--file", "--binary-file", "--interactive", "--debug"}
# llama.cpp's names for what both have; its other LLAMA_ARG_* variables are not looked at.
LLAMA_ARGS = {
    "model": "LLAMA_ARG_MODEL",
    "hf-repo": "LLAMA_ARG_HF_REPO",
    "hf-file": "LLAMA_ARG_HF_FILE",
    "offline": "LLAMA_ARG_OFFLINE",
    "numa": "LLAMA_ARG_NUMA",
    "fit": "LLAMA_ARG_FIT",
    "threads": "LLAMA_ARG_THREADS",
    "ctx-size": "LLAMA_ARG_CTX_SIZE",
    "batch-size": "LLAMA_ARG_BATCH",
    "ubatch-size": "LLAMA_ARG_UBATCH",
    "mlock": "LLAMA_ARG_MLOCK",
    "mmap": "LLAMA_ARG_MMAP",
    "flash-attn": "LLAMA_ARG_FLASH_ATTN",
    "cache-type-k": "LLAMA_ARG_CACHE_TYPE_K",
    "cache-type-v": "LLAMA_ARG_CACHE_TYPE_V",
    "n-predict": "LLAMA_ARG_N_PREDICT",
    "context-shift": "LLAMA_ARG_CONTEXT_SHIFT",
    "temp": "LLAMA_ARG_TEMPERATURE",
    "top-k": "LLAMA_ARG_TOP_K",
    "top-p": "LLAMA_ARG_TOP_P",
    "min-p": "LLAMA_ARG_MIN_P",
    "repeat-penalty": "LLAMA_ARG_REPEAT_PENALTY",
    "presence-penalty": "LLAMA_ARG_PRESENCE_PENALTY",
    "frequency-penalty": "LLAMA_ARG_FREQUENCY_PENALTY",
    "reasoning": "LLAMA_ARG_REASONING",
    "chat-template": "LLAMA_ARG_CHAT_TEMPLATE",
    "chat-template-file": "LLAMA_ARG_CHAT_TEMPLATE_FILE",
    "chat-template-kwargs": "LLAMA_ARG_CHAT_TEMPLATE_KWARGS",
}
# Set to anything they switch it off: llama.cpp's older form.
LLAMA_NEGATIVES = {"mmap": "LLAMA_ARG_NO_MMAP", "context-shift": "LLAMA_ARG_NO_CONTEXT_SHIFT"}


class Key(NamedTuple):
    """What a key sets: a flag, or not `positive` the flag's opposite."""

    option: TyperOption
    positive: bool = True


class Setting(NamedTuple):
    """What a parameter is set to, and by what: `FILE: KEY` or a variable's name."""

    value: str | bool | list[str]
    origin: str


Found = dict[str, Setting]  # by parameter
Others = Callable[[], Mapping[str, "StrictCommand"]]


class Sources(NamedTuple):
    """The settings in force for a command beside what was typed, and what there is to say."""

    settings: Found
    overridden: Found  # by what was typed
    notes: Sequence[str]


def keys_of(command: StrictCommand) -> dict[str, Key]:
    """Every key that a command knows."""
    found: dict[str, Key] = {}
    for option in command.options():
        if not {*TYPED_ONLY, *command.typed_only} & set(option.opts):
            found |= {key: Key(option) for key in _keys(option.opts)}
            found |= {key: Key(option, False) for key in _keys(option.secondary_opts)}
    return found


def _keys(names: Iterable[str]) -> Iterator[str]:
    return (key for name in names if len(key := name.lstrip("-")) > 1)


def main_key(option: TyperOption) -> str:
    """The key of its first long name, or else of its first."""
    return min(option.opts, key=lambda name: not name.startswith("--")).lstrip("-")


def variable(key: str) -> str:
    """MLACLI_CTX_SIZE for ctx-size."""
    return "MLACLI_" + key.upper().replace("-", "_")


def config_file(*, required: bool) -> ConfigFile:
    """The file in force, perhaps an empty one; with `required` one that was named has to exist.
    Raises UsageError."""
    path = ENV.config_file
    if path is None:
        return ConfigFile(Path())
    return read_config_file(path, required=required and ENV.config_is_named)


def collect(
    command: StrictCommand,
    name: str,
    typed: Mapping[str, Any],
    commands: Sequence[str],
    others: Others,
    default_model: Path,
) -> Sources:
    """What is set for a command of this name, one of `commands`. `others` loads all of them, which
    is only done when something is set that this command does not know. Raises UsageError."""
    keys, variables = keys_of(command), ENV.settings
    file = config_file(required=not command.creates_config)
    found: Found = {}
    if file.content:
        file.check(commands)
        for entries in (file.for_all(), file.for_command(name)):
            found = _over(found, _read_entries(file, entries, keys, name, others), command)
    from_variables = _read_variables(keys, variables)
    if file.content:
        model = _model(typed, from_variables, found, default_model)
        for entries in file.for_model(model) if model else ():
            for key in entries.keys() & keys.keys():
                if keys[key].option.name in ("model", "hf_repo", "hf_file"):
                    raise UsageError(f"{file.path}: {entries[key].where}: has no place here")
            found = _over(found, _read_entries(file, entries, keys, "", others), command)
    found = _over(found, from_variables, command)
    kept = _without(found, typed, command)
    overridden = {name: setting for name, setting in found.items() if name not in kept}
    return Sources(kept, overridden, _unknown_variables(keys, variables, others))


def _model(typed: Mapping[str, Any], *rest: Any) -> Path | None:
    """The model in force; None when there are several."""
    *found, default = rest
    layers: list[Mapping[str, Any]] = [typed]
    layers += ({name: setting.value for name, setting in f.items()} for f in found)
    for layer in layers:
        if layer.get("hf_repo"):
            return None  # which file that is, the hub says
        if value := layer.get("model"):
            files = value if isinstance(value, list) else [value]
            return Path(files[0]) if len(set(files)) == 1 else None
    assert isinstance(default, Path)
    return default


def _over(lower: Found, upper: Found, command: StrictCommand) -> Found:
    return _without(lower, upper, command) | upper


def _without(lower: Found, upper: Iterable[str], command: StrictCommand) -> Found:
    """`lower` without what `upper` replaces: the same flag, or one that excludes it."""
    given = set(upper)
    gone = given.union(*(group for group in command.exclusive if not given.isdisjoint(group)))
    return {name: setting for name, setting in lower.items() if name not in gone}


def _read_entries(
    file: ConfigFile,
    entries: Mapping[str, Entry],
    keys: Mapping[str, Key],
    name: str,
    others: Others,
) -> Found:
    """The settings of one table; `name` is the command's. Raises UsageError for a key that nobody
    knows, in the command's own table that it does not know."""
    found: Found = {}
    for key, entry in entries.items():
        origin = f"{file.path}: {entry.where}"
        if key not in keys:
            every = keys if entry.where.startswith(f"{name}.") and name else every_key(others())
            if key not in every:
                raise UsageError(f"{origin}: {no_such_key(key, every)}")
            continue
        parameter = keys[key].option.name
        if parameter in found:
            raise UsageError(f"{origin}: {found[parameter].origin} says the same flag")
        found[parameter] = Setting(read(keys[key], entry.value, origin), origin)
    return found


def every_key(commands: Mapping[str, StrictCommand]) -> dict[str, Key]:
    """The keys of all commands."""
    found: dict[str, Key] = {}
    for command in commands.values():
        found = keys_of(command) | found
    return found


def no_such_key(key: str, known: Iterable[str]) -> str:
    """Why a key is refused."""
    if f"--{key}" in TYPED_ONLY:
        return "this flag is for the command line only"
    return f"no such flag{suggestion(key, known)}"


def read(key: Key, value: Value, origin: str) -> str | bool | list[str]:
    """A parameter's value, as if typed. Raises UsageError, which begins with `origin`."""
    texts = [_text(item) for item in (value if isinstance(value, list) else [value])]
    if any("\0" in text for text in texts):
        raise UsageError(f"{origin}: holds a NUL character")
    if (key.option.metavar or "").endswith(",..."):  # a list in one value
        texts = [",".join(texts)]
    if key.option.multiple:
        return texts
    if len(texts) != 1:
        raise UsageError(f"{origin}: takes one value (got {len(texts)})")
    if key.option.is_flag:
        return Switch(origin).parse(texts[0]) == key.positive
    return texts[0]


def _text(item: str | int | float | bool) -> str:
    return str(item).lower() if isinstance(item, bool) else str(item)


def _read_variables(keys: Mapping[str, Key], variables: Mapping[str, str]) -> Found:
    found: Found = {}
    names = [
        *((key, LLAMA_ARGS[key], None) for key in keys if key in LLAMA_ARGS),
        *((key, LLAMA_NEGATIVES[key], "off") for key in keys if key in LLAMA_NEGATIVES),
        *((key, variable(key), None) for key in keys),
    ]
    for key, name, meant in names if variables else ():
        if name in variables and name not in VARIABLES:
            value = read(keys[key], meant or variables[name], name)
            found[keys[key].option.name] = Setting(value, name)
    return found


def _unknown_variables(
    keys: Mapping[str, Key],
    variables: Mapping[str, str],
    others: Others,
) -> list[str]:
    """A line for every MLACLI_* variable that no command knows."""
    own = [name for name in variables if name.startswith("MLACLI_")]
    odd = set(own) - VARIABLES.keys() - set(map(variable, keys))
    if odd:
        keys = every_key(others())
        odd -= set(map(variable, keys))
    known = [*map(variable, keys), *VARIABLES]
    lines = []
    for name in sorted(odd):
        typed = name.removeprefix("MLACLI_").lower().replace("_", "-")
        why = no_such_key(typed, ()) if f"--{typed}" in TYPED_ONLY else ""
        lines.append(f"{name}: {why or 'no such variable' + suggestion(name, known)}")
    return lines


def explained(
    problem: Exception, settings: Mapping[str, Setting], options: Iterable[TyperOption]
) -> str:
    """A problem's line, with where the values come from that it names and nobody typed."""
    message = str(problem)
    origins: dict[str, str] = {}
    for option in options:
        if option.name in settings:
            names = (*option.opts, *option.secondary_opts)
            origins |= dict.fromkeys(names, settings[option.name].origin)
    first, _, rest = message.partition(" ")
    if first.endswith(":") and first[:-1] in origins:
        message = f"{origins.pop(first[:-1])}: {rest}"
    named = [flag for flag in re.findall(r"(?<!\S)--?[a-zA-Z][\w-]*", rest) if flag in origins]
    if first in origins:
        named.insert(0, first)
    if isinstance(problem, ModelError) and "-m" in origins:
        named = ["-m"]
    places = "; ".join(f"{flag} is from {origins[flag]}" for flag in dict.fromkeys(named))
    return f"{message} ({places})" if places else message
