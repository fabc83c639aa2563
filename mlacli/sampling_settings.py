"""How the next token is picked: what may be chosen, under the names of the peers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from mlacli.errors import UsageError
from mlacli.limits import Limit, Text, check_fields, limited, ruled
from mlacli.suggest import suggestion

MAX_SEED = 2**32 - 1
RANDOM_SEEDS = (-1, MAX_SEED)  # both stand for a seed drawn by the system, as in llama.cpp
MAX_INT = 2**31 - 1
_MAX_BREAKERS = 64

# name: (other names for it, letters of --sampling-seq)
_SAMPLERS = {
    "penalties": ((), "e"),
    "dry": ((), "d"),
    "top_n_sigma": (("top_nsigma",), "sn"),
    "top_k": ((), "k"),
    "tfs_z": (("tfs",), "f"),
    "typical_p": (("typ_p", "typical", "typ"), "y"),
    "top_p": (("nucleus",), "p"),
    "min_p": ((), "m"),
    "xtc": ((), "x"),
    "temperature": (("temp",), "t"),
    "adaptive_p": ((), "wa"),
}
SAMPLERS = tuple(_SAMPLERS)  # in the order in which they run unless told otherwise
_BY_NAME = {n: name for name, (others, _) in _SAMPLERS.items() for n in (name, *others)}
_BY_LETTER = {letter: name for name, (_, letters) in _SAMPLERS.items() for letter in letters}
_NOT_HERE = {"infill": "i"}  # the peers', and their letters


@dataclass(frozen=True)
class Chain:
    """Samplers in the order in which they run: `top_k;temperature`, or with `letters` `kt`."""

    flag: str
    letters: bool = False

    def check(self, value: tuple[str, ...]) -> None:
        for name in value:
            if name not in _SAMPLERS:
                raise UsageError(f"{self.flag}: {name!r} is not one of {', '.join(SAMPLERS)}")

    def parse(self, text: str) -> tuple[str, ...]:
        words = list(text) if self.letters else [w.strip() for w in text.split(";") if w.strip()]
        return tuple(map(self._letter if self.letters else self._name, words))

    def _letter(self, letter: str) -> str:
        if letter in _NOT_HERE.values():
            name = next(n for n, known in _NOT_HERE.items() if known == letter)
            raise UsageError(f"{self.flag}: {letter!r} ({name}) is not a sampler of mlacli")
        if letter not in _BY_LETTER:
            known = ", ".join(f"{key} {name}" for key, name in _BY_LETTER.items())
            raise UsageError(f"{self.flag}: {letter!r} is not one of {known}")
        return _BY_LETTER[letter]

    def _name(self, word: str) -> str:
        name = word.lower().replace("-", "_")
        if name in _NOT_HERE:
            raise UsageError(f"{self.flag}: {word!r} is not a sampler of mlacli")
        if name not in _BY_NAME:
            hint = suggestion(name, _BY_NAME)
            raise UsageError(f"{self.flag}: {word!r} is not one of {', '.join(SAMPLERS)}{hint}")
        return _BY_NAME[name]


@dataclass(frozen=True)
class Bias:
    """`29905+1.5`, `29905-1` or `29905-inf`: a token and what is added to its logit."""

    flag: str

    def check(self, value: tuple[int, float]) -> None:
        token, bias = value
        if not 0 <= token <= MAX_INT or math.isnan(bias) or bias == math.inf:
            raise UsageError(f"{self.flag}: {value} is not a token and a number below infinity")

    def parse(self, text: str) -> tuple[int, float]:
        found = re.fullmatch(r"(\d{1,10})([+-](?:\d+\.?\d*|\.\d+)|-inf)", text, re.ASCII)
        if not found:
            raise UsageError(f"{self.flag}: {text!r} is not a token and a bias such as 29905-1.5")
        value = int(found[1]), float(found[2])
        self.check(value)
        return value


def _number(flag: str, default: float, low: float, high: float) -> float:
    return field(default=default, metadata=ruled(Limit(flag, low, high, float)))


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is picked; the defaults are llama.cpp's. Raises UsageError."""

    temp: float = _number("--temp", 0.8, 0, 1000)  # 0: greedy
    dynatemp_range: float = _number("--dynatemp-range", 0, 0, 1000)
    dynatemp_exp: float = _number("--dynatemp-exp", 1, 0, 100)
    top_k: int = field(default=40, metadata=limited("--top-k", 0, MAX_INT))  # 0: all
    top_p: float = _number("--top-p", 0.95, 0, 1)
    min_p: float = _number("--min-p", 0.05, 0, 1)
    top_n_sigma: float = _number("--top-n-sigma", -1, -1, 1000)  # 0 and below: off
    tfs_z: float = _number("--tfs", 1, 0, 1)
    typical_p: float = _number("--typical", 1, 0, 1)
    xtc_probability: float = _number("--xtc-probability", 0, 0, 1)
    xtc_threshold: float = _number("--xtc-threshold", 0.1, 0, 1)
    repeat_penalty: float = _number("--repeat-penalty", 1, 0.01, 100)
    presence_penalty: float = _number("--presence-penalty", 0, -100, 100)
    frequency_penalty: float = _number("--frequency-penalty", 0, -100, 100)
    # -1: the whole context
    repeat_last_n: int = field(default=64, metadata=limited("--repeat-last-n", -1, MAX_INT))
    dry_multiplier: float = _number("--dry-multiplier", 0, 0, 1000)
    dry_base: float = _number("--dry-base", 1.75, 1, 100)
    dry_allowed_length: int = field(default=2, metadata=limited("--dry-allowed-length", 1, MAX_INT))
    # -1: the whole context
    dry_penalty_last_n: int = field(
        default=-1, metadata=limited("--dry-penalty-last-n", -1, MAX_INT)
    )
    dry_sequence_breaker: tuple[str, ...] = field(
        default=("\n", ":", '"', "*"),
        metadata=ruled(Text("--dry-sequence-breaker", 1, 256), each=True),
    )
    mirostat: int = field(default=0, metadata=limited("--mirostat", 0, 2))
    mirostat_ent: float = _number("--mirostat-ent", 5, 0, 100)
    mirostat_lr: float = _number("--mirostat-lr", 0.1, 0, 1)
    # below 0: off
    adaptive_target: float = _number("--adaptive-target", -1, -1, 1)
    adaptive_decay: float = _number("--adaptive-decay", 0.9, 0, 0.99)
    # None: the other one, or the default
    samplers: tuple[str, ...] | None = field(default=None, metadata=ruled(Chain("--samplers")))
    sampling_seq: tuple[str, ...] | None = field(
        default=None, metadata=ruled(Chain("--sampling-seq", letters=True))
    )
    logit_bias: tuple[tuple[int, float], ...] = field(
        default=(), metadata=ruled(Bias("-l"), each=True)
    )
    # RANDOM_SEEDS: a new one each time, which the start-up lines name
    seed: int = field(default=-1, metadata=limited("-s", -1, MAX_SEED))
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.samplers is not None and self.sampling_seq is not None:
            raise UsageError("--samplers and --sampling-seq: give one of them, not both")
        if len(self.dry_sequence_breaker) > _MAX_BREAKERS:
            raise UsageError(f"--dry-sequence-breaker: more than {_MAX_BREAKERS}")

    @property
    def chain(self) -> tuple[str, ...]:
        """The samplers that run, in order. Mirostat comes in place of those that cut; adaptive-p
        picks the token, so that it is the last wherever it stands in a list."""
        given = self.samplers if self.samplers is not None else self.sampling_seq
        if self.mirostat:
            return ("penalties", "dry", "temperature", "mirostat")
        chain = SAMPLERS if given is None else given
        last = ("adaptive_p",) if "adaptive_p" in chain else ()
        return (*(name for name in chain if name != "adaptive_p"), *last)

    @property
    def breakers(self) -> tuple[str, ...]:
        return () if self.dry_sequence_breaker == ("none",) else self.dry_sequence_breaker


