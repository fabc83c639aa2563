"""The storage formats of weights and caches, each declared once as data.

The GGUF loader takes sizes from here, the numpy oracle (mlacli/gguf/quants.py) decodes by it, and
kernels unpack by it. A block of `size` values is the `fields` laid out one after another, packed:

    value[j] = d * code[j]                       (`d` is 1 when there is no such field)
    code[j]  = qs[j]                             8-bit and float formats
    code[j]  = table[n] or n + offset            4-bit: n = low nibble of qs[j] for j < 16, else
                                                 high nibble of qs[j - 16], with `high_bits` more
                                                 bits per value from `qh` above the nibble

A super-block (K-quants) has a scale, and where there is a `dmin` a minimum, per group of values:

    value[j] = d * scale[j // groups.size] * code[j] - dmin * minimum[j // groups.size]

Interleaved rows (-rtr) lie in groups: block b of all rows of a group, then block b + 1. Inside,
every field has the rows side by side: the R numbers d, then dword 0 of every row's qs, dword 1, ...
A group takes the bytes that its rows took, in the same place.

Sources: ggml-common.h of llama.cpp for the layouts; q6_0 and q8_KV from ik_llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from codegen.dtypes import DType, bf16, f16, f32, i8, i32, u8

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Field:
    """`count` values of one type inside a block (or a row header)."""

    name: str
    type: DType
    count: int = 1

    @property
    def nbytes(self) -> int:
        return self.type.nbytes * self.count


RUN = 32  # codes of a super-block that lie in as many bytes, one below the other


@dataclass(frozen=True)
class Groups:
    """Inside a super-block: `size` values share a scale, kept in the field `scales`.

    Codes stand in runs of 32: run r in the nibbles of 32 bytes of `qs`, the low ones, and run
    r + `step` in the high ones; further bits above them lie in `qh`, from the lowest. Scales are
    i8 as they are, or with `dmin` 12 bytes of 8 scales and 8 minima of 6 bits: number i < 4 in
    bytes i and i + 4, further ones in the nibbles of byte i + 4 and the top bits of i - 4 and i.
    """

    size: int
    step: int

    def low_place(self, run: Any) -> tuple[Any, Any]:
        """(first byte in qs, shift) of a run; the same arithmetic for numbers and kernel values."""
        place = run // (2 * self.step) * self.step + run % self.step
        return RUN * place, 4 * (run // self.step % 2)

    def high_place(self, run: Any, bits: int) -> tuple[Any, Any]:
        """(first byte in qh, shift) of a run's further bits."""
        return RUN * (run * bits // 8), run * bits % 8


@dataclass(frozen=True)
class BlockFormat:
    """How `size` consecutive values of a row are stored; see the module docstring for the maths.

    `header` fields stand once at the start of each row (q8_KV), `fields` once per block. Weights
    with `integer_dot` meet activations in 8 bits (a8), all others are decoded and meet f32.
    `interleaved` is the number of rows in a group, 0 for rows that lie one after another.
    """

    name: str
    ggml_type: int
    size: int
    fields: tuple[Field, ...]
    header: tuple[Field, ...] = ()
    table: tuple[int, ...] = ()
    offset: int = 0
    high_bits: int = 0
    groups: Groups | None = None
    integer_dot: bool = False
    interleaved: int = 0

    @property
    def block_bytes(self) -> int:
        return sum(f.nbytes for f in self.fields)

    @property
    def header_bytes(self) -> int:
        return sum(f.nbytes for f in self.header)

    @property
    def is_quantised(self) -> bool:
        return self.size > 1

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of `n` values. Raises ValueError unless `n` is a multiple of `size`."""
        if n % self.size:
            raise ValueError(f"{self.name}: row of {n} values is not a multiple of {self.size}")
        return self.header_bytes + n // self.size * self.block_bytes

    def field_offset(self, name: str) -> int:
        """Byte offset of a field inside its block (or of a header field inside its row)."""
        for group in (self.fields, self.header):
            at = 0
            for field in group:
                if field.name == name:
                    return at
                at += field.nbytes
        raise KeyError(name)

    def has(self, name: str) -> bool:
        return any(f.name == name for f in self.fields + self.header)


_D = Field("d", f16)
F32 = BlockFormat("F32", 0, 1, (Field("qs", f32),))
F16 = BlockFormat("F16", 1, 1, (Field("qs", f16),))
BF16 = BlockFormat("BF16", 30, 1, (Field("qs", bf16),))
Q8_0 = BlockFormat("Q8_0", 8, 32, (_D, Field("qs", i8, 32)), integer_dot=True)
Q4_0 = BlockFormat("Q4_0", 2, 32, (_D, Field("qs", u8, 16)), offset=-8, integer_dot=True)
IQ4_NL = BlockFormat(
    "IQ4_NL", 20, 32, (_D, Field("qs", u8, 16)), table=IQ4_NL_VALUES, integer_dot=True
)
Q5_0 = BlockFormat(
    "Q5_0", 6, 32, (_D, Field("qh", u8, 4), Field("qs", u8, 16)), offset=-16, high_bits=1
)
Q6_0 = BlockFormat(
    "Q6_0", 133, 32, (_D, Field("qh", u8, 8), Field("qs", u8, 16)), offset=-32, high_bits=2
)
Q8_KV = BlockFormat(
    "Q8_KV", 151, 32, (Field("qs", i8, 32),), header=(Field("d", f32), Field("sum", i32))
)
_SIX_BITS = (_D, Field("dmin", f16), Field("scales", u8, 12))
Q4_K = BlockFormat(
    "Q4_K", 12, 256, (*_SIX_BITS, Field("qs", u8, 128)), groups=Groups(size=32, step=1)
)
Q5_K = BlockFormat(
    "Q5_K",
    13,
    256,
    (*_SIX_BITS, Field("qh", u8, 32), Field("qs", u8, 128)),
    high_bits=1,
    groups=Groups(size=32, step=1),
)
Q6_K = BlockFormat(
    "Q6_K",
    14,
    256,
    (Field("qs", u8, 128), Field("qh", u8, 64), Field("scales", i8, 16), _D),
    offset=-32,
    high_bits=2,
    groups=Groups(size=16, step=2),
)

WEIGHT_FORMATS = {f.name: f for f in (F32, F16, BF16, Q8_0, Q4_0, IQ4_NL, Q4_K, Q5_K, Q6_K)}
CACHE_FORMATS = {
    "f32": F32,
    "f16": F16,
    "bf16": BF16,
    "q8_0": Q8_0,
    "q8_KV": Q8_KV,
    "q6_0": Q6_0,
    "q4_0": Q4_0,
    "iq4_nl": IQ4_NL,
    "q5_0": Q5_0,
}
# Types of a K-only (latent) cache; the rest hold only -mla 0's K and V, as in ik_llama.cpp.
LATENT_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q8_KV", "q6_0")
BY_GGML_TYPE = {f.ggml_type: f for f in WEIGHT_FORMATS.values()}


def transposed_type(fmt: BlockFormat) -> DType:
    """Numbers of a transposed copy of such rows: blocks do not go along columns, and f16 is
    enough for all but f32 rows, which are asked for to be exact."""
    return f32 if fmt is F32 else f16


def interleave(fmt: BlockFormat, rows: int) -> BlockFormat:
    """Such rows in groups of `rows`. Raises ValueError for a format without an integer dot."""
    if not fmt.integer_dot or fmt.interleaved:
        raise ValueError(f"{fmt.name}: rows cannot be interleaved")
    return replace(fmt, name=f"{fmt.name}_R{rows}", interleaved=rows)
