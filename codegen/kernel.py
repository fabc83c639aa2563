"""`@kernel(...)`: a traced function plus the table of its parameters.

    @kernel(y=ptr(f32), w=ptr(u8), n_rows=value(i64), n_tokens=dim())
    def gemv(k, y, w, n_rows, n_tokens, *, n_cols, fmt): ...

A `ptr` slot holds an address, a `value` slot the number itself, a `dim` slot the address of a word
that is set before each step. Build-time sizes are the keyword-only arguments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codegen.dtypes import DType, i64

if TYPE_CHECKING:
    from codegen.targets.base import Target


@dataclass(frozen=True)
class Param:
    kind: str  # "ptr", "value" or "dim"
    type: DType


def ptr(t: DType) -> Param:
    return Param("ptr", t)


def value(t: DType = i64) -> Param:
    return Param("value", t)


def dim() -> Param:
    return Param("dim", i64)


@dataclass(frozen=True)
class KernelFunction:
    """A kernel before its sizes are chosen."""

    name: str
    trace: Callable[..., None]
    params: dict[str, Param]

    @property
    def is_ours(self) -> bool:
        """Whether it is one of codegen's own."""
        return self.trace.__module__.partition(".")[0] == __package__

    def __call__(self, **sizes: Any) -> KernelSpec:
        return KernelSpec(self, tuple(sorted(sizes.items())))


@dataclass(frozen=True)
class KernelSpec:
    """A kernel with its build-time sizes: everything but the target."""

    function: KernelFunction
    sizes: tuple[tuple[str, Any], ...]

    def __hash__(self) -> int:
        return hash((self.function.name, repr(self.sizes)))

    @property
    def name(self) -> str:
        return self.function.name

    @property
    def params(self) -> dict[str, Param]:
        return self.function.params

    @property
    def symbol(self) -> str:
        """The name that profilers show: gemv_q8_0_7168, plus a digest of all sizes."""
        shown = [_short(v) for _, v in self.sizes if isinstance(v, int) or hasattr(v, "name")]
        digest = hashlib.sha256(repr(self.sizes).encode()).hexdigest()[:8]
        return "_".join([self.name, *shown, digest])

    def key(self, target: Target, compiler: str) -> str:
        """Names the object code: codegen's sources, sizes, target and compiler decide it.

        Of a kernel from elsewhere the sources are not known, wherever they are spread: its IR
        stands for them, which takes a trace.
        """
        parts = [source_digest(), self.name, repr(self.sizes), repr(target), compiler]
        if not self.function.is_ours:
            parts.append(self.ir(target))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def build(self, target: Target) -> tuple[str, int]:
        """(IR text, tile counters used)."""
        from codegen.builder import Kernel
        from codegen.values import Pointer

        k = Kernel(self.symbol, target, len(self.params))
        arguments: list[Any] = []
        for slot, param in enumerate(self.params.values()):
            where = k.args.at(slot)
            if param.kind == "value":
                arguments.append(where.cast(param.type).load())
            elif param.kind == "dim":
                arguments.append(k.load_pointer(where, i64).load())
            else:
                pointer = k.load_pointer(where, param.type)
                arguments.append(Pointer(k, pointer.ir, param.type))
        self.function.trace(k, *arguments, **dict(self.sizes))
        return k.finish(), k.n_counters

    def ir(self, target: Target) -> str:
        """The LLVM IR as text."""
        return self.build(target)[0]


def _short(v: Any) -> str:
    return str(getattr(v, "name", v)).lower()


def kernel(**params: Param) -> Callable[[Callable[..., None]], KernelFunction]:
    """Declare a kernel and its run-time parameters, in order."""

    def wrap(trace: Callable[..., None]) -> KernelFunction:
        return KernelFunction(trace.__name__, trace, params)

    return wrap


@cache
def source_digest() -> str:
    """Digest of the code generator itself: a changed kernel never meets an old object."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


__all__ = ["KernelFunction", "KernelSpec", "Param", "dim", "kernel", "ptr", "value"]
