"""Multiply-adds per token of each -mla mode, and from which batch size prompts are expanded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mlacli.model.choose import MachineProfile, PathChooser, chooser, multiply_adds
from mlacli.model.config import ModelConfig
from mlacli.model.inventory import layer_shapes
from mlacli.model.layers import Path
from mlacli.settings import RunSettings

_EQUAL_RATES = MachineProfile(1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class CostModel:
    """What -mla 3 goes by: this machine's profile, if it has been measured, and whether kv_b is
    multiplied in integers."""

    profile: MachineProfile | None
    integer: bool


@dataclass(frozen=True)
class ModeWork:
    """Multiply-adds per token of one -mla mode when the whole context is cached."""

    mla: int
    prompt_path: Path
    prompt_per_token: int
    generation_path: Path
    generation_per_token: int


@dataclass(frozen=True)
class Work:
    """`per_row` counts per query token, cached row and head, for batches of `n_batch` tokens.

    `weights_per_token` is the work of all matrices that a token meets, without the logits.
    """

    n_batch: int
    per_row: dict[Path, float]
    weights_per_token: int
    logits_per_token: int
    modes: tuple[ModeWork, ...]


@dataclass(frozen=True)
class Switching:
    """Batches of `crossover` tokens and more are expanded, and what says so.

    `source` is "one path" (-mla 0 and 1), "--mla-threshold", "default" (of -mla 2), "measured"
    (-mla 3, this machine's cost model), or "unmeasured": then the crossover is where the numbers of
    multiply-adds are equal, and the first run measures.
    """

    crossover: int | None
    source: str


def switching(config: ModelConfig, settings: RunSettings, cost: CostModel, mla: int) -> Switching:
    """From which batch size a mode expands, with the other settings as they are."""
    if mla in (0, 1):
        return Switching(None, "one path")
    asked = replace(settings, mla=mla, type_k="f16")  # a type that every mode can cache
    profile = cost.profile or _EQUAL_RATES
    at = chooser(asked, config, profile, integer=cost.integer).crossover
    if settings.mla_threshold is not None:
        return Switching(at, "--mla-threshold")
    if mla == 2:
        return Switching(at, "default")
    return Switching(at, "measured" if cost.profile else "unmeasured")


def work_of(config: ModelConfig, settings: RunSettings, model: CostModel, n_ctx: int) -> Work:
    """The work of every mode for micro-batches as large as -ub and the context allow."""
    n_batch = min(settings.n_ubatch, n_ctx)
    cost = multiply_adds(config)
    per_row: dict[Path, float] = {
        "standard": cost["standard"],
        "absorbed": cost["absorbed"],
        "expanded": cost["standard"] + cost["expansion"] / n_batch,
    }
    weights = weight_multiply_adds(config)
    heads = config.n_layer * config.n_head

    def per_token(path: Path) -> int:
        # the expanded path's use of kv_b is part of its work per cached row
        kv_b = heads * cost["expansion"] if path == "expanded" else 0
        return weights - kv_b + round(heads * n_ctx * per_row[path])

    modes = []
    for mla in range(4):
        switch = switching(config, settings, model, mla)
        prompt = PathChooser(mla, switch.crossover or 0).path(n_batch, n_ctx)
        generation = PathChooser(mla, n_batch + 1).path(1, n_ctx)
        modes.append(ModeWork(mla, prompt, per_token(prompt), generation, per_token(generation)))
    return Work(n_batch, per_row, weights, config.n_embd * config.n_vocab, tuple(modes))


def weight_multiply_adds(config: ModelConfig) -> int:
    """Of all matrices that one token meets in all layers: of the experts only those used, k_b and
    v_b (or kv_b) once, no logits."""
    c = config
    total = c.n_layer * c.n_head * multiply_adds(c)["expansion"]
    for layer in range(c.n_layer):
        for shape in layer_shapes(c, layer).values():
            n_experts = c.n_expert_used if len(shape) > 2 else 1
            total += n_experts * math.prod(shape[:2]) if len(shape) > 1 else 0
    return total
