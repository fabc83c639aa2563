"""The flags of `mlacli bench` that take lists of values, and the grid that they span."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from itertools import chain
from pathlib import Path
from typing import Any

from mlacli.bench import AXES, Grid
from mlacli.cli.flag_texts import DEMO_MODEL, MODEL
from mlacli.cli.flags import choices_of, flags_of, hub_model, meaning
from mlacli.cli.model_flags import LOAD_MODES, load_mode
from mlacli.cli.options import flag, parameter
from mlacli.errors import UsageError
from mlacli.hub import HubFile
from mlacli.limits import Limit, Rule, Switch, parse_list, parse_pairs, rules
from mlacli.settings import RunSettings, default_model

TESTS, VALUES = "Tests", "Lists of values (1,2,4 or 1-8 or 1-9+2 or 1-64*2)"
_MAX_TOKENS = 1 << 24

# field: (names, placeholder, default, help); all may be repeated
_TESTS = {
    "n_prompt": ("-p --n-prompt", "N", "512", "Prompt of N tokens; 0: no such test."),
    "n_gen": ("-n --n-gen", "N", "128", "Generation of N tokens; 0: no such test."),
    "prompt_gen": ("-pg", "P,N", "", "Prompt and generation, timed together."),
    "fill_gen": ("-gp", "P,N", "", "Generation after a prompt that is not timed."),
    "n_depth": ("-d --n-depth", "N", "0", "Tokens already in the cache."),
}
_AXES = {
    "n_batch": "-b --batch-size",
    "n_ubatch": "-ub --ubatch-size",
    "type_k": "-ctk --cache-type-k",
    "type_v": "-ctv --cache-type-v",
    "flash_attn": "-fa --flash-attn",
    "mla": "-mla --mla-attn --mla-use",
    "amb_mib": "-amb --attention-max-batch",
    "ser": "-ser --smart-expert-reduction",
    "mmap": "-mmp --mmap",
    "rtr": "-rtr --run-time-repack --repack",
    "thp": "-thp --transparent-huge-pages",
    "fmoe": "-fmoe --fused-moe",
    "n_threads": "-t --threads",
    "numa": "--numa",
    "cpu_mask": "-C --cpu-mask",
    "cpu_strict": "--cpu-strict",
    "prio": "--prio",
    "poll": "--poll",
}


_LOAD_MODE = "load_mode"
_THREADS = "threads_gen_batch"


@dataclass(frozen=True)
class LoadMode:
    """llama.cpp's words for how the file is read, as the settings that they stand for."""

    flag: str

    def check(self, value: Mapping[str, bool]) -> None:
        if value.keys() != {"mmap", "mlock"}:
            raise UsageError(f"{self.flag}: {value!r} is no load mode")

    def parse(self, text: str) -> dict[str, bool]:
        return load_mode(text, {})


def list_flags() -> Iterator[Parameter]:
    """A parameter for each; all may be repeated."""
    text = "GGUF file; may be repeated."
    yield parameter("model", flag("-m --model", MODEL, "FILE", text, DEMO_MODEL), list[str] | None)
    yield from flags_of(HubFile)
    yield from map(_test, _TESTS)
    yield from map(_axis, AXES)
    text = "Threads for generation and for prompts: `4,8` or `4,8;2,8`."
    yield parameter(
        _THREADS, flag("-tgb --threads-gen-batch", VALUES, "G,B;...", text), list[str] | None
    )
    text = f"How the file is read: {LOAD_MODES}."
    yield parameter(
        _LOAD_MODE, flag("-lm --load-mode", VALUES, "LIST", text, "mmap"), list[str] | None
    )


def _test(field: str) -> Parameter:
    names, placeholder, default, text = _TESTS[field]
    return parameter(field, flag(names, TESTS, placeholder, text, default), list[str] | None)


def _axis(field: str) -> Parameter:
    placeholder = "LIST"
    if isinstance(rules(RunSettings)[field], Switch):
        placeholder = "[1|0]"
    elif field == "ser":
        placeholder = "K,T;..."
    default = "physical cores" if field == "n_threads" else getattr(RunSettings, field)
    text = "Threads." if field == "n_threads" else meaning(field)
    choices = choices_of(rules(RunSettings)[field])
    option = flag(_AXES[field], VALUES, placeholder, text, _shown(default), choices)
    return parameter(field, option, list[str] | None)


def _shown(default: object) -> str:
    return "off" if default is None else str(int(default) if isinstance(default, bool) else default)


def grid_of(values: Mapping[str, Any]) -> Grid:
    """What the flags span. Raises UsageError."""
    tests = {}
    for field in (field for field in _TESTS if values[field]):
        limit = Limit(_TESTS[field][0].split()[0], 0, _MAX_TOKENS)
        parse = parse_pairs if field in ("prompt_gen", "fill_gen") else parse_list
        tests[field] = _joined(parse, limit, values[field])
    limits = rules(RunSettings)
    axes = {
        field: _joined(parse_list, limits[field], values[field]) for field in AXES if values[field]
    }
    if values[_THREADS]:
        pairs = _joined(parse_pairs, Limit("-tgb", 1, 1024), values[_THREADS])
        both = ({"n_threads": gen, "n_threads_batch": batch} for gen, batch in pairs)
        axes["n_threads"] = (*axes.get("n_threads", ()), *both)
    if values[_LOAD_MODE]:
        if "mmap" in axes:
            raise UsageError("-mmp and -lm: give one of them, not both")
        axes["mmap"] = _joined(parse_list, LoadMode("-lm"), values[_LOAD_MODE])
    fetched = hub_model(values)
    files = (fetched,) if fetched else tuple(map(Path, values["model"] or ())) or (default_model(),)
    return Grid(models=files, axes=axes, **tests)


def _joined(parse: Callable[..., list[Any]], rule: Rule, texts: Sequence[str]) -> tuple[Any, ...]:
    """What several uses of a flag give together."""
    return tuple(chain.from_iterable(parse(rule, text) for text in texts))
