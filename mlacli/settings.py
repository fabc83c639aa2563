"""What a user may choose, with defaults and limits: the one place that knows which values work.

A settings object checks itself when it is made, so whoever holds one need not check again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from codegen.formats import CACHE_FORMATS, LATENT_CACHE_TYPES
from mlacli.cpu_count import available_cpus, default_threads
from mlacli.errors import UsageError
from mlacli.limits import Choice, ExpertReduction, Limit, Rule, Switch

SAME_AS_THREADS = -1
MAX_SEED = 2**32 - 1
RANDOM_SEEDS = (-1, MAX_SEED)  # both stand for a seed drawn by the system, as in llama.cpp
_MAX_INT = 2**31 - 1


def _rule(rule: Rule) -> dict[str, Rule]:
    return {"rule": rule}


def _limit(flag: str, low: int, high: int) -> dict[str, Rule]:
    return _rule(Limit(flag, low, high))


def rules(settings: type[Any]) -> dict[str, Rule]:
    """Field name -> its rule, for a settings class."""
    return {f.name: f.metadata["rule"] for f in fields(settings) if "rule" in f.metadata}


def _check_fields(settings: Any) -> None:
    for name, rule in rules(type(settings)).items():
        value = getattr(settings, name)
        if value is not None:
            rule.check(value)


def default_model() -> Path:
    """The small model that ships with the package."""
    return Path(__file__).parent / "data" / "demo.gguf"


@dataclass(frozen=True)
class RunSettings:
    """How a model is run. Sizes are in tokens, `amb_mib` in MiB. Raises UsageError."""

    model: Path = field(default_factory=default_model)
    # None: as much as was trained and fits, at most 4096. 0: all that was trained.
    n_ctx: int | None = field(default=None, metadata=_limit("-c", 0, _MAX_INT))
    n_batch: int = field(default=2048, metadata=_limit("-b", 1, 2**20))
    n_ubatch: int = field(default=512, metadata=_limit("-ub", 1, 2**16))
    n_threads: int = field(default_factory=default_threads, metadata=_limit("-t", 1, 1024))
    n_threads_batch: int = field(default=SAME_AS_THREADS, metadata=_limit("-tb", 1, 1024))
    mla: int = field(default=3, metadata=_limit("-mla", 0, 3))
    # None: 128 with -mla 2, a cost model of this machine with -mla 3. 1: always expanded.
    mla_threshold: int | None = field(default=None, metadata=_limit("--mla-threshold", 1, _MAX_INT))
    flash_attn: bool = field(default=True, metadata=_rule(Switch("-fa")))
    type_k: str = field(default="f16", metadata=_rule(Choice("-ctk", tuple(CACHE_FORMATS))))
    type_v: str = field(default="f16", metadata=_rule(Choice("-ctv", tuple(CACHE_FORMATS))))
    amb_mib: int = field(default=256, metadata=_limit("-amb", 0, 2**20))  # 0: no limit
    rtr: bool = field(default=False, metadata=_rule(Switch("-rtr")))
    fmoe: bool = field(default=True, metadata=_rule(Switch("-fmoe")))
    # (least number of experts, threshold)
    ser: tuple[int, float] | None = field(default=None, metadata=_rule(ExpertReduction("-ser")))
    thp: bool = field(default=False, metadata=_rule(Switch("-thp")))
    mlock: bool = field(default=False, metadata=_rule(Switch("--mlock")))
    mmap: bool = field(default=True, metadata=_rule(Switch("--mmap")))
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.n_threads_batch == SAME_AS_THREADS:
            object.__setattr__(self, "n_threads_batch", self.n_threads)
        _check_fields(self)
        if self.n_ubatch > self.n_batch:
            raise UsageError(f"-ub: {self.n_ubatch} is more than -b {self.n_batch}")
        self._check_cache_types()

    def _check_cache_types(self) -> None:
        if self.mla and self.type_k not in LATENT_CACHE_TYPES:
            raise UsageError(
                f"-ctk: {self.type_k} cannot hold the latent rows of -mla {self.mla} "
                f"(one of {', '.join(LATENT_CACHE_TYPES)}, or -mla 0)"
            )
        if not self.flash_attn and CACHE_FORMATS[self.type_v].is_quantised:
            raise UsageError(
                f"-ctv: {self.type_v} needs flash attention (-fa on): "
                "without it V is kept transposed, which blocks of values do not allow"
            )


def fitted(**given: Any) -> RunSettings:
    """RunSettings whose -b and -ub go together when only one of them is given.

    A -ub above the default -b raises -b, a -b below the default -ub lowers -ub. Raises UsageError.
    """
    if "n_batch" in given:
        given.setdefault("n_ubatch", min(RunSettings.n_ubatch, given["n_batch"]))
    elif "n_ubatch" in given:
        given["n_batch"] = max(RunSettings.n_batch, given["n_ubatch"])
    return RunSettings(**given)


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is picked; the defaults are llama.cpp's. Raises UsageError."""

    temp: float = field(default=0.8, metadata=_rule(Limit("--temp", 0, 1000, float)))  # 0: greedy
    top_k: int = field(default=40, metadata=_limit("--top-k", 0, _MAX_INT))  # 0: all
    top_p: float = field(default=0.95, metadata=_rule(Limit("--top-p", 0, 1, float)))
    min_p: float = field(default=0.05, metadata=_rule(Limit("--min-p", 0, 1, float)))
    repeat_penalty: float = field(
        default=1.0, metadata=_rule(Limit("--repeat-penalty", 0.01, 100, float))
    )
    # -1: the whole context
    repeat_last_n: int = field(default=64, metadata=_limit("--repeat-last-n", -1, _MAX_INT))
    # RANDOM_SEEDS: a new one each time, which the start-up lines name
    seed: int = field(default=-1, metadata=_limit("-s", -1, MAX_SEED))
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True)
class Request:
    """One prompt to answer. Bytes that are no UTF-8 stand in `prompt` as surrogate escapes.

    Raises UsageError.
    """

    prompt: str
    # -1: until the model ends. -2: until the context is full.
    n_predict: int = field(default=-1, metadata=_limit("-n", -2, _MAX_INT))
    raw: bool = False  # no chat template
    system: str = ""  # message before the prompt, for the chat template
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        _check_fields(self)
        if not self.prompt:
            raise UsageError("the prompt is empty (give -p TEXT, -f FILE or standard input)")


