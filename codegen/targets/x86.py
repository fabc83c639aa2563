"""x86-64: AVX2 and AVX-512, each with the integer and bfloat16 dot products it may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f16, f32, i8, i16, i32, u8, u32
from codegen.targets.base import Target
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel


@dataclass(frozen=True)
class X86(Target):
    """AVX2 with F16C and FMA; `vnni` and `bf16` name the dot-product instructions at hand, and
    `vbmi` says that there is a lookup among 64 bytes."""

    vnni: str = ""  # "", "avxvnni" or "avx512vnni"
    bf16: bool = False

    @property
    def vbmi(self) -> bool:
        return "+avx512vbmi" in self.features.split(",")

    @property
    def vector_bits(self) -> int:
        return 32 * self.lanes

    def dot_i8(self, k: Kernel, acc: Value, weights: Value, codes: Value) -> Value:
        n = acc.type.lanes
        if n > self.lanes:  # longer vectors are several registers
            ends = ((0, n // 2), (n // 2, n))
            parts = [
                self.dot_i8(
                    k, acc.lanes(i, j), weights.lanes(4 * i, 4 * j), codes.lanes(4 * i, 4 * j)
                )
                for i, j in ends
            ]
            return k.concat(parts[0], parts[1])
        if weights.type.scalar == i8:  # |w| * (sign(w) a): |w| <= 128 cannot saturate a pair
            weights, codes = self._move_sign(k, weights, codes)
        elif not self.vnni:  # a pair of 255 * 127 would
            return super().dot_i8(k, acc, weights, codes)
        if self.vnni:
            name = f"llvm.x86.avx512.vpdpbusd.{32 * n}"
            return k.intrinsic(name, acc.type, acc, weights, codes)
        return acc + self._pair_sums(k, weights, codes)

    def _move_sign(self, k: Kernel, weights: Value, codes: Value) -> tuple[Value, Value]:
        n = weights.type.lanes
        if n == 32:
            return (
                k.absolute(weights).to(u8),
                k.intrinsic("llvm.x86.avx2.psign.b", codes.type, codes, weights),
            )
        negative = weights < 0
        return k.absolute(weights).to(u8), k.select(negative, -codes, codes)

    def _pair_sums(self, k: Kernel, weights: Value, codes: Value) -> Value:
        """u8 * s8 into i16 pairs, then into i32 (pmaddubsw, pmaddwd)."""
        n = weights.type.lanes
        first = {
            16: "ssse3.pmadd.ub.sw.128",
            32: "avx2.pmadd.ub.sw",
            64: "avx512.pmaddubs.w.512",
        }[n]
        pairs = k.intrinsic("llvm.x86." + first, i16 * (n // 2), weights, codes)
        ones = k.const(1, i16 * (n // 2))
        return k.intrinsic(_PAIR_PRODUCTS[n // 2], i32 * (n // 4), pairs, ones)

    def dot_i16(self, k: Kernel, acc: Value, a: Value, b: Value) -> Value:
        n = acc.type.lanes
        if self.vnni:
            return k.intrinsic(f"llvm.x86.avx512.vpdpwssd.{32 * n}", acc.type, acc, a, b)
        return acc + k.intrinsic(_PAIR_PRODUCTS[2 * n], acc.type, a, b)

    def dot_bf16(self, k: Kernel, acc: Value, a: Value, b: Value) -> Value:
        n = acc.type.lanes
        if not self.bf16:
            return super().dot_bf16(k, acc, a, b)
        return k.dot_bf16_native(f"llvm.x86.avx512bf16.dpbf16ps.{32 * n}", acc, a, b)

    def lookup16(self, k: Kernel, table: tuple[int, ...], index: Value) -> Value:
        n = index.type.lanes
        name = {
            16: "llvm.x86.ssse3.pshuf.b.128",
            32: "llvm.x86.avx2.pshuf.b",
            64: "llvm.x86.avx512.pshuf.b.512",
        }[n]
        entries = k.vector([t & 255 for t in table] * (n // 16), u8)
        return k.intrinsic(name, u8 * n, entries, index)

    def lookup_nibble(self, k: Kernel, table: tuple[int, ...], codes: Value) -> Value:
        n = codes.type.lanes
        if not (self.vbmi and n == 64):
            return super().lookup_nibble(k, table, codes)
        # Six bits of each byte choose: with the table four times over, two of them do not matter.
        entries = k.vector([t & 255 for t in table] * 4, u8)
        return k.intrinsic("llvm.x86.avx512.permvar.qi.512", u8 * n, entries, codes)

    def load_pieces(self, k: Kernel, at: Pointer, offset: int, stride: int) -> Value:
        span = offset + 3 * stride + 16
        if not (self.vbmi and self.lanes == 16 and offset + 2 * stride + 16 <= 64 < span):
            return super().load_pieces(k, at, offset, stride)
        order = [offset + stride * i + j for i in range(3) for j in range(16)] + [0] * 16
        first = _permute_bytes(k, at.bytes(0, u8).load(u8 * 64), order).bits_as(u32 * 16)
        last = at.bytes(span - 64, u32).load(u32 * 16)
        return k.shuffle(first, last, [*range(12), *range(28, 32)])

    def load_scales(self, k: Kernel, at: Pointer, stride: int) -> Value:
        if not (self.vbmi and self.lanes == 16 and 3 * stride + 2 <= 64):
            return super().load_scales(k, at, stride)
        order = [stride * (i // 4) + j for i in range(16) for j in (0, 1)] + [0] * 32
        moved = _permute_bytes(k, at.bytes(0, u8).load(u8 * 64), order)
        return moved.lanes(0, 32).bits_as(f16 * 16).to(f32)

    def f16_to_f32(self, k: Kernel, v: Value) -> Value:
        return k.float_cast(v, f32)

    def f32_to_f16(self, k: Kernel, v: Value) -> Value:
        return k.float_cast(v, f16)

    def pause(self, k: Kernel) -> None:
        k.void_intrinsic("llvm.x86.sse2.pause")


# pmaddwd, by the number of i16 lanes
_PAIR_PRODUCTS = {
    8: "llvm.x86.sse2.pmadd.wd",
    16: "llvm.x86.avx2.pmadd.wd",
    32: "llvm.x86.avx512.pmaddw.d.512",
}


def _permute_bytes(k: Kernel, v: Value, order: list[int]) -> Value:
    """result[i] = v[order[i]], by VBMI.

    The order is hidden from LLVM, which turns one that moves pairs of bytes into a permutation of
    words: that takes two or three times as long.
    """
    index = k.opaque(k.vector(order, u8))
    return k.intrinsic("llvm.x86.avx512.permvar.qi.512", v.type, v, index)


TRIPLE = "x86_64-unknown-linux-gnu"
_AVX2 = "+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+lzcnt,+movbe"
_AVX512 = _AVX2 + ",+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd"


def avx2(triple: str = TRIPLE, cpu: str = "haswell", features: str = _AVX2) -> X86:
    return X86("avx2", triple, cpu, features, lanes=8, registers=16)


def avx2_vnni(triple: str = TRIPLE, cpu: str = "alderlake", features: str = "") -> X86:
    features = features or _AVX2 + ",+avxvnni"
    return X86("avx2vnni", triple, cpu, features, 8, 16, unsigned_weights=True, vnni="avxvnni")


def avx512(triple: str = TRIPLE, cpu: str = "skylake-avx512", features: str = _AVX512) -> X86:
    return X86("avx512", triple, cpu, features, lanes=16, registers=32)


def avx512_vnni(
    triple: str = TRIPLE, cpu: str = "cascadelake", features: str = "", bf16: bool = False
) -> X86:
    features = features or _AVX512 + ",+avx512vnni" + (",+avx512bf16" if bf16 else "")
    name = "avx512vnni-bf16" if bf16 else "avx512vnni"
    return X86(
        name, triple, cpu, features, 16, 32, unsigned_weights=True, vnni="avx512vnni", bf16=bf16
    )


__all__ = ["X86", "avx2", "avx2_vnni", "avx512", "avx512_vnni"]
