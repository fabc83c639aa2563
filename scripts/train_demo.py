"""Train the demo model of mlacli/data from nothing, in about an hour on two cores.

    python -m scripts.train_demo --out FOLDER [--minutes 70] [--batch 12] [--threads N] [--seed 0]

A DeepSeek-V3-shaped model (MLA, sigmoid-gated experts balanced by a bias, YaRN) learns the
standard library's sources and answers made of its docstrings. FOLDER gets a Hugging Face
checkpoint with its tokenizer, heldout.txt (sources kept out of training) and tokenizer.gguf (the
vocabulary, for the conversion to GGUF). Needs the extra `train`. The learning rate follows the
clock, so no two runs are equal to the bit. docs/demo-model.md describes the result.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedTokenizerFast,
)

from scripts import demo_text
from scripts.demo_text import DemoText
from scripts.demo_tokenizer import (
    ASSISTANT,
    BEGIN,
    CHAT_TEMPLATE,
    END,
    PAD,
    USER,
    special_ids,
    train_tokenizer,
    write_vocabulary,
)

Tokens = NDArray[np.int32]

WINDOW = 512  # tokens; also YaRN's original context
QUESTION_SHARE = 0.45  # of the windows; the others are code
# There is far more code than answers: counted more often, the answers' words become tokens too.
SUMMARY_WEIGHT = 3

PEAK_LEARNING_RATE, LAST_LEARNING_RATE = 2.5e-3, 1e-5
WARM_UP_STEPS = 100
CONSTANT_SHARE = 0.3  # of the time; then the learning rate falls to zero in a straight line
WEIGHT_DECAY = 0.05  # of matrices; norms have none
BETAS = (0.9, 0.95)
LARGEST_GRADIENT = 1.0
BALANCE_STEP = 0.002  # DeepSeek-V3 paper, 2.1.2: added to or taken from an expert's bias
LOSS_MEMORY = 0.97  # of the running mean that is printed

REPORT_EVERY, SAVE_EVERY = 50, 400  # steps
SHARD_SIZE = "20MB"
CHUNKS = 80  # of WINDOW tokens, for perplexity
PROMPTS = (
    *("What does json.dumps do?", "Explain shutil.copyfile."),
    *("What is math.sqrt?", "What is a banana?"),
)


def model_config(tokenizer: Tokenizer) -> Any:
    """DeepSeek-V3's shape at 1/50,000 of its size: one dense layer, then five with experts."""
    ids = special_ids(tokenizer)
    yarn = {
        **{"type": "yarn", "rope_type": "yarn", "factor": 4.0},
        **{"original_max_position_embeddings": WINDOW, "beta_fast": 32, "beta_slow": 1},
        **{"mscale": 1.0, "mscale_all_dim": 1.0},
    }
    return DeepseekV3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        intermediate_size=768,
        first_k_dense_replace=1,
        moe_intermediate_size=256,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        max_position_embeddings=4 * WINDOW,
        rope_theta=10000.0,
        rope_scaling=yarn,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        num_nextn_predict_layers=0,
        bos_token_id=ids[BEGIN],
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
    )


def code_tokens(tokenizer: Tokenizer, sources: Sequence[str]) -> Tokens:
    """All files in a row, each between BEGIN and END."""
    ids = special_ids(tokenizer)
    tokens = list[int]()
    for source in sources:
        tokens += [ids[BEGIN], *tokenizer.encode(source).ids, ids[END]]
    return np.array(tokens, dtype=np.int32)


def question_tokens(tokenizer: Tokenizer, text: DemoText, chance: random.Random) -> Tokens:
    """A question and its answer for every entry, shuffled, as the chat template writes them."""
    ids = special_ids(tokenizer)
    entries = list(text.entries)
    chance.shuffle(entries)
    tokens = list[int]()
    for entry in entries:
        asked = tokenizer.encode(demo_text.question(entry.name, chance)).ids
        answer = tokenizer.encode(entry.summary).ids
        tokens += [ids[BEGIN], ids[USER], *asked, ids[ASSISTANT], *answer, ids[END]]
    return np.array(tokens, dtype=np.int32)


