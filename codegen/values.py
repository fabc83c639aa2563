"""What a kernel author holds: `Value` (immutable), `Pointer` (address), `Var` (mutable register).

They only forward to the builder `k`; nothing here knows LLVM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from codegen.dtypes import DType

if TYPE_CHECKING:
    from codegen.builder import Kernel

Operand = "Value | Var | int | float"


class Value:
    """An SSA value. Python numbers become constants, scalars are splat; nothing else converts."""

    __slots__ = ("ir", "k", "type")

    def __init__(self, k: Kernel, ir: Any, type_: DType) -> None:
        self.k, self.ir, self.type = k, ir, type_

    def __add__(self, other: Any) -> Value:
        return self.k.arith("add", self, other)

    def __radd__(self, other: Any) -> Value:
        return self.k.arith("add", other, self)

    def __sub__(self, other: Any) -> Value:
        return self.k.arith("sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return self.k.arith("sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return self.k.arith("mul", self, other)

    def __rmul__(self, other: Any) -> Value:
        return self.k.arith("mul", other, self)

    def __truediv__(self, other: Any) -> Value:
        return self.k.arith("div", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return self.k.arith("div", other, self)

    def __floordiv__(self, other: Any) -> Value:
        return self.k.arith("idiv", self, other)

    def __mod__(self, other: Any) -> Value:
        return self.k.arith("rem", self, other)

    def __and__(self, other: Any) -> Value:
        return self.k.arith("and", self, other)

    def __or__(self, other: Any) -> Value:
        return self.k.arith("or", self, other)

    def __xor__(self, other: Any) -> Value:
        return self.k.arith("xor", self, other)

    def __lshift__(self, other: Any) -> Value:
        return self.k.arith("shl", self, other)

    def __rshift__(self, other: Any) -> Value:
        return self.k.arith("shr", self, other)

    def __neg__(self) -> Value:
        return self.k.arith("sub", 0, self)

    def __lt__(self, other: Any) -> Value:
        return self.k.compare("<", self, other)

    def __le__(self, other: Any) -> Value:
        return self.k.compare("<=", self, other)

    def __gt__(self, other: Any) -> Value:
        return self.k.compare(">", self, other)

    def __ge__(self, other: Any) -> Value:
        return self.k.compare(">=", self, other)

    def eq(self, other: Any) -> Value:
        return self.k.compare("==", self, other)

    def ne(self, other: Any) -> Value:
        return self.k.compare("!=", self, other)

    def __bool__(self) -> bool:
        raise TypeError("a kernel Value has no Python truth value; use k.select or k.when")

    def __index__(self) -> int:
        raise TypeError("a kernel Value is known at run time only; Python `for` and [] unroll")

    def to(self, type_: DType) -> Value:
        """Convert the numbers (a scalar DType keeps the lane count)."""
        return self.k.convert(self, type_)

    def bits_as(self, type_: DType) -> Value:
        """The same bits under another type."""
        return self.k.bitcast(self, type_)

    def lanes(self, low: int, high: int) -> Value:
        return self.k.shuffle(self, self, list(range(low, high)))

    def lane(self, index: int) -> Value:
        return self.k.extract(self, index)

    def sum(self) -> Value:
        """Sum over lanes as a fixed tree, so every target adds in the same order."""
        return self.k.reduce("add", self)

    def max(self) -> Value:
        return self.k.reduce("max", self)


class Pointer:
    """A typed address: `p[i]` loads, `p[i] = v` stores, `p.at(i)` moves by elements."""

    __slots__ = ("elem", "ir", "k")

    def __init__(self, k: Kernel, ir: Any, elem: DType) -> None:
        self.k, self.ir, self.elem = k, ir, elem

    def at(self, index: Any, elem: DType | None = None) -> Pointer:
        """The address `index` elements on (counted in this pointer's own element type)."""
        return self.k.offset(self, index, elem or self.elem)

    def cast(self, elem: DType) -> Pointer:
        return Pointer(self.k, self.ir, elem)

    def bytes(self, offset: Any, elem: DType | None = None) -> Pointer:
        """The address `offset` bytes on."""
        return self.k.offset(self.cast(DType("u", 8)), offset, elem or self.elem)

    def load(self, type_: DType | None = None) -> Value:
        return self.k.load(self, type_ or self.elem)

    def store(self, value: Any) -> None:
        self.k.store(self, value)

    def __getitem__(self, index: Any) -> Value:
        return self.at(index).load()

    def __setitem__(self, index: Any, value: Any) -> None:
        self.at(index).store(value)


class Var:
    """A register that changes over a loop; LLVM turns it into phis."""

    __slots__ = ("k", "slot", "type")

    def __init__(self, k: Kernel, init: Value) -> None:
        self.k, self.type = k, init.type
        self.slot = k.alloca(init.type)
        self.set(init)

    def get(self) -> Value:
        return self.k.load_slot(self.slot, self.type)

    def set(self, value: Any) -> None:
        self.k.store_slot(self.slot, self.k.const(value, self.type))

    def __iadd__(self, value: Any) -> Var:
        self.set(self.get() + value)
        return self