def notes(settings: RunSettings, request: Request | None = None) -> list[str]:
    """A line for every flag that was given but changes nothing with the others as they are, or
    only does harm."""
    found = []
    if request is not None and request.raw and request.system:
        found.append("-sys has no effect with --no-cnv: no chat template is used")
    if settings.mla and settings.type_v != "f16":
        found.append(
            f"-ctv {settings.type_v} has no effect with -mla {settings.mla}: "
            "V is a part of the cached row"
        )
    if not settings.mla and not settings.flash_attn and settings.type_v == "bf16":
        found.append("-ctv bf16: without flash attention V is kept transposed, as f16")
    if settings.flash_attn and settings.mla in (0, 1) and settings.amb_mib != 256:
        found.append(
            f"-amb {settings.amb_mib} has no effect with -fa on and -mla {settings.mla}: "
            "K*Q is never stored"
        )
    if settings.rtr and not settings.mmap:
        found.append(
            "--no-mmap with -rtr holds the weights twice: the copies alone are what is read"
        )
    if settings.mla_threshold is not None and settings.mla in (0, 1):
        found.append(f"--mla-threshold has no effect with -mla {settings.mla}: one path only")
    cpus = available_cpus()
    threads = max(settings.n_threads, settings.n_threads_batch)
    if threads > cpus:
        found.append(f"{threads} threads share {cpus} CPUs: slower than -t {default_threads()}")
    return found