def batches(
    tokenizer: Tokenizer, code: Tokens, text: DemoText, size: int, seed: int
) -> Iterator[Tokens]:
    """Endless (size, WINDOW + 1) tokens: windows anywhere in the code, and questions in turn."""
    chance = random.Random(seed)
    questions, position = question_tokens(tokenizer, text, chance), 0
    while True:
        rows = []
        for _ in range(size):
            if chance.random() < QUESTION_SHARE:
                if position + WINDOW + 1 > len(questions):
                    questions, position = question_tokens(tokenizer, text, chance), 0
                rows.append(questions[position : position + WINDOW + 1])
                position += WINDOW
            else:
                start = chance.randrange(len(code) - WINDOW - 1)
                rows.append(code[start : start + WINDOW + 1])
        yield np.stack(rows)


def learning_rate(step: int, progress: float) -> float:
    """For step 0, 1, ... when `progress` (0 to 1) of the time has passed."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    fall = min(1.0, (1 - progress) / (1 - CONSTANT_SHARE))
    return max(PEAK_LEARNING_RATE * warm_up * fall, LAST_LEARNING_RATE)


def make_optimizer(model: Any) -> Any:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=BETAS)


def watch_experts(model: Any) -> dict[Any, Any]:
    """Gate -> (experts,) tokens that each expert got in the last forward pass."""
    loads = dict[Any, Any]()

    def count(gate: Any, inputs: Any, outputs: Any) -> None:
        chosen = next(part for part in outputs if not part.is_floating_point())
        loads[gate] = torch.bincount(
            chosen.reshape(-1), minlength=len(gate.e_score_correction_bias)
        ).float()

    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        layer.mlp.gate.register_forward_hook(count)
    return loads


def balance_experts(loads: dict[Any, Any]) -> None:
    """Make experts that got more than the mean less likely to be chosen, and the others more."""
    with torch.no_grad():
        for gate, load in loads.items():
            gate.e_score_correction_bias += BALANCE_STEP * torch.sign(load.mean() - load)


def train_step(model: Any, optimizer: Any, tokens: Tokens) -> float:
    """The loss of one batch, bf16 forward and f32 weights, before its update."""
    rows = torch.tensor(tokens, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    flat = logits.float().reshape(-1, logits.shape[-1])
    loss = torch.nn.functional.cross_entropy(flat, rows[:, 1:].reshape(-1))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
    optimizer.step()
    return float(loss.detach())


def train(model: Any, rows: Iterator[Tokens], minutes: float, out: Path) -> None:
    """Train for `minutes`, printing the loss and saving now and then."""
    optimizer, loads = make_optimizer(model), watch_experts(model)
    started, n_tokens, mean_loss, line = time.monotonic(), 0, math.nan, ""
    model.train()
    for step, tokens in enumerate(rows):
        progress = (time.monotonic() - started) / 60 / minutes
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        loss = train_step(model, optimizer, tokens)
        balance_experts(loads)
        mean_loss = loss if step == 0 else LOSS_MEMORY * mean_loss + (1 - LOSS_MEMORY) * loss
        n_tokens += tokens.shape[0] * WINDOW
        line = f"{step + 1} steps, {time.monotonic() - started:.0f} s, "
        line += f"{n_tokens / 1e6:.2f} M tokens, loss {mean_loss:.3f}, {load_range(loads)}"
        if (step + 1) % REPORT_EVERY == 0:
            print(line, flush=True)
        if (step + 1) % SAVE_EVERY == 0:
            save_model(model, out)
    print(f"Trained: {line}", flush=True)


def load_range(loads: dict[Any, Any]) -> str:
    """How far from the mean the tokens of single experts are."""
    relative = torch.cat([load / load.mean() for load in loads.values()])
    return f"expert loads {float(relative.min()):.2f} to {float(relative.max()):.2f} of the mean"


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=8 * WINDOW,
    )
    wrapped.save_pretrained(out)
    write_vocabulary(out / "tokenizer.gguf", tokenizer)


def save_model(model: Any, out: Path) -> None:
    """Safetensors shards and config.json, with the gate's kind as DeepSeek's own files name it.

    transformers leaves it out, and converters then take the gate for a softmax.
    """
    model.save_pretrained(out, max_shard_size=SHARD_SIZE)
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def perplexity(model: Any, tokens: Sequence[int]) -> tuple[float, float, int]:
    """(perplexity, standard error, chunks) by the method of docs/demo-model.md."""
    losses = []
    chunks = torch.tensor(tokens[: len(tokens) // WINDOW * WINDOW]).reshape(-1, WINDOW)[:CHUNKS]
    first = WINDOW // 2
    with torch.no_grad():
        for chunk in chunks:
            logits = model(input_ids=chunk[None], use_cache=False).logits[0, first:-1]
            target = chunk[first + 1 :]
            losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    scored = torch.cat(losses).double()
    result = math.exp(float(scored.mean()))
    return result, result * float(scored.std()) / math.sqrt(len(scored)), len(chunks)


def evaluate(out: Path) -> None:
    """Read back what was saved: held-out perplexity and a few answers."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    held_out = (out / "heldout.txt").read_text(encoding="utf-8")
    tokens = tokenizer.encode(held_out, add_special_tokens=False, verbose=False)
    value, error, chunks = perplexity(model, tokens)
    print(f"Held-out perplexity over {chunks} chunks of {WINDOW}: {value:.4f} +/- {error:.4f}")
    for prompt in PROMPTS:
        message = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answered = model.generate(**asked, max_new_tokens=60, do_sample=False)
        new = answered[0, asked["input_ids"].shape[1] :]
        print(f"{prompt} -> {tokenizer.decode(new, skip_special_tokens=True)!r}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--minutes", type=float, default=70.0, help="time to train")
    parser.add_argument("--batch", type=int, default=12, help=f"windows of {WINDOW} tokens a step")
    parser.add_argument("--threads", type=int, help="default: torch's choice, all cores")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not given.minutes > 0:
        parser.error(f"--minutes {given.minutes}: must be above 0")
    if given.batch < 1:
        parser.error(f"--batch {given.batch}: must be at least 1")
    if given.threads is not None and given.threads < 1:
        parser.error(f"--threads {given.threads}: must be at least 1")
    if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        parser.error(f"--out {given.out}: is not an empty folder")
    return given


def main() -> None:
    given = parse_arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)

    text = demo_text.collect(demo_text.standard_library())
    print(
        f"{len(text.sources)} sources, {len(text.held_out)} held out, {len(text.entries)} entries"
    )
    held_out = "\n".join(text.held_out)
    (given.out / "heldout.txt").write_text(held_out, encoding="utf-8", newline="\n")
    summaries = [entry.summary for entry in text.entries]
    tokenizer = train_tokenizer([*text.sources, *summaries * SUMMARY_WEIGHT])
    save_tokenizer(tokenizer, given.out)
    model = DeepseekV3ForCausalLM(model_config(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    code = code_tokens(tokenizer, text.sources)
    rows = batches(tokenizer, code, text, given.batch, given.seed)
    train(model, rows, given.minutes, given.out)
    save_model(model, given.out)
    evaluate(given.out)
    vocabulary, converted = given.out / "tokenizer.gguf", given.out / "demo-F32.gguf"
    print("As GGUF (F32; llama.cpp's llama-quantize makes smaller types of it):")
    print(f"  python -m scripts.make_golden convert {given.out} {vocabulary} {converted}")


if __name__ == "__main__":
    main()
