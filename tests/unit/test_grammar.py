"""Constrained answers: whatever is drawn, the text keeps to the grammar."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from mlacli.errors import UsageError
from mlacli.gguf.reader import open_gguf
from mlacli.sampling_settings import SamplingSettings
from mlacli.settings import Grammar, default_model
from mlacli.text.grammar import Constraint
from mlacli.text.sampling import Sampler
from mlacli.text.tokenizer import Tokenizer
from mlacli.text.vocabulary import tokenizer_data

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
GBNF = """
root  ::= "The answer is " number (" or " number)? "."
number ::= [1-9] [0-9]{0,2} # no zero in front
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_data(open_gguf(default_model()).metadata))


def answer(tokenizer: Tokenizer, constraint: Constraint, seed: int) -> str:
    """What a model that knows nothing answers."""
    chance = np.random.default_rng(seed)
    sampler = Sampler(SamplingSettings(seed=seed, temp=1, top_k=0), tokenizer.n_vocab)
    tokens: list[int] = []
    for _ in range(400):
        logits = chance.normal(size=tokenizer.n_vocab).astype(np.float32) * 3
        tokens.append(sampler.sample(logits, constraint.allowed()))
        if not constraint.accept(tokens[-1]):
            break
    else:
        pytest.fail("no end after 400 tokens")
    return tokenizer.decode(tokens).decode()


@pytest.mark.parametrize(
    ("kind", "text", "holds"),
    [
        ("gbnf", GBNF, re.compile(r"The answer is [1-9]\d{0,2}( or [1-9]\d{0,2})?\.").fullmatch),
        ("regex", r"[a-f]{3,6}-[0-9]{2}", re.compile(r"[a-f]{3,6}-[0-9]{2}").fullmatch),
    ],
)
def test_every_answer_keeps_to_the_grammar(
    kind: str, text: str, holds: Any, tokenizer: Tokenizer
) -> None:
    constraint = Constraint(Grammar(kind, text, "--x"), tokenizer)
    for seed in range(10):
        assert holds(answer(tokenizer, constraint, seed))
        constraint.restart()


def test_every_answer_keeps_to_the_schema(tokenizer: Tokenizer) -> None:
    constraint = Constraint(Grammar("json", json.dumps(SCHEMA), "-j"), tokenizer)
    for seed in range(5):
        found = json.loads(answer(tokenizer, constraint, seed))
        assert set(found) == {"name", "age", "tags"}
        assert len(found["name"]) <= 12 and 0 <= found["age"] <= 150
        assert len(found["tags"]) <= 3 and set(found["tags"]) <= {"a", "b"}
        constraint.restart()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("gbnf", "root ::= ("),
        ("gbnf", 'start ::= "x"'),
        ("gbnf", "root ::= missing"),
        ("gbnf", ""),
        ("json", "{"),
        ("json", '{"type": 7}'),
        ("json", "[" * 100_000),
        ("regex", "(a"),
        ("regex", "[z-a]"),
    ],
)
def test_what_is_no_grammar_is_refused_in_one_line(
    kind: str, text: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(UsageError, match=r"^--flag: .+") as caught:
        Constraint(Grammar(kind, text, "--flag"), tokenizer).allowed()
    assert "\n" not in str(caught.value)
