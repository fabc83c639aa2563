"""Goldens from HF transformers in float64, and the check of tests/reference.py against it.

Needs the extra `oracle` (torch, transformers, safetensors); the tests read only the .npz files:

    python -m scripts.make_golden convert HF_DIR TOKENIZER.gguf OUT.gguf [--joint]
    python -m scripts.make_golden golden HF_DIR TEXT OUT.npz [--weights MODEL.gguf]
    python -m scripts.make_golden check MODEL.gguf GOLDEN.npz
    python -m scripts.make_golden compare MODEL.gguf

`convert` writes the checkpoint as an F32 GGUF, `golden` stores HF's logits (of the checkpoint, or
of a GGUF's dequantised weights), `check` holds the reference against them, and `compare` against
HF itself on random tokens.

HF computes norms, router, softmax and RoPE in float32 whatever the model's type; `forward` lifts
that, so that the formulas are compared and not the rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from scripts.hf_gguf import from_gguf, hf_config, write_gguf
from tests.reference import load, nmse
from tests.reference_file import SIGMOID, as_float64

Float64s = NDArray[np.float64]

# The rows kept of the logits of each prompt, by its length; 700 is past the demo model's original
# context of 512. Every row of 4096 logits costs 16 KB.
ROWS = {1: [0], 33: [16, 32], 700: [255, 511, 512, 640, 699]}
LIMIT = 1e-12  # NMSE of the reference against HF


def read_tensors(path: Path) -> dict[str, Float64s]:
    """All tensors of a GGUF, dequantised."""
    reader = gguf.GGUFReader(path)
    return {str(t.name): as_float64(t.data, t.tensor_type) for t in reader.tensors}


def checkpoint_model(folder: Path) -> Any:
    """HF's model of a checkpoint folder, in float64."""
    import torch  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoModelForCausalLM  # type: ignore[import-not-found, unused-ignore]

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def gguf_model(path: Path) -> Any:
    """HF's model for a GGUF's metadata and weights: V3 with a sigmoid gate, else V2."""
    import torch
    from transformers import (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
    )

    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    sigmoid = fields["deepseek2.expert_gating_func"] == SIGMOID
    config_type = DeepseekV3Config if sigmoid else DeepseekV2Config
    model_type = DeepseekV3ForCausalLM if sigmoid else DeepseekV2ForCausalLM
    config = config_type(**hf_config(fields))
    config._attn_implementation = config._experts_implementation = "eager"
    model = model_type(config).to(torch.float64)
    set_weights(model, path)
    return model.eval()


def set_weights(model: Any, path: Path) -> None:
    """Replace every parameter of HF's `model` by the dequantised tensors of a GGUF."""
    import torch

    tensors = read_tensors(path)
    places = dict(model.named_parameters())
    places.update((n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    with torch.no_grad():
        for name, place in places.items():
            values = from_gguf(name, tensors, model.config.num_attention_heads)
            place.copy_(torch.from_numpy(np.array(values)).reshape(place.shape))


def forward(model: Any, tokens: Sequence[int], rows: Sequence[int]) -> Float64s:
    """(n_rows, n_vocab) logits of HF's `model`, with its float32 parts done in float64."""
    import torch
    from torch.overrides import TorchFunctionMode  # type: ignore[import-not-found, unused-ignore]

    def widened(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    class InFloat64(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.Tensor.float:
                func = torch.Tensor.double
            named = {key: widened(value) for key, value in (kwargs or {}).items()}
            return func(*(widened(value) for value in args), **named)

    with torch.no_grad(), InFloat64():
        # Made anew, because its frequencies were rounded to float32 when the model was made.
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        logits = model(torch.tensor([tokens]), use_cache=False, logits_to_keep=torch.tensor(rows))
    values: Float64s = logits.logits[0].numpy()
    return values


def convert(args: argparse.Namespace) -> None:
    from safetensors.numpy import load_file  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoConfig

    tensors: dict[str, NDArray[Any]] = {}
    for shard in sorted(args.folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    config = AutoConfig.from_pretrained(args.folder)
    write_gguf(args.out, config, tensors, args.tokenizer, args.joint)


def golden(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    text = tokenizer.encode(args.text.read_text(encoding="utf-8"), add_special_tokens=False)
    model = checkpoint_model(args.folder)
    if args.weights is not None:
        set_weights(model, args.weights)
    arrays: dict[str, NDArray[Any]] = {}
    for length, rows in ROWS.items():
        tokens = [tokenizer.bos_token_id, *text[: length - 1]]
        arrays[f"tokens_{length}"] = np.array(tokens, dtype=np.int32)
        arrays[f"rows_{length}"] = np.array(rows, dtype=np.int32)
        # float32 is 1e-15 in NMSE: far below any limit that the logits are used with.
        arrays[f"logits_{length}"] = forward(model, tokens, rows).astype(np.float32)
    np.savez_compressed(args.out, allow_pickle=False, **arrays)
    print(f"{args.out}: {args.out.stat().st_size} bytes")


def check(args: argparse.Namespace) -> None:
    stored, model = np.load(args.golden), load(args.model)
    for length in ROWS:
        rows = stored[f"rows_{length}"].tolist()
        logits = model.forward(stored[f"tokens_{length}"].tolist(), rows=rows)
        report(f"{length} tokens", nmse(logits, stored[f"logits_{length}"]))


def compare(args: argparse.Namespace) -> None:
    reference, hf = load(args.model), gguf_model(args.model)
    generator = np.random.default_rng(0)
    for length in (1, 33, args.length):
        tokens = generator.integers(0, hf.config.vocab_size, length).tolist()
        rows = sorted({0, length // 2, length - 1})
        expected = forward(hf, tokens, rows)
        report(f"{length} tokens", nmse(reference.forward(tokens, rows=rows), expected))


def report(name: str, error: float) -> None:
    print(f"{name}: NMSE {error:.2e} (limit {LIMIT:.0e})")
    if not error <= LIMIT:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("convert", help="write an F32 GGUF of an HF checkpoint")
    for name in ("folder", "tokenizer", "out"):
        sub.add_argument(name, type=Path)
    sub.add_argument("--joint", action="store_true", help="one attn_kv_b, not k_b and v_b")
    sub.set_defaults(run=convert)
    sub = commands.add_parser("golden", help="store HF's logits")
    for name in ("folder", "text", "out"):
        sub.add_argument(name, type=Path)
    sub.add_argument("--weights", type=Path, help="GGUF whose dequantised weights are used")
    sub.set_defaults(run=golden)
    sub = commands.add_parser("check", help="reference.py against stored logits")
    for name in ("model", "golden"):
        sub.add_argument(name, type=Path)
    sub.set_defaults(run=check)
    sub = commands.add_parser("compare", help="reference.py against HF, random tokens")
    sub.add_argument("model", type=Path)
    sub.add_argument("--length", type=int, default=700, help="tokens of the longest prompt")
    sub.set_defaults(run=compare)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
