"""Perplexity of a model over a text file, by llama.cpp's recipe.

    PPL = exp(mean over scored tokens of -log p(token | what precedes it in its chunk))

The text is cut into chunks of -c tokens; the second half of each is scored (its first token is
not). Where the file asks for BOS, it takes the place of each chunk's first token.

    python scripts/perplexity.py -m model.gguf -f text.txt [-c 512] [--chunks 80] [-ctk f16] ...
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

from mlacli.engine import Engine, Logits, load_model
from mlacli.machine import make_jit
from mlacli.session import start_engine
from mlacli.settings import RunSettings
from mlacli.text.tokenizer import Tokenizer
from mlacli.text.vocabulary import tokenizer_data


def negative_log_likelihoods(
    logits: Logits, targets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """-log softmax(logits[i])[targets[i]], in f64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    log_sum = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    chosen: npt.NDArray[np.float64] = wide[np.arange(len(targets)), targets]
    result: npt.NDArray[np.float64] = log_sum - chosen
    return result


def chunk_losses(
    engine: Engine, tokens: Sequence[int], n_ctx: int, n_chunks: int, bos: int | None
) -> Iterator[npt.NDArray[np.float64]]:
    """The scored tokens' losses of each chunk."""
    first = n_ctx // 2
    for chunk in range(min(n_chunks, len(tokens) // n_ctx)):
        part = list(tokens[chunk * n_ctx : (chunk + 1) * n_ctx])
        targets = np.array(part[first + 1 :])
        if bos is not None:
            part[0] = bos
        engine.cache.clear()
        logits = engine.eval(part, range(n_ctx), wanted=range(first, n_ctx - 1))
        yield negative_log_likelihoods(logits, targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-f", "--file", type=Path, required=True)
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=80)
    parser.add_argument("-ub", "--ubatch-size", type=int, default=512)
    parser.add_argument("-mla", "--mla-use", type=int, default=3)
    parser.add_argument("-fa", "--flash-attn", choices=("on", "off"), default="on")
    parser.add_argument("-ctk", "--cache-type-k", default="f16")
    parser.add_argument("-t", "--threads", type=int)
    given = parser.parse_args()
    settings = RunSettings(
        model=given.model,
        n_ctx=given.ctx_size,
        n_ubatch=given.ubatch_size,
        mla=given.mla_use,
        flash_attn=given.flash_attn == "on",
        type_k=given.cache_type_k,
        **({"n_threads": given.threads} if given.threads else {}),
    )
    model = load_model(given.model)
    data = tokenizer_data(model.file.metadata, str(given.model))
    tokenizer = Tokenizer(data, model.config.n_vocab)
    tokens = tokenizer.encode_bytes(given.file.read_bytes())
    bos = data.bos if data.add_bos else None
    engine = start_engine(model, settings, make_jit(), given.ctx_size, n_out_max=settings.n_ubatch)
    losses: list[npt.NDArray[np.float64]] = []
    for part in chunk_losses(engine, tokens, given.ctx_size, given.chunks, bos):
        losses.append(part)
        ppl = math.exp(float(np.concatenate(losses).mean()))
        print(f"[{len(losses)}]{ppl:.4f}", end=",", flush=True)
    scored = np.concatenate(losses)
    ppl = math.exp(float(scored.mean()))
    error = ppl * float(scored.std(ddof=1)) / math.sqrt(len(scored))
    chunks, n_ctx = len(losses), given.ctx_size
    print(
        f"\nFinal estimate: PPL over {chunks} chunks for n_ctx={n_ctx} = {ppl:.4f} +/- {error:.5f}"
    )


if __name__ == "__main__":
    main()
