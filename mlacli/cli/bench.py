"""`mlacli bench`: speed of every combination of flags, in llama-bench's table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import click

from mlacli import bench as benching
from mlacli.bench_table import WRITERS
from mlacli.cli import console
from mlacli.cli.flags import MODEL
from mlacli.cli.options import Flag, StrictCommand
from mlacli.limits import Choice, Limit, Switch, parse_list, parse_pairs
from mlacli.settings import RunSettings, default_model, rules

TESTS, VALUES, OUTPUT = "Tests", "Lists of values (1,2,4 or 1-8 or 1-9+2 or 1-64*2)", "Output"
_MAX_TOKENS = 1 << 24
_REPETITIONS = Limit("-r", 1, 10_000)
_FORMAT = Choice("-o", tuple(WRITERS))


def bench(**values: Any) -> int:
    """Measure prompt processing and generation for every combination of the values given."""
    cases = benching.cases(_grid(values))

    from mlacli.bench_runner import EngineRunner

    runner = EngineRunner(
        repetitions=values["repetitions"],
        warmup=values["warmup"],
        roof=values["roof"],
        verbose=values["verbose"],
    )
    rows: list[benching.BenchRow] = []
    try:
        for row in benching.run_cases(cases, runner):
            rows.append(row)
            console.note(f"{len(rows)}/{len(cases)}: {row.case.test} {row.error or 'done'}")
    finally:  # what was measured is shown even when the rest is stopped
        if rows:
            console.write(WRITERS[values["format"]](rows, values["roof"]))
    return int(any(row.error for row in rows))


def _grid(values: dict[str, Any]) -> benching.Grid:
    tests = {
        name: tuple(_joined(values[name]))
        for name in ("n_prompt", "n_gen", "prompt_gen", "fill_gen", "n_depth")
        if values[name]
    }
    return benching.Grid(
        models=values["models"] or (default_model(),),
        axes={name: _joined(values[name]) for name in benching.AXES},
        **tests,
    )


def _joined(lists: Sequence[list[Any]]) -> list[Any]:
    """What several uses of a flag gave together."""
    return list(chain.from_iterable(lists))


def _list(names: str, section: str, placeholder: str, text: str, parse: Any, **rest: Any) -> Flag:
    return Flag(names, section, metavar=placeholder, help=text, type=parse, multiple=True, **rest)


def _test(names: str, field: str, text: str) -> Flag:
    limit = Limit(names.split()[0], 0, _MAX_TOKENS)
    return _list(f"{names} {field}", TESTS, "N", text, lambda words: parse_list(limit, words))


def _pair(names: str, field: str, text: str) -> Flag:
    limit = Limit(names.split()[0], 0, _MAX_TOKENS)
    return _list(f"{names} {field}", TESTS, "P,N", text, lambda words: parse_pairs(limit, words))


_AXIS_NAMES = {
    "n_batch": "-b --batch-size",
    "n_ubatch": "-ub --ubatch-size",
    "type_k": "-ctk --cache-type-k",
    "type_v": "-ctv --cache-type-v",
    "flash_attn": "-fa --flash-attn",
    "mla": "-mla --mla-attn --mla-use",
    "amb_mib": "-amb --attention-max-batch",
    "ser": "-ser --smart-expert-reduction",
    "mmap": "-mmp --mmap",
    "rtr": "-rtr --run-time-repack",
    "thp": "-thp --transparent-huge-pages",
    "fmoe": "-fmoe --fused-moe",
    "n_threads": "-t --threads",
}


def _axis(field: str) -> Flag:
    rule = rules(RunSettings)[field]
    switch = isinstance(rule, Switch)
    placeholder = "0|1" if switch else "K,T;..." if field == "ser" else "LIST"
    text = "" if field == "n_threads" else f"[{_default(getattr(RunSettings, field))}]"
    return _list(
        f"{_AXIS_NAMES[field]} {field}",
        VALUES,
        placeholder,
        text or "[physical cores]",
        lambda words: parse_list(rule, words),
        bare="1" if switch else None,
    )


def _default(value: object) -> str:
    return "off" if value is None else str(int(value) if isinstance(value, bool) else value)


command = StrictCommand(
    "bench",
    callback=bench,
    help=bench.__doc__,
    rewrites={"--no-warmup": "-w 0", "--no-mmap": "-mmp 0", "-no-fmoe": "-fmoe 0"},
    params=[
        Flag(
            "-m --model models",
            MODEL,
            metavar="FILE",
            multiple=True,
            type=click.Path(path_type=Path),
            help="GGUF file; may be repeated [a small model that comes with mlacli]",
        ),
        _test("-p --n-prompt", "n_prompt", "Prompt of N tokens; 0: no such test. [512]"),
        _test("-n --n-gen", "n_gen", "Generation of N tokens; 0: no such test. [128]"),
        _pair("-pg", "prompt_gen", "Prompt and generation, timed together."),
        _pair("-gp", "fill_gen", "Generation after a prompt that is not timed."),
        _test("-d --n-depth", "n_depth", "Tokens already in the cache. [0]"),
        *map(_axis, benching.AXES),
        Flag(
            "-r --repetitions repetitions",
            OUTPUT,
            metavar="N",
            default=5,
            type=lambda text: _REPETITIONS.parse(str(text)),
            help="Times that each test is run. [5]",
        ),
        Flag(
            "-w --warmup warmup",
            OUTPUT,
            metavar="0|1",
            bare="1",
            default="1",
            type=Switch("-w").parse,
            help="Run each test once before the clock starts. [1]",
        ),
        Flag("--roof roof", OUTPUT, is_flag=True, help="Measure the machine; column `limit`."),
        Flag(
            "-o --output format",
            OUTPUT,
            metavar="|".join(WRITERS),
            default="md",
            type=_FORMAT.parse,
            help="Format of the table. [md]",
        ),
        Flag("-v --verbose verbose", OUTPUT, is_flag=True, help="Say more on stderr."),
    ],
)
