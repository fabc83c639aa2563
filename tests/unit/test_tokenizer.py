"""The tokenizer against an own BPE, pinned cuts, exact round trips and malformed vocabularies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlacli.text.tokenizer as tokenizer_module
from mlacli.errors import ModelError, UsageError
from mlacli.text.pre_tokenizer import PATTERNS
from mlacli.text.tokenizer import Piece, StreamDecoder, Tokenizer, tokenizer_data
from mlacli.text.vocabulary import MAX_TOKEN_LENGTH, TokenizerData
from tests.unit.vocabularies import (
    BOS,
    CONTROLS,
    EOS,
    MIXED,
    USER_TOKENS,
    split_by,
    vocabulary,
    without_bytes,
)

PRES = tuple(PATTERNS)
TEXT = st.text(
    st.one_of(
        st.sampled_from("aB z09 \n\t\r.,!<|>'\"_-äßøé你の。😀\u0301\u200d\u00a0\u3000\u2028½٣"),
        st.characters(codec="utf-8"),
    ),
    max_size=60,
)


@pytest.fixture(scope="module", params=PRES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(vocabulary(request.param))


TOKENIZERS = [Tokenizer(vocabulary(pre)) for pre in PRES]
both = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=PRES)


def merged(data: TokenizerData, word: str) -> list[str]:
    """BPE by its definition: merge the pair of the lowest rank, leftmost first, until none is."""
    rank = {tuple(merge.split(" ")): place for place, merge in enumerate(data.merges)}
    parts = list(word)
    while True:
        pairs = [(rank.get((a, b), len(rank)), i) for i, (a, b) in enumerate(pairwise(parts))]
        best, place = min(pairs, default=(len(rank), 0))
        if best == len(rank):
            return parts
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def stand_ins(word: str) -> str:
    """GPT-2's bytes_to_unicode, from its definition."""
    keep = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    moved = {byte: 256 + place for place, byte in enumerate(b for b in range(256) if b not in keep)}
    return "".join(chr(moved.get(byte, byte)) for byte in word.encode())


@both
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_ids_are_those_of_a_bpe_by_definition(tokenizer: Tokenizer, text: str) -> None:
    data = tokenizer.data
    words = [word for word, _ in split_by(PATTERNS[data.pre]).pre_tokenize_str(text)]
    expected = [part for word in words for part in merged(data, stand_ins(word))]
    assert [data.tokens[i] for i in tokenizer.encode(text, special=False)] == expected


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("deepseek-v3", "Hello, world", ["Hello", ",", " world"]),
        ("deepseek-v3", "1234567", ["123", "456", "7"]),
        ("deepseek-v3", "a 12 b", ["a", " ", "12", " b"]),
        ("deepseek-v3", "don't(x) .get", ["don", "'t", "(x", ")", " .", "get"]),
        ("deepseek-v3", "你好。カナ漢字", ["你好", "。", "カナ漢字"]),
        ("deepseek-v3", "x  \n\n  y", ["x", "  \n\n", " ", " y"]),
        ("deepseek-v3", "x;\r\ny\t\tz  ", ["x", ";\r\n", "y", "\t", "\tz", "  "]),
        ("deepseek-v3", "e\u0301a 1½", ["e\u0301a", " ", "1½"]),
        ("deepseek-llm", "Hello, world", ["Hello", ",", " world"]),
        ("deepseek-llm", "1234567", ["1234567"]),
        ("deepseek-llm", "a\n\nb\r\n", ["a", "\n", "\n", "b", "\r", "\n"]),
        ("deepseek-llm", "a  b  ", ["a", " ", " b", "  "]),
        ("deepseek-llm", "你好。カナ 가", ["你好", "。", "カナ", " ", "가"]),
        # `:-~` in the class of punctuation holds the ASCII letters, so they are cut off again
        ("deepseek-llm", "Größe Привет", ["Gr", "öß", "e", " Привет"]),
        ("deepseek-llm", "\u212a\u1f7d\u03ce[", ["\u212a\u1f7d", "\u03ce", "["]),
        ("deepseek-llm", "x\u01bby", ["x", "\u01bb", "y"]),
    ],
)
def test_cuts(pre: str, text: str, words: list[str]) -> None:
    assert [word for word, _ in split_by(PATTERNS[pre]).pre_tokenize_str(text)] == words


@settings(max_examples=300, deadline=None)
@given(text=st.text(" \t\u00a0\u3000a1，\n", max_size=20))
def test_spaces_at_the_end_are_cut_as_by_the_models_own_pattern(text: str) -> None:
    own = tuple(r"\s+$" if p == r"(?<!\s)\s+$" else p for p in PATTERNS["deepseek-llm"])
    assert own != PATTERNS["deepseek-llm"]
    ours = split_by(PATTERNS["deepseek-llm"]).pre_tokenize_str(text)
    assert ours == split_by(own).pre_tokenize_str(text)


