"""What a user may choose, with defaults and limits: the one place that knows which values work.

A settings object checks itself when it is made, so whoever holds one need not check again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import or_
from pathlib import Path
from typing import Any

from codegen.formats import CACHE_FORMATS, LATENT_CACHE_TYPES
from codegen.thread_policy import DEFAULT_POLL, ThreadPolicy
from mlacli.cpu_count import available_cpus, default_threads
from mlacli.errors import UsageError
from mlacli.limits import (
    Choice,
    CpuMask,
    CpuRange,
    ExpertReduction,
    Switch,
    Text,
    check_fields,
    limited,
    ruled,
)
from mlacli.overrides import FROM_FILE, Override, OverrideRule, RopeSettings
from mlacli.placement import (
    NUMA,
    chosen_cpus,
    mask_notes,
    numa_notes,
    this_machine,
    thread_cpus,
)
from mlacli.sampling_settings import MAX_INT, SamplingSettings, sampling_notes

OFF = "off"
ALL_CORES = -1  # of the CPUs chosen
SAME_AS_THREADS = -1
TEXT = "text"  # as the model writes it
REASONING_FORMATS = ("auto", "none", "deepseek", "deepseek-legacy")


def default_model() -> Path:
    """The small model that ships with the package."""
    return Path(__file__).parent / "data" / "demo.gguf"


@dataclass(frozen=True)
class RunSettings:
    """How a model is run. Sizes are in tokens, `amb_mib` in MiB. Raises UsageError."""

    model: Path = field(default_factory=default_model)
    # None: as much as was trained and fits, at most 4096. 0: all that was trained.
    n_ctx: int | None = field(default=None, metadata=limited("-c", 0, MAX_INT))
    n_batch: int = field(default=2048, metadata=limited("-b", 1, 2**20))
    n_ubatch: int = field(default=512, metadata=limited("-ub", 1, 2**16))
    n_threads: int = field(default=ALL_CORES, metadata=limited("-t", 1, 1024))
    n_threads_batch: int = field(default=SAME_AS_THREADS, metadata=limited("-tb", 1, 1024))
    mla: int = field(default=3, metadata=limited("-mla", 0, 3))
    # None: 128 with -mla 2, a cost model of this machine with -mla 3. 1: always expanded.
    mla_threshold: int | None = field(default=None, metadata=limited("--mla-threshold", 1, MAX_INT))
    flash_attn: bool = field(default=True, metadata=ruled(Switch("-fa")))
    type_k: str = field(default="f16", metadata=ruled(Choice("-ctk", tuple(CACHE_FORMATS))))
    type_v: str = field(default="f16", metadata=ruled(Choice("-ctv", tuple(CACHE_FORMATS))))
    amb_mib: int = field(default=256, metadata=limited("-amb", 0, 2**20))  # 0: no limit
    rtr: bool = field(default=False, metadata=ruled(Switch("-rtr")))
    fmoe: bool = field(default=True, metadata=ruled(Switch("-fmoe")))
    # (least number of experts, threshold)
    ser: tuple[int, float] | None = field(default=None, metadata=ruled(ExpertReduction("-ser")))
    thp: bool = field(default=False, metadata=ruled(Switch("-thp")))
    mlock: bool = field(default=False, metadata=ruled(Switch("--mlock")))
    mmap: bool = field(default=True, metadata=ruled(Switch("--mmap")))
    fit: bool = field(default=True, metadata=ruled(Switch("-fit")))  # without -c: what fits
    check_tensors: bool = field(default=False, metadata=ruled(Switch("--check-tensors")))
    overrides: tuple[Override, ...] = field(
        default=(), metadata=ruled(OverrideRule("--override-kv"), each=True)
    )
    rope: RopeSettings = FROM_FILE
    verbose: bool = False
    # Where threads run and how they wait. A mask has bit i for CPU i, a range is a mask as well;
    # what is None for prompts (_batch) is as it is for generation.
    numa: str | None = field(default=None, metadata=ruled(Choice("--numa", (*NUMA, OFF))))
    cpu_mask: int | None = field(default=None, metadata=ruled(CpuMask("-C")))
    cpu_range: int | None = field(default=None, metadata=ruled(CpuRange("-Cr")))
    cpu_strict: bool = field(default=False, metadata=ruled(Switch("--cpu-strict")))
    prio: int = field(default=0, metadata=limited("--prio", -1, 3))
    poll: int = field(default=DEFAULT_POLL, metadata=limited("--poll", 0, 100))
    cpu_mask_batch: int | None = field(default=None, metadata=ruled(CpuMask("-Cb")))
    cpu_range_batch: int | None = field(default=None, metadata=ruled(CpuRange("-Crb")))
    cpu_strict_batch: bool | None = field(
        default=None, metadata=ruled(Switch("--cpu-strict-batch"))
    )
    poll_batch: int | None = field(default=None, metadata=limited("--poll-batch", 0, 100))

    def __post_init__(self) -> None:
        if self.numa == OFF:
            object.__setattr__(self, "numa", None)
        if self.n_threads == ALL_CORES:
            object.__setattr__(self, "n_threads", default_threads(self.cpus()))
        if self.n_threads_batch == SAME_AS_THREADS:
            own = (self.cpu_mask_batch or self.cpu_range_batch) is not None
            n = default_threads(self.cpus(batch=True)) if own else self.n_threads
            object.__setattr__(self, "n_threads_batch", n)
        check_fields(self)
        for batch in (False, True):
            self.cpus(batch=batch)
        if self.n_ubatch > self.n_batch:
            raise UsageError(f"-ub: {self.n_ubatch} is more than -b {self.n_batch}")
        self._check_cache_types()

    def cpus(self, *, batch: bool = False) -> frozenset[int] | None:
        """The CPUs chosen for generation or for prompts; None: those that the process may use.

        Raises UsageError when there is none.
        """
        flag, mask = self.cpu_masks(batch=batch)
        if mask is None and self.numa is None:
            return None
        return chosen_cpus(this_machine(), flag, mask, self.numa)

    def policy(self, *, batch: bool = False) -> ThreadPolicy:
        """How threads are to behave during generation or prompts."""
        strict, poll = self.cpu_strict, self.poll
        if batch:
            strict = strict if self.cpu_strict_batch is None else self.cpu_strict_batch
            poll = poll if self.poll_batch is None else self.poll_batch
        cpus, found = self.cpus(batch=batch), tuple[frozenset[int], ...]()
        if cpus is not None or strict:
            machine = this_machine()
            found = thread_cpus(
                machine,
                machine.allowed if cpus is None else cpus,
                numa=self.numa,
                strict=strict,
                in_order=self.cpu_masks(batch=batch)[1] is not None,
            )
        return ThreadPolicy(found, poll, self.prio)

    def cpu_masks(self, *, batch: bool = False) -> tuple[str, int | None]:
        """(flag, mask) of the CPUs asked for: a mask and a range together name all of both."""
        own = (("-Cb", self.cpu_mask_batch), ("-Crb", self.cpu_range_batch)) if batch else ()
        for masks in (own, (("-C", self.cpu_mask), ("-Cr", self.cpu_range))):
            given = [(flag, mask) for flag, mask in masks if mask is not None]
            if given:
                return " and ".join(f for f, _ in given), functools.reduce(
                    or_, dict(given).values()
                )
        return "-C", None

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
class Grammar:
    """What an answer must be: `kind` is gbnf, json (a schema) or regex; `flag` gave the text."""

    kind: str
    text: str
    flag: str


@dataclass(frozen=True)
class Request:
    """One prompt to answer. Bytes that are no UTF-8 stand in `prompt` as surrogate escapes.

    Raises UsageError.
    """

    prompt: str
    # -1: until the model ends. -2: until the context is full.
    n_predict: int = field(default=-1, metadata=limited("-n", -2, MAX_INT))
    raw: bool = False  # no chat template
    system: str = ""  # message before the prompt, for the chat template
    template: str | None = None  # Jinja text instead of the file's
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    context_shift: bool = field(default=False, metadata=ruled(Switch("--context-shift")))
    # of a shift: tokens of the prompt that stay; -1: all of them
    keep: int = field(default=0, metadata=limited("--keep", -1, MAX_INT))
    grammar: Grammar | None = None
    talks: bool = False  # the prompt, if any, begins a conversation
    single_turn: bool = False
    reverse_prompt: tuple[str, ...] = field(default=(), metadata=ruled(Text("-r"), each=True))
    in_prefix: str = field(default="", metadata=ruled(Text("--in-prefix")))
    in_suffix: str = field(default="", metadata=ruled(Text("--in-suffix")))
    multiline: bool = False
    # auto: dim on a terminal
    reasoning: str = field(default="auto", metadata=ruled(Choice("-rea", ("auto", "on", "off"))))
    # auto is deepseek
    reasoning_format: str = field(
        default="auto", metadata=ruled(Choice("--reasoning-format", REASONING_FORMATS))
    )
    # tokens of a thought; -1: no limit
    reasoning_budget: int = field(default=-1, metadata=limited("--reasoning-budget", -1, MAX_INT))
    reasoning_message: str = field(default="", metadata=ruled(Text("--reasoning-budget-message")))
    special: bool = False  # control tokens are shown
    # tokens between two notes about how many there are; -1: none
    token_count: int = field(default=-1, metadata=limited("-ptc", -1, MAX_INT))
    warmup: bool = False
    waits: bool = False  # a conversation whose prompt goes before the first message typed
    prompt_cache: Path | None = None  # a session file, read before and written after the prompt
    prompt_cache_all: bool = False  # written after the answer instead
    prompt_cache_ro: bool = False  # only read
    display_prompt: bool = False
    verbose_prompt: bool = False  # its tokens are listed
    show_timings: bool = True
    output: str = TEXT  # or json, jsonl: an answer as objects
    json_tokens: bool = False  # their ids in it, too
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    @property
    def limit(self) -> int:
        """Most tokens to generate."""
        return self.n_predict if self.n_predict >= 0 else MAX_INT

    def __post_init__(self) -> None:
        check_fields(self)
        if self.prompt_cache is None and (self.prompt_cache_all or self.prompt_cache_ro):
            flag = "all" if self.prompt_cache_all else "ro"
            raise UsageError(f"--prompt-cache-{flag}: needs --prompt-cache FILE")
        if self.talks and self.output != TEXT:
            raise UsageError(
                f"--{self.output}: is for one answer, not for a conversation "
                "(give -p TEXT, -f FILE or standard input)"
            )
        if self.json_tokens and self.output == TEXT:
            raise UsageError("--json-tokens: needs --json or --jsonl")
        if not self.prompt and not self.talks:
            raise UsageError("the prompt is empty (give -p TEXT, -f FILE or standard input)")


def notes(settings: RunSettings, request: Request | None = None) -> list[str]:
    """A line for every flag that was given but changes nothing with the others as they are, or
    only does harm."""
    found = []
    if request is not None and request.raw and request.system:
        found.append("-sys has no effect with --no-cnv: no chat template is used")
    if request is not None:
        found += sampling_notes(request.sampling)
    if request is not None and request.keep and not request.context_shift:
        found.append("--keep has no effect without --context-shift")
    if request is not None and request.grammar and request.sampling.ignore_eos:
        found.append(f"--ignore-eos has no effect with {request.grammar.flag}: it says what ends")
    if request is not None and request.display_prompt and (request.talks or request.output != TEXT):
        found.append("--display-prompt has no effect with --json, --jsonl or a conversation")
    if request is not None:
        found += _thought_notes(request)
    if request is not None and request.prompt_cache_all and request.prompt_cache_ro:
        found.append("--prompt-cache-all has no effect with --prompt-cache-ro: nothing is written")
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
    return found + cpu_notes(settings)


def cpu_notes(settings: RunSettings) -> list[str]:
    """The same of threads and the CPUs they run on."""
    machine, found = this_machine(), list[str]()
    for batch in (False, True):
        found += mask_notes(machine, *settings.cpu_masks(batch=batch))
    found = [*dict.fromkeys(found), *numa_notes(machine, settings.numa)]
    threads = {False: settings.n_threads, True: settings.n_threads_batch}
    for batch in sorted(threads, key=lambda batch: -threads[batch]):
        chosen = settings.cpus(batch=batch)
        cpus = available_cpus() if chosen is None else len(chosen)
        if threads[batch] > cpus:
            best = f"-t {default_threads(chosen)}"
            found.append(f"{threads[batch]} threads share {cpus} CPUs: slower than {best}")
            break
    return found


def _thought_notes(request: Request) -> list[str]:
    found = []
    if request.grammar and request.reasoning_budget >= 0:
        found.append(
            f"--reasoning-budget has no effect with {request.grammar.flag}: "
            "it says what the answer is from its first token"
        )
    if request.reasoning_message and request.reasoning_budget < 0:
        found.append("--reasoning-budget-message has no effect without --reasoning-budget")
    if request.reasoning != "auto" and request.reasoning_format in ("none", "deepseek-legacy"):
        found.append(f"-rea has no effect with --reasoning-format {request.reasoning_format}")
    return found
