"""The flags that commands share, by the settings field that each one sets.

Their texts: flag_texts.py. Limits and defaults are those of the settings classes.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from mlacli.cli import console
from mlacli.cli.flag_texts import MODEL, SHOWN_DEFAULT, TEXT
from mlacli.cli.log_settings import DEBUG, LogSettings
from mlacli.cli.model_flags import LOAD_MODES, each_override, load_mode
from mlacli.cli.options import flag, parameter
from mlacli.errors import UsageError
from mlacli.hub import HubFile, fetch
from mlacli.limits import Choice, CpuMask, CpuRange, Limit, Rule
from mlacli.overrides import RopeSettings
from mlacli.settings import RunSettings, fitted

MAX_CHOICES = 8
_LOAD_MODE = flag(
    "-lm --load-mode", MODEL, LOAD_MODES, "The same in one word, as llama.cpp has it.", "auto"
)
# What is set by flags of its own beside a settings class or inside it.
_PARTS = {RunSettings: (HubFile, RunSettings, RopeSettings, LogSettings)}


def meaning(field: str) -> str:
    """What the flag of this field does."""
    return TEXT[field][3]


def shown_default(field: Field[Any]) -> str:
    """The default as help and docs show it."""
    if field.name in SHOWN_DEFAULT:
        return SHOWN_DEFAULT[field.name]
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return "" if field.default in (MISSING, None) else str(field.default)


def flags_of(*owners: type[Any]) -> Iterator[inspect.Parameter]:
    """A parameter for each field of these settings classes that has a flag; None: not given."""
    every = [part for owner in owners for part in _PARTS.get(owner, (owner,))]
    for field in (field for owner in every for field in fields(owner)):
        if field.name in TEXT:
            section, names, placeholder, text = TEXT[field.name]
            default, choices = shown_default(field), choices_of(field.metadata.get("rule"))
            option = flag(names, section, placeholder, text, default, choices)
            one = list[str] if field.metadata.get("each") else str if placeholder else bool
            yield parameter(field.name, option, one | None)
        if field.name == "mmap":
            yield parameter("load_mode", _LOAD_MODE)


def choices_of(rule: Rule | None) -> Sequence[str]:
    """The words for a shell to offer: all values, where they are few."""
    if isinstance(rule, Limit) and rule.kind is int and rule.high - rule.low < MAX_CHOICES:
        return [str(number) for number in range(int(rule.low), int(rule.high) + 1)]
    return rule.words if isinstance(rule, Choice) else ()


def given(owner: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Field name -> value of the flags of `owner` that were given. Raises UsageError."""
    found = {}
    for field in fields(owner):
        value = values.get(field.name)
        if value is not None:
            rule: Rule | None = field.metadata.get("rule")
            if rule and isinstance(value, list):
                found[field.name] = tuple(map(rule.parse, value))
            else:
                found[field.name] = rule.parse(value) if rule and isinstance(value, str) else value
    return found


def words_of(settings: RunSettings, names: Collection[str]) -> list[str]:
    """The flags that give these fields of settings, as they are typed."""
    words = _words(settings, names)
    if "rope" in names:
        rope = settings.rope
        words += _words(rope, [f.name for f in fields(rope) if getattr(rope, f.name) is not None])
    return words


def _words(settings: Any, names: Collection[str]) -> list[str]:
    words: list[str] = []
    for field in (field for field in fields(settings) if field.name in names):
        if field.name not in TEXT:
            continue
        _, flags, placeholder, _ = TEXT[field.name]
        value, flag = getattr(settings, field.name), flags.split()[0]
        if field.metadata.get("each"):
            words += [word for one in value for word in (flag, str(one))]
        elif placeholder:
            words += [flag, _typed(field.metadata.get("rule"), value)]
        elif value or "/" in flag:
            words.append(flag.partition("/")[0 if value else 2])
    return words


def _typed(rule: Rule | None, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(rule, CpuMask):
        return f"{value:#x}"
    if isinstance(rule, CpuRange):  # a mask as well
        return f"{(value & -value).bit_length() - 1}-{value.bit_length() - 1}"
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return "-1,0" if value is None else str(value)  # None: -ser, switched off


def run_settings(values: Mapping[str, Any]) -> RunSettings:
    """What the flags of RunSettings say, as `given_settings` does."""
    return fitted(**given_settings(values))


def given_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of RunSettings that the flags give; those of the log take effect, and a model of
    the hub is fetched. Raises UsageError, SpaceError, and ModelError where there is no such model.
    """
    log = LogSettings(**given(LogSettings, values))
    found = given(RunSettings, each_override(values))
    if values.get("load_mode") is not None:
        found |= load_mode(values["load_mode"], found)
    found["rope"] = RopeSettings(**given(RopeSettings, values))
    if log.verbosity >= DEBUG:
        found.setdefault("verbose", True)
    if "model" in found:
        if not found["model"]:
            raise UsageError("-m: the name is empty")
        found["model"] = Path(found["model"])
    fitted(**found)  # what cannot work is said before anything is fetched
    fetched = hub_model(values)
    found |= {"model": fetched} if fetched else {}
    if log.path:
        _check_log(log.path, {**values, "model": str(found.get("model", ""))})
    console.start(log)
    return found


def _check_log(path: Path, values: Mapping[str, Any]) -> None:
    """Raises UsageError for a log that would take the place of a model or of what is read."""
    try:
        with path.open("rb") as stream:
            if stream.read(4) == b"GGUF":
                raise UsageError(f"--log-file: {path} is a model file")
    except FileNotFoundError:
        return
    except OSError as problem:
        raise UsageError(f"--log-file: {path}: {problem.strerror}") from problem
    named = (v for name, v in values.items() if name != "log_file" and isinstance(v, str))
    if any(os.path.exists(name) and path.samefile(name) for name in named):
        raise UsageError(f"--log-file: {path} is a file that this command uses")


def hub_model(values: Mapping[str, Any]) -> Path | None:
    """The model that -hf names, fetched; None if it names none. Raises UsageError, ModelError."""
    hub = given(HubFile, values)
    if "hf_repo" not in hub:
        if "hf_file" in hub:  # a token, or to be offline, may be set for all commands
            raise UsageError("-hff: needs -hf USER/REPO")
        return None
    if values["model"]:
        raise UsageError("-m and -hf: give one of them, not both")
    return fetch(HubFile(**hub), console.note, bars=console.shows_bars())
