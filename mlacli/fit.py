"""Which context fits into this machine's memory, answered before any of it is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from codegen.formats import CACHE_FORMATS
from mlacli.context import ContextPlan, cache_layout, padded_context
from mlacli.errors import SpaceError, UsageError
from mlacli.free_memory import available_bytes as free_bytes
from mlacli.model.config import ModelConfig
from mlacli.settings import RunSettings
from mlacli.units import GIB, MIB, size_text

__all__ = [
    "GIB",
    "Need",
    "check_cache_rows",
    "check_plan",
    "context_size",
    "default_context",
    "least_need",
    "planned_memory",
    "planned_need",
    "size_text",
    "wanted_context",
]

DEFAULT_CONTEXT = 4096
CONTEXT_STEP = 256


@dataclass(frozen=True)
class Need:
    """Bytes of anonymous memory. Mapped weights are not among them: they can be paged."""

    cache: int
    compute: int
    output: int
    derived: int = 0

    @property
    def total(self) -> int:
        return self.cache + self.compute + self.output + self.derived

    def check(self, n_ctx: int, available: int) -> None:
        """Raise SpaceError when there is less than that."""
        if self.total > available:
            raise SpaceError(
                f"-c {n_ctx}: needs {size_text(self.cache)} for the cache and "
                f"{size_text(self.total - self.cache)} for buffers, "
                f"{size_text(available)} available"
            )


def context_size(
    config: ModelConfig,
    settings: RunSettings,
    available_bytes: int | None = None,
    note: Callable[[str], None] | None = None,
) -> int:
    """Tokens of context: -c as asked (0: all that was trained), or what fits, at most 4096.

    Takes no memory. Says through `note` when the model was trained on less, or less fits. Raises
    SpaceError when the context cannot fit, UsageError when the cache type cannot hold a row.
    """
    available = free_bytes() if available_bytes is None else available_bytes
    n_ctx = wanted_context(config, settings, available, note or (lambda line: None))
    least_need(config, settings, n_ctx).check(n_ctx, available)
    return n_ctx


def wanted_context(
    config: ModelConfig, settings: RunSettings, available: int, note: Callable[[str], None]
) -> int:
    """As `context_size`, but what is asked for need not fit."""
    check_cache_rows(config, settings)
    if settings.n_ctx is None:
        n_ctx = default_context(config, settings, available)
        most = min(config.n_ctx_train, DEFAULT_CONTEXT)
        if n_ctx < most:
            note(f"note: the context is {n_ctx} tokens: memory for {most} is not available")
        return n_ctx
    n_ctx = settings.n_ctx or config.n_ctx_train
    if n_ctx > config.n_ctx_train:
        note(f"note: -c {n_ctx}: the model was trained on {config.n_ctx_train} tokens")
    return n_ctx


def default_context(config: ModelConfig, settings: RunSettings, available: int) -> int:
    """The longest context that fits, at most what was trained and 4096; a step if none does.

    With -fit off the most, whether it fits or not.
    """
    n_ctx = min(config.n_ctx_train, DEFAULT_CONTEXT)
    if not settings.fit:
        return n_ctx
    while n_ctx > CONTEXT_STEP and least_need(config, settings, n_ctx).total > available:
        n_ctx = (n_ctx - 1) // CONTEXT_STEP * CONTEXT_STEP
    return n_ctx


def least_need(config: ModelConfig, settings: RunSettings, n_ctx: int) -> Need:
    """What a context takes at least, without a plan: cache, logits and K*Q."""
    n_ctx = padded_context(n_ctx, flash=settings.flash_attn)
    layout = cache_layout(config, settings, n_ctx)
    compute = 0 if settings.flash_attn else _kq_bytes(config, settings, n_ctx)
    return Need(sum(layout.nbytes().values()), compute, 4 * config.n_vocab)


def _kq_bytes(config: ModelConfig, settings: RunSettings, n_ctx: int) -> int:
    """The f32 scores of one slice of heads: as many heads as -amb allows, at least one."""
    per_head = 4 * min(settings.n_ubatch, n_ctx) * n_ctx
    heads = settings.amb_mib * MIB // per_head if settings.amb_mib else config.n_head
    return per_head * max(1, min(heads, config.n_head))


def planned_need(plan: ContextPlan) -> Need:
    """What a planned context takes, exactly."""
    derived = sum(matrix.nbytes for matrix in plan.derived())
    return Need(plan.cache_bytes, plan.arena_bytes, plan.output_bytes, derived)


def planned_memory(plan: ContextPlan, settings: RunSettings, file_bytes: int) -> tuple[int, int]:
    """(bytes that must be had, bytes of weights besides, which can be paged) of a planned context.

    With --no-mmap or --mlock the weights must be had, too; what -rtr copies is read once.
    """
    needed, weights = planned_need(plan).total, file_bytes
    if settings.mmap:
        weights -= sum(matrix.nbytes for matrix in plan.derived() if matrix.is_copy)
    if settings.mlock or not settings.mmap:
        return needed + weights, 0
    return needed, weights


def check_plan(plan: ContextPlan, available_bytes: int | None = None) -> None:
    """Raise SpaceError when what a plan takes is not to be had: to be asked before it is taken."""
    available = free_bytes() if available_bytes is None else available_bytes
    planned_need(plan).check(plan.n_ctx, available)


def check_cache_rows(config: ModelConfig, settings: RunSettings) -> None:
    """Raise UsageError for a cache type whose blocks do not divide this model's rows."""
    rows = [("-ctk", settings.type_k, config.c_width)]
    if settings.mla == 0:
        rows = [("-ctk", settings.type_k, config.head_dim), ("-ctv", settings.type_v, config.n_v)]
    for flag, name, width in rows:
        size = CACHE_FORMATS[name].size
        if width % size:
            raise UsageError(f"{flag}: {name} has blocks of {size}, a cached row {width} values")
