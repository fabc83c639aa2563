"""Logits of every mode, cache type and batch size against a float64 forward of the same weights.

Prints per row the NMSE over all tokens, the per-token median and 99th percentile, and how many
tokens are left out because the choice of experts is a near tie in the reference (a flip there says
nothing about arithmetic).

    python scripts/accuracy.py --preset tiny-v3 --type F32 --length 700 [--mla 0,1,2,3] [--fa 1,0]
        [--cache f32,f16,...] [--ubatch 1,7,32,512] [--threads 2]
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parent.parent))

from codegen.formats import LATENT_CACHE_TYPES
from codegen.pool import Pool
from mlacli.engine import Engine, Logits, Model, load_model
from mlacli.errors import UsageError
from mlacli.machine import make_jit
from mlacli.model.choose import MachineProfile
from mlacli.settings import RunSettings, fitted
from scripts.make_model import make_model
from tests import reference

MARGIN = 1e-4  # a gap between chosen and unchosen experts below this counts as a tie
# Batches of 128 tokens and more are expanded, as with -mla 2.
EVEN_PROFILE = MachineProfile(1e11, 1e11, 1e11, 1e11)


def evaluate(engine: Engine, tokens: list[int]) -> Logits:
    """Logits of every token, evaluated in micro-batches from an empty cache."""
    engine.cache.clear()
    return engine.eval(tokens, range(len(tokens)), wanted=range(len(tokens)))


def settings_grid(path: Path, given: argparse.Namespace, n_ctx: int) -> Iterator[RunSettings]:
    """Every combination that can work."""
    for mla, fa, cache, ubatch in itertools.product(given.mla, given.fa, given.cache, given.ubatch):
        try:
            yield fitted(
                model=path,
                n_ctx=n_ctx,
                mla=mla,
                flash_attn=bool(fa),
                type_k=cache,
                n_ubatch=min(ubatch, n_ctx),
                n_threads=given.threads,
            )
        except UsageError as problem:
            print(f"skipped: {problem}", file=sys.stderr)


def measure(
    model: Model,
    grid: Iterator[RunSettings],
    tokens: list[int],
    expected: npt.NDArray[np.float64],
    clear: npt.NDArray[np.bool_],
    n_threads: int,
) -> Iterator[list[object]]:
    """One table row per setting."""
    jit = make_jit()
    pool = Pool(jit, n_threads)
    for settings in grid:
        engine = Engine(
            model,
            settings,
            jit,
            EVEN_PROFILE,
            n_ctx=settings.n_ctx or 1,
            n_out_max=settings.n_ubatch,
            pool=pool,
        )
        each = reference.per_token_nmse(evaluate(engine, tokens), expected)
        kept = each[clear]
        yield [
            settings.mla,
            "on" if settings.flash_attn else "off",
            settings.type_k,
            settings.n_ubatch,
            float(each.mean()),
            float(np.median(kept)),
            float(np.quantile(kept, 0.99)),
            int((~clear).sum()),
        ]
    pool.close()


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="tiny-v3")
    parser.add_argument("--model", type=Path, help="instead of a preset")
    parser.add_argument("--type", default="F32")
    parser.add_argument("--kv-b", default="joint")
    parser.add_argument("--length", type=int, default=700)
    parser.add_argument("--mla", type=numbers, default=[0, 1, 2, 3])
    parser.add_argument("--fa", type=numbers, default=[1, 0])
    parser.add_argument("--cache", type=lambda s: s.split(","), default=list(LATENT_CACHE_TYPES))
    parser.add_argument("--ubatch", type=numbers, default=[1, 7, 32, 512])
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.model or Path(folder) / "model.gguf"
        if given.model is None:
            make_model(path, preset=given.preset, type=given.type, kv_b=given.kv_b)
        model = load_model(path)
        rng = np.random.default_rng(7)
        tokens = rng.integers(0, model.config.n_vocab, given.length).tolist()
        oracle = reference.load(path)
        result = oracle.run(tokens)
        clear = result.smallest_margin() > MARGIN
        n_ctx = given.length + 1
        grid = settings_grid(path, given, n_ctx)
        rows = measure(model, grid, tokens, result.logits, clear, given.threads)
        head = ["mla", "fa", "cache", "ubatch", "NMSE", "median", "p99", "ties"]
        for row in rows:
            print(tabulate([row], head, tablefmt="plain", floatfmt=".1e").split("\n")[-1])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
