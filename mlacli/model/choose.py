"""Which attention path a batch takes: settings -> options, and the cost model of -mla 3.

Per batch of n tokens over m cached rows, in multiply-adds per layer:

    absorbed  n m H (2 R + rope)        at the rate of the absorbed inner loop
              + n H R (nope + v)        at the matrix rate: q into the latent space, results out
    expanded  n m H (nope + rope + v)   at the rate of the expanded inner loop
              + m H R (nope + v)        at the matrix rate: every row becomes K and V

so expanding pays when a batch is large enough, however long the cache is, and always at its start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from codegen.formats import CACHE_FORMATS
from mlacli.model.config import ModelConfig
from mlacli.model.layers import Options, Path
from mlacli.settings import RunSettings

CHUNK_MIB = 32
DEFAULT_THRESHOLD = 128  # tokens; of -mla 2
FEW_TOKENS = 2  # more than this meet weights as a batch: streaming rows once per token costs more
MIB = 2**20
NEVER = 2**31 - 1


@dataclass(frozen=True)
class MachineProfile:
    """Multiply-adds per second of this machine: the two inner loops, and the kv_b expansion with
    integer and with float weights."""

    absorbed_rate: float
    expanded_rate: float
    expansion_rate_int8: float
    expansion_rate_f32: float


@dataclass(frozen=True)
class PathChooser:
    """Picks the path of a batch from its size and the number of cached rows it attends to.

    The expanded path costs `per_pair` seconds less per (token, row) and layer; turning a row into
    K and V, or a token's q and result into and out of the latent space, costs `per_row` each.
    """

    mla: int
    threshold: int | None = None  # fixed batch size: --mla-threshold, or that of -mla 2
    per_pair: float = 0.0
    per_row: float = 0.0

    def path(self, n_tokens: int, n_kv: int) -> Path:
        if self.mla == 0:
            return "standard"
        if self.mla == 1:
            return "absorbed"
        if self.threshold is not None:
            return "expanded" if n_tokens >= self.threshold else "absorbed"
        saved = n_tokens * n_kv * self.per_pair
        return "expanded" if saved >= (n_kv - n_tokens) * self.per_row else "absorbed"

    @property
    def crossover(self) -> int:
        """The batch size from which expanding pays however long the cache is."""
        if self.threshold is not None:
            return self.threshold
        return math.ceil(self.per_row / self.per_pair) if self.per_pair > 0 else NEVER


def multiply_adds(config: ModelConfig) -> dict[str, int]:
    """Multiply-adds per query token, cached row and head of the two inner loops, and per cached
    row and head of the expansion."""
    c = config
    return {
        "standard": c.n_nope + c.n_rope + c.n_v,
        "absorbed": 2 * c.kv_lora_rank + c.n_rope,
        "expansion": c.kv_lora_rank * (c.n_nope + c.n_v),
    }


def is_measured(settings: RunSettings) -> bool:
    """Whether the path of a batch depends on what the machine can do."""
    return settings.mla == 3 and settings.mla_threshold is None


def chooser(
    settings: RunSettings, config: ModelConfig, profile: MachineProfile | None, *, integer: bool
) -> PathChooser:
    """--mla-threshold pins the batch size; else 128 for -mla 2 and the cost model for -mla 3, which
    needs a profile.

    `integer`: kv_b is quantised, so expanding it runs at the integer rate.
    """
    if not is_measured(settings):
        return PathChooser(settings.mla, settings.mla_threshold or DEFAULT_THRESHOLD)
    assert profile is not None
    cost, h = multiply_adds(config), config.n_head
    rate = profile.expansion_rate_int8 if integer else profile.expansion_rate_f32
    saved = cost["absorbed"] / profile.absorbed_rate - cost["standard"] / profile.expanded_rate
    return PathChooser(settings.mla, None, h * saved, h * cost["expansion"] / rate)


def options(settings: RunSettings, path: Path, n_ctx: int, *, few: bool, lanes: int = 0) -> Options:
    """Everything a graph needs to know, from the flags. `lanes` are those of a register: as many
    rows does -rtr interleave."""
    amb = settings.amb_mib * MIB
    return Options(
        path=path,
        flash=settings.flash_attn,
        transposed_cache=settings.mla == 1 and not settings.flash_attn,
        fmt_k=CACHE_FORMATS[settings.type_k],
        fmt_v=CACHE_FORMATS[settings.type_v],
        n_ctx=n_ctx,
        amb_bytes=amb,
        chunk_bytes=min(amb or CHUNK_MIB * MIB, CHUNK_MIB * MIB),
        fmoe=settings.fmoe,
        ser=settings.ser,
        few=few,
        interleaved=lanes if settings.rtr else 0,
    )
