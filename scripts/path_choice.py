"""Is the path right that -mla 3 takes? Times both paths of batches over a grid, in turn.

    python scripts/path_choice.py -m model.gguf [-ctk q8_KV] [-t 2] [--tokens 4,64,512]
        [--depths 0,1024,8192] [--rounds 5]

`loss` is the time of the chosen path over that of the faster one, less 1: medians of whole steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlacli.engine import Engine, load_model
from mlacli.loading import start_engine
from mlacli.machine import make_jit
from mlacli.model.choose import PathChooser
from mlacli.settings import fitted

ALWAYS = {"absorbed": PathChooser(1), "expanded": PathChooser(2, threshold=1)}


@dataclass(frozen=True)
class Point:
    """Seconds of a step of n_tokens behind n_depth others, by path."""

    n_tokens: int
    n_depth: int
    seconds: dict[str, float]
    chosen: str

    @property
    def loss(self) -> float:
        return self.seconds[self.chosen] / min(self.seconds.values()) - 1


def timed(engine: Engine, n_tokens: int, depth: int) -> float:
    """Seconds of one step, which leaves nothing in the cache."""
    tokens = np.random.default_rng().integers(engine.model.config.n_vocab, size=n_tokens).tolist()
    start = time.perf_counter()
    engine.eval(tokens, range(depth, depth + n_tokens))
    seconds = time.perf_counter() - start
    engine.cache.truncate(0, depth)
    return seconds


def measure(engine: Engine, n_tokens: int, depth: int, rounds: int) -> Point:
    own = engine.chooser
    chosen = engine.graph_name(n_tokens)
    found: dict[str, list[float]] = {path: [] for path in ALWAYS}
    try:
        for _ in range(rounds + 1):  # the first time pages are new
            for path, always in ALWAYS.items():
                engine.chooser = always
                found[path].append(timed(engine, n_tokens, depth))
    finally:
        engine.chooser = own
    medians = {path: statistics.median(times[1:]) for path, times in found.items()}
    return Point(n_tokens, depth, medians, chosen)


def fill(engine: Engine, depth: int) -> None:
    have = engine.cache.n_used
    tokens = np.random.default_rng(0).integers(engine.model.config.n_vocab, size=depth - have)
    if depth > have:
        engine.eval(tokens.tolist(), range(have, depth))


def numbers(text: str) -> list[int]:
    return sorted(int(part) for part in text.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-ctk", default="q8_KV", help="cache type")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--tokens", type=numbers, default=numbers("4,16,64,128,256,512"))
    parser.add_argument("--depths", type=numbers, default=numbers("0,256,1024,4096,8192"))
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args(arguments)
    sizes = {"n_ubatch": max(chosen.tokens), "n_ctx": max(chosen.depths) + max(chosen.tokens)}
    settings = fitted(model=chosen.model, type_k=chosen.ctk, n_threads=chosen.threads, **sizes)
    engine = start_engine(load_model(chosen.model), settings, make_jit(), sizes["n_ctx"])
    engine.prepare(*ALWAYS)
    print(f"-mla 3 expands from {engine.chooser.crossover} tokens on, whatever the depth")
    points = []
    for depth in chosen.depths:
        fill(engine, depth)
        for n_tokens in chosen.tokens:
            points.append(measure(engine, n_tokens, depth, chosen.rounds))
            print(f"{points[-1].loss:7.1%} {points[-1]}", file=sys.stderr)
    rows = [
        [p.n_depth, p.n_tokens, *(1e3 * p.seconds[path] for path in ALWAYS), p.chosen, p.loss]
        for p in points
    ]
    headers = ["depth", "tokens", *(f"{path} ms" for path in ALWAYS), "chosen", "loss"]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=("", "", ".1f", ".1f", "", ".1%")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
