"""What a kernel may ask of the CPU it is built for: a few numbers and a few hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import DType, f16, f32, i8, i32, u8, u16, u32
from codegen.values import Pointer, Value
from codegen.vecmath import join

if TYPE_CHECKING:
    from codegen.builder import Kernel


@dataclass(frozen=True)
class Target:
    """A CPU family. `lanes` f32 fit a register, of which there are `registers`.

    `unsigned_weights`: `dot_i8` wants its first operand as u8 = value + 128, and the caller then
    subtracts 128 times the sum of the codes. Otherwise both operands are signed.
    `fuses`: a * b + c rounded once is an instruction.
    """

    name: str
    triple: str
    cpu: str
    features: str
    lanes: int
    registers: int
    unsigned_weights: bool = False
    fuses: bool = True
    cache_line: int = 64
    l1_bytes: int = 32 * 1024
    l2_bytes: int = 1024 * 1024

    @property
    def weight_bias(self) -> int:
        return 128 if self.unsigned_weights else 0

    @property
    def weight_type(self) -> DType:
        return u8 if self.unsigned_weights else i8

    def dot_i8(self, k: Kernel, acc: Value, weights: Value, codes: Value) -> Value:
        """acc[j] += sum of weights[4j + i] * codes[4j + i], i = 0..3, exact.

        Weights are i8 or u8, codes i8; with i8 weights no code may be -128.
        """
        products = weights.to(i32) * codes.to(i32)
        n = acc.type.lanes
        for i in range(4):
            acc = acc + k.shuffle(products, products, [4 * j + i for j in range(n)])
        return acc

    def dot_i16(self, k: Kernel, acc: Value, a: Value, b: Value) -> Value:
        """acc[j] += a[2j] * b[2j] + a[2j+1] * b[2j+1] over i16 pairs, exact; none is -32768."""
        products, n = a.to(i32) * b.to(i32), acc.type.lanes
        for i in range(2):
            acc = acc + k.shuffle(products, products, [2 * j + i for j in range(n)])
        return acc

    def dot_bf16(self, k: Kernel, acc: Value, a: Value, b: Value) -> Value:
        """acc[j] += a[2j] * b[2j] + a[2j+1] * b[2j+1] over bf16 pairs, in f32."""
        n = acc.type.lanes
        wide_a, wide_b = (v.bits_as(u32 * n) for v in (a, b))
        odd = [(v & 0xFFFF0000).bits_as(f32 * n) for v in (wide_a, wide_b)]
        even = [(v << 16).bits_as(f32 * n) for v in (wide_a, wide_b)]
        return acc + even[0] * even[1] + odd[0] * odd[1]

    def lookup16(self, k: Kernel, table: tuple[int, ...], index: Value) -> Value:
        """table[index] per byte; `index` is u8 lanes of 0..15, the result u8 (two's complement)."""
        result = k.const(table[0], index.type)
        for i, entry in enumerate(table[1:], start=1):
            result = k.select(index.eq(i), k.const(entry & 255, index.type), result)
        return result

    def lookup_nibble(self, k: Kernel, table: tuple[int, ...], codes: Value) -> Value:
        """table[low nibble] per byte: the upper bits of `codes` may be anything."""
        return self.lookup16(k, table, codes & 15)

    def load_pieces(self, k: Kernel, at: Pointer, offset: int, stride: int) -> Value:
        """16 bytes from each of `lanes / 4` places that are `stride` bytes apart, as u32 lanes;
        the first place is `offset` bytes behind `at`, from where on there is memory.

        Nothing behind the last piece is read.
        """
        places = [at.bytes(offset + stride * i, u32) for i in range(self.lanes // 4)]
        return join(k, [place.load(u32 * 4) for place in places])

    def load_scales(self, k: Kernel, at: Pointer, stride: int) -> Value:
        """f16 from `lanes / 4` places that are `stride` bytes apart, each in four lanes, as f32.

        Up to 64 bytes may be read, or 16 behind the last scale if that is more.
        """
        places = [at.bytes(stride * i, u16) for i in range(self.lanes // 4)]
        fours = join(k, [k.splat(place.load(), 4) for place in places])
        return fours.bits_as(f16 * self.lanes).to(f32)

    def f16_to_f32(self, k: Kernel, v: Value) -> Value:
        """By bits: scale the shifted exponent and mantissa by 2^112; infinities kept."""
        n = v.type.lanes
        h = v.bits_as(u16 * n).to(u32)
        magnitude = (h & 0x7FFF) << 13
        scaled = magnitude.bits_as(f32 * n) * 2.0**112
        special = (magnitude | 0x7F800000).bits_as(f32 * n)
        result = k.select(magnitude >= (31 << 23), special, scaled)
        return (result.bits_as(u32 * n) | ((h & 0x8000) << 16)).bits_as(f32 * n)

    def f32_to_f16(self, k: Kernel, v: Value) -> Value:
        """By bits, to nearest even; too large becomes infinity."""
        n = v.type.lanes
        bits = v.bits_as(u32 * n)
        sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
        normal = (magnitude - (112 << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13
        # A denormal f16 is what an add of 0.5 leaves in the low mantissa bits.
        small = (magnitude.bits_as(f32 * n) + 0.5).bits_as(u32 * n) - 0x3F000000
        half = k.select(magnitude < (113 << 23), small, normal)
        half = k.select(magnitude >= 0x477FF000, k.const(0x7C00, u32 * n), half)
        half = k.select(magnitude > 0x7F800000, k.const(0x7E00, u32 * n), half)
        return (half | sign).to(u16).bits_as(f16 * n)

    def pause(self, k: Kernel) -> None:
        """Tell the core that this is a spin loop."""
