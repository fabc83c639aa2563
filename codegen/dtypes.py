"""Machine types as kernels see them; unlike LLVM's, they know whether an integer is signed."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DType:
    """`kind` is f (float), g (bfloat), i (signed), u (unsigned), b (bool); f32 * 16 is a vector."""

    kind: str
    bits: int
    lanes: int = 1

    def __mul__(self, lanes: int) -> DType:
        return replace(self, lanes=self.lanes * lanes)

    @property
    def scalar(self) -> DType:
        return replace(self, lanes=1)

    @property
    def nbytes(self) -> int:
        return self.bits * self.lanes // 8

    @property
    def is_float(self) -> bool:
        return self.kind in "fg"

    def __str__(self) -> str:
        name = {"f": "f", "g": "bf", "i": "i", "u": "u", "b": "b"}[self.kind] + str(self.bits)
        return name if self.lanes == 1 else f"{name}x{self.lanes}"


f64 = DType("f", 64)
f32 = DType("f", 32)
f16 = DType("f", 16)
bf16 = DType("g", 16)
i8 = DType("i", 8)
u8 = DType("u", 8)
i16 = DType("i", 16)
u16 = DType("u", 16)
i32 = DType("i", 32)
u32 = DType("u", 32)
i64 = DType("i", 64)
u64 = DType("u", 64)
b1 = DType("b", 1)
