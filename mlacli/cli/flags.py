"""The flags that commands share, by the settings field that each one sets.

Names are llama.cpp's and ik_llama.cpp's. Limits and defaults are those of the settings classes.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from codegen.formats import CACHE_FORMATS, LATENT_CACHE_TYPES
from mlacli.cli import answer_flags, console
from mlacli.cli.log_settings import DEBUG, LOG_TEXT, LogSettings
from mlacli.cli.model_flags import LOAD_MODES, SHOWN_DEFAULT, TEXTS, each_override, load_mode
from mlacli.cli.options import flag, parameter
from mlacli.errors import UsageError
from mlacli.hub import HubFile, fetch
from mlacli.limits import Choice, CpuMask, CpuRange, Limit, Rule
from mlacli.overrides import RopeSettings
from mlacli.sampling_settings import SAMPLERS
from mlacli.settings import RunSettings, fitted

MODEL, ATTENTION, SAMPLING, PROMPT = "Model and memory", "Attention", "Sampling", "Prompt"
THREADS = "Threads and CPUs"
OUTPUT = "Output"
PROFILE_HELP = "Show on stderr where the time goes, by op; with -v also by layer."
DEMO_MODEL = "a small model that comes with mlacli"
MAX_CHOICES = 8
NO_FLASH_ATTENTION = {"-no-fa": "-fa off", "--no-flash-attn": "-fa off"}
_ONLY_MLA_0 = ", ".join(name for name in CACHE_FORMATS if name not in LATENT_CACHE_TYPES)

# field: (section, names, placeholder, help)
_TEXT: dict[str, tuple[str, str, str, str]] = {
    "model": (MODEL, "-m --model", "FILE", "GGUF file; of a split model the first part."),
    "hf_repo": (
        MODEL,
        "-hf -hfr --hf-repo",
        "USER/REPO[:QUANT]",
        "A model of the Hugging Face hub, kept in its cache (extra: hub).",
    ),
    "hf_file": (MODEL, "-hff --hf-file", "FILE", "Which file of it."),
    "hf_token": (MODEL, "-hft --hf-token", "TOKEN", "Access token."),
    "offline": (MODEL, "--offline", "", "Take what the cache has and ask no one."),
    "n_ctx": (MODEL, "-c --ctx-size", "N", "Context in tokens; 0: all that was trained."),
    "n_batch": (MODEL, "-b --batch-size", "N", "Prompt tokens that are submitted at once."),
    "n_ubatch": (MODEL, "-ub --ubatch-size", "N", "Prompt tokens that are computed at once."),
    "n_threads": (THREADS, "-t --threads", "N", "Threads for generation."),
    "n_threads_batch": (THREADS, "-tb --threads-batch", "N", "Threads for prompts."),
    "numa": (
        THREADS,
        "--numa",
        "distribute|isolate|numactl",
        "Threads on all NUMA nodes in turn, on the node where the process started, or on the CPUs "
        "that numactl chose.",
    ),
    "cpu_mask": (THREADS, "-C --cpu-mask", "HEX", "CPUs that threads may run on: bit i for CPU i."),
    "cpu_range": (THREADS, "-Cr --cpu-range", "LO-HI", "The same as a range; adds to -C."),
    "cpu_strict": (THREADS, "--cpu-strict", "[1|0]", "Each thread on a CPU of its own."),
    "prio": (
        THREADS,
        "--prio",
        "-1..3",
        "Priority of the threads: low, normal, medium, high, real-time.",
    ),
    "poll": (
        THREADS,
        "--poll",
        "0..100",
        "How long threads look for work before they sleep: 0 not at all, 100 for ever.",
    ),
    "cpu_mask_batch": (THREADS, "-Cb --cpu-mask-batch", "HEX", "CPUs for prompts."),
    "cpu_range_batch": (THREADS, "-Crb --cpu-range-batch", "LO-HI", "The same; adds to -Cb."),
    "cpu_strict_batch": (THREADS, "--cpu-strict-batch", "[1|0]", "--cpu-strict for prompts."),
    "poll_batch": (THREADS, "--poll-batch", "0..100", "--poll for prompts."),
    "rtr": (MODEL, "-rtr --run-time-repack", "", "Interleave weights at load (copies them)."),
    "fmoe": (MODEL, "-fmoe/-no-fmoe --fused-moe/--no-fused-moe", "", "Fuse up, gate and SiLU."),
    "ser": (
        MODEL,
        "-ser --smart-expert-reduction",
        "K,T",
        "The top K experts always; others only above T times the best one.",
    ),
    "thp": (MODEL, "-thp --transparent-huge-pages", "", "Huge pages where the system has them."),
    "mlock": (MODEL, "--mlock", "", "Keep the weights from being paged out."),
    "mmap": (MODEL, "--mmap/--no-mmap", "", "Map the file, or read it into memory."),
    "fit": (
        MODEL,
        "-fit --fit",
        "[on|off]",
        "Without -c, take less context if memory is short; off: refuse to run then.",
    ),
    "check_tensors": (
        MODEL,
        "--check-tensors -vq --validate-quants",
        "",
        "Look for NaN and Inf in the weights before anything runs.",
    ),
    **TEXTS,
    "verbose": (MODEL, "-v --verbose", "", "Say more about what is chosen and why."),
    "mla": (
        ATTENTION,
        "-mla --mla-use",
        "0..3",
        "0: K and V; 1: latent cache; 2: latent, prompts expanded; 3: the cheaper of both.",
    ),
    "mla_threshold": (
        ATTENTION,
        "--mla-threshold",
        "N",
        "Batches of N tokens and more are expanded (-mla 2 and 3); 1: all.",
    ),
    "flash_attn": (ATTENTION, "-fa --flash-attn", "[on|off|auto]", "Flash attention."),
    "type_k": (
        ATTENTION,
        "-ctk --cache-type-k",
        "TYPE",
        f"Type of the K cache: {', '.join(LATENT_CACHE_TYPES)}; with -mla 0 also {_ONLY_MLA_0}.",
    ),
    "type_v": (ATTENTION, "-ctv --cache-type-v", "TYPE", "Type of the V cache (-mla 0)."),
    "amb_mib": (
        ATTENTION,
        "-amb --attention-max-batch",
        "MIB",
        "Most memory for K*Q; 0: no limit.",
    ),
    "n_predict": (
        PROMPT,
        "-n --predict --n-predict",
        "N",
        "Most tokens to generate; -1: until the model ends, -2: until the context is full.",
    ),
    "samplers": (SAMPLING, "--samplers", "A;B", "Samplers in order, divided by semicolons."),
    "sampling_seq": (
        SAMPLING,
        "--sampling-seq --sampler-seq",
        "LETTERS",
        "The same, a letter each: e penalties, d dry, s top_n_sigma, k top_k, f tfs_z, "
        "y typical_p, p top_p, m min_p, x xtc, t temperature, w adaptive_p.",
    ),
    "temp": (SAMPLING, "--temp --temperature", "T", "0 takes the likeliest token."),
    "dynatemp_range": (
        SAMPLING,
        "--dynatemp-range",
        "R",
        "Temperature between T - R and T + R, by how open the choice is.",
    ),
    "dynatemp_exp": (SAMPLING, "--dynatemp-exp", "E", "How it depends on that: entropy^E."),
    "top_k": (SAMPLING, "--top-k", "N", "Only the N likeliest tokens; 0: all."),
    "top_p": (SAMPLING, "--top-p", "P", "The likeliest tokens that make up P."),
    "min_p": (SAMPLING, "--min-p", "P", "Tokens at least P times as likely as the likeliest."),
    "top_n_sigma": (
        SAMPLING,
        "--top-n-sigma --top-nsigma",
        "N",
        "Logits within N standard deviations of the greatest; -1: all.",
    ),
    "tfs_z": (SAMPLING, "--tfs", "Z", "Tail-free sampling; 1: off."),
    "typical_p": (SAMPLING, "--typical --typical-p", "P", "Locally typical sampling; 1: off."),
    "xtc_probability": (SAMPLING, "--xtc-probability", "P", "Chance that XTC removes the top."),
    "xtc_threshold": (
        SAMPLING,
        "--xtc-threshold",
        "P",
        "Of the tokens of at least this probability XTC leaves the least likely one.",
    ),
    "repeat_penalty": (SAMPLING, "--repeat-penalty", "X", "Weakens tokens used before; 1: off."),
    "presence_penalty": (SAMPLING, "--presence-penalty", "X", "Taken from tokens used before."),
    "frequency_penalty": (SAMPLING, "--frequency-penalty", "X", "The same for each use."),
    "repeat_last_n": (
        SAMPLING,
        "--repeat-last-n",
        "N",
        "Tokens these penalties look at; -1: the context.",
    ),
    "dry_multiplier": (
        SAMPLING,
        "--dry-multiplier",
        "X",
        "DRY: weakens tokens that go on with a repetition; 0: off.",
    ),
    "dry_base": (SAMPLING, "--dry-base", "B", "Its penalty grows by this factor per token."),
    "dry_allowed_length": (SAMPLING, "--dry-allowed-length", "N", "Repetitions that are free."),
    "dry_penalty_last_n": (SAMPLING, "--dry-penalty-last-n", "N", "Tokens it looks at; -1: all."),
    "dry_sequence_breaker": (
        SAMPLING,
        "--dry-sequence-breaker",
        "TEXT",
        "Text that ends a repetition; may be repeated; none: no such text.",
    ),
    "mirostat": (SAMPLING, "--mirostat", "0|1|2", "Keep the surprise of the text steady; 0: off."),
    "mirostat_ent": (SAMPLING, "--mirostat-ent", "TAU", "That surprise, in bits per token."),
    "mirostat_lr": (SAMPLING, "--mirostat-lr", "ETA", "How fast it is corrected."),
    **{field: (SAMPLING, *words) for field, words in answer_flags.SAMPLING_TEXTS.items()},
    "logit_bias": (
        SAMPLING,
        "-l --logit-bias",
        "ID+X",
        "Added to a token's logit; may be repeated.",
    ),
    "seed": (SAMPLING, "-s --seed", "N", "-1 (or 4294967295): a new one each time."),
    "ignore_eos": (SAMPLING, "--ignore-eos", "", "Go on after the end token."),
    "context_shift": (
        PROMPT,
        "--context-shift",
        "[on|off|auto]",
        "When the context is full, drop the oldest half of it and go on.",
    ),
    "keep": (PROMPT, "--keep", "N", "Tokens of the prompt that it keeps; -1: all."),
    "single_turn": (PROMPT, "-st --single-turn", "", "Of a conversation only the first answer."),
    "reverse_prompt": (
        PROMPT,
        "-r --reverse-prompt",
        "TEXT",
        "Text that ends an answer; may be repeated.",
    ),
    "in_prefix": (PROMPT, "--in-prefix", "TEXT", "Put before every message typed."),
    "in_suffix": (PROMPT, "--in-suffix", "TEXT", "Put behind every message typed."),
    "multiline": (
        PROMPT,
        "-mli --multiline-input",
        "",
        r"A message ends with a line that ends with \, instead of going on after one.",
    ),
    "reasoning": (
        PROMPT,
        "-rea --reasoning",
        "auto|on|off",
        "Show what is thought before an answer: dim on a terminal, as it comes, not at all.",
    ),
    **answer_flags.TEXTS,
    "prompt_cache": (
        PROMPT,
        "--prompt-cache",
        "FILE",
        "Keep the evaluated prompt in a file; what it has of the next one is not evaluated again.",
    ),
    "prompt_cache_all": (PROMPT, "--prompt-cache-all", "", "Keep the answer in it, too."),
    "prompt_cache_ro": (PROMPT, "--prompt-cache-ro", "", "Read that file, but never write it."),
    "display_prompt": (
        OUTPUT,
        "--display-prompt/--no-display-prompt",
        "",
        "Write the prompt, as the model reads it, before the answer.",
    ),
    "verbose_prompt": (OUTPUT, "--verbose-prompt", "", "List the prompt's tokens on stderr."),
    "show_timings": (
        OUTPUT,
        "--show-timings/--no-show-timings --perf/--no-perf",
        "",
        "After an answer, say how long it took.",
    ),
    **LOG_TEXT,
}
_SHOWN_DEFAULT = {
    **SHOWN_DEFAULT,
    "model": DEMO_MODEL,
    "n_ctx": "what fits, at most 4096",
    "n_threads": "physical cores",
    "n_threads_batch": "-t",
    "numa": "off",
    "cpu_mask": "all",
    "cpu_range": "",
    "cpu_mask_batch": "-C",
    "cpu_range_batch": "",
    "cpu_strict_batch": "--cpu-strict",
    "poll_batch": "--poll",
    "mla_threshold": "128 with -mla 2, measured with -mla 3",
    "ser": "off",
    "samplers": ";".join(SAMPLERS),
    "sampling_seq": "",
    "dry_sequence_breaker": r'\n : " *',
    "logit_bias": "",
    "reverse_prompt": "",
    "hf_repo": "",
    "hf_file": "",
    "hf_token": "HF_TOKEN",
    "offline": "off",
}


_LOAD_MODE = flag(
    "-lm --load-mode", MODEL, LOAD_MODES, "The same in one word, as llama.cpp has it.", "auto"
)
# What is set by flags of its own beside a settings class or inside it.
_PARTS = {RunSettings: (HubFile, RunSettings, RopeSettings, LogSettings)}


def meaning(field: str) -> str:
    """What the flag of this field does."""
    return _TEXT[field][3]


def names_of(field: str) -> list[str]:
    """The names of the flag of this field."""
    return _TEXT[field][1].replace("/", " ").split()


def shown_default(field: Field[Any]) -> str:
    """The default as help and docs show it."""
    if field.name in _SHOWN_DEFAULT:
        return _SHOWN_DEFAULT[field.name]
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return "" if field.default in (MISSING, None) else str(field.default)


def flags_of(*owners: type[Any]) -> Iterator[inspect.Parameter]:
    """A parameter for each field of these settings classes that has a flag; None: not given."""
    every = [part for owner in owners for part in _PARTS.get(owner, (owner,))]
    for field in (field for owner in every for field in fields(owner)):
        if field.name in _TEXT:
            section, names, placeholder, text = _TEXT[field.name]
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
        if field.name not in _TEXT:
            continue
        _, flags, placeholder, _ = _TEXT[field.name]
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
        found["model"] = Path(found["model"])
    settings = fitted(**found)  # what cannot work is said before anything is fetched
    both = log.path or "", settings.model
    if all(map(os.path.exists, both)) and os.path.samefile(*both):
        raise UsageError(f"--log-file: {log.path} is the model file")
    console.start(log)
    fetched = hub_model(values)
    return found | ({"model": fetched} if fetched else {})


def hub_model(values: Mapping[str, Any]) -> Path | None:
    """The model that -hf names, fetched; None if it names none. Raises UsageError, ModelError."""
    hub = given(HubFile, values)
    if "hf_repo" not in hub:
        if hub:
            raise UsageError(f"{names_of(next(iter(hub)))[0]}: needs -hf USER/REPO")
        return None
    if values["model"]:
        raise UsageError("-m and -hf: give one of them, not both")
    return fetch(HubFile(**hub), console.note, bars=console.shows_bars())
