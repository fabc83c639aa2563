"""Text to token ids and back: byte-level BPE with the vocabulary of a GGUF file.

The merging itself is the `tokenizers` library's. Special tokens are cut out here, before it sees
the text, because only the caller knows which text may contain them: a template's own words may, a
user's message must not.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import TYPE_CHECKING

from mlacli.errors import ModelError, UsageError
from mlacli.text.pre_tokenizer import PATTERNS
from mlacli.text.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    TokenizerData,
    check_vocabulary,
    printable,
    tokenizer_data,
    vocabulary_error,
)

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Piece", "StreamDecoder", "Tokenizer", "TokenizerData", "tokenizer_data"]

# Texts that end an answer in models of this family, whatever the file says about them.
_END_TEXTS = frozenset(
    {
        "<｜end▁of▁sentence｜>",
        "<|end_of_sentence|>",
        "<|EOT|>",
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "[EOS]",
        "[EOT]",
    }
)
_CONTROL = (CONTROL, UNKNOWN)
_PART = 65536  # characters given to the library at once: it needs 300 bytes for each
_PART_END = re.compile(r"\n(?=[!-~])")
_SURROGATES = re.compile("([\ud800-\udfff]+)")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a prompt. `special`: control tokens spelled out within it become these tokens."""

    text: str
    special: bool


