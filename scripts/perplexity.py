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
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlacli import Model, load


def negative_log_likelihoods(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """-log softmax(logits[i])[targets[i]], in f64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    log_sum = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    chosen: npt.NDArray[np.float64] = wide[np.arange(len(targets)), targets]
    result: npt.NDArray[np.float64] = log_sum - chosen
    return result


def chunk_losses(
    model: Model, tokens: Sequence[int], n_ctx: int, n_chunks: int
) -> Iterator[npt.NDArray[np.float64]]:
    """The scored tokens' losses of each chunk."""
    first = n_ctx // 2
    for chunk in range(min(n_chunks, len(tokens) // n_ctx)):
        part = list(tokens[chunk * n_ctx : (chunk + 1) * n_ctx])
        targets = np.array(part[first + 1 :])
        if model.bos is not None:
            part[0] = model.bos
        logits = model.logits(part, every=True, first=first)
        yield negative_log_likelihoods(logits[:-1], targets)


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
    threads: dict[str, Any] = {"n_threads": given.threads} if given.threads else {}
    model = load(
        given.model,
        n_out_max=given.ubatch_size,
        n_ctx=given.ctx_size,
        n_ubatch=given.ubatch_size,
        mla=given.mla_use,
        flash_attn=given.flash_attn == "on",
        type_k=given.cache_type_k,
        **threads,
    )
    text = given.file.read_bytes().decode("utf-8", "surrogateescape")
    tokens = model.tokenize(text, add_bos=False)
    losses: list[npt.NDArray[np.float64]] = []
    for part in chunk_losses(model, tokens, given.ctx_size, given.chunks):
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
