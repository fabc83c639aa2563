"""Write a DeepSeek-V2/V3-shaped GGUF of random weights, for speed, memory and agreement tests.

    python -m scripts.make_model OUT [--preset v2-lite|v3|tiny-v3|...] [--type IQ4_NL|F32|...]
                                     [--kv-b joint|both|split] [--set key=value ...] [--sparse]

`--kv-b` picks the flavour of deepseek2 file: joint has attn_kv_b only (the oldest files), both adds
2-D k_b and v_b (ik_llama.cpp's files), split has 3-D transposed k_b and v_b only (llama.cpp today).
Every tensor has its own seed, and with F32, F16 or BF16 weights k_b and v_b are cut from the same
kv_b: the three flavours are then the same model. The vocabulary is a BPE trained on the standard
library's sources, so that text prompts work. `--sparse` writes the headers and leaves the data as a
hole (a 671B file costs no disk): for reports, not for running.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGMLType

ARCH = "deepseek2"
TRAINED_CONTEXT = 163840
FLOAT_TYPES = {GGMLType.F32: np.float32, GGMLType.F16: np.float16, GGMLType.BF16: np.uint16}


@dataclass(frozen=True)
class Blocks:
    """Blocks of random bytes with f16 scales of std / `spread`, at byte `scale_at`.

    K-quants with a minimum have its scale, `centre` times the other, in the two bytes behind it:
    values are then zero on average.
    """

    spread: float
    scale_at: int = 0
    centre: float = 0.0


BLOCKS = {
    GGMLType.IQ4_NL: Blocks(70.0),
    GGMLType.Q8_0: Blocks(74.0),
    GGMLType.Q4_0: Blocks(4.6),
    GGMLType.Q4_K: Blocks(258.0, centre=7.5),
    GGMLType.Q5_K: Blocks(527.0, centre=15.5),
    GGMLType.Q6_K: Blocks(1366.0, scale_at=208),
}
K_QUANTS = (GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K)  # rows that do not fit become Q8_0


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model; the field names are the keys of `--set`."""

    n_layer: int
    n_embd: int
    n_head: int
    kv_lora: int
    q_lora: int
    nope: int
    rope: int
    v: int
    n_ff: int
    n_dense: int
    n_exp: int
    n_used: int
    n_shared: int
    n_ff_exp: int
    vocab: int
    gating: int  # 1 softmax, 2 sigmoid with a selection bias
    scale: float
    norm: bool
    n_group: int = 0
    topk_group: int = 0


# fmt: off
_V2_LITE = Geometry(n_layer=27, n_embd=2048, n_head=16, kv_lora=512, q_lora=0, nope=128, rope=64,
                    v=128, n_ff=10944, n_dense=1, n_exp=64, n_used=6, n_shared=2, n_ff_exp=1408,
                    vocab=102400, gating=1, scale=1.0, norm=False)
_TINY_LITE = Geometry(n_layer=27, n_embd=256, n_head=4, kv_lora=128, q_lora=0, nope=64, rope=32,
                      v=64, n_ff=512, n_dense=1, n_exp=8, n_used=2, n_shared=1, n_ff_exp=128,
                      vocab=4096, gating=1, scale=1.0, norm=False)
_TINY_ODD = Geometry(n_layer=3, n_embd=320, n_head=5, kv_lora=160, q_lora=96, nope=96, rope=32,
                     v=160, n_ff=448, n_dense=1, n_exp=16, n_used=3, n_shared=2, n_ff_exp=96,
                     vocab=4096, gating=2, scale=1.5, norm=True, n_group=4, topk_group=2)
_V3 = Geometry(n_layer=61, n_embd=7168, n_head=128, kv_lora=512, q_lora=1536, nope=128, rope=64,
               v=128, n_ff=18432, n_dense=3, n_exp=256, n_used=8, n_shared=1, n_ff_exp=2048,
               vocab=129280, gating=2, scale=2.5, norm=True)
