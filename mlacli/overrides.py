"""Metadata that a user puts in the place of the file's: `--override-kv`, and RoPE's own flags.

`--override-kv KEY=TYPE:VALUE`, TYPE one of int, float, bool, str, may be repeated; or several stand
in one value with commas between them. Which keys there are, only the model folder knows.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

from mlacli.errors import UsageError
from mlacli.limits import Choice, Limit, check_fields, ruled

KINDS = ("int", "float", "bool", "str")
_MAX_KEY, _MAX_TEXT = 1024, 2**20
_INT_RANGE = (-(2**63), 2**64 - 1)
_START = re.compile(r"(?<!^),(?=[^,=\s]+=(?:int|float|bool|str):)")


@dataclass(frozen=True)
class Override:
    """A key of the metadata and what stands there instead; `kind` is one of KINDS."""

    key: str
    kind: str
    value: int | float | bool | str

    def __str__(self) -> str:
        shown = str(self.value).lower() if self.kind == "bool" else str(self.value)
        return f"{self.key}={self.kind}:{shown}"


def divided(text: str) -> list[str]:
    """The overrides in one value of the flag: a comma divides where KEY=TYPE: follows it."""
    return _START.split(text)


@dataclass(frozen=True)
class OverrideRule:
    """`KEY=int|float|bool|str:VALUE`."""

    flag: str

    def check(self, value: Override) -> None:
        if not isinstance(value, Override) or value.kind not in KINDS:
            raise UsageError(f"{self.flag}: {value!r} is not an override")

    def parse(self, text: str) -> Override:
        key, equals, rest = text.partition("=")
        kind, colon, word = rest.partition(":")
        if not (key and equals and colon) or len(key) > _MAX_KEY:
            raise self._wrong(text, "is not KEY=TYPE:VALUE")
        if kind not in KINDS:
            raise self._wrong(text, f"has type {kind[:20]!r} (one of {', '.join(KINDS)})")
        return Override(key, kind, self._value(text, kind, word))

    def _value(self, text: str, kind: str, word: str) -> int | float | bool | str:
        if kind == "str":
            if len(word) > _MAX_TEXT:
                raise self._wrong(text, f"is longer than {_MAX_TEXT} characters")
            return word
        if kind == "bool":
            if word not in ("true", "false"):
                raise self._wrong(text, f"has {word[:20]!r} (true or false)")
            return word == "true"
        if kind == "int":
            low, high = _INT_RANGE
            digits = re.fullmatch(r"-?\d{1,20}", word, re.ASCII)
            if not digits or not low <= int(word) <= high:
                raise self._wrong(text, f"has {word[:24]!r} ({low} to {high})")
            return int(word)
        plain = re.fullmatch(r"-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", word, re.ASCII)
        if not plain or len(word) > 40 or not math.isfinite(float(word)):
            raise self._wrong(text, f"has {word[:24]!r}, which is not a finite number")
        return float(word)

    def _wrong(self, text: str, problem: str) -> UsageError:
        return UsageError(f"{self.flag}: {text[:80]!r} {problem}")


@dataclass(frozen=True)
class FromModel:
    """A limit, and a number besides that stands for what the file says (None)."""

    limit: Limit
    stands_for_file: float

    @property
    def flag(self) -> str:
        return self.limit.flag

    def check(self, value: float) -> None:
        self.limit.check(value)

    def parse(self, text: str) -> float | None:
        wide = Limit(self.flag, min(self.stands_for_file, self.limit.low), self.limit.high, float)
        number = wide.parse(text)
        if number == self.stands_for_file:
            return None
        self.check(number)
        return int(number) if self.limit.kind is int and number == int(number) else number


def _or_file(flag: str, low: float, high: float, auto: float, *, whole: bool = False) -> Any:
    limit = Limit(flag, low, high, int if whole else float)
    return field(default=None, metadata=ruled(FromModel(limit, auto)))


@dataclass(frozen=True)
class RopeSettings:
    """How positions are rotated, where it is not what the file says (None). Raises UsageError.

    The scale is the factor by which the context is longer than what was trained.
    """

    rope_scaling: str | None = field(
        default=None, metadata=ruled(Choice("--rope-scaling", ("none", "linear", "yarn")))
    )
    rope_scale: float | None = _or_file("--rope-scale", 1, 65536, 0)
    rope_freq_base: float | None = _or_file("--rope-freq-base", 2, 1e12, 0)
    rope_freq_scale: float | None = _or_file("--rope-freq-scale", 1 / 65536, 1, 0)
    yarn_orig_ctx: int | None = _or_file("--yarn-orig-ctx", 1, 2**30, 0, whole=True)
    yarn_ext_factor: float | None = _or_file("--yarn-ext-factor", 0, 1, -1)
    yarn_attn_factor: float | None = _or_file("--yarn-attn-factor", 1e-3, 1e3, -1)
    yarn_beta_slow: float | None = _or_file("--yarn-beta-slow", 1e-6, 1e6, -1)
    yarn_beta_fast: float | None = _or_file("--yarn-beta-fast", 1e-6, 1e6, -1)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rope_scale is not None and self.rope_freq_scale is not None:
            raise UsageError("--rope-scale and --rope-freq-scale: give one of them, not both")
        if self.rope_scaling == "none" and self.factor not in (None, 1):
            raise UsageError(f"--rope-scaling none: leaves no room for a scale of {self.factor:g}")
        slow, fast = self.yarn_beta_slow, self.yarn_beta_fast
        if slow is not None and fast is not None and fast < slow:
            raise UsageError(f"--yarn-beta-fast: {fast:g} is below --yarn-beta-slow {slow:g}")

    @property
    def factor(self) -> float | None:
        """What frequencies are divided by."""
        return 1 / self.rope_freq_scale if self.rope_freq_scale else self.rope_scale

    @property
    def is_given(self) -> bool:
        return any(getattr(self, each.name) is not None for each in fields(self))


FROM_FILE = RopeSettings()