class Tokenizer:
    """Encodes and decodes with one file's vocabulary. Safe to share between threads.

    Raises ModelError when the vocabulary is malformed, its pre-tokenizer is not known, or (given
    `embedding_rows`) it has another size than the model's embedding.
    """

    def __init__(self, data: TokenizerData, embedding_rows: int | None = None) -> None:
        check_vocabulary(data, embedding_rows)
        self.data = data
        self.n_vocab = len(data.tokens)
        self.bos, self.eos = data.bos, data.eos
        kinds = data.token_types
        normal = {text: i for i, text in enumerate(data.tokens) if kinds[i] == NORMAL}
        special = {data.tokens[i]: i for i, kind in enumerate(kinds) if kind != NORMAL}
        # a control token of one character could not be told from that character in a message
        self._control = {t: i for t, i in special.items() if kinds[i] in _CONTROL and len(t) > 1}
        self._user_defined = {t: i for t, i in special.items() if kinds[i] == USER_DEFINED}
        self._byte_of, self._id_of_byte = _byte_alphabet(data, normal)
        self._model = _byte_pair_encoder(data, normal)
        self._longest = max(map(len, data.tokens))  # characters stand for bytes or for themselves
        known = self._control | self._user_defined
        named = {token for token in (data.eos, data.eot, data.eom) if token is not None}
        self.end_ids = frozenset(named | {known[text] for text in _END_TEXTS & known.keys()})

    @property
    def control_texts(self) -> tuple[str, ...]:
        """The spellings of all control tokens: what a user's text must not smuggle in."""
        return tuple(self._control)

    @property
    def bos_text(self) -> str:
        return "" if self.bos is None else self.data.tokens[self.bos]

    @property
    def eos_text(self) -> str:
        return "" if self.eos is None else self.data.tokens[self.eos]

    def is_end_of_generation(self, token: int) -> bool:
        return token in self.end_ids

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of `text`, without BOS. Lone surrogates stand for raw bytes, as in `os.fsdecode`."""
        return self.encode_pieces([Piece(text, special)])

    def encode_bytes(self, data: bytes, *, special: bool = False) -> list[int]:
        """Ids of `data`; bytes that are no UTF-8 become byte tokens and come back unchanged."""
        return self.encode(data.decode("utf-8", "surrogateescape"), special=special)

    def encode_prompt(self, pieces: Iterable[Piece]) -> list[int]:
        """`encode_pieces` with exactly one BOS in front if the file or the pieces ask for one."""
        ids = self.encode_pieces(pieces)
        if self.bos is None:
            return ids
        written = 0
        while written < len(ids) and ids[written] == self.bos:
            written += 1
        return [self.bos] * (self.data.add_bos or written > 0) + ids[written:]

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of the joined pieces.

        Control tokens are looked for inside each `special` piece, never across two pieces. The text
        between them is joined before it is cut into words, so that a word and the space in front of
        it become the same tokens wherever the pieces meet.
        """
        ids: list[int] = []
        pending: list[str] = []
        for piece in pieces:
            control = self._control if piece.special else {}
            for text, token in _split_at(piece.text, control):
                pending.append(text)
                if token is not None:
                    ids += self._encode_text("".join(pending))
                    ids.append(token)
                    pending.clear()
        return ids + self._encode_text("".join(pending))

    def minimum_tokens(self, text: str) -> int:
        """At least this many tokens, at no cost: enough to refuse a hopeless prompt at once."""
        return -(-len(text) // self._longest)

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for (of a control token: its spelling)."""
        if not 0 <= token < self.n_vocab:
            raise ModelError(f"token id {token} is outside the vocabulary (0..{self.n_vocab - 1})")
        text, kind = self.data.tokens[token], self.data.token_types[token]
        if kind == NORMAL:
            return bytes(map(self._byte_of.__getitem__, text))
        if kind == BYTE:
            return bytes([int(text[3:5], 16)])
        return text.encode("utf-8", "surrogateescape")

    def decode(self, ids: Iterable[int], special: bool = False) -> bytes:
        """The bytes of `ids`; control tokens are left out unless `special`."""
        return b"".join(self.piece(i) for i in ids if special or not self.is_control(i))

    def is_control(self, token: int) -> bool:
        return 0 <= token < self.n_vocab and self.data.token_types[token] in _CONTROL

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for words, token in _split_at(text, self._user_defined):
            # split with one group: valid text at even places, runs of surrogates at odd ones
            for place, run in enumerate(_SURROGATES.split(words)):
                if place % 2:
                    ids += self._encode_raw(run)
                else:
                    for part in _parts(run):
                        ids += self._model.encode(part, add_special_tokens=False).ids
            if token is not None:
                ids.append(token)
        return ids

    def _encode_raw(self, surrogates: str) -> Iterator[int]:
        for char in surrogates:
            escaped = "\udc80" <= char <= "\udcff"
            for byte in char.encode("utf-8", "surrogateescape" if escaped else "surrogatepass"):
                token = self._id_of_byte[byte]
                if token is None:
                    raise UsageError(
                        f"prompt: byte 0x{byte:02x} is not UTF-8 and this model has no token for it"
                    )
                yield token


class StreamDecoder:
    """Turns ids into text one at a time, holding back characters whose bytes are not all there."""

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that `token` completes; bytes that cannot be UTF-8 become U+FFFD."""
        return self._utf8.decode(self._tokenizer.decode([token], self._special))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character was cut short."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _split_at(text: str, tokens: dict[str, int]) -> Iterator[tuple[str, int | None]]:
    """(text, the token that follows it) ...; of several tokens at one place the longest wins."""
    present = sorted((token for token in tokens if token in text), key=len, reverse=True)
    start = 0
    if present:
        for match in re.finditer("|".join(map(re.escape, present)), text):
            yield text[start : match.start()], tokens[match[0]]
            start = match.end()
    yield text[start:], None


def _parts(text: str) -> Iterator[str]:
    """`text` in parts of at least `_PART` characters that encode alone as they do together."""
    start = 0
    while len(text) - start > _PART:
        end = _PART_END.search(text, start + _PART)
        if end is None:
            break
        yield text[start : end.end()]
        start = end.end()
    if start < len(text):
        yield text[start:]


def _byte_alphabet(
    data: TokenizerData, normal: dict[str, int]
) -> tuple[dict[str, int], Sequence[int | None]]:
    """GPT-2's printable stand-in for each byte -> the byte; and byte -> its token, if it has one.

    Bytes that show as themselves in Latin-1 keep their place; the others move to U+0100 and up.
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(kept)]
    byte_of = {chr(byte): byte for byte in kept}
    byte_of |= {chr(0x100 + index): byte for index, byte in enumerate(moved)}
    stranger = re.compile(f"[^{re.escape(''.join(byte_of))}]")
    if stranger.search("".join(normal)):
        token = next(token for token in normal if stranger.search(token))
        problem = f"token {normal[token]} ({printable(token)}) is not made of byte stand-ins"
        raise vocabulary_error(data.source, "tokenizer.ggml.tokens", problem)
    id_of_byte: list[int | None] = [None] * 256
    for char, byte in byte_of.items():
        id_of_byte[byte] = normal.get(char)
    in_utf8 = [*range(0xC0), *range(0xC2, 0xF5)]  # C0, C1 and F5.. never occur in UTF-8
    missing = [byte for byte in in_utf8 if id_of_byte[byte] is None]
    if missing:
        problem = f"no token for byte 0x{missing[0]:02x} ({len(missing)} bytes lack one)"
        raise vocabulary_error(data.source, "tokenizer.ggml.tokens", problem)
    return byte_of, id_of_byte


def _byte_pair_encoder(data: TokenizerData, normal: dict[str, int]) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    if set(map(methodcaller("count", " "), data.merges)) - {1}:
        merge = next(merge for merge in data.merges if merge.count(" ") != 1)
        problem = f"{printable(merge)} is not two tokens with one space between them"
        raise vocabulary_error(data.source, "tokenizer.ggml.merges", problem)
    parts = " ".join(data.merges).split(" ") if data.merges else []
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    try:
        library = Tokenizer(models.BPE(normal, pairs))
    except Exception as error:  # the library raises bare Exception for a part it does not know
        for left, right in pairs:
            for part in (left, right, left + right):
                if part not in normal:
                    problem = f"{printable(left)} {printable(right)}: no token {printable(part)}"
                    raise vocabulary_error(data.source, "tokenizer.ggml.merges", problem) from error
        raise
    splits = [pre_tokenizers.Split(Regex(text), "isolated") for text in PATTERNS[data.pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    return library
