"""Context shift: kept rows are those of their new positions."""

from __future__ import annotations

import argparse
import inspect
import math
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from codegen.formats import CACHE_FORMATS, LATENT_CACHE_TYPES
from mlacli.engine import load_model
from mlacli.settings import default_model
from mlacli.text.tokenizer import Tokenizer
from mlacli.text.vocabulary import tokenizer_data
from scripts.shift_perplexity import BATCH, losses_along, per_context
from tests.conftest import TinyModel
from tests.engines import make_engine
from tests.kernels.harness import nmse

TOKENS = [(7 * n + 3) % 90 for n in range(60)]
# What storing a row twice may add, as part of its values' mean square.
LIMITS = {"f32": 1e-12, "f16": 1e-6, "bf16": 1e-4, "q8_0": 5e-4, "q8_KV": 1e-3, "q6_0": 1e-2}


def cases() -> list[dict[str, Any]]:
    found = [{"mla": 3, "type_k": name} for name in LATENT_CACHE_TYPES]
    found += [{"mla": 0, "type_k": name} for name in CACHE_FORMATS if name in LIMITS]
    found += [{"mla": mla, "flash_attn": False, "type_k": "f32"} for mla in (0, 1, 2)]
    return found


@pytest.mark.parametrize("flags", cases(), ids=str)
def test_with_one_layer_a_shifted_context_is_a_fresh_one(
    flags: dict[str, Any], tiny_model: TinyModel
) -> None:
    """A row of the first layer depends on its own token and position alone."""
    path = tiny_model("tiny-v3", "F32", n_layer=1)
    first, n = 5, 20
    engine = make_engine(path, **flags)
    engine.eval(TOKENS, range(len(TOKENS)))
    engine.shift(first, n)
    kept = TOKENS[:first] + TOKENS[first + n :]
    assert engine.cache.n_used == len(kept)
    found = engine.eval([11], [len(kept)])[-1].copy()
    fresh = make_engine(path, **flags)
    fresh.eval(kept, range(len(kept)))
    expected = fresh.eval([11], [len(kept)])[-1]
    assert nmse(found, expected) <= LIMITS[flags["type_k"]]
    assert nmse(found, expected) < 1e-3 or flags["type_k"] == "q6_0"


def test_without_rotation_it_would_be_another(tiny_model: TinyModel) -> None:
    """So that the test above tells something."""
    path = tiny_model("tiny-v3", "F32", n_layer=1)
    engine = make_engine(path, type_k="f32")
    engine.eval(TOKENS, range(len(TOKENS)))
    engine.cache.shift(0, 5, 20)
    found = engine.eval([11], [40])[-1].copy()
    fresh = make_engine(path, type_k="f32")
    kept = TOKENS[:5] + TOKENS[25:]
    fresh.eval(kept, range(40))
    assert nmse(found, fresh.eval([11], [40])[-1]) > 1e-6


def test_shifts_one_after_another(tiny_model: TinyModel) -> None:
    path = tiny_model("tiny-v3", "F32", n_layer=1)
    engine, kept = make_engine(path, type_k="f32"), list(TOKENS)
    engine.eval(TOKENS, range(len(TOKENS)))
    for first, n in ((0, 10), (3, 7), (1, 1), (20, 5)):
        engine.shift(first, n)
        del kept[first : first + n]
        engine.eval([n], [len(kept)])
        kept.append(n)
    found = engine.eval([11], [len(kept)])[-1].copy()
    fresh = make_engine(path, type_k="f32")
    fresh.eval(kept, range(len(kept)))
    assert nmse(found, fresh.eval([11], [len(kept)])[-1]) <= 1e-11
    assert np.array_equal(
        np.sort(engine.cache.pos[engine.cache.seq == 0])[:-1], np.arange(len(kept))
    )


def test_an_answer_of_four_contexts() -> None:
    words = ["run", "-p", "What does json.dumps do?", "-c", "256", "-n", "1100", "--ignore-eos"]
    mlacli = [sys.executable, "-m", "mlacli"]
    done = subprocess.run(
        [*mlacli, *words, "--context-shift", "--keep", "-1", "-s", "1"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0
    assert re.search(r"eval time = .* / +1099 runs", done.stderr)
    assert int(re.search(r"context shifts = (\d+)", done.stderr)[1]) >= 6  # type: ignore[index]
    stopped = subprocess.run([*mlacli, *words], capture_output=True, text=True, timeout=120)
    assert stopped.returncode == 0 and "context shifts" not in stopped.stderr
    assert re.search(r"eval time = .* / +24[0-9] runs", stopped.stderr)


@pytest.mark.parametrize("flags", [{}, {"mla": 0, "type_k": "q8_0"}], ids=str)
def test_perplexity_stays_flat_over_shifts(flags: dict[str, Any]) -> None:
    """A text of four contexts reads as well as where what is kept is evaluated anew, and worse when
    rows keep the rotation of their old places."""
    model = load_model(default_model())
    data = tokenizer_data(model.file.metadata, "demo")
    text = inspect.getsource(argparse).encode()
    tokens = Tokenizer(data, model.config.n_vocab).encode_bytes(text)[: 4 * 256 + BATCH + 1]
    engine = make_engine(default_model(), n_out_max=BATCH, **flags)

    def perplexities(*, anew: bool) -> list[float]:
        return per_context(losses_along(engine, tokens, keep=4, anew=anew), 256)

    anew, shifted = perplexities(anew=True), perplexities(anew=False)
    assert len(shifted) == 4
    assert all(a == pytest.approx(b, rel=0.02) for a, b in zip(shifted, anew, strict=True))
    engine.shift = lambda first, n: engine.cache.shift(0, first, n)  # type: ignore[method-assign,assignment]
    ratios = [math.log(a / b) for a, b in zip(perplexities(anew=False), anew, strict=True)]
    assert np.mean(ratios) > 0.02
