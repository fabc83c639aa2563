"""Engines for tests: one compiler and one pool for the whole run."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.jit import Jit
from codegen.pool import Pool
from mlacli.engine import Engine, Logits
from mlacli.loading import model_for
from mlacli.machine import make_jit
from mlacli.model.choose import MachineProfile
from mlacli.model.config import ModelConfig
from mlacli.settings import fitted
from tests import reference

# Makes -mla 3 expand from a few dozen tokens on, so that small tests reach both paths.
PROFILE = MachineProfile(1e9, 1e9, 1e10, 1e10)
MAX_THREADS = 5


@cache
def shared_jit() -> Jit:
    return make_jit()


@cache
def shared_pool() -> Pool:
    return Pool(shared_jit(), MAX_THREADS)


@cache
def oracle(path: Path) -> reference.ReferenceModel:
    """The f64 forward of a model; its weights are decoded once."""
    return reference.load(path)


def make_engine(
    path: Path,
    *,
    n_ctx: int = 256,
    n_out_max: int | None = None,
    jit: Jit | None = None,
    profile: MachineProfile = PROFILE,
    keep_experts: bool = False,
    **flags: Any,
) -> Engine:
    """An engine with settings by field name; all logits of a micro-batch can be asked for."""
    flags.setdefault("n_threads", 2)
    settings = fitted(model=path, n_ctx=n_ctx, **flags)
    model = model_for(settings)
    return Engine(
        model,
        settings,
        jit or shared_jit(),
        profile,
        n_ctx=n_ctx,
        n_out_max=n_out_max or settings.n_ubatch,
        pool=shared_pool(),
        keep=routing_names(model.config) if keep_experts else (),
    )


def routing_names(config: ModelConfig) -> tuple[str, ...]:
    """The nodes that hold what the routers chose."""
    return tuple(f"ffn_moe_topk-{i}" for i in range(config.n_layer_dense, config.n_layer))


def all_logits(engine: Engine, tokens: list[int]) -> Logits:
    """Logits of every token from an empty cache."""
    engine.cache.clear()
    return engine.eval(tokens, range(len(tokens)), wanted=range(len(tokens)))


def logits_and_experts(
    engine: Engine, tokens: list[int], positions: Sequence[int] | None = None
) -> tuple[Logits, list[NDArray[np.int64]]]:
    """The same, and the experts that each MoE layer chose, (n_tokens, n_expert_used).

    The engine must have been made with `routing_names` kept.
    """
    engine.cache.clear()
    positions = range(len(tokens)) if positions is None else positions
    n_ubatch, n_used = engine.plan.n_tokens_max, engine.plan.n_expert_used
    logits, experts = [], []
    for start in range(0, len(tokens), n_ubatch):
        part = tokens[start : start + n_ubatch]
        where, n = positions[start : start + n_ubatch], len(part)
        name = engine.graph_name(n)  # before the step: it may depend on what is cached
        logits.append(engine.step(part, where, [0] * n, range(n)).copy())
        graph, program = engine.plan.graphs[name].graph, engine.program(name)
        tables = [program.address(node) for node in graph.operations if node.op == "route"]
        words = ctypes.c_int32 * (n * n_used)
        experts.append([_copy(words.from_address(at), n) for at in tables])
    return np.concatenate(logits), [np.concatenate(e) for e in zip(*experts, strict=True)]


def _copy(words: Any, n_rows: int) -> NDArray[np.int64]:
    return np.array(words, np.int64).reshape(n_rows, -1)
