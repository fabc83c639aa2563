"""Rules for the values of flags: what text is read as what, and what is refused with which line.

A rule has the flag's name, `parse(text)` and `check(value)`; both raise UsageError.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from mlacli.errors import UsageError

_WORDS = {"on": True, "auto": True, "1": True, "off": False, "0": False}
# What llama.cpp, and a configuration file, have for them.
_MORE_WORDS = {"true": True, "enabled": True, "false": False, "disabled": False}
_MAX_VALUES = 1024
MAX_CPUS = 4096


@dataclass(frozen=True)
class Limit:
    """A number from `low` to `high`, both included; whole unless `kind` is float."""

    flag: str
    low: float
    high: float
    kind: type[int] | type[float] = int

    @property
    def text(self) -> str:
        return f"{self.low} to {self.high}"

    def check(self, value: float) -> None:
        if not self.low <= value <= self.high:  # NaN is outside too
            raise UsageError(f"{self.flag}: {value} is out of range ({self.text})")

    def parse(self, text: str) -> Any:
        """Plain decimal only: no `1e3` for a whole number, no `1_000`, no `inf`."""
        pattern = r"-?\d+" if self.kind is int else r"-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
        if not re.fullmatch(pattern, text, re.ASCII) or len(text) > 40:
            what = "whole number" if self.kind is int else "number"
            raise UsageError(f"{self.flag}: {text!r} is not a {what} ({self.text})")
        value = self.kind(text)
        self.check(value)
        return value


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    flag: str
    words: tuple[str, ...]

    def check(self, value: str) -> None:
        if value not in self.words:
            raise UsageError(f"{self.flag}: {value!r} is not one of {', '.join(self.words)}")

    def parse(self, text: str) -> str:
        self.check(text)
        return text


@dataclass(frozen=True)
class Switch:
    """on, off, auto, 1 or 0."""

    flag: str

    def check(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise UsageError(f"{self.flag}: {value!r} is neither on nor off")

    def parse(self, text: str) -> bool:
        words = _WORDS | _MORE_WORDS
        if text.lower() not in words:
            raise UsageError(f"{self.flag}: {text!r} is not one of {', '.join(_WORDS)}")
        return words[text.lower()]


@dataclass(frozen=True)
class ExpertReduction:
    """`Kmin,t`: the Kmin best experts, and others whose weight is above t times the best one's.

    `-1,0` is off (None). From ik_llama.cpp PR 239.
    """

    flag: str

    def check(self, value: tuple[int, float]) -> None:
        Limit(f"{self.flag} Kmin", 1, 2**16).check(value[0])
        Limit(f"{self.flag} t", 0, 1, float).check(value[1])

    def parse(self, text: str) -> tuple[int, float] | None:
        least, comma, threshold = text.partition(",")
        if not comma:
            raise UsageError(
                f"{self.flag}: {text!r} is not a pair Kmin,t such as 4,0.3 (-1,0 is off)"
            )
        if least == "-1":
            return None
        value = (
            Limit(f"{self.flag} Kmin", 1, 2**16).parse(least),
            Limit(f"{self.flag} t", 0, 1, float).parse(threshold),
        )
        return value


@dataclass(frozen=True)
class CpuMask:
    """CPUs as a hexadecimal number, bit i for CPU i; `0x` may stand before it. The value is that
    number."""

    flag: str

    def check(self, value: int) -> None:
        if not 0 < value < 1 << MAX_CPUS:
            raise UsageError(f"{self.flag}: a mask names at least one CPU (0 to {MAX_CPUS - 1})")

    def parse(self, text: str) -> int:
        if not re.fullmatch(r"(0[xX])?[0-9a-fA-F]+", text, re.ASCII):
            raise UsageError(f"{self.flag}: {text!r} is not a hexadecimal mask")
        value = int(text[:4096], 16)
        self.check(value)
        return value


@dataclass(frozen=True)
class CpuRange:
    """`lo-hi`, `lo-` or `-hi`: the CPUs from `lo` (or 0) to `hi` (or the last). The value is the
    mask of these CPUs."""

    flag: str

    def check(self, value: int) -> None:
        CpuMask(self.flag).check(value)

    def parse(self, text: str) -> int:
        ends = re.fullmatch(r"(\d{0,9})-(\d{0,9})", text, re.ASCII)
        if not ends or text == "-":
            raise UsageError(f"{self.flag}: {text!r} is not a range of CPUs (as 0-7, 4- or -3)")
        number = Limit(self.flag, 0, MAX_CPUS - 1)
        low: int = number.parse(ends[1] or "0")
        high: int = number.parse(ends[2] or str(max(low, (os.cpu_count() or 1) - 1)))
        if low > high:
            raise UsageError(f"{self.flag}: {text!r} ends before it begins")
        return (1 << high + 1) - (1 << low)


@dataclass(frozen=True)
class Text:
    """Some text, from `low` characters on."""

    flag: str
    low: int = 0
    high: int = 65536

    def check(self, value: str) -> None:
        if not self.low <= len(value) <= self.high:
            raise UsageError(
                f"{self.flag}: {len(value)} characters are out of range ({self.low} to {self.high})"
            )

    def parse(self, text: str) -> str:
        self.check(text)
        return text


_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class ByteSize:
    """Bytes from `low` to `high`, with a unit: K, Ki, KiB and so on up to T are powers of 1024, KB,
    MB, GB and TB powers of 1000. A number alone is refused: it could be meant in anything."""

    flag: str
    low: int = 2**20
    high: int = 2**50

    def check(self, value: int) -> None:
        if not self.low <= value <= self.high:
            limits = f"{self.low} to {self.high} bytes"
            raise UsageError(f"{self.flag}: {value} bytes are out of range ({limits})")

    def parse(self, text: str) -> int:
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)([KMGT])(I?B?)", text.upper(), re.ASCII)
        if found is None or len(text) > 40:
            raise UsageError(
                f"{self.flag}: {text!r} is not a size (a number and a unit: 64GiB, 512MiB, 16G)"
            )

        from decimal import Decimal

        number, unit, rest = found.groups()
        value = int(Decimal(number) * (1000 if rest == "B" else 1024) ** _UNITS[unit])
        self.check(value)
        return value


@dataclass(frozen=True)
class Expression:
    """A regular expression, Python's."""

    flag: str

    def check(self, value: re.Pattern[str]) -> None:
        if not value.pattern:
            raise UsageError(f"{self.flag}: the expression is empty")

    def parse(self, text: str) -> re.Pattern[str]:
        try:
            value = re.compile(text)
        except (re.error, RecursionError, OverflowError) as problem:
            raise UsageError(f"{self.flag}: {text!r} is no expression ({problem})") from problem
        self.check(value)
        return value


