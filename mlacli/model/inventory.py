"""Which tensors a model must have, and in which shapes (GGUF order: fastest dimension first)."""

from __future__ import annotations

import re

from mlacli.gguf.problem import model_error, printable
from mlacli.gguf.reader import GGUFFile
from mlacli.model.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]
_MUST_BE_F32 = re.compile(r".*(_norm\.weight|exp_probs_b\.bias)")
_SHOWN = 5


def check_tensors(file: GGUFFile, config: ModelConfig) -> list[str]:
    """Check that every tensor is there with its exact shape; return what was odd but harmless.

    Raises ModelError for a missing tensor, a wrong shape, or norms and biases that are not F32.
    """
    known: set[str] = set()
    known |= _check(file, model_shapes(config))
    for layer in range(config.n_layer):
        known |= _check(file, layer_shapes(config, layer))
        known |= _check_kv_b(file, config, layer)
        bias = f"blk.{layer}.exp_probs_b.bias"
        if bias in file.tensors and layer >= config.n_layer_dense:
            known |= _check(file, {bias: (config.n_expert,)})
    unused = [name for name in file.tensors if name not in known]
    for name in unused:
        if config.n_expert_shared == 0 and "_shexp." in name and _layer_of(name) < config.n_layer:
            raise model_error(file.path, name, "shared expert, but expert_shared_count is 0")
    return _notes(config, unused)


def model_shapes(config: ModelConfig) -> Shapes:
    """The tensors outside the layers."""
    shapes: Shapes = {
        "token_embd.weight": (config.n_embd, config.n_vocab),
        "output_norm.weight": (config.n_embd,),
    }
    if not config.tied_output:
        shapes["output.weight"] = (config.n_embd, config.n_vocab)
    return shapes


def layer_shapes(config: ModelConfig, layer: int) -> Shapes:
    """One layer's tensors, without those that depend on the flavour: kv_b, k_b and v_b."""
    n_embd, q_width = config.n_embd, config.n_head * config.head_dim
    shapes: Shapes = {
        "attn_norm.weight": (n_embd,),
        "attn_kv_a_mqa.weight": (n_embd, config.c_width),
        "attn_kv_a_norm.weight": (config.kv_lora_rank,),
        "attn_output.weight": (config.n_head * config.n_v, n_embd),
        "ffn_norm.weight": (n_embd,),
    }
    if config.q_lora_rank:
        shapes["attn_q_a.weight"] = (n_embd, config.q_lora_rank)
        shapes["attn_q_a_norm.weight"] = (config.q_lora_rank,)
        shapes["attn_q_b.weight"] = (config.q_lora_rank, q_width)
    else:
        shapes["attn_q.weight"] = (n_embd, q_width)
    if layer < config.n_layer_dense:
        shapes |= _feed_forward("", n_embd, config.n_ff)
    else:
        shapes["ffn_gate_inp.weight"] = (n_embd, config.n_expert)
        shapes |= _feed_forward("_exps", n_embd, config.n_ff_exp, config.n_expert)
        if config.n_expert_shared:
            shapes |= _feed_forward("_shexp", n_embd, config.n_ff_exp * config.n_expert_shared)
    return {f"blk.{layer}.{name}": shape for name, shape in shapes.items()}


def _feed_forward(suffix: str, n_embd: int, n_ff: int, *experts: int) -> Shapes:
    return {
        f"ffn_gate{suffix}.weight": (n_embd, n_ff, *experts),
        f"ffn_up{suffix}.weight": (n_embd, n_ff, *experts),
        f"ffn_down{suffix}.weight": (n_ff, n_embd, *experts),
    }


def _check(file: GGUFFile, shapes: Shapes) -> set[str]:
    """Check that these tensors exist with these shapes; return their names."""
    for name, shape in shapes.items():
        if name not in file.tensors:
            raise model_error(file.path, name, "the tensor is missing" + _fused_hint(file, name))
        tensor = file.tensors[name]
        if _without_ones(tensor.shape) != _without_ones(shape):
            raise model_error(file.path, name, "wrong shape", got=tensor.shape, limit=shape)
        if _MUST_BE_F32.fullmatch(name) and tensor.type_name != "F32":
            problem = "norms and biases must be F32"
            raise model_error(file.path, name, problem, got=tensor.type_name, limit="F32")
    return set(shapes)


def _fused_hint(file: GGUFFile, name: str) -> str:
    fused = re.sub(r"ffn_(gate|up)_exps", "ffn_gate_up_exps", name)
    if fused != name and fused in file.tensors:
        return ": the fused ffn_gate_up_exps is not supported"
    return ""


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Trailing dimensions of 1 mean nothing in GGUF."""
    n = len(shape)
    while n > 1 and shape[n - 1] == 1:
        n -= 1
    return shape[:n]


def _check_kv_b(file: GGUFFile, config: ModelConfig, layer: int) -> set[str]:
    """kv_b, or k_b and v_b, or all three; k_b and v_b may be 2-D (heads stacked) or 3-D."""
    heads, rank = config.n_head, config.kv_lora_rank
    kv_b, k_b, v_b = (f"blk.{layer}.attn_{part}_b.weight" for part in ("kv", "k", "v"))
    found: set[str] = set()
    if kv_b in file.tensors:
        found |= _check(file, {kv_b: (rank, heads * (config.n_nope + config.n_v))})
    for name, width, rows in ((k_b, config.n_nope, rank), (v_b, rank, config.n_v)):
        if name not in file.tensors:
            continue
        shape = _without_ones(file.tensors[name].shape)
        three_d, two_d = _without_ones((width, rows, heads)), (width, rows * heads)
        if shape not in (three_d, two_d):
            raise model_error(
                file.path, name, "wrong shape", got=shape, limit=f"{three_d} or {two_d}"
            )
        found.add(name)
    if kv_b not in found and found != {k_b, v_b}:
        problem = "the tensor is missing, and attn_k_b with attn_v_b as well"
        raise model_error(file.path, kv_b, problem)
    return found


def _layer_of(name: str) -> int:
    number = name.split(".")[1] if name.startswith("blk.") else ""
    return int(number) if number.isdecimal() else 0


def _notes(config: ModelConfig, unused: list[str]) -> list[str]:
    """One line about skipped prediction layers, one about tensors that nobody asked for."""
    notes = []
    mtp = [name for name in unused if _layer_of(name) >= config.n_layer]
    if mtp:
        layers = sorted({_layer_of(name) for name in mtp})
        notes.append(
            f"layers {layers[0]}..{layers[-1]} predict several tokens ahead (MTP): skipped"
        )
    extra = [name for name in unused if _layer_of(name) < config.n_layer]
    if extra:
        shown = ", ".join(printable(name, 64) for name in extra[:_SHOWN])
        more = ", ..." if len(extra) > _SHOWN else ""
        notes.append(f"{len(extra)} tensors are not used: {shown}{more}")
    return notes
