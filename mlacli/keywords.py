"""Settings from Python values: the keyword arguments of the API, named as the settings' fields.

The values are checked by the rules that the flags follow; what is wrong is said under the keyword.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from numbers import Integral, Real
from typing import Any, TypedDict

from mlacli.errors import MlaError, UsageError
from mlacli.limits import Choice, ExpertReduction, Limit, Rule, Switch, Text
from mlacli.sampling_settings import Bias, Chain
from mlacli.suggest import suggestion


class LoadSettings(TypedDict, total=False):
    """Keywords of `load`: fields of RunSettings, of which `path` gives the model and `overrides`
    say what differs from its metadata, RoPE's among it."""

    n_ctx: int | None
    n_batch: int
    n_ubatch: int
    n_threads: int
    n_threads_batch: int
    mla: int
    mla_threshold: int | None
    flash_attn: bool
    type_k: str
    type_v: str
    amb_mib: int
    rtr: bool
    fmoe: bool
    ser: tuple[int, float] | None
    thp: bool
    mlock: bool
    mmap: bool
    fit: bool
    check_tensors: bool
    overrides: Sequence[str]
    numa: str | None
    cpu_mask: str | None
    cpu_range: str | None
    cpu_strict: bool
    prio: int
    poll: int
    cpu_mask_batch: str | None
    cpu_range_batch: str | None
    cpu_strict_batch: bool | None
    poll_batch: int | None


class SamplingOptions(TypedDict, total=False):
    """Keywords of `generate` and `stream`: fields of SamplingSettings."""

    temp: float
    dynatemp_range: float
    dynatemp_exp: float
    top_k: int
    top_p: float
    min_p: float
    top_n_sigma: float
    tfs_z: float
    typical_p: float
    xtc_probability: float
    xtc_threshold: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    repeat_last_n: int
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breaker: Sequence[str]
    adaptive_target: float
    adaptive_decay: float
    mirostat: int
    mirostat_ent: float
    mirostat_lr: float
    samplers: Sequence[str] | None
    logit_bias: Mapping[int, float]
    seed: int
    ignore_eos: bool


def checked(owner: type[Any], given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Field values for a settings class, of the fields `known`. Raises UsageError naming the
    keyword."""
    declared, found = {field.name: field for field in fields(owner)}, {}
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"{name}: no such setting{suggestion(name, known)}")
        found[name] = _field_value(declared[name], value)
    return found


def number(name: str, value: Any, kind: type[int] | type[float]) -> Any:
    """A number of Python's or numpy's as Python's. Raises UsageError."""
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"{name}: {str(value)[:40]!r} is not {what}")
    made: int | float = kind(value)  # type: ignore[call-overload]  # numbers.Real has both
    return made


@contextmanager
def named(name: str, flag: str) -> Iterator[None]:
    """Within, errors that begin with a flag begin with the keyword instead."""
    try:
        yield
    except MlaError as problem:
        text = str(problem).removeprefix(flag + ":").lstrip()
        raise type(problem)(f"{name}: {text}") from None


def _field_value(field: Field[Any], value: Any) -> Any:
    name, rule = field.name, field.metadata.get("rule")
    if value is None and field.default is None:
        return None
    if rule is None:
        return _of_type(name, value, type(field.default))
    if isinstance(rule, Bias):
        pairs = _of_type(name, value, Mapping, "a dict of tokens and numbers").items()
        value = tuple((number(name, t, int), number(name, x, float)) for t, x in pairs)
        with named(name, rule.flag):
            for one in value:
                rule.check(one)
        return value
    if isinstance(rule, Chain):
        with named(name, rule.flag):
            return rule.parse(";".join(_texts(name, value)))
    if field.metadata["each"]:
        return tuple(_one(name, rule, one) for one in _texts(name, value))
    return _one(name, rule, value)


def _one(name: str, rule: Rule, value: Any) -> Any:
    with named(name, rule.flag):
        match rule:
            case Limit():
                value = number(name, value, rule.kind)
            case Switch():
                _of_type(name, value, bool, "True or False")
            case ExpertReduction():
                if len(_of_type(name, value, Sequence, "a pair such as (4, 0.3)")) != 2:
                    raise UsageError(f"{name}: {value!r} is not a pair such as (4, 0.3)")
                value = number(name, value[0], int), number(name, value[1], float)
            case Choice() | Text():
                _of_type(name, value, str)
            case _:
                return rule.parse(_of_type(name, value, str))
        rule.check(value)
    return value


def _texts(name: str, value: Any) -> Sequence[str]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UsageError(f"{name}: {value!r} is not a list of texts")
    for one in value:
        _of_type(name, one, str)
    return value


def _of_type(name: str, value: Any, kind: type[Any], what: str = "") -> Any:
    if not isinstance(value, kind):
        what = what or {str: "a text", bool: "True or False"}.get(kind, f"a {kind.__name__}")
        raise UsageError(f"{name}: {str(value)[:40]!r} is not {what}")
    return value
