"""Op -> kernel. A launch names a kernel, its build-time sizes, and where each parameter comes from.

Operands stay symbolic (node + byte offset) until the program gives them addresses, so the same
lowering serves planning (how much scratch?) and running.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from codegen.kernel import KernelSpec
from codegen.targets.base import Target
from mlacli.errors import UsageError
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
    own: Mapping[str, Lowering] = field(default_factory=dict)  # op: what takes its place

    def size(self, node: Node, axis: int) -> int:
        return size_of(node.shape[axis], self.bounds)

    def tokens(self, node: Node) -> Dim:
        """The run-time size that counts a node's rows."""
        dim = node.shape[0]
        if not isinstance(dim, Dim):
            raise TypeError(f"{node} has no run-time number of rows")
        return dim

    def replaced(self, node: Node) -> Lowering | None:
        """What takes the place of the registered lowering of a node, if anything does."""
        own = self.own.get(node.op)
        return own if own and own.where(self, node) else None


LowerOp = Callable[[Lower, Node], list[Launch]]
ScratchOp = Callable[[Lower, Node], int]


def _everywhere(lower: Lower, node: Node) -> bool:
    return True


def _no_scratch(lower: Lower, node: Node) -> int:
    return 0


@dataclass(frozen=True)
class Lowering:
    """Kernels from elsewhere in place of those registered for an op.

    `launches(lower, node)` and `scratch(lower, node)` (bytes) are as `lowers` takes them; where
    `where(lower, node)` is false, the registered ones stay.
    """

    launches: LowerOp
    scratch: ScratchOp = _no_scratch
    where: Callable[[Lower, Node], bool] = _everywhere


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
    own = lower.replaced(node)
    declared = own.scratch if own else SCRATCH.get(node.op)
    return declared(lower, node) if declared else 0


def launches_of(lower: Lower, node: Node) -> list[Launch]:
    """The launches of one op. Raises UsageError for those of a `Lowering` that cannot work."""
    own = lower.replaced(node)
    if own is None:
        return OPS[node.op](lower, node)
    launches = own.launches(lower, node)
    for launch in launches:
        _check(lower, node, launch)
    return launches


def _check(lower: Lower, node: Node, launch: Launch) -> None:
    """A wrong operand would be a wrong address, which nothing could catch any more."""
    name, params = f"kernels: {node.op}: {launch.spec.name}", launch.spec.params
    if launch.node is not node:
        raise UsageError(f"{name}: its launch is for {launch.node}, not for {node}")
    if len(launch.operands) != len(params):
        raise UsageError(f"{name}: {len(launch.operands)} operands for {len(params)} parameters")
    for (param, declared), operand in zip(params.items(), launch.operands, strict=True):
        kinds = {"ptr": (At, Scratch), "value": (int,), "dim": (Dim,)}[declared.kind]
        if not isinstance(operand, kinds):
            got = type(operand).__name__
            raise UsageError(f"{name}: parameter {param} is a {declared.kind}, got {got}")
        if isinstance(operand, At | Scratch) and operand.node not in (node, *node.inputs):
            raise UsageError(f"{name}: parameter {param} is at {operand.node}, no input of {node}")
        if isinstance(operand, Scratch) and not scratch_bytes(lower, node):
            raise UsageError(f"{name}: parameter {param} is scratch, of which it declares none")
