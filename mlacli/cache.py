"""The cache: one block of memory per layer and kind, and who owns which row (cell).

It is given plain numbers, not the model's config. A cell holds one token of one sequence, known
by (position, sequence id); -1 marks an empty cell. Rows are written by kernels; here is only where.

    kind   row of a cell                                   used by
    c      [c_kv | k_pe] in type_k                         -mla 1, 2, 3
    kv_t   c_kv transposed: (kv_lora, n_ctx)               -mla 1 without flash attention
    k, v   H heads of [k_nope | k_pe], H heads of v        -mla 0
    v_t    v transposed: (H * v, n_ctx)                    -mla 0 without flash attention

Transposed copies are f32 beside f32 rows, else f16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from codegen.formats import BlockFormat, transposed_type
from mlacli.errors import SpaceError
from mlacli.memory import allocate

EMPTY = -1
LINE = 64


@dataclass(frozen=True)
class CacheLayout:
    """Sizes of a cache, without the memory."""

    n_layer: int
    n_ctx: int
    n_head: int
    kv_lora_rank: int
    n_rope: int
    n_nope: int
    n_v: int
    fmt_k: BlockFormat
    fmt_v: BlockFormat
    latent: bool
    transposed: bool  # without flash attention: v_t for -mla 0, kv_t for -mla 1

    def cells(self) -> dict[str, tuple[int, int]]:
        """Kind -> (parts, bytes of a cell in each): one row, or a value in each transposed row."""
        if self.latent:
            kinds = {"c": (1, self.fmt_k.row_bytes(self.kv_lora_rank + self.n_rope))}
            if self.transposed:
                kinds["kv_t"] = (self.kv_lora_rank, transposed_type(self.fmt_k).nbytes)
            return kinds
        k_row = self.n_head * self.fmt_k.row_bytes(self.n_nope + self.n_rope)
        if self.transposed:
            return {
                "k": (1, k_row),
                "v_t": (self.n_head * self.n_v, transposed_type(self.fmt_v).nbytes),
            }
        return {"k": (1, k_row), "v": (1, self.n_head * self.fmt_v.row_bytes(self.n_v))}

    def bytes_per_layer(self) -> dict[str, int]:
        """Kind -> bytes of one layer."""
        return {kind: parts * n * self.n_ctx for kind, (parts, n) in self.cells().items()}

    def nbytes(self) -> dict[str, int]:
        """Kind -> bytes of all layers."""
        return {kind: n * self.n_layer for kind, n in self.bytes_per_layer().items()}

    @property
    def bytes_per_token(self) -> int:
        return sum(self.nbytes().values()) // self.n_ctx


class Cache:
    """The memory of a `CacheLayout` and its cells. Raises SpaceError when it cannot be had."""

    def __init__(self, layout: CacheLayout, *, huge: bool = False) -> None:
        self.layout = layout
        self.pos = np.full(layout.n_ctx, EMPTY, np.int32)
        self.seq = np.full(layout.n_ctx, EMPTY, np.int32)
        self._memory: dict[str, npt.NDArray[np.uint8]] = {}
        for kind, n in layout.bytes_per_layer().items():
            pitch = -(-n // LINE) * LINE
            what = f"-c {layout.n_ctx}: the cache"
            block = allocate(layout.n_layer * pitch, what, huge=huge)
            self._memory[kind] = block.reshape(layout.n_layer, pitch)

    def address(self, kind: str, layer: int) -> int:
        return int(self._memory[kind][layer].ctypes.data)

    def parts(self, kind: str, layer: int) -> npt.NDArray[np.uint8]:
        """A layer's memory as (parts, n_ctx, bytes of a cell): what a cell holds, to copy it."""
        n_parts, n_bytes = self.layout.cells()[kind]
        size = n_parts * self.layout.n_ctx * n_bytes
        return self._memory[kind][layer, :size].reshape(n_parts, self.layout.n_ctx, n_bytes)

    @property
    def n_used(self) -> int:
        return int(np.count_nonzero(self.seq != EMPTY))

    @property
    def n_rows(self) -> int:
        """Rows that attention must look at: one more than the highest cell in use."""
        used = np.flatnonzero(self.seq != EMPTY)
        return int(used[-1]) + 1 if len(used) else 0

    def allocate(self, positions: Sequence[int], sequences: Sequence[int]) -> npt.NDArray[np.int32]:
        """Take cells for new tokens, lowest first. Raises SpaceError when the context is full."""
        free = np.flatnonzero(self.seq == EMPTY)[: len(positions)]
        if len(free) < len(positions):
            raise SpaceError(
                f"the context is full: {self.n_used} of {self.layout.n_ctx} cells are in use, "
                f"{len(positions)} more are needed (-c)"
            )
        self.pos[free] = positions
        self.seq[free] = sequences
        return free.astype(np.int32)

    def release(self, cells: npt.NDArray[np.integer[Any]]) -> None:
        """Give cells back as if they had never been taken."""
        self.seq[cells] = EMPTY
        self.pos[cells] = EMPTY

    def truncate(self, sequence: int, position: int) -> None:
        """Forget the tokens of a sequence from `position` on."""
        self.release(np.flatnonzero((self.seq == sequence) & (self.pos >= position)))

    def shift(self, sequence: int, first: int, n: int) -> npt.NDArray[np.int32]:
        """Forget n tokens of a sequence from position `first` on; those behind move up by n.

        Returns their cells: what was rotated for the old positions is to be rotated by -n.
        """
        mine = self.seq == sequence
        self.release(np.flatnonzero(mine & (self.pos >= first) & (self.pos < first + n)))
        moved = np.flatnonzero(mine & (self.pos >= first + n))
        self.pos[moved] -= n
        return moved.astype(np.int32)

    def clear(self) -> None:
        self.seq[:] = EMPTY
        self.pos[:] = EMPTY
