"""The key/value part of a GGUF file: scalars decoded when it is opened, arrays when asked for.

A vocabulary of 100,000 tokens costs 10 ms to step over and nothing else until `strings` is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt

from mlacli.gguf.problem import model_error

BOOL, STRING, ARRAY = 7, 8, 9
# GGUF value type -> (name, little-endian struct / numpy code)
VALUE_TYPES = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    BOOL: ("bool", "B"),
    STRING: ("string", ""),
    ARRAY: ("array", ""),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
TYPE_NAMES = tuple(name for name, _ in VALUE_TYPES.values())
TYPE_NAMES_TO_TYPES = {name: type_ for type_, (name, _) in VALUE_TYPES.items()}
SCALAR_CODES = {type_: code for type_, (_, code) in VALUE_TYPES.items() if code}
_LENGTH = Struct("<Q")

Numbers = npt.NDArray[Any]
Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class ArrayRef:
    """An array that still lies in the file: `count` elements at bytes `start` to `end`."""

    element_type: int
    count: int
    start: int
    end: int


class Metadata(Mapping[str, Any]):
    """Keys to int, float, bool, str, numpy array (numeric arrays) or list of str (string arrays).

    `metadata[key]` decodes an array afresh each time. The typed getters raise ModelError with the
    file and the key when the value is absent (and no default is given) or of another type.
    """

    def __init__(
        self,
        path: Path,
        buffer: memoryview,
        values: dict[str, Scalar | ArrayRef],
        types: dict[str, int],
    ) -> None:
        self.path = path
        self._buffer = buffer
        self._values = values
        self._types = types

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if not isinstance(value, ArrayRef):
            return value
        return self.strings(key) if value.element_type == STRING else self.numbers(key)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def type_name(self, key: str) -> str:
        """`u32`, `string`, ..., or `array of string`."""
        value = self._values[key]
        if isinstance(value, ArrayRef):
            return f"array of {TYPE_NAMES[value.element_type]}"
        return TYPE_NAMES[self._types[key]]

    def count(self, key: str) -> int:
        """Number of elements of an array, without decoding it; 1 for a scalar."""
        value = self._values[key]
        return value.count if isinstance(value, ArrayRef) else 1

    def is_array(self, key: str) -> bool:
        return isinstance(self._values.get(key), ArrayRef)

    def replaced(self, key: str, value: Scalar, type_name: str) -> Metadata:
        """The same with another scalar at `key`, which need not be there yet."""
        types = self._types | {key: TYPE_NAMES_TO_TYPES[type_name]}
        return Metadata(self.path, self._buffer, self._values | {key: value}, types)

    def integer(
        self, key: str, default: int | None = None, *, low: int = 0, high: int = 2**31 - 1
    ) -> int:
        """The integer at `key`, refused outside `low`..`high`."""
        value = self._scalar(key, default, "an integer")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong_type(key, "an integer")
        if not low <= value <= high:
            raise model_error(self.path, key, "out of range", got=value, limit=f"{low}..{high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The float at `key` (integers are taken too); may be NaN or infinite."""
        value = self._scalar(key, default, "a number")
        if isinstance(value, bool | str):
            raise self._wrong_type(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._scalar(key, default, "a bool")
        if not isinstance(value, bool):
            raise self._wrong_type(key, "a bool")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._scalar(key, default, "a string")
        if not isinstance(value, str):
            raise self._wrong_type(key, "a string")
        return value

    def strings(self, key: str) -> list[str]:
        """All strings of a string array. Raises ModelError when one is not UTF-8."""
        array = self._array(key)
        if array.element_type != STRING:
            raise self._wrong_type(key, "an array of strings")
        region = bytes(self._buffer[array.start : array.end])
        unpack = _LENGTH.unpack_from
        strings = []
        at = 0
        try:
            for _ in range(array.count):
                start = at + 8
                at = start + unpack(region, at)[0]
                strings.append(region[start:at].decode())
        except UnicodeDecodeError:
            problem = f"element {len(strings)} is not UTF-8"
            raise model_error(
                self.path, key, problem, got=region[start:at].decode(errors="surrogateescape")
            ) from None
        return strings

    def head(self, key: str, n: int) -> list[Any]:
        """The first n elements of an array, at no cost for the others; bytes of strings that are no
        UTF-8 come as surrogate escapes."""
        array = self._array(key)
        if array.element_type != STRING:
            return list(self.numbers(key)[:n].tolist())
        found, at = [], array.start
        for _ in range(min(n, array.count)):
            start = at + 8
            at = start + _LENGTH.unpack_from(self._buffer, at)[0]
            found.append(bytes(self._buffer[start:at]).decode("utf-8", "surrogateescape"))
        return found

    def numbers(self, key: str) -> Numbers:
        """A numeric or bool array as a read-only numpy view of the file."""
        array = self._array(key)
        if array.element_type == STRING:
            raise self._wrong_type(key, "an array of numbers")
        code = "?" if array.element_type == BOOL else SCALAR_CODES[array.element_type]
        return np.frombuffer(self._buffer[array.start : array.end], np.dtype("<" + code))

    def _scalar(self, key: str, default: Scalar | None, wanted: str) -> Scalar:
        value = self._values.get(key, default)
        if value is None:
            raise model_error(self.path, key, "missing from the metadata")
        if isinstance(value, ArrayRef):
            raise self._wrong_type(key, wanted)
        return value

    def _array(self, key: str) -> ArrayRef:
        value = self._values.get(key)
        if value is None:
            raise model_error(self.path, key, "missing from the metadata")
        if not isinstance(value, ArrayRef):
            raise self._wrong_type(key, "an array")
        return value

    def _wrong_type(self, key: str, wanted: str) -> Exception:
        return model_error(
            self.path, key, "has the wrong type", got=self.type_name(key), limit=wanted
        )