@both
@settings(max_examples=150, deadline=None)
@given(data=st.one_of(st.binary(max_size=80), TEXT.map(str.encode)), special=st.booleans())
def test_bytes_come_back(tokenizer: Tokenizer, data: bytes, special: bool) -> None:
    assert tokenizer.decode(tokenizer.encode_bytes(data, special=special), special=True) == data


@both
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbfx\r\n\0",
        b"a\x80\xe4\xbd",
        b"\xf5" * 9,
    ],
)
def test_what_is_no_utf8_comes_back(tokenizer: Tokenizer, data: bytes) -> None:
    assert tokenizer.decode(tokenizer.encode_bytes(data)) == data


def test_a_lone_surrogate_becomes_its_three_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b", special=False)) == b"a\xed\xa0\x80b"


@both
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=40) | TEXT.map(str.encode))
def test_streaming_gives_the_same_text(tokenizer: Tokenizer, data: bytes) -> None:
    ids = tokenizer.encode_bytes(data)
    stream = StreamDecoder(tokenizer)
    text = "".join(map(stream.feed, ids)) + stream.flush()
    assert text == data.decode("utf-8", "replace")


def test_streaming_holds_back_a_split_character(tokenizer: Tokenizer) -> None:
    one_by_one = [tokenizer.encode_bytes(bytes([byte]))[0] for byte in "😀".encode()]
    stream = StreamDecoder(tokenizer)
    assert [stream.feed(token) for token in one_by_one] == ["", "", "", "😀"]
    assert stream.feed(one_by_one[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


@both
@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(
        st.sampled_from(["a", "!", " b ", "12", "  ", "\n", "\r\n", "你", "\t\n"]), max_size=40
    )
)
def test_long_texts_encode_in_parts_as_they_do_at_once(
    tokenizer: Tokenizer, lines: list[str]
) -> None:
    text = "".join(lines)
    at_once = tokenizer.encode(text, special=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_PART", 2)
        assert tokenizer.encode(text, special=False) == at_once


@both
@settings(max_examples=100, deadline=None)
@given(text=TEXT, cut=st.integers(0, 60))
def test_pieces_of_text_join_before_they_are_cut_into_words(
    tokenizer: Tokenizer, text: str, cut: int
) -> None:
    pieces = [Piece(text[:cut], True), Piece(text[cut:], False)]
    assert tokenizer.encode_pieces(pieces) == tokenizer.encode(text, special=False)


@pytest.mark.parametrize("control", CONTROLS)
def test_control_tokens_only_where_they_may_be(tokenizer: Tokenizer, control: str) -> None:
    token = tokenizer.data.tokens.index(control)
    text = f"say {control} now"
    assert tokenizer.encode(text, special=True).count(token) == 1
    plain = tokenizer.encode(text, special=False)
    assert not any(map(tokenizer.is_control, plain))
    assert tokenizer.decode(plain).decode() == text
    halves = [Piece(text[:8], True), Piece(text[8:], True)]
    assert not any(map(tokenizer.is_control, tokenizer.encode_pieces(halves)))


def test_the_longest_of_two_control_tokens_wins(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<｜User｜>xy", special=True)
    assert tokenizer.piece(ids[0]).decode() == "<｜User｜>x"


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", USER_TOKENS)
def test_user_defined_tokens_are_ordinary_text(
    tokenizer: Tokenizer, text: str, special: bool
) -> None:
    token = tokenizer.data.tokens.index(text)
    ids = tokenizer.encode(f"a{text}b", special=special)
    assert ids.count(token) == 1
    assert tokenizer.decode(ids).decode() == f"a{text}b"


def test_decoding_leaves_control_tokens_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"{BOS}hi{EOS}", special=True)
    assert tokenizer.decode(ids) == b"hi"
    assert tokenizer.decode(ids, special=True).decode() == f"{BOS}hi{EOS}"
    assert [StreamDecoder(tokenizer).feed(i) for i in ids if tokenizer.is_control(i)] == ["", ""]


def test_one_bos(tokenizer: Tokenizer) -> None:
    hi = tokenizer.encode("hi", special=False)
    assert tokenizer.bos is not None
    for text in ("hi", f"{BOS}hi", f"{BOS}{BOS}hi"):
        assert tokenizer.encode_prompt([Piece(text, True)]) == [tokenizer.bos, *hi]
    never = Tokenizer(replace(tokenizer.data, add_bos=False))
    assert never.encode_prompt([Piece("hi", True)]) == hi
    assert never.encode_prompt([Piece(f"{BOS}{BOS}hi", True)]) == [tokenizer.bos, *hi]
    without = Tokenizer(replace(tokenizer.data, bos=None))
    assert without.encode_prompt([Piece("hi", True)]) == hi


def test_end_of_generation() -> None:
    data = vocabulary("deepseek-v3")
    user = data.tokens.index("<｜User｜>")
    ends = Tokenizer(replace(data, eot=user)).end_ids
    assert ends == {data.eos, user}
    by_name = Tokenizer(replace(data, eos=None))
    assert by_name.is_end_of_generation(data.tokens.index(EOS))
    assert not by_name.is_end_of_generation(user)


@both
@settings(max_examples=50, deadline=None)
@given(text=TEXT)
def test_minimum_tokens_is_a_lower_bound(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.minimum_tokens(text) <= len(tokenizer.encode(text, special=True))


def test_an_id_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    for token in (-1, tokenizer.n_vocab):
        with pytest.raises(ModelError, match=f"token id {token} is outside"):
            tokenizer.piece(token)


# --- metadata: the T cases of the threat list ---


def metadata(**changes: Any) -> dict[str, Any]:
    data = vocabulary("deepseek-v3")
    values: dict[str, Any] = {
        "model": data.model,
        "pre": data.pre,
        "tokens": data.tokens,
        "token_type": np.array(data.token_types, np.int32),
        "merges": data.merges,
        "bos_token_id": data.bos,
        "eos_token_id": data.eos,
        "add_bos_token": True,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def test_metadata_is_read() -> None:
    values = metadata(padding_token_id=3, scores=[0.5] * len(vocabulary("deepseek-v3").tokens))
    data = tokenizer_data(values | {"tokenizer.chat_template": "{{ x }}"}, "a.gguf")
    expected = replace(vocabulary("deepseek-v3"), pad=3, chat_template="{{ x }}", source="a.gguf")
    assert data == expected
    assert Tokenizer(data, embedding_rows=len(data.tokens)).n_vocab == len(data.tokens)


N = len(vocabulary("deepseek-v3").tokens)
TOKENS = vocabulary("deepseek-v3").tokens
MERGES = vocabulary("deepseek-v3").merges
TYPES = vocabulary("deepseek-v3").token_types


def changed(values: Sequence[Any], index: int, value: Any) -> list[Any]:
    return [value if place == index else old for place, old in enumerate(values)]


def byte_token(text: str) -> dict[str, Any]:
    return {"tokens": changed(TOKENS, N - 1, text), "token_type": changed(TYPES, N - 1, 6)}


EMPTY: dict[str, Any] = {
    "tokens": [],
    "token_type": [],
    "merges": [],
    "bos_token_id": None,
    "eos_token_id": None,
}
NO_A = {"token_type": changed(TYPES, TOKENS.index("A"), 5), "merges": []}
MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "T01 absent": ({"tokens": None}, "tokens: missing"),
    "T01 type": ({"tokens": [1] * N}, "tokens: is not an array of str"),
    "T01 none": (EMPTY, "no token for byte 0x00"),
    "T02 absent": ({"token_type": None}, "token_type: missing"),
    "T02 short": ({"token_type": TYPES[1:]}, f"{N - 1} elements for {N} tokens"),
    "T02 long": ({"token_type": [*TYPES, 1]}, f"{N + 1} elements for {N} tokens"),
    "T02 float": ({"token_type": np.ones(N, np.float32)}, "not an array of int"),
    "T02 string": ({"token_type": ["1"] * N}, "not an array of int"),
    "T02 unknown": ({"token_type": changed(TYPES, 3, 9)}, "unknown type 9"),
    "T02 scores": ({"scores": np.ones(3, np.float32)}, f"scores: 3 elements for {N}"),
    "T02 scores type": ({"scores": [1] * N}, "scores: is not an array of float"),
    "T03 high": ({"bos_token_id": N}, rf"bos_token_id: got {N} \(limit 0..{N - 1}\)"),
    "T03 negative": ({"eos_token_id": -1}, "eos_token_id: got -1"),
    "T03 eot": ({"eot_token_id": 2**32 - 1}, "eot_token_id: got 4294967295"),
    "T03 unknown": ({"unknown_token_id": N}, "unknown_token_id: got"),
    "T03 type": ({"padding_token_id": "3"}, "padding_token_id: is not an integer"),
    "T03 bool": ({"bos_token_id": True}, "bos_token_id: is not an integer"),
    "T04": ({"tokens": changed(TOKENS, 300, TOKENS[5])}, "tokens 5 and 300 are both"),
    "T05 negative": (byte_token("<0x-1>"), "<0x-1>.*not of the form"),
    "T05 letters": (byte_token("<0xZZ>"), "<0xZZ>.*not of the form"),
    "T05 missing": (NO_A, "no token for byte 0x41"),
    "T06 no space": ({"merges": [*MERGES, "ab"]}, "ab is not two tokens"),
    "T06 two spaces": ({"merges": [*MERGES, "a b c"]}, "a b c is not two tokens"),
    "T06 empty part": ({"merges": [*MERGES, "a "]}, "a : no token"),
    "T06 unknown part": ({"merges": [*MERGES, "a qzqz"]}, "a qzqz: no token qzqz"),
    "T06 unknown result": ({"merges": [*MERGES, "~ ~"]}, "~ ~: no token ~~"),
    "T06 many": ({"merges": ["a b"] * 10**6}, "1000000 merges for"),
    "T06 absent": ({"merges": None}, "merges: missing"),
    "T07": ({"tokens": changed(TOKENS, 7, "")}, "token 7 has 0 characters"),
    "T08": ({"tokens": changed(TOKENS, N - 1, "x" * 2**24)}, "has 16777216 characters"),
    "stranger": ({"tokens": changed(TOKENS, 300, "\u202ez")}, r"\(\\u202ez\) is not made of byte"),
    "T10": ({"pre": "kimi-k2"}, "pre: kimi-k2 is not supported"),
    "T10 absent": ({"pre": None}, "pre: missing"),
    "T10 type": ({"pre": 3}, "pre: is not a string"),
    "model": ({"model": "llama"}, "model: llama is not supported"),
    "flag": ({"add_bos_token": 1}, "add_bos_token: is not a bool"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_vocabularies(case: str) -> None:
    changes, reason = MALFORMED[case]
    start = time.perf_counter()
    with pytest.raises(ModelError, match=reason) as caught:
        Tokenizer(tokenizer_data(metadata(**changes), "bad.gguf"))
    assert time.perf_counter() - start < 2
    message = str(caught.value)
    assert message.startswith("bad.gguf: tokenizer.ggml.") and message.isprintable()
    assert len(message) < 290


def test_t09_other_size_than_the_embedding() -> None:
    with pytest.raises(ModelError, match=f"{N} tokens, but the embedding has {N + 64} rows"):
        Tokenizer(vocabulary("deepseek-v3"), embedding_rows=N + 64)


def test_template_of_another_type() -> None:
    with pytest.raises(ModelError, match="chat_template: is not a string"):
        tokenizer_data(metadata() | {"tokenizer.chat_template": 7})


def test_the_longest_token_there_may_be() -> None:
    long = "x" * MAX_TOKEN_LENGTH
    tokenizer = Tokenizer(tokenizer_data(metadata(tokens=changed(TOKENS, N - 1, long))))
    assert tokenizer.encode(f"a{long}", special=False)[1] == N - 1


def test_byte_tokens() -> None:
    values = metadata(tokens=changed(TOKENS, N - 1, "<0xE4>"), token_type=changed(TYPES, N - 1, 6))
    assert Tokenizer(tokenizer_data(values)).piece(N - 1) == b"\xe4"


def test_bytes_that_utf8_never_has_may_be_missing() -> None:
    """DeepSeek-V2 has no tokens for them: encoding such a byte is refused, all text works."""
    gone = [0xC0, 0xC1, *range(0xF5, 0x100)]
    tokenizer = Tokenizer(without_bytes(vocabulary("deepseek-llm"), gone))
    assert tokenizer.decode(tokenizer.encode(MIXED, special=False)).decode() == MIXED
    letter = tokenizer.encode("ø", special=False)
    assert letter == [tokenizer.data.tokens.index("ø")]
    with pytest.raises(UsageError, match="byte 0xff is not UTF-8"):
        tokenizer.encode_bytes(b"a\xff")


@both
@pytest.mark.parametrize("unit", ["a", " ", "7", "😀", "\n", "e\u0301", "!", "一", "a ", " \u00a0"])
@pytest.mark.parametrize("end", ["7", "一"])
def test_t11_time_is_linear(tokenizer: Tokenizer, unit: str, end: str) -> None:
    text = unit * (50_000 // len(unit)) + end
    start = time.process_time()
    ids = tokenizer.encode(text, special=True)
    assert time.process_time() - start < 1  # a pattern that goes back and forth needs 10 s
    assert tokenizer.decode(ids).decode() == text
