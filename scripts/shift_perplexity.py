"""Perplexity along one long text that does not fit: does a context shift keep it flat?

The text is read in small batches into one context. Whenever that is full, the oldest half goes
(after --keep tokens): by a shift, and for comparison by evaluating anew what is kept. One line per
context's worth of tokens: the perplexity of both, and their ratio.

    python scripts/shift_perplexity.py -m model.gguf -f text.txt [-c 512] [--contexts 20] ...
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlacli.engine import Engine, load_model
from mlacli.loading import start_engine
from mlacli.machine import make_jit
from mlacli.settings import RunSettings
from mlacli.text.tokenizer import Tokenizer
from mlacli.text.vocabulary import tokenizer_data
from scripts.perplexity import negative_log_likelihoods

BATCH = 16


def losses_along(
    engine: Engine, tokens: Sequence[int], *, keep: int, anew: bool
) -> Iterator[npt.NDArray[np.float64]]:
    """-log p of the next token of each batch; `anew`: no shift, the kept tokens are evaluated.

    The engine must give logits of BATCH tokens.
    """
    engine.cache.clear()
    held: list[int] = []
    for start in range(0, len(tokens) - BATCH, BATCH):
        if len(held) + BATCH > engine.n_ctx:
            n = (len(held) - keep) // 2
            del held[keep : keep + n]
            if anew:
                engine.cache.clear()
                engine.eval(held, range(len(held)))
            else:
                engine.shift(keep, n)
        batch = tokens[start : start + BATCH]
        places = range(len(held), len(held) + BATCH)
        logits = engine.eval(batch, places, wanted=range(BATCH))
        yield negative_log_likelihoods(logits, np.array(tokens[start + 1 : start + BATCH + 1]))
        held += batch


def per_context(losses: Iterator[npt.NDArray[np.float64]], n_ctx: int) -> list[float]:
    """Perplexity of each n_ctx tokens; what is left over is not counted."""
    every = np.concatenate(list(losses))
    whole = every[: len(every) // n_ctx * n_ctx].reshape(-1, n_ctx)
    return [math.exp(float(part.mean())) for part in whole]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-f", "--file", type=Path, required=True)
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--contexts", type=int, default=20)
    parser.add_argument("-mla", "--mla-use", type=int, default=3)
    parser.add_argument("-ctk", "--cache-type-k", default="f16")
    given = parser.parse_args()
    settings = RunSettings(
        model=given.model, n_ctx=given.ctx_size, mla=given.mla_use, type_k=given.cache_type_k
    )
    model = load_model(given.model)
    data = tokenizer_data(model.file.metadata, str(given.model))
    tokens = Tokenizer(data, model.config.n_vocab).encode_bytes(given.file.read_bytes())
    engine = start_engine(model, settings, make_jit(), given.ctx_size, n_out_max=BATCH)
    tokens = tokens[: given.contexts * engine.n_ctx + BATCH + 1]
    found = [
        per_context(losses_along(engine, tokens, keep=given.keep, anew=anew), engine.n_ctx)
        for anew in (False, True)
    ]
    for i, (shifted, anew) in enumerate(zip(*found, strict=True), start=1):
        print(f"context {i:3d}: shifted {shifted:9.4f}, anew {anew:9.4f}: {shifted / anew:.4f}")


if __name__ == "__main__":
    main()
