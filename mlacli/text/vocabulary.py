"""The vocabulary of a GGUF file as plain values, and everything that can be wrong with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlacli.errors import ModelError
from mlacli.text.pre_tokenizer import PATTERNS

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

MAX_TOKEN_LENGTH = 65536
MAX_MERGES_PER_TOKEN = 4  # vocabularies in use have 1 to 2.2
MAX_TEMPLATE_BYTES = 2**20
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_PREFIX = "tokenizer.ggml."


@dataclass(frozen=True, slots=True)
class TokenizerData:
    """What a file says about its tokens. `source` is its name, for messages."""

    model: str
    pre: str
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    bos: int | None = None
    eos: int | None = None
    eot: int | None = None
    eom: int | None = None
    pad: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None
    source: str = "tokenizer"


def tokenizer_data(metadata: Mapping[str, Any], source: str = "tokenizer") -> TokenizerData:
    """The `tokenizer.*` keys of a GGUF file's metadata (scalars, lists, or numpy arrays).

    Raises ModelError naming the key that is missing or has the wrong type, length or range.
    """
    read = _Reader(metadata, source)
    tokens = read.array("tokens", str)
    count = len(tokens)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise vocabulary_error(source, "tokenizer.chat_template", "is not a string")
    if "tokenizer.ggml.scores" in metadata:
        read.check_length("scores", read.array("scores", float), count)
    types = read.array("token_type", int)
    read.check_length("token_type", types, count)
    for name in ("unknown", "separator", "seperator", "mask"):
        read.token_id(name, count)
    return TokenizerData(
        model=read.text("model"),
        pre=read.text("pre"),
        tokens=tokens,
        token_types=types,
        merges=read.array("merges", str),
        bos=read.token_id("bos", count),
        eos=read.token_id("eos", count),
        eot=read.token_id("eot", count),
        eom=read.token_id("eom", count),
        pad=read.token_id("padding", count),
        add_bos=read.flag("add_bos_token"),
        add_eos=read.flag("add_eos_token"),
        chat_template=template,
        source=source,
    )


def check_vocabulary(data: TokenizerData, embedding_rows: int | None = None) -> None:
    """Raises ModelError for a vocabulary that cannot be encoded and decoded without guessing."""

    def fail(key: str, problem: str) -> ModelError:
        return vocabulary_error(data.source, _PREFIX + key, problem)

    if data.model != "gpt2":
        raise fail("model", f"{printable(data.model)} is not supported (only gpt2, byte-level BPE)")
    if data.pre not in PATTERNS:
        known = ", ".join(PATTERNS)
        raise fail("pre", f"{printable(data.pre)} is not supported (known: {known})")
    count = len(data.tokens)
    if embedding_rows is not None and count != embedding_rows:
        raise fail("tokens", f"{count} tokens, but the embedding has {embedding_rows} rows")
    wrong = {size for size in set(map(len, data.tokens)) if not 1 <= size <= MAX_TOKEN_LENGTH}
    if wrong:
        index, size = next((i, len(t)) for i, t in enumerate(data.tokens) if len(t) in wrong)
        raise fail("tokens", f"token {index} has {size} characters (limit 1..{MAX_TOKEN_LENGTH})")
    if len(set(data.tokens)) != count:
        raise fail("tokens", _duplicate(data.tokens))
    if not set(data.token_types) <= set(range(NORMAL, BYTE + 1)):
        bad = next(kind for kind in data.token_types if not NORMAL <= kind <= BYTE)
        raise fail("token_type", f"unknown type {bad} (limit {NORMAL}..{BYTE})")
    if len(data.merges) > MAX_MERGES_PER_TOKEN * count:
        limit = MAX_MERGES_PER_TOKEN * count
        raise fail("merges", f"{len(data.merges)} merges for {count} tokens (limit {limit})")
    for index in (i for i, kind in enumerate(data.token_types) if kind == BYTE):
        if not _BYTE_TOKEN.fullmatch(data.tokens[index]):
            shown = printable(data.tokens[index])
            raise fail("tokens", f"byte token {index} ({shown}) is not of the form <0xNN>")


def vocabulary_error(source: str, field: str, problem: str) -> ModelError:
    return ModelError(f"{printable(source, 80)}: {field}: {problem}")


def printable(text: str, limit: int = 40) -> str:
    """`text` on one line, shortened, with control and bidi characters escaped."""
    short = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in short)


def _duplicate(tokens: list[str]) -> str:
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if token in seen:
            return f"tokens {seen[token]} and {index} are both {printable(token)}"
        seen[token] = index
    raise AssertionError("no duplicate")


@dataclass(frozen=True, slots=True)
class _Reader:
    metadata: Mapping[str, Any]
    source: str

    def value(self, name: str) -> Any:
        key = _PREFIX + name
        if key not in self.metadata:
            raise vocabulary_error(self.source, key, "missing from the metadata")
        value = self.metadata[key]
        return value.tolist() if hasattr(value, "tolist") else value

    def text(self, name: str) -> str:
        value = self.value(name)
        if not isinstance(value, str):
            raise vocabulary_error(self.source, _PREFIX + name, "is not a string")
        return value

    def flag(self, name: str) -> bool:
        value = self.value(name) if _PREFIX + name in self.metadata else False
        if not isinstance(value, bool):
            raise vocabulary_error(self.source, _PREFIX + name, "is not a bool")
        return value

    def array(self, name: str, element: type) -> list[Any]:
        value = self.value(name)
        if not isinstance(value, list) or not set(map(type, value)) <= {element}:
            problem = f"is not an array of {element.__name__}"
            raise vocabulary_error(self.source, _PREFIX + name, problem)
        return value

    def check_length(self, name: str, values: list[Any], count: int) -> None:
        if len(values) != count:
            problem = f"{len(values)} elements for {count} tokens"
            raise vocabulary_error(self.source, _PREFIX + name, problem)

    def token_id(self, name: str, count: int) -> int | None:
        key = f"{_PREFIX}{name}_token_id"
        if key not in self.metadata:
            return None
        value = self.metadata[key]
        if isinstance(value, bool) or not isinstance(value, int):
            raise vocabulary_error(self.source, key, "is not an integer")
        if not 0 <= value < count:
            raise vocabulary_error(self.source, key, f"got {value} (limit 0..{count - 1})")
        return value
