"""Op -> kernel. A launch names a kernel, its build-time sizes, and where each parameter comes from.

Operands stay symbolic (node + byte offset) until the program gives them addresses, so the same
lowering serves planning (how much scratch?) and running.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from codegen.kernel import KernelSpec
from codegen.targets.base import Target
from mlacli.graph.node import Bounds, Dim, Node, size_of


@dataclass(frozen=True)
class At:
    """The address of a node's memory, `offset` bytes in."""

    node: Node
    offset: int = 0


@dataclass(frozen=True)
class Scratch:
    """The address of the op's scratch, `offset` bytes in."""

    node: Node
    offset: int = 0


Operand = At | Scratch | Dim | int


@dataclass(frozen=True)
class Walk:
    """In which order a launch streams weights (codegen/ahead.py): `n` matrices, or those that `ids`
    name, of `parts` tiles each."""

    weights: Node
    n: int
    parts: int
    part_bytes: int
    ids: At | None = None


@dataclass(frozen=True)
class Launch:
    """One kernel call by all threads. Launches of one op never depend on each other unless
    `after_previous` asks for a barrier between them. `walk`: for few tokens, its weights."""

    node: Node
    spec: KernelSpec
    operands: tuple[Operand, ...]
    after_previous: bool = False
    walk: Walk | None = None


@dataclass(frozen=True)
class Lower:
    """What lowering may look at besides the node."""

    target: Target
    bounds: Bounds
    n_threads: int
    few: bool  # at most a handful of tokens: matrices are streamed row by row

    def size(self, node: Node, axis: int) -> int:
        return size_of(node.shape[axis], self.bounds)

    def tokens(self, node: Node) -> Dim:
        """The run-time size that counts a node's rows."""
        dim = node.shape[0]
        if not isinstance(dim, Dim):
            raise TypeError(f"{node} has no run-time number of rows")
        return dim


LowerOp = Callable[[Lower, Node], list[Launch]]
ScratchOp = Callable[[Lower, Node], int]
OPS: dict[str, LowerOp] = {}
SCRATCH: dict[str, ScratchOp] = {}


def lowers(op: str, *, scratch: ScratchOp | None = None) -> Callable[[LowerOp], LowerOp]:
    """Register the function that lowers `op`, and how much scratch the op needs."""

    def register(function: LowerOp) -> LowerOp:
        OPS[op] = function
        if scratch:
            SCRATCH[op] = scratch
        return function

    return register


def scratch_bytes(lower: Lower, node: Node) -> int:
    """Scratch of an op at the upper bounds, in bytes."""
    declared = SCRATCH.get(node.op)
    return declared(lower, node) if declared else 0
