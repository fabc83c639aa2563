"""Metadata with some of its values replaced (--override-kv), before anything reads it."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mlacli.errors import UsageError
from mlacli.gguf.metadata import Metadata, Scalar
from mlacli.gguf.problem import printable
from mlacli.overrides import Override

# GGUF's types -> the kind that a user names
_KIND_OF_TYPE = {
    **dict.fromkeys(("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"), "int"),
    **{"f32": "float", "f64": "float", "bool": "bool", "string": "str"},
}
_TYPE_OF_KIND = {"int": "i64", "float": "f32", "bool": "bool", "str": "string"}
# What says where the data lies has been acted upon before there is anything to replace.
_STRUCTURE = ("general.alignment", "split.")


@dataclass(frozen=True)
class Patched:
    """Metadata with values replaced: those that differ from the file's, and a note for each."""

    metadata: Metadata
    applied: tuple[str, ...]
    notes: tuple[str, ...]


def patched(metadata: Metadata, overrides: Iterable[Override]) -> Patched:
    """The metadata with these values in it; of several for one key the last counts.

    Raises UsageError for a value of another type than the file's, an array, or a key of the file's
    own structure.
    """
    applied, notes, file = [], [], metadata
    for override in {override.key: override for override in overrides}.values():
        key, value = override.key, _checked(file, override)
        if key in file and file[key] == value:
            continue
        type_name = file.type_name(key) if key in file else _TYPE_OF_KIND[override.kind]
        metadata = metadata.replaced(key, value, type_name)
        applied.append(str(replace(override, value=value)))
        before = f"not {printable(str(file[key]), 60)}" if key in file else _unknown(file, key)
        notes.append(f"{printable(key, 80)} = {printable(str(value), 60)}, {before}")
    return Patched(metadata, tuple(sorted(applied)), tuple(notes))


def _checked(file: Metadata, override: Override) -> Scalar:
    """The override's value as the file would keep it."""
    key = override.key
    if key.startswith(_STRUCTURE):
        raise _wrong(key, "describes the file itself and cannot be replaced")
    if key in file:
        type_name = file.type_name(key)
        if file.is_array(key):
            raise _wrong(key, f"is an {type_name} in the file and cannot be replaced")
        if _KIND_OF_TYPE[type_name] != override.kind:
            kind = _KIND_OF_TYPE[type_name]
            raise _wrong(key, f"is {type_name} in the file: write {kind}:, not {override.kind}:")
    return _rounded(key, override.value) if isinstance(override.value, float) else override.value


def _unknown(file: Metadata, key: str) -> str:
    import difflib

    near = difflib.get_close_matches(key, list(file), n=1, cutoff=0.8)
    hint = f" (did you mean {printable(near[0], 60)}?)" if near else ""
    return f"which is not in the file{hint}"


def _rounded(key: str, value: float) -> float:
    """As 32 bits: no reader of GGUF keeps more."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        raise _wrong(key, f"{value:g} does not fit into 32 bits") from None
    return rounded


def _wrong(key: str, problem: str) -> UsageError:
    return UsageError(f"--override-kv: {printable(key, 80)} {problem}")
