"""AArch64: NEON with the signed dot product (ARMv8.2 dotprod)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f16, f32, i32, u8
from codegen.targets.base import Target
from codegen.values import Value

if TYPE_CHECKING:
    from codegen.builder import Kernel


@dataclass(frozen=True)
class Neon(Target):
    """128-bit registers; both operands of the dot product are signed."""

    def dot_i8(self, k: Kernel, acc: Value, weights: Value, codes: Value) -> Value:
        if weights.type.scalar == u8:
            return super().dot_i8(k, acc, weights, codes)
        n = acc.type.lanes
        if n > 4:  # longer vectors are several registers
            low, high = range(0, n // 2), range(n // 2, n)
            halves = [
                self.dot_i8(
                    k,
                    acc.lanes(part[0], part[-1] + 1),
                    weights.lanes(4 * part[0], 4 * part[-1] + 4),
                    codes.lanes(4 * part[0], 4 * part[-1] + 4),
                )
                for part in (low, high)
            ]
            return k.concat(halves[0], halves[1])
        return k.intrinsic(
            f"llvm.aarch64.neon.sdot.v{n}i32.v{4 * n}i8", i32 * n, acc, weights, codes
        )

    def lookup16(self, k: Kernel, table: tuple[int, ...], index: Value) -> Value:
        n = index.type.lanes
        if n > 16:
            low = self.lookup16(k, table, index.lanes(0, n // 2))
            return k.concat(low, self.lookup16(k, table, index.lanes(n // 2, n)))
        entries = k.vector([t & 255 for t in table], u8)
        return k.intrinsic(f"llvm.aarch64.neon.tbl1.v{n}i8", u8 * n, entries, index)

    def f16_to_f32(self, k: Kernel, v: Value) -> Value:
        return k.float_cast(v, f32)

    def f32_to_f16(self, k: Kernel, v: Value) -> Value:
        return k.float_cast(v, f16)

    def pause(self, k: Kernel) -> None:
        k.void_intrinsic("llvm.aarch64.hint", 1)


def neon_dotprod(
    triple: str = "aarch64-unknown-linux-gnu",
    cpu: str = "neoverse-n1",
    features: str = "+neon,+dotprod,+fullfp16",
) -> Neon:
    return Neon("neon", triple, cpu, features, lanes=4, registers=32)


__all__ = ["Neon", "neon_dotprod"]