class Rule(Protocol):
    """What a flag's values must be."""

    @property
    def flag(self) -> str: ...
    def check(self, value: Any) -> None: ...
    def parse(self, text: str) -> Any: ...


def ruled(rule: Rule, *, each: bool = False) -> dict[str, Any]:
    """Metadata of a settings field that follows a rule, or whose items do."""
    return {"rule": rule, "each": each}


def limited(flag: str, low: int, high: int) -> dict[str, Any]:
    """The same of a whole number."""
    return ruled(Limit(flag, low, high))


def rules(settings: type[Any]) -> dict[str, Rule]:
    """Field name -> its rule, for a settings class."""
    return {f.name: f.metadata["rule"] for f in fields(settings) if "rule" in f.metadata}


def check_fields(settings: Any) -> None:
    """Raises UsageError where a field breaks its rule; None stands for no value."""
    for field in (f for f in fields(settings) if "rule" in f.metadata):
        value = getattr(settings, field.name)
        values = value if field.metadata["each"] else (value,)
        for one in values:
            if one is not None:
                field.metadata["rule"].check(one)


def parse_list(rule: Rule, text: str) -> list[Any]:
    """llama-bench's lists: `1,2,4`, `1-8` (step 1), `1-9+2`, `1-64*2`; pairs are split by `;`.

    Raises UsageError.
    """
    if isinstance(rule, ExpertReduction):
        return [rule.parse(part) for part in text.split(";")]
    if not isinstance(rule, Limit):
        return [rule.parse(part) for part in text.split(",")]
    found: list[Any] = []
    for part in text.split(","):
        spread = re.fullmatch(r"(\d+)-(\d+)(?:([+*])(\d+))?", part, re.ASCII)
        found += _spread(rule, part, spread.groups()) if spread else [rule.parse(part)]
    if len(found) > _MAX_VALUES:
        raise UsageError(f"{rule.flag}: {text!r} has more than {_MAX_VALUES} values")
    return found


def _spread(rule: Limit, part: str, groups: Sequence[str | None]) -> list[int]:
    first, last, sign, by = groups
    assert first is not None and last is not None
    value, end, step = rule.parse(first), rule.parse(last), int((by or "1")[:20])
    if value > end or step < 1 or (sign == "*" and (step < 2 or value < 1)):
        raise UsageError(f"{rule.flag}: {part!r} is not a range (as 1-8, 1-9+2 or 1-64*2)")
    found: list[int] = []
    while value <= end and len(found) <= _MAX_VALUES:
        found.append(value)
        value = value * step if sign == "*" else value + step
    return found


def parse_pairs(limit: Limit, text: str) -> list[tuple[int, int]]:
    """`512,128` or `512,128;1024,64`. Raises UsageError."""
    pairs = []
    for part in text.split(";"):
        first, comma, second = part.partition(",")
        if not comma:
            raise UsageError(f"{limit.flag}: {part!r} is not a pair such as 512,128")
        pairs.append((limit.parse(first), limit.parse(second)))
    return pairs
