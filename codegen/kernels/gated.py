"""Up and gate of a feed-forward layer for any number of tokens: silu(W_gate x) * (W_up x)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from codegen.formats import BlockFormat
from codegen.kernels.activations import row_bytes
from codegen.kernels.matmul import load_rows, store_rows
from codegen.kernels.rowdot import Store
from codegen.values import Pointer, Value
from codegen.vecmath import silu

if TYPE_CHECKING:
    from codegen.builder import Kernel


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, perhaps the first of a stack."""

    data: Pointer
    fmt: BlockFormat
    n_rows: int
    n_cols: int

    @property
    def x_pitch(self) -> int:
        """Bytes from one row of its input to the next: a8 rows, or f32 for other formats."""
        return row_bytes(self.n_cols) if self.fmt.integer_dot else 4 * self.n_cols

    @property
    def pitch(self) -> int:
        return self.fmt.row_bytes(self.n_cols)

    def row(self, index: Value) -> Pointer:
        return self.data.bytes(index * self.pitch)

    def expert(self, index: Value) -> Matrix:
        """Another one of the stack."""
        return replace(self, data=self.row(index * self.n_rows))


# Multiplies some rows of a matrix with all tokens; the pointer is to what will be read after them.
Multiply = Callable[[Matrix, Pointer, Store], None]


def gated(
    k: Kernel,
    gate: Matrix,
    up: Matrix,
    first: Value,
    following: Pointer,
    place: Callable[[Value], Pointer],
    multiply: Multiply,
) -> None:
    """place(t) = silu(gate x[t]) * (up x[t]) for the rows from `first` on: gate waits there for up.
    `following`: what is read after both.

    Matrices of one format share their code.
    """

    def store_gate(t: Value, total: Value) -> None:
        store_rows(k, place(t), total, first, gate.n_rows)

    def store_product(t: Value, total: Value) -> None:
        waiting = load_rows(k, place(t), total.type, first, gate.n_rows)
        store_rows(k, place(t), silu(k, waiting) * total, first, gate.n_rows)

    if gate.fmt != up.fmt:
        multiply(gate, up.row(first), store_gate)
        multiply(up, following, store_product)
        return
    with k.loop(0, 2) as turn:
        is_gate = turn.eq(0)

        def store(t: Value, total: Value) -> None:
            with k.either(is_gate) as (yes, no):
                with yes:
                    store_gate(t, total)
                with no:
                    store_product(t, total)

        matrix = replace(gate, data=k.select_pointer(is_gate, gate.data, up.data))
        multiply(matrix, k.select_pointer(is_gate, up.row(first), following), store)
