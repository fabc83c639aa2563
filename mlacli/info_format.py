"""A file's facts as text and JSON: pure functions. What the file says is escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from mlacli.gguf.metadata import Metadata
from mlacli.gguf.problem import printable
from mlacli.info import ModelInfo, TokenizerFacts
from mlacli.model.config import ModelConfig
from mlacli.units import count_text, size_text

_LABEL = 15
_LINE = 400  # longest text of a file that is shown
_VALUE = 40  # llama.cpp cuts values there
_HEAD = 16  # elements of an array that are read
_CACHES = ("f16", "q8_0", "q8_KV", "q6_0")


def info_text(info: ModelInfo) -> str:
    """A line for each kind of fact. Text of the file is escaped."""
    file, t = info.file, info.tokenizer
    parts = f" in {len(file.files)} files" if len(file.files) > 1 else ""
    types = ", ".join(f"{n} {c} ({size_text(b)})" for n, (c, b) in info.tensor_types.items())
    lines = [
        ("model", printable(info.name, _LINE)),
        ("file", f"{printable(str(file.path), _LINE)}, {size_text(file.size_bytes)}{parts}"),
        (
            "architecture",
            f"{printable(info.arch, 64)}, {count_text(info.n_params)} parameters, "
            f"{len(file.tensors)} tensors, {len(file.metadata)} keys",
        ),
        ("quantisation", f"{_mixture(info)}{info.bits_per_weight:.2f} bits per weight: {types}"),
        *(_config_lines(info, info.config) if info.config else ()),
        ("tokenizer", _tokenizer_text(t)),
        ("chat template", f"{t.chat_template_chars} characters" if t.chat_template_chars else "no"),
        *(("note", line) for line in info.notes),
    ]
    if info.problem:
        lines.append(("cannot be run", info.problem))
    return "".join(f"{label:<{_LABEL}}{text}\n" for label, text in lines)


def _mixture(info: ModelInfo) -> str:
    return f"{info.config.file_type}, " if info.config else ""


def _tokenizer_text(t: TokenizerFacts) -> str:
    names = ", ".join(printable(name, 40) for name in (t.model, t.pre) if name) or "none"
    added = " (put in front)" if t.add_bos else ""
    bos = f", BOS {t.bos}{added}" if t.bos is not None else ""
    eos = f", EOS {t.eos}" if t.eos is not None else ""
    return f"{names}: {t.n_tokens} tokens{bos}{eos}"


def _config_lines(info: ModelInfo, c: ModelConfig) -> Iterable[tuple[str, str]]:
    dense, moe = c.n_layer_dense, c.n_layer - c.n_layer_dense
    layers = [f"{dense} dense ({c.n_ff} wide)"] * bool(dense) + [f"{moe} with experts"] * bool(moe)
    yield "layers", f"{c.n_layer}: {', '.join(layers)}"
    if moe:
        groups = f", {c.n_group_used} of {c.n_group} groups" if c.n_group > 1 else ""
        norm = "normalised, " if c.expert_weights_norm else ""
        yield (
            "experts",
            f"{c.n_expert}, {c.n_expert_used} used{groups}, {c.n_expert_shared} shared, "
            f"{c.n_ff_exp} wide; {c.gating}, weights {norm}x {c.expert_weights_scale:g}",
        )
    tied = "the output matrix, too" if c.tied_output else "the output matrix is another"
    yield "embedding", f"{c.n_embd} wide, {c.n_vocab} rows; {tied}"
    q_lora = f"q_lora {c.q_lora_rank}" if c.q_lora_rank else "no q_lora"
    yield (
        "attention",
        f"{c.n_head} heads: nope {c.n_nope}, rope {c.n_rope}, v {c.n_v}; "
        f"kv_lora {c.kv_lora_rank}, {q_lora}",
    )
    yield "", f"the file has {', '.join(info.attention)}"
    yield "positions", _positions(c)
    shown = [n for n in _CACHES if n in info.bytes_per_token]
    sizes = ", ".join(f"{n} {info.bytes_per_token[n] / 1024:.2f} KiB" for n in shown)
    yield "KV per token", f"{sizes}; -mla 0: f16 {info.plain_bytes_per_token / 1024:.2f} KiB"


def _positions(c: ModelConfig) -> str:
    text = f"{c.n_ctx_train} trained; RoPE base {c.rope_freq_base:g}"
    if c.yarn is None:
        return text
    kind = "YaRN" if c.yarn.ext_factor else "linear"
    more = f", log multiplier {c.yarn.log_multiplier:g}" if c.yarn.log_multiplier else ""
    return f"{text}, {kind} factor {c.yarn.factor:g} over {c.yarn.original_context}{more}"


def kv_lines(metadata: Metadata) -> Iterator[str]:
    """All keys as llama.cpp's loader lists them, values cut after 40 characters."""
    for i, key in enumerate(metadata):
        kind, value = _type(metadata, key), _shown(metadata, key)
        if len(value) > _VALUE:
            value = value[: _VALUE - 3] + "..."
        name, value = printable(key, _LINE), printable(value.replace("\n", "\\n"), _LINE)
        yield f"llama_model_loader: - kv {i:3}: {name:>42} {kind:<16} = {value}"


