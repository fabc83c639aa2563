"""What the machine can do at best: kernels that only multiply, and one that only reads.

Each runs many independent accumulators so that latency hides; results are stored so that nothing
can be left out. `bench --roof` times them on all threads, before and after every row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen.dtypes import DType, f32, i8, i16, i32, u8, u32
from codegen.kernel import kernel, ptr, value
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

OPERATIONS = ("int8", "bf16", "f32")  # those of bench --roof; kernels for "int16" are there, too


def accumulators(registers: int) -> int:
    """As many as leave room for the operands."""
    return registers * 3 // 4


def multiply_adds(what: str, lanes: int, registers: int) -> int:
    """Multiply-adds of one round of `peak` on one thread."""
    per_lane = {"int8": 4, "int16": 2, "bf16": 2, "f32": 1}[what]
    return accumulators(registers) * lanes * per_lane


@kernel(out=ptr(f32), seed=ptr(u8), rounds=value())
def peak(k: Kernel, out: Pointer, seed: Pointer, rounds: Value, *, what: str) -> None:
    """`rounds` times: every accumulator gets one dot product.

    Integer codes are the accumulator's own bits: of operands that stay the same, products made of
    several instructions would be computed once, and only their sums be left to measure.
    """
    n = k.target.lanes
    sum_type = i32 if what in ("int8", "int16") else f32
    accs = [k.var(k.zeros(sum_type * n)) for _ in range(accumulators(k.target.registers))]
    a, b = _operands(k, seed, what)
    with k.loop(0, rounds):
        for acc in accs:
            if what == "int8":
                acc.set(k.dot_i8(acc.get(), a, acc.get().bits_as(b.type)))
            elif what == "int16":
                acc.set(k.target.dot_i16(k, acc.get(), a, acc.get().bits_as(b.type)))
            elif what == "bf16":
                acc.set(k.target.dot_bf16(k, acc.get(), a, b))
            else:
                acc += a * b
    total = accs[0].get()
    for acc in accs[1:]:
        total = total + acc.get()
    out.at(k.thread * 16).store(total.to(f32))


def _operands(k: Kernel, seed: Pointer, what: str) -> tuple[Value, Value]:
    n = k.target.lanes
    types: tuple[DType, DType]
    if what == "int8":
        types = (k.target.weight_type * (4 * n), i8 * (4 * n))
    elif what == "int16":
        types = (i16 * (2 * n), i16 * (2 * n))
    elif what == "bf16":
        types = (u32 * n, u32 * n)
    else:
        types = (f32 * n, f32 * n)
    first, second = (seed.bytes(64 * i, t.scalar).load(t) for i, t in enumerate(types))
    return first, second


@kernel(out=ptr(f32), data=ptr(u32), n_bytes=value())
def read_memory(k: Kernel, out: Pointer, data: Pointer, n_bytes: Value) -> None:
    """Read every byte of this thread's share of `data` once, in order."""
    n, step = k.target.lanes, 8
    first, last = k.my_share(n_bytes // (4 * n * step))
    accs = [k.var(k.zeros(u32 * n)) for _ in range(step)]
    with k.loop(first, last) as i:
        at = data.at(i * (n * step))
        for j, acc in enumerate(accs):
            k.prefetch(at.at(j * n).bytes(4096))
            acc.set(acc.get() ^ at.at(j * n).load(u32 * n))
    total = accs[0].get()
    for acc in accs[1:]:
        total = total ^ acc.get()
    out.at(k.thread * 16).store((total & 1).to(f32))
