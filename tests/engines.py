"""Engines for tests: one compiler and one pool for the whole run."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from codegen.jit import Jit
from codegen.pool import Pool
from mlacli.engine import Engine, Logits, load_model
from mlacli.machine import make_jit
from mlacli.model.choose import MachineProfile
from mlacli.settings import fitted

# Makes -mla 3 expand from a few dozen tokens on, so that small tests reach both paths.
PROFILE = MachineProfile(attention_rate=1e9, expansion_rate=1e10)
MAX_THREADS = 5


@cache
def shared_jit() -> Jit:
    return make_jit()


@cache
def shared_pool() -> Pool:
    return Pool(shared_jit(), MAX_THREADS)


def make_engine(
    path: Path, *, n_ctx: int = 256, n_out_max: int | None = None, **flags: Any
) -> Engine:
    """An engine with settings by field name; all logits of a micro-batch can be asked for."""
    flags.setdefault("n_threads", 2)
    settings = fitted(model=path, n_ctx=n_ctx, **flags)
    return Engine(
        load_model(path),
        settings,
        shared_jit(),
        PROFILE,
        n_ctx=n_ctx,
        n_out_max=n_out_max or settings.n_ubatch,
        pool=shared_pool(),
    )


def all_logits(engine: Engine, tokens: list[int]) -> Logits:
    """Logits of every token from an empty cache."""
    engine.cache.clear()
    return engine.eval(tokens, range(len(tokens)), wanted=range(len(tokens)))
