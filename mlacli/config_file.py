"""The configuration file: reading it, finding what it says, changing it.

Top-level keys are for every command, those of `[run]` for that command, and those of
`[models."NAME"]` for files of that name. Later in this order counts more.
"""

from __future__ import annotations

import fnmatch
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from mlacli.errors import SpaceError, UsageError

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

MAX_BYTES = 1 << 18
MODELS = "models"
Scalar = str | int | float | bool
Value = Scalar | list[Scalar]


class Entry(NamedTuple):
    """One key with its value. `where` is its place in the file, as `run.ctx-size`."""

    key: str
    value: Value
    where: str


class ConfigFile(NamedTuple):
    """What a file holds; nothing when there is none."""

    path: Path
    content: Mapping[str, Any] = MappingProxyType({})

    def for_all(self) -> dict[str, Entry]:
        """The settings for every command. Raises UsageError."""
        return self._entries("", {k: v for k, v in self.content.items() if not _is_table(v)})

    def for_command(self, name: str) -> dict[str, Entry]:
        """Those of a command's own table. Raises UsageError."""
        return self._entries(f"{name}.", self.content.get(name, {}))

    def for_model(self, model: Path) -> Iterator[dict[str, Entry]]:
        """Those of every table whose name is this file's, or a pattern for it or its path."""
        for name, table in self.content.get(MODELS, {}).items():
            names = (model.name, str(model), str(model.absolute()))
            if any(name == n or fnmatch.fnmatchcase(n, name) for n in names):
                yield self._entries(f'{MODELS}."{name}".', table)

    def for_model_name(self, name: str) -> dict[str, Entry]:
        """Those of the table of exactly this name. Raises UsageError."""
        return self._entries(f'{MODELS}."{name}".', self._models().get(name, {}))

    def keys_for_all_models(self) -> set[str]:
        """What is set at the top level or in a command's table. Raises UsageError."""
        tables = (name for name, value in self.content.items() if _is_table(value))
        return {*self.for_all(), *(k for t in tables if t != MODELS for k in self.for_command(t))}

    def check(self, commands: Sequence[str]) -> None:
        """Raises UsageError for a table that belongs to no command."""
        for name, table in self.content.items():
            if _is_table(table) and name not in (*commands, MODELS):
                known = ", ".join((*commands, f'{MODELS}."NAME"'))
                raise UsageError(f"{self.path}: [{name}]: no such table (one of {known})")
        for name, table in self._models().items():
            if not _is_table(table):
                raise UsageError(f'{self.path}: {MODELS}.{name}: belongs into [{MODELS}."NAME"]')

    def _models(self) -> Mapping[str, Any]:
        found = self.content.get(MODELS, {})
        if not _is_table(found):
            raise UsageError(f'{self.path}: {MODELS}: is not a table [{MODELS}."NAME"]')
        return dict(found)

    def _entries(self, before: str, table: Mapping[str, Any]) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for name, value in table.items():
            key, where = name.replace("_", "-"), before + name
            if key in found:
                raise UsageError(f"{self.path}: {where} and {found[key].where}: give one of them")
            items = value if isinstance(value, list) else [value]
            if not all(isinstance(item, Scalar) for item in items):
                raise UsageError(
                    f"{self.path}: {where}: is not a string, number or boolean, nor a list of them"
                )
            found[key] = Entry(key, value, where)
        return found


def read_config_file(path: Path, *, required: bool = False) -> ConfigFile:
    """The file's content; a missing one is empty unless `required`. Raises UsageError."""
    try:
        text = _text(path)
    except FileNotFoundError as problem:
        if required:
            raise UsageError(f"{path}: {problem.strerror}") from problem
        return ConfigFile(path)
    except OSError as problem:
        raise UsageError(f"{path}: {problem.strerror}") from problem

    import tomllib

    try:
        return ConfigFile(path, tomllib.loads(text))
    except RecursionError as problem:
        raise UsageError(f"{path}: is not TOML: too deeply nested") from problem
    except ValueError as problem:
        raise UsageError(f"{path}: {_where(str(problem), text)}") from problem


def _where(problem: str, text: str) -> str:
    """tomllib's complaint with the line in front."""
    what, _, place = problem.removesuffix(")").partition(" (at ")
    line = re.match(r"line (\d+)", place)
    number = line[1] if line else text.count("\n") + 1 if place else ""
    return f"line {number}: is not TOML: {what}" if number else f"is not TOML: {what}"


def _text(path: Path) -> str:
    """A file's text, "\\n" at the ends of its lines. Raises OSError, UsageError."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise UsageError(f"{path}: is {what}")
    with path.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: is longer than {MAX_BYTES >> 10} KiB")
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise UsageError(f"{path}: line {line}: is not UTF-8") from problem


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


def change(path: Path, table: Sequence[str], values: Mapping[str, Value | None]) -> None:
    """Set keys of a table (none: the top level), or remove those whose value is None.

    Comments and order stay. The file is replaced as a whole; a link is followed. Raises UsageError,
    SpaceError.
    """
    from mlacli.files import write_whole

    read_config_file(path)
    try:
        old = _text(path) if path.exists() else ""
        text = changed(old, table, values)
        if text != old:
            target = path.resolve()
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(target, [text.encode()])
    except OSError as problem:
        raise SpaceError(f"{path}: {problem.strerror}") from problem


def changed(text: str, table: Sequence[str], values: Mapping[str, Value | None]) -> str:
    """The text of a file after `change`."""
    import tomlkit

    document = tomlkit.parse(text)
    place = _place(document, table, create=any(v is not None for v in values.values()))
    if place is None:
        return text
    for key, value in values.items():
        names = [name for name in place if name.replace("_", "-") == key]
        for name in names:
            if value is None or name != key:
                del place[name]
        if value is not None:
            place[key] = value
    if table and not place:
        _remove(document, table)
    return tomlkit.dumps(document)


def _place(document: TOMLDocument, table: Sequence[str], *, create: bool) -> Any:
    """The table, made if there is none; None when it is not there and is not to be made."""
    import tomlkit

    place: Any = document
    for depth, name in enumerate(table, 1):
        if name not in place:
            if not create:
                return None
            place[name] = tomlkit.table(is_super_table=depth < len(table))
        place = place[name]
    return place


def _remove(document: TOMLDocument, table: Sequence[str]) -> None:
    """Take away a table that has become empty, and those around it that have."""
    places: list[Any] = [document]
    for name in table:
        places.append(places[-1][name])
    for parent, name, child in reversed(list(zip(places, table, places[1:], strict=False))):
        if not child:
            del parent[name]
