"""What a GGUF file says about itself: headers only, and nothing that compiles is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from codegen.formats import CACHE_FORMATS, LATENT_CACHE_TYPES
from mlacli.cache import CacheLayout
from mlacli.errors import ModelError
from mlacli.gguf.metadata import Metadata
from mlacli.gguf.reader import GGUFFile, open_gguf
from mlacli.model.config import ModelConfig, read_config
from mlacli.model.inventory import check_tensors

_ATTENTION = ("attn_kv_b", "attn_k_b", "attn_v_b")


@dataclass(frozen=True)
class TokenizerFacts:
    """Its kind, special tokens and template; None where the file does not say."""

    model: str | None
    pre: str | None
    n_tokens: int
    bos: int | None
    eos: int | None
    add_bos: bool
    chat_template_chars: int  # 0: there is none


@dataclass(frozen=True)
class ModelInfo:
    """A file's facts. `config` is None, and `problem` says why, where mlacli cannot run it.

    `bytes_per_token` are those of the latent cache by type, `plain_bytes_per_token` of K and V in
    f16 (-mla 0); `attention` names which of attn_kv_b, attn_k_b and attn_v_b there are.
    """

    file: GGUFFile
    arch: str
    name: str
    n_params: int
    tensor_types: dict[str, tuple[int, int]]  # type -> (tensors, bytes), most bytes first
    tokenizer: TokenizerFacts
    attention: tuple[str, ...]
    config: ModelConfig | None
    bytes_per_token: dict[str, int]
    plain_bytes_per_token: int
    problem: str
    notes: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(n for _, n in self.tensor_types.values()) / max(1, self.n_params)


def read_info(path: Path) -> ModelInfo:
    """Raises ModelError for what is no sound GGUF file; any model may be in it."""
    file = open_gguf(path)
    types: dict[str, tuple[int, int]] = {}
    for tensor in file.tensors.values():
        count, nbytes = types.get(tensor.type_name, (0, 0))
        types[tensor.type_name] = (count + 1, nbytes + tensor.nbytes)
    config, problem, notes = None, "", file.notes
    try:
        config = read_config(file)
        notes = (*notes, *check_tensors(file, config))
    except ModelError as refusal:
        problem = str(refusal)
    return ModelInfo(
        file=file,
        arch=_text(file.metadata, "general.architecture") or "",
        name=_text(file.metadata, "general.name") or path.stem,
        n_params=sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
        tensor_types=dict(sorted(types.items(), key=lambda item: -item[1][1])),
        tokenizer=_tokenizer(file.metadata),
        attention=tuple(part for part in _ATTENTION if f"blk.0.{part}.weight" in file.tensors),
        config=config,
        bytes_per_token=_latent_bytes(config) if config else {},
        plain_bytes_per_token=_layout(config, "f16", latent=False).bytes_per_token if config else 0,
        problem=problem,
        notes=notes,
    )


def _latent_bytes(config: ModelConfig) -> dict[str, int]:
    whole = [t for t in LATENT_CACHE_TYPES if config.c_width % CACHE_FORMATS[t].size == 0]
    return {t: _layout(config, t, latent=True).bytes_per_token for t in whole}


def _layout(config: ModelConfig, cache_type: str, *, latent: bool) -> CacheLayout:
    """A cache of one token, with flash attention."""
    fmt, c = CACHE_FORMATS[cache_type], config
    return CacheLayout(
        n_layer=c.n_layer,
        n_ctx=1,
        n_head=c.n_head,
        kv_lora_rank=c.kv_lora_rank,
        n_rope=c.n_rope,
        n_nope=c.n_nope,
        n_v=c.n_v,
        fmt_k=fmt,
        fmt_v=fmt,
        latent=latent,
        transposed=False,
    )


def _tokenizer(metadata: Metadata) -> TokenizerFacts:
    tokens = "tokenizer.ggml.tokens"
    return TokenizerFacts(
        model=_text(metadata, "tokenizer.ggml.model"),
        pre=_text(metadata, "tokenizer.ggml.pre"),
        n_tokens=metadata.count(tokens) if metadata.is_array(tokens) else 0,
        bos=_integer(metadata, "tokenizer.ggml.bos_token_id"),
        eos=_integer(metadata, "tokenizer.ggml.eos_token_id"),
        add_bos=metadata.get("tokenizer.ggml.add_bos_token") is True,
        chat_template_chars=len(_text(metadata, "tokenizer.chat_template") or ""),
    )


def _text(metadata: Metadata, key: str) -> str | None:
    value = None if metadata.is_array(key) else metadata.get(key)
    return value if isinstance(value, str) else None


def _integer(metadata: Metadata, key: str) -> int | None:
    value = None if metadata.is_array(key) else metadata.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
