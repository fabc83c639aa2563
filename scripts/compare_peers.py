"""mlacli beside other engines on one file, in turn: ratios with their spread.

    python scripts/compare_peers.py model.gguf -p 512,2048 -n 64 -d 0,4096 --rounds 5 \\
        --ours '-ctk q8_KV' \\
        --peer 'ik=/path/to/llama-bench -mla 3 -fa 1 -fmoe 1 -ctk q8_0' --peer 'llama.cpp=/path/...'

A peer is any binary with llama-bench's flags and `-o json`; its command may carry flags of its own.
Every round runs each engine once per test, one after another, so that what else happens on the
machine meets all of them; a ratio compares runs of the same round. Tests at a depth use `-d` where
the binary knows it, else `-gp` (the prompt is processed, but not timed).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).parent.parent
OURS = "mlacli"


@dataclass(frozen=True)
class BenchCase:
    """What is timed: a prompt or generated tokens, behind `depth` others."""

    n_prompt: int
    n_gen: int
    depth: int

    @property
    def name(self) -> str:
        what = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return what + (f" @ d{self.depth}" if self.depth else "")


@dataclass(frozen=True)
class Engine:
    """A bench command; `knows_depth`: it has -d."""

    name: str
    command: tuple[str, ...]
    knows_depth: bool = True

    def arguments(self, model: Path, test: BenchCase) -> list[str]:
        """The command line of one test. Raises ValueError if the binary cannot run it."""
        found = [*self.command, "-m", str(model), "-r", "1", "-o", "json"]
        if not test.depth or self.knows_depth:
            sizes = ["-p", str(test.n_prompt), "-n", str(test.n_gen)]
            return found + sizes + (["-d", str(test.depth)] if test.depth else [])
        if test.n_prompt:
            raise ValueError(f"{self.name} has no -d: it cannot time a prompt at a depth")
        return [*found, "-p", "0", "-n", "0", "-gp", f"{test.depth},{test.n_gen}"]


Run = Callable[[Sequence[str]], str]


def run_command(arguments: Sequence[str]) -> str:
    """Its standard output. Raises RuntimeError with the last lines it complained in."""
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        last = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}: {last}")
    return done.stdout


def tokens_per_second(output: str) -> float:
    """avg_ts of the only row. Raises ValueError when there is none."""
    rows = json.loads(output[output.index("[") :])
    if len(rows) != 1 or rows[0].get("error"):
        raise ValueError(f"not one row: {[row.get('error') for row in rows]}")
    return float(rows[0]["avg_ts"])


def parse_peer(text: str, run: Run = run_command) -> Engine:
    """'name=command ...'. Raises ValueError."""
    name, equals, command = text.partition("=")
    if not (name and equals and command.strip()):
        raise ValueError(f"--peer {text!r}: 'name=command' is wanted")
    words = tuple(shlex.split(command))
    return Engine(name, words, "--n-depth" in run([words[0], "--help"]))


def our_engine(flags: str) -> Engine:
    return Engine(OURS, (sys.executable, "-m", "mlacli", "bench", *shlex.split(flags)))


Rates = dict[str, list[float]]


def compare(
    engines: Sequence[Engine], model: Path, test: BenchCase, rounds: int, run: Run = run_command
) -> Rates:
    """Tokens per second of each engine, by round."""
    rates: Rates = {engine.name: [] for engine in engines}
    for _ in range(rounds):
        for engine in engines:
            rates[engine.name].append(tokens_per_second(run(engine.arguments(model, test))))
    return rates


def row(test: BenchCase, rates: Rates) -> list[str]:
    """Medians of all, and ours against each peer: median (least .. most) of the rounds' ratios."""
    ours, cells = rates[OURS], [test.name]
    for name, found in rates.items():
        cells.append(f"{statistics.median(found):.2f}")
        if name != OURS:
            ratios = [a / b for a, b in zip(ours, found, strict=True)]
            middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
            cells.append(f"{middle:.2f} ({low:.2f} .. {high:.2f})")
    return cells


def header(engines: Sequence[Engine]) -> list[str]:
    names = ["test"]
    for engine in engines:
        names.append(f"{engine.name} t/s")
        if engine.name != OURS:
            names.append(f"ours / {engine.name}")
    return names


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def all_cases(
    prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int]
) -> list[BenchCase]:
    found = [BenchCase(n, 0, 0) for n in prompts if n]
    return found + [BenchCase(0, n, depth) for n in generated if n for depth in depths]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-p", type=numbers, default=[512], help="prompt sizes")
    parser.add_argument("-n", type=numbers, default=[64], help="numbers of generated tokens")
    parser.add_argument("-d", type=numbers, default=[0], help="depths of the generation tests")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ours", default="", help="flags of mlacli bench")
    parser.add_argument("--peer", action="append", default=[], help="name=command with flags")
    options = parser.parse_args(argv)
    engines = [our_engine(options.ours), *map(parse_peer, options.peer)]
    rows = []
    for test in all_cases(options.p, options.n, options.d):
        rows.append(row(test, compare(engines, options.model, test, options.rounds)))
        print(*(f"{n}: {c}" for n, c in zip(header(engines), rows[-1], strict=True)), sep=", ",
              file=sys.stderr)  # fmt: skip
    print(tabulate(rows, headers=header(engines), tablefmt="github", disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
