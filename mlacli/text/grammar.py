"""Constrained output: which tokens may come next by a grammar, a JSON schema or an expression.

llguidance parses the constraint and keeps its state; here it meets the vocabulary. GBNF is
translated to llguidance's own grammars; what has no translation there is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, proxy

import numpy as np

from mlacli.errors import UsageError
from mlacli.settings import Grammar
from mlacli.text.filters import Logits
from mlacli.text.tokenizer import Tokenizer

_LIBRARY: WeakKeyDictionary[Tokenizer, Any] = WeakKeyDictionary()


class Constraint:
    """The state of one answer. Raises UsageError naming the flag when the text is not valid."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer) -> None:
        from llguidance import LLMatcher

        self._flag, self._n = grammar.flag, tokenizer.n_vocab
        self._tokenizer = tokenizer  # keeps the library's one alive, too
        library = _library_tokenizer(tokenizer)
        self._start = LLMatcher(library, _translated(grammar), log_level=0)
        self._check(self._start)
        self._state = self._start.deep_copy()
        self._mask = np.zeros(-(-self._n // 32), np.uint32)

    def allowed(self) -> Logits:
        """0 for the tokens that may come next, -inf for the others; at least one may."""
        mask = self._mask
        self._state.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check(self._state)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: self._n]
        return np.where(bits, np.float32(0), np.float32(-np.inf))

    def accept(self, token: int) -> bool:
        """Go on by a token that was allowed; False: it was the last one."""
        self._state.consume_token(token)
        self._check(self._state)
        return not self._state.is_stopped()

    def restart(self) -> None:
        """Back to the start, for the next answer."""
        self._state = self._start.deep_copy()

    def _check(self, state: Any) -> None:
        if state.is_error():
            raise _problem(self._flag, state.get_error())


def _translated(grammar: Grammar) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        match grammar.kind:
            case "regex":
                return str(LLMatcher.grammar_from_regex(grammar.text))
            case "json":
                json.loads(grammar.text)  # a better message than the library's
                return str(LLMatcher.grammar_from_json_schema(grammar.text))
        return str(LLMatcher.grammar_from_lark(gbnf_to_lark(grammar.text)))
    except Exception as problem:  # the library raises bare Exception for a rule it does not know
        raise _problem(grammar.flag, str(problem) or type(problem).__name__) from problem


def _problem(flag: str, text: str) -> UsageError:
    return UsageError(f"{flag}: {' '.join(text.split())}")


def _library_tokenizer(tokenizer: Tokenizer) -> Any:
    """The vocabulary as the library keeps it: made once, as that takes a second for a large one."""
    from llguidance import LLTokenizer, TokenizerWrapper

    if tokenizer not in _LIBRARY:
        _LIBRARY[tokenizer] = LLTokenizer(
            TokenizerWrapper(_Vocabulary(tokenizer)),
            n_vocab=tokenizer.n_vocab,
            eos_token=sorted(tokenizer.end_ids),
        )
    return _LIBRARY[tokenizer]


class _Vocabulary:
    """The tokens as llguidance asks for them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = range(tokenizer.n_vocab)
        self._tokenizer: Tokenizer = proxy(tokenizer)  # which outlives this: see _LIBRARY
        self.bos_token_id = tokenizer.data.bos
        self.eos_token_id = min(tokenizer.end_ids)
        self.tokens = [tokenizer.piece(token) for token in ids]
        self.special_token_ids = [token for token in ids if tokenizer.is_control(token)]

    def __call__(self, text: bytes | str) -> Sequence[int]:
        data = text.encode() if isinstance(text, str) else text
        return self._tokenizer.encode_bytes(data)