# fmt: on
PRESETS = {
    "v2-lite": _V2_LITE,
    "v2-lite-3l": replace(_V2_LITE, n_layer=3),
    "tiny-lite": _TINY_LITE,
    "tiny-v3": replace(_TINY_LITE, n_layer=4, q_lora=96, gating=2, scale=2.5, norm=True),
    "tiny-odd": _TINY_ODD,
    "v3": _V3,
    "v3-2l": replace(_V3, n_layer=2, n_dense=1),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: `shape` in GGUF's order (fastest first); `constant` fills norms."""

    name: str
    shape: tuple[int, ...]
    type: Any
    std: float
    constant: float | None = None

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """numpy's order (slowest first); rows in bytes for quantised types."""
        rows = tuple(reversed(self.shape[1:]))
        return (*rows, self.shape[0] if self.type in FLOAT_TYPES else self.row_bytes)

    @property
    def row_bytes(self) -> int:
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        if self.shape[0] % block:
            raise SystemExit(f"{self.name}: a row of {self.shape[0]} is no multiple of {block}")
        return int(self.shape[0] // block * block_bytes)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[1:]) * self.row_bytes


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos: int
    eos: int


def make_model(
    path: Path | str,
    *,
    preset: str = "v2-lite",
    type: str = "IQ4_NL",
    kv_b: str = "joint",
    seed: int = 1,
    overrides: Mapping[str, float | bool] | None = None,
    sparse: bool = False,
) -> int:
    """Write the model to `path` and return its size in bytes; equal arguments give equal bytes.

    `overrides` changes fields of the preset's `Geometry`. Raises SystemExit when a row length
    does not fit the type's blocks.
    """
    geometry = replace(PRESETS[preset], **(overrides or {}))  # type: ignore[arg-type]
    writer = gguf.GGUFWriter(str(path), ARCH)
    _write_metadata(writer, geometry, f"random {preset}", type, kv_b)
    _write_vocabulary(writer, geometry)
    tensors = _tensors(geometry, GGMLType[type], kv_b)
    for tensor in tensors:
        dtype = np.dtype(FLOAT_TYPES.get(tensor.type, np.uint8))
        writer.add_tensor_info(
            tensor.name, tensor.byte_shape, dtype, tensor.nbytes, raw_dtype=tensor.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if sparse:
        _leave_hole(writer, tensors)
    else:
        for tensor in tensors:
            writer.write_tensor_data(_values(tensor, geometry, seed))
    writer.close()
    return os.path.getsize(path)


def _write_metadata(w: Any, g: Geometry, name: str, type: str, kv_b: str) -> None:
    """Everything but the vocabulary, with the key/value lengths that the flavour uses."""
    split = kv_b == "split"
    w.add_name(name)
    w.add_block_count(g.n_layer)
    w.add_context_length(TRAINED_CONTEXT)
    w.add_embedding_length(g.n_embd)
    w.add_feed_forward_length(g.n_ff)
    w.add_head_count(g.n_head)
    w.add_head_count_kv(1 if split else g.n_head)
    w.add_rope_freq_base(10000.0)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_expert_used_count(g.n_used)
    file_type = getattr(gguf.LlamaFileType, "MOSTLY_" + type, gguf.LlamaFileType.ALL_F32)
    w.add_file_type(int(file_type))
    w.add_leading_dense_block_count(g.n_dense)
    w.add_vocab_size(g.vocab)
    if g.q_lora:
        w.add_q_lora_rank(g.q_lora)
    w.add_kv_lora_rank(g.kv_lora)
    if split:
        w.add_key_length(g.kv_lora + g.rope)
        w.add_value_length(g.kv_lora)
        w.add_key_length_mla(g.nope + g.rope)
        w.add_value_length_mla(g.v)
    else:
        w.add_key_length(g.nope + g.rope)
        w.add_value_length(g.v)
    w.add_expert_feed_forward_length(g.n_ff_exp)
    w.add_expert_count(g.n_exp)
    w.add_expert_shared_count(g.n_shared)
    w.add_expert_weights_scale(g.scale)
    w.add_expert_weights_norm(g.norm)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType(g.gating))
    if g.n_group:
        w.add_expert_group_count(g.n_group)
        w.add_expert_group_used_count(g.topk_group)
    w.add_rope_dimension_count(g.rope)
    w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    w.add_rope_scaling_factor(40.0)
    w.add_rope_scaling_orig_ctx_len(4096)
    w.add_rope_scaling_yarn_log_mul(0.1 if g.q_lora else 0.0707)


def _write_vocabulary(w: Any, g: Geometry) -> None:
    vocabulary = train_vocabulary(g.vocab)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("deepseek-v3" if g.q_lora else "deepseek-llm")
    w.add_token_list(vocabulary.tokens)
    w.add_token_types(vocabulary.types)
    w.add_token_merges(vocabulary.merges)
    w.add_bos_token_id(vocabulary.bos)
    w.add_eos_token_id(vocabulary.eos)
    w.add_pad_token_id(vocabulary.eos)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)


@cache
def train_vocabulary(size: int) -> Vocabulary:
    """A byte-level BPE of the standard library's sources, padded to `size` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=min(size - 500, 8000),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(str(p) for p in Path(os.__file__).parent.glob("*.py"))
    tokenizer.train(sources, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    types = [int(gguf.TokenType.NORMAL)] * len(tokens)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    bos = len(tokens)
    tokens += ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    types += [int(gguf.TokenType.CONTROL)] * 2
    n_padding = size - len(tokens)
    tokens += [f"[PAD{len(tokens) + i}]" for i in range(n_padding)]
    types += [int(gguf.TokenType.UNUSED)] * n_padding
    return Vocabulary(tokens, types, merges, bos=bos, eos=bos + 1)


def _tensors(g: Geometry, weight_type: Any, kv_b: str) -> list[Tensor]:
    """All tensors in file order; std = 1/sqrt(columns) keeps activations near unit size."""

    def matrix(name: str, *shape: int, std: float | None = None) -> Tensor:
        fits = weight_type not in K_QUANTS or shape[0] % gguf.QK_K == 0
        type_ = weight_type if fits else GGMLType.Q8_0
        return Tensor(name, shape, type_, 1.0 / math.sqrt(shape[0]) if std is None else std)

    tensors = [matrix("token_embd.weight", g.n_embd, g.vocab, std=0.5)]
    for i in range(g.n_layer):
        block = f"blk.{i}."
        tensors += [_norm(block + "attn_norm.weight", g.n_embd)]
        tensors += [_norm(block + "ffn_norm.weight", g.n_embd)]
        tensors += _attention(block, g, kv_b, matrix)
        tensors += (_dense if i < g.n_dense else _experts)(block, g, matrix)
    tensors += [_norm("output_norm.weight", g.n_embd)]
    tensors += [matrix("output.weight", g.n_embd, g.vocab)]
    return tensors


def _norm(name: str, n: int) -> Tensor:
    return Tensor(name, (n,), GGMLType.F32, std=0.0, constant=1.0)


def _attention(block: str, g: Geometry, kv_b: str, matrix: Callable[..., Tensor]) -> list[Tensor]:
    q_width = g.n_head * (g.nope + g.rope)
    if g.q_lora:
        tensors = [
            matrix(block + "attn_q_a.weight", g.n_embd, g.q_lora),
            _norm(block + "attn_q_a_norm.weight", g.q_lora),
            matrix(block + "attn_q_b.weight", g.q_lora, q_width),
        ]
    else:
        tensors = [matrix(block + "attn_q.weight", g.n_embd, q_width)]
    tensors += [
        matrix(block + "attn_kv_a_mqa.weight", g.n_embd, g.kv_lora + g.rope),
        _norm(block + "attn_kv_a_norm.weight", g.kv_lora),
    ]
    k_name, v_name = block + "attn_k_b.weight", block + "attn_v_b.weight"
    k_std = 1.0 / math.sqrt(g.kv_lora)  # not 1/sqrt(nope): k_b is kv_b's rows, transposed
    if kv_b != "split":
        tensors += [matrix(block + "attn_kv_b.weight", g.kv_lora, g.n_head * (g.nope + g.v))]
    if kv_b == "both":
        tensors += [matrix(k_name, g.nope, g.kv_lora * g.n_head, std=k_std)]
        tensors += [matrix(v_name, g.kv_lora, g.v * g.n_head)]
    elif kv_b == "split":
        tensors += [matrix(k_name, g.nope, g.kv_lora, g.n_head, std=k_std)]
        tensors += [matrix(v_name, g.kv_lora, g.v, g.n_head)]
    return [*tensors, matrix(block + "attn_output.weight", g.n_head * g.v, g.n_embd)]


def _dense(block: str, g: Geometry, matrix: Callable[..., Tensor]) -> list[Tensor]:
    return _feed_forward(block, "", (g.n_embd, g.n_ff), (), matrix)


def _experts(block: str, g: Geometry, matrix: Callable[..., Tensor]) -> list[Tensor]:
    router_std = 1.0 / math.sqrt(g.n_embd)
    router = [Tensor(block + "ffn_gate_inp.weight", (g.n_embd, g.n_exp), GGMLType.F32, router_std)]
    if g.gating == 2:
        router += [Tensor(block + "exp_probs_b.bias", (g.n_exp,), GGMLType.F32, std=0.01)]
    routed = _feed_forward(block, "_exps", (g.n_embd, g.n_ff_exp), (g.n_exp,), matrix)
    shared = _feed_forward(block, "_shexp", (g.n_embd, g.n_ff_exp * g.n_shared), (), matrix)
    return router + routed + shared


def _feed_forward(
    block: str,
    suffix: str,
    sizes: tuple[int, int],
    experts: tuple[int, ...],
    matrix: Callable[..., Tensor],
) -> list[Tensor]:
    n_embd, n_ff = sizes
    return [
        matrix(f"{block}ffn_gate{suffix}.weight", n_embd, n_ff, *experts),
        matrix(f"{block}ffn_up{suffix}.weight", n_embd, n_ff, *experts),
        matrix(f"{block}ffn_down{suffix}.weight", n_ff, n_embd, *experts),
    ]


def _values(tensor: Tensor, g: Geometry, seed: int) -> Any:
    """The tensor's data as `gguf` wants it written, in C order."""
    if tensor.constant is not None:
        return np.full(tensor.shape[::-1], tensor.constant, np.float32)
    part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
    if tensor.type not in FLOAT_TYPES or part not in ("attn_k_b", "attn_v_b"):
        return _random(tensor, seed)
    joint = Tensor(
        tensor.name.replace(part, "attn_kv_b"),
        (g.kv_lora, g.n_head * (g.nope + g.v)),
        tensor.type,
        1.0 / math.sqrt(g.kv_lora),
    )
    kv_b = _random(joint, seed).reshape(g.n_head, g.nope + g.v, g.kv_lora)
    w_uk = kv_b[:, : g.nope].transpose(0, 2, 1)  # (heads, kv_lora, nope)
    w_uv = kv_b[:, g.nope :]  # (heads, v, kv_lora)
    return np.ascontiguousarray((w_uk if part == "attn_k_b" else w_uv).reshape(tensor.shape[::-1]))


def _random(tensor: Tensor, seed: int) -> Any:
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    n = math.prod(tensor.shape)
    if tensor.type in FLOAT_TYPES:
        x = rng.standard_normal(n, dtype=np.float32) * tensor.std
        if tensor.type == GGMLType.F16:
            x = x.astype(np.float16)
        elif tensor.type == GGMLType.BF16:
            x = (x.view(np.uint32) >> 16).astype(np.uint16)
        return x.reshape(tensor.byte_shape)
    if tensor.type not in BLOCKS:
        raise SystemExit(f"type {tensor.type.name} is not among those that can be made at random")
    kind = BLOCKS[tensor.type]
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.type]
    codes = np.frombuffer(rng.bytes(n // block * (block_bytes - 2)), np.uint8)
    spread = 0.75 + 0.5 * rng.random((n // block, 1), dtype=np.float32)
    scales = tensor.std / kind.spread * spread
    blocks = np.insert(codes.reshape(-1, block_bytes - 2), [kind.scale_at] * 2, 0, axis=1)
    blocks[:, kind.scale_at : kind.scale_at + 2] = scales.astype(np.float16).view(np.uint8)
    if kind.centre:
        blocks[:, 2:4] = (kind.centre * scales).astype(np.float16).view(np.uint8)
    return blocks.reshape(tensor.byte_shape)


def _leave_hole(writer: Any, tensors: list[Tensor]) -> None:
    """Extend the file to the length it would have, without writing a byte of tensor data."""

    def padded(n: int) -> int:
        return -(-n // int(writer.data_alignment)) * int(writer.data_alignment)

    file = writer.fout[0]
    file.truncate(padded(file.tell()) + sum(padded(tensor.nbytes) for tensor in tensors))


def _parse_overrides(settings: list[str]) -> dict[str, float | bool]:
    """`key=value` settings, converted to the type of the `Geometry` field (bools: 0 or 1)."""
    converters: dict[str, Callable[[str], float | bool]] = {
        "int": lambda text: int(float(text)),
        "float": float,
        "bool": lambda text: text == "1",
    }
    types = {field.name: str(field.type) for field in fields(Geometry)}
    overrides = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        if key not in types:
            raise SystemExit(f"--set {setting}: no such key; keys are {' '.join(types)}")
        overrides[key] = converters[types[key]](text)
    return overrides


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("--preset", default="v2-lite", choices=PRESETS)
    parser.add_argument("--type", default="IQ4_NL")
    parser.add_argument("--kv-b", choices=["joint", "both", "split"], default="joint")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    size = make_model(
        options.out,
        preset=options.preset,
        type=options.type,
        kv_b=options.kv_b,
        seed=options.seed,
        overrides=_parse_overrides(options.set),
        sparse=options.sparse,
    )
    print(options.out, size / 2**20, "MiB sparse" if options.sparse else "MiB")


if __name__ == "__main__":
    main()
