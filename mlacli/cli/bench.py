"""`mlacli bench`: speed of every combination of flags, in llama-bench's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from mlacli import bench as benching
from mlacli.bench_table import WRITERS
from mlacli.cli import console
from mlacli.cli.flags import (
    DEMO_MODEL,
    MODEL,
    NO_FLASH_ATTENTION,
    PROFILE_HELP,
    choices_of,
    meaning,
)
from mlacli.cli.options import StrictCommand, flag, new_app, parameter, takes
from mlacli.limits import Choice, Limit, Rule, Switch, parse_list, parse_pairs, rules
from mlacli.settings import RunSettings, default_model

TESTS, VALUES, OUTPUT = "Tests", "Lists of values (1,2,4 or 1-8 or 1-9+2 or 1-64*2)", "Output"
_MAX_TOKENS = 1 << 24
_REPETITIONS = Limit("-r", 1, 10_000)
_WARMUP = Switch("-w")
_FORMAT = Choice("-o", tuple(WRITERS))
app = new_app()

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
    "rtr": "-rtr --run-time-repack",
    "thp": "-thp --transparent-huge-pages",
    "fmoe": "-fmoe --fused-moe",
    "n_threads": "-t --threads",
}


class BenchCommand(StrictCommand):
    rewrites = NO_FLASH_ATTENTION | {
        "--no-warmup": "-w 0",
        "--no-mmap": "-mmp 0",
        "-no-fmoe": "-fmoe 0",
    }


def _test(field: str) -> Parameter:
    names, placeholder, default, text = _TESTS[field]
    return parameter(field, flag(names, TESTS, placeholder, text, default), list[str] | None)


def _axis(field: str) -> Parameter:
    placeholder = "LIST"
    if isinstance(rules(RunSettings)[field], Switch):
        placeholder = "[1|0]"
    elif field == "ser":
        placeholder = "K,T;..."
    default = getattr(RunSettings, field, "physical cores")
    text = "Threads." if field == "n_threads" else meaning(field)
    choices = choices_of(rules(RunSettings)[field])
    option = flag(_AXES[field], VALUES, placeholder, text, _shown(default), choices)
    return parameter(field, option, list[str] | None)


def _shown(default: object) -> str:
    return "off" if default is None else str(int(default) if isinstance(default, bool) else default)


_MODEL = parameter(
    "model",
    flag("-m --model", MODEL, "FILE", "GGUF file; may be repeated.", DEMO_MODEL),
    list[str] | None,
)
_REPEAT = flag("-r --repetitions", OUTPUT, "N", "Times that each test is run.", "5")
_WARM = flag("-w --warmup", OUTPUT, "[1|0]", "Run each test once before the clock starts.", "1")
_ROOF = flag("--roof", OUTPUT, "", "Measure the machine; column `limit`.")
_OUTPUT = flag("-o --output", OUTPUT, "|".join(WRITERS), "Format of the table.", "md")
_PROFILE = flag("--profile", OUTPUT, "", PROFILE_HELP)
_VERBOSE = flag("-v --verbose", OUTPUT, "", "Say more on stderr.")


@app.command("bench", cls=BenchCommand)
@takes([_MODEL, *map(_test, _TESTS), *map(_axis, benching.AXES)], first=True)
def bench(
    repetitions: Annotated[str, _REPEAT] = "5",
    warmup: Annotated[str, _WARM] = "1",
    roof: Annotated[bool, _ROOF] = False,
    output: Annotated[str, _OUTPUT] = "md",
    profile: Annotated[bool, _PROFILE] = False,
    verbose: Annotated[bool, _VERBOSE] = False,
    **values: Any,
) -> int:
    """Measure prompt processing and generation for every combination of the values given."""
    cases = benching.cases(_grid(values))
    format = WRITERS[_FORMAT.parse(output)]
    n, warm = _REPETITIONS.parse(repetitions), _WARMUP.parse(warmup)

    from mlacli.bench_runner import EngineRunner

    runner = EngineRunner(
        cases, repetitions=n, warmup=warm, roof=roof, profile=profile, verbose=verbose
    )
    rows: list[benching.BenchRow] = []
    try:
        for row in benching.run_cases(cases, runner):
            rows.append(row)
            console.note(
                f"{len(rows)}/{len(cases)}: {row.case.test} {row.error or f'{row.avg_ts:.2f} t/s'}"
            )
            for line in row.result.profile if row.result else ():
                console.note(line)
    finally:  # what was measured is shown even when the rest is stopped
        for line in runner.notes:
            console.note(f"note: {line}")
        if rows:
            console.write(format(rows, roof))
    return int(any(row.error for row in rows))


def _grid(values: Mapping[str, Any]) -> benching.Grid:
    """Raises UsageError."""
    tests = {}
    for field in (field for field in _TESTS if values[field]):
        limit = Limit(_TESTS[field][0].split()[0], 0, _MAX_TOKENS)
        parse = parse_pairs if field in ("prompt_gen", "fill_gen") else parse_list
        tests[field] = _joined(parse, limit, values[field])
    limits = rules(RunSettings)
    axes = {
        field: _joined(parse_list, limits[field], values[field])
        for field in benching.AXES
        if values[field]
    }
    files = tuple(map(Path, values["model"] or ())) or (default_model(),)
    return benching.Grid(models=files, axes=axes, **tests)


def _joined(parse: Callable[..., list[Any]], rule: Rule, texts: Sequence[str]) -> tuple[Any, ...]:
    """What several uses of a flag give together."""
    return tuple(chain.from_iterable(parse(rule, text) for text in texts))
