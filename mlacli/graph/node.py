"""The graph: nodes in the order they run. A node's shape may hold run-time sizes (`Dim`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from codegen.kernels.activations import row_bytes as code_row_bytes


class Dim(Enum):
    """Sizes known only when a batch arrives; each has an upper bound in `Bounds`."""

    N_TOKENS = "n_tokens"
    N_KV = "n_kv"
    N_OUT = "n_out"


Size = int | Dim
Bounds = Mapping[Dim, int]
# Storage of a node: plain numbers; a8 = quantised activation rows (codegen/kernels/activations.py);
# routing = expert ids and weights per slot; groups = the slots sorted by expert (layouts:
# graph/lower_moe.py).
_ELEMENT_BYTES = {"f32": 4, "i32": 4, "f16": 2}


@dataclass(frozen=True, eq=False)
class Node:
    """One result. `inplace` is the index of the input whose memory it takes over, if any."""

    index: int
    op: str
    dtype: str
    shape: tuple[Size, ...]
    inputs: tuple[Node, ...]
    name: str
    attrs: dict[str, Any] = field(default_factory=dict)
    inplace: int | None = None

    @property
    def is_leaf(self) -> bool:
        """Memory that exists before the step: a weight, a batch input, the cache."""
        return self.op in ("weight", "input", "cache")

    @property
    def storage(self) -> Node:
        """The node whose memory holds this one."""
        return self if self.inplace is None else self.inputs[self.inplace].storage

    def rows(self, bounds: Bounds) -> int:
        """Product of all sizes but the last."""
        return math.prod(size_of(s, bounds) for s in self.shape[:-1])

    def nbytes(self, bounds: Bounds) -> int:
        """Memory at the upper bounds."""
        last = size_of(self.shape[-1], bounds)
        if self.dtype == "a8":
            return self.rows(bounds) * code_row_bytes(last)
        if self.dtype == "routing":
            return 2 * 4 * self.rows(bounds) * last
        if self.dtype == "groups":
            return 4 * (int(self.attrs["n_expert"]) + 1 + 2 * self.rows(bounds) * last)
        return self.rows(bounds) * last * _ELEMENT_BYTES[self.dtype]

    def __repr__(self) -> str:
        return f"{self.name}:{self.op}{self.shape}"


def size_of(size: Size, bounds: Bounds) -> int:
    return bounds[size] if isinstance(size, Dim) else size


class Graph:
    """Nodes in execution order; `outputs` live outside the arena."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.outputs: list[Node] = []
        self._leaves: dict[str, Node] = {}

    def add(
        self,
        op: str,
        dtype: str,
        shape: tuple[Size, ...],
        *inputs: Node,
        name: str,
        inplace: int | None = None,
        **attrs: Any,
    ) -> Node:
        node = Node(len(self.nodes), op, dtype, shape, inputs, name, attrs, inplace)
        self.nodes.append(node)
        return node

    def leaf(self, op: str, dtype: str, shape: tuple[Size, ...], name: str, **attrs: Any) -> Node:
        """A weight, batch input or cache; asking again for a name gives the same node."""
        if name not in self._leaves:
            self._leaves[name] = self.add(op, dtype, shape, name=name, **attrs)
        return self._leaves[name]

    @property
    def operations(self) -> Iterator[Node]:
        return (n for n in self.nodes if not n.is_leaf)