def _type(metadata: Metadata, key: str) -> str:
    name = metadata.type_name(key).removeprefix("array of ").replace("string", "str")
    return f"arr[{name},{metadata.count(key)}]" if metadata.is_array(key) else name


def _shown(metadata: Metadata, key: str) -> str:
    if not metadata.is_array(key):
        return _one(metadata[key])
    found = metadata.head(key, _HEAD)
    texts = (f'"{_quoted(x)}"' if isinstance(x, str) else _one(x) for x in found)
    more = ", ..." if metadata.count(key) > len(found) else ""
    return f"[{', '.join(texts)}{more}]"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _one(value: object) -> str:
    """As C++ prints it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def tensor_table(info: ModelInfo) -> str:
    """All tensors in the order of the file: type, shape (fastest dimension first), bytes."""
    import tabulate

    lines = [
        (i, printable(t.name, 80), t.type_name, " x ".join(map(str, t.shape)), t.nbytes)
        for i, t in enumerate(info.file.tensors.values())
    ]
    heads = ("", "tensor", "type", "shape", "bytes")
    align = ("right", "left", "left", "right", "right")
    text = tabulate.tabulate(lines, heads, "simple", colalign=align, disable_numparse=True)
    return text + "\n"


def info_json(info: ModelInfo, *, kv: bool, tensors: bool) -> str:
    """Everything as JSON; of arrays in the metadata the first elements and their number."""
    file = info.file
    found = {
        "file": str(file.path),
        "file_bytes": file.size_bytes,
        "n_files": len(file.files),
        "arch": info.arch,
        "name": info.name,
        "n_params": info.n_params,
        "n_tensors": len(file.tensors),
        "n_kv": len(file.metadata),
        "bits_per_weight": info.bits_per_weight,
        "tensor_types": {n: {"count": c, "nbytes": b} for n, (c, b) in info.tensor_types.items()},
        "tokenizer": asdict(info.tokenizer),
        "attention": info.attention,
        "config": asdict(info.config) if info.config else None,
        "kv_bytes_per_token": info.bytes_per_token,
        "kv_bytes_per_token_mla_0": info.plain_bytes_per_token,
        "problem": info.problem,
        "notes": info.notes,
    }
    if kv:
        found["kv"] = {key: _json_value(file.metadata, key) for key in file.metadata}
    if tensors:
        found["tensors"] = [
            {"name": t.name, "type": t.type_name, "shape": t.shape, "nbytes": t.nbytes}
            for t in file.tensors.values()
        ]
    return json.dumps(found, indent=2) + "\n"


def _json_value(metadata: Metadata, key: str) -> dict[str, Any]:
    kind = {"type": metadata.type_name(key)}
    if metadata.is_array(key):
        head = [_finite(value) for value in metadata.head(key, _HEAD)]
        return {**kind, "count": metadata.count(key), "head": head}
    return {**kind, "value": _finite(metadata[key])}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: their names."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
