"""What a node's memory holds just now, as numpy arrays of the sizes of this step.

f32, i32    as they are, in the node's shape
a8          decoded to f32: what the next matrix reads
routing     records of (id, weight), a slot each; id -1: dropped by -ser
groups      for each slot the row that its expert's results have
cache       the rows of this batch's tokens, decoded to f32
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.kernels.activations import row_bytes, scales_offset
from codegen.kernels.attention_plain import ROW_STEP
from codegen.kernels.blocks import BLOCK
from mlacli.gguf.quants import dequantise
from mlacli.graph.matrix import Heads
from mlacli.graph.node import Bounds, Dim, Node, size_of

Array = NDArray[Any]
SLOT = np.dtype([("id", np.int32), ("weight", np.float32)])


@dataclass(frozen=True)
class Reader:
    """`bounds` are those that the graph was planned for, `sizes` this step's; `cells` are the
    cache rows of the step's tokens."""

    bounds: Bounds
    sizes: Mapping[Dim, int]
    cells: Array

    def read(self, node: Node, address: int) -> Array:
        """A copy of the node's values."""
        shape = tuple(size_of(size, self.sizes) for size in node.shape)
        match node.dtype:
            case "cache":
                return self._rows(node, address)
            case "a8":
                return decoded(_bytes(address, math.prod(shape[:-1]) * row_bytes(shape[-1])), shape)
            case "routing":
                return self._slots(node, address, shape)
            case "groups":
                first = 4 * (int(node.attrs["n_expert"]) + 1 + self._most_slots(node))
                return _bytes(address + first, 4 * math.prod(shape)).view(np.int32)
            case "f32" | "i32":
                kind, n = np.float32 if node.dtype == "f32" else np.int32, shape[-1]
                pitch = -(-n // ROW_STEP) * ROW_STEP if node.op in ("kq", "soft_max") else n
                wide = (*shape[:-1], pitch)
                return _bytes(address, 4 * math.prod(wide)).view(kind).reshape(wide)[..., :n]
        raise TypeError(f"{node}: values of type {node.dtype} cannot be read")

    def _most_slots(self, node: Node) -> int:
        return node.rows(self.bounds) * size_of(node.shape[-1], self.bounds)

    def _slots(self, node: Node, address: int, shape: tuple[int, ...]) -> Array:
        slots = np.empty(shape, SLOT)
        n = 4 * math.prod(shape)
        slots["id"] = _bytes(address, n).view(np.int32).reshape(shape)
        behind = address + 4 * self._most_slots(node)
        slots["weight"] = _bytes(behind, n).view(np.float32).reshape(shape)
        return slots

    def _rows(self, node: Node, address: int) -> Array:
        """(n_tokens, rows of a cell, values): one row of a latent cache, one per head of K."""
        heads: Heads = node.attrs["heads"]
        n_rows, width = (heads.n_head, heads.q_width)
        if node.op == "store_latent":
            n_rows, width = 1, heads.c_width
        pitch = n_rows * heads.fmt_k.row_bytes(width)
        rows = np.concatenate([_bytes(address + int(cell) * pitch, pitch) for cell in self.cells])
        values = dequantise(rows.reshape(-1, pitch // n_rows), heads.fmt_k, width)
        return values.reshape(len(self.cells), n_rows, width)


def decoded(rows: Array, shape: tuple[int, ...]) -> Array:
    """a8 rows (codegen/kernels/activations.py) as numbers."""
    n, pitch = shape[-1], row_bytes(shape[-1])
    rows = rows.reshape(-1, pitch)
    at, n_blocks = scales_offset(n), n // BLOCK
    codes = rows[:, :n].view(np.int8).reshape(-1, n_blocks, BLOCK)
    scales = np.ascontiguousarray(rows[:, at : at + 4 * n_blocks]).view(np.float32)
    return (codes * scales[:, :, None]).astype(np.float32).reshape(shape)


def _bytes(address: int, n: int) -> Array:
    """A copy of n bytes."""
    return np.frombuffer(ctypes.string_at(address, n), np.uint8).copy()
