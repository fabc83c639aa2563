"""Which attention path a batch takes: settings -> options, and the cost model of -mla 3.

Per batch of n tokens over m cached rows, in multiply-adds per layer (DESIGN section 2):

    absorbed  n m H (2 R + rope)                        at the machine's attention rate
    expanded  n m H (nope + rope + v)                   at the same rate
              + m H R (nope + v)                        at its expansion (matrix) rate

so expanding pays when a batch is large enough, however long the cache is.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.formats import CACHE_FORMATS
from mlacli.model.config import ModelConfig
from mlacli.model.layers import Options, Path
from mlacli.settings import RunSettings

CHUNK_MIB = 32
DEFAULT_THRESHOLD = 128  # tokens; of -mla 2
FEW_TOKENS = 4  # up to here a batch counts as generation
MIB = 2**20


@dataclass(frozen=True)
class MachineProfile:
    """Multiply-adds per second of this machine's attention and of its matrix expansion."""

    attention_rate: float
    expansion_rate: float


@dataclass(frozen=True)
class PathChooser:
    """Picks the path of a batch; `crossover` is the batch size from which expanding is cheaper."""

    mla: int
    crossover: int

    def path(self, n_tokens: int) -> Path:
        if self.mla == 0:
            return "standard"
        if self.mla == 1 or n_tokens < self.crossover:
            return "absorbed"
        return "expanded"


def multiply_adds(config: ModelConfig) -> dict[str, int]:
    """Multiply-adds per query token, cached row and head of the two inner loops, and per cached
    row and head of the expansion."""
    c = config
    return {
        "standard": c.n_nope + c.n_rope + c.n_v,
        "absorbed": 2 * c.kv_lora_rank + c.n_rope,
        "expansion": c.kv_lora_rank * (c.n_nope + c.n_v),
    }


def crossover(config: ModelConfig, profile: MachineProfile) -> int:
    """Smallest batch for which the expanded path is estimated to be the faster one."""
    cost = multiply_adds(config)
    saved = (cost["absorbed"] - cost["standard"]) / profile.attention_rate
    extra = cost["expansion"] / profile.expansion_rate
    if saved <= 0:
        return 2**31 - 1
    return max(1, int(extra / saved) + 1)


def chooser(settings: RunSettings, config: ModelConfig, profile: MachineProfile) -> PathChooser:
    """--mla-threshold pins the crossover; else 128 for -mla 2 and the cost model for -mla 3."""
    if settings.mla_threshold is not None:
        at = settings.mla_threshold
    elif settings.mla == 2:
        at = DEFAULT_THRESHOLD
    else:
        at = crossover(config, profile)
    return PathChooser(settings.mla, at)


def options(settings: RunSettings, path: Path, n_ctx: int, *, few: bool) -> Options:
    """Everything a graph needs to know, from the flags."""
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
    )
