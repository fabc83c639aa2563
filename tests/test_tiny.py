"""Smoke: the bundled model, end to end, against Hugging Face's own forward pass. Runs in seconds.

The golden file holds logits of HF transformers in float64 with the same (dequantised) weights; what
remains is the engine's quantisation of activations and the f16 cache.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlacli.settings import default_model
from tests import reference
from tests.engines import make_engine

GOLDEN = Path(__file__).parent / "golden" / "demo_q8_0_hf.npz"
LIMIT = 2e-3


@pytest.mark.parametrize("mla", [0, 3])
@pytest.mark.parametrize("length", [1, 33, 700])
def test_bundled_model_agrees_with_transformers(mla: int, length: int) -> None:
    golden = np.load(GOLDEN)
    tokens, rows = golden[f"tokens_{length}"].tolist(), golden[f"rows_{length}"].tolist()
    engine = make_engine(default_model(), n_ctx=1024, mla=mla)
    logits = engine.eval(tokens, range(length), wanted=rows)
    errors = reference.per_token_nmse(logits, golden[f"logits_{length}"])
    assert np.median(errors) <= LIMIT


def test_greedy_choice_is_that_of_transformers() -> None:
    golden = np.load(GOLDEN)
    tokens, rows = golden["tokens_33"].tolist(), golden["rows_33"].tolist()
    engine = make_engine(default_model(), n_ctx=256)
    ours = engine.eval(tokens, range(33), wanted=rows).argmax(axis=1)
    theirs = golden["logits_33"].argmax(axis=1)
    assert np.mean(ours == theirs) >= 0.9