# sampler: the fields that set it
_FIELDS = {
    "penalties": ("repeat_penalty", "presence_penalty", "frequency_penalty", "repeat_last_n"),
    "dry": ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
    "top_n_sigma": ("top_n_sigma",),
    "top_k": ("top_k",),
    "tfs_z": ("tfs_z",),
    "typical_p": ("typical_p",),
    "top_p": ("top_p",),
    "min_p": ("min_p",),
    "xtc": ("xtc_probability", "xtc_threshold"),
    "temperature": ("temp", "dynatemp_range", "dynatemp_exp"),
    "adaptive_p": ("adaptive_target", "adaptive_decay"),
}


def sampling_notes(settings: SamplingSettings) -> list[str]:
    """A line for every sampler that was set but does not run."""
    why = f"--mirostat {settings.mirostat}" if settings.mirostat else "the list of samplers"
    found = []
    for name, names in _FIELDS.items():
        set_ones = [n for n in names if getattr(settings, n) != getattr(SamplingSettings, n)]
        if set_ones and name not in settings.chain:
            found.append(f"{', '.join(set_ones)} has no effect: {name} is left out by {why}")
    if settings.mirostat and (settings.samplers or settings.sampling_seq):
        found.append(f"the list of samplers has no effect with --mirostat {settings.mirostat}")
    return found


def sampling_lines(settings: SamplingSettings, seed: int) -> list[str]:
    """What is printed before a run: the seed, the values, the order."""
    values = [
        f"{name} = {getattr(settings, name):g}" for names in _FIELDS.values() for name in names
    ]
    values += [f"mirostat = {settings.mirostat}"]
    if settings.mirostat:
        values += [f"{n} = {getattr(settings, n):g}" for n in ("mirostat_ent", "mirostat_lr")]
    return [
        f"sampling seed: {seed}",
        f"sampling: {', '.join(values)}",
        f"sampling order: {' -> '.join(('logits', *settings.chain))}",
    ]
