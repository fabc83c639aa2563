"""Up and gate of a feed-forward layer for any number of tokens: silu(W_gate x) * (W_up x)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from codegen.dtypes import f32
from codegen.formats import BlockFormat
from codegen.kernels.activations import row_bytes, store_codes
from codegen.kernels.blocks import BLOCK
from codegen.kernels.matmul import load_rows, store_rows
from codegen.kernels.rowdot import Store
from codegen.kernels.rows import vectors
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


@dataclass(frozen=True)
class Hidden:
    """Where rows of n values silu(gate x) * (up x) go: f32, or a8 where the matrix that reads them
    meets codes. Those wait as f32 [token][rows] until `rows` values of every token are there.
    """

    y: Pointer
    n: int
    rows: int
    waiting: Pointer | None

    @property
    def pitch(self) -> int:
        return 4 * self.n if self.waiting is None else row_bytes(self.n)

    def from_row(self, index: Value) -> Hidden:
        return replace(self, y=self.y.bytes(index * self.pitch))

    def place(self, t: Value, first: Value) -> Pointer:
        """Where values of token t from `first` on lie as f32."""
        if self.waiting is None:
            return self.y.cast(f32).at(t * self.n + first)
        return self.waiting.at(t * self.rows + first % self.rows)

    def close(self, k: Kernel, first: Value, n_tokens: Value | int) -> None:
        """The values from `first` on, `rows` at most, are there."""
        waiting = self.waiting
        if waiting is None:
            return
        with k.loop(0, n_tokens) as t, k.loop(0, k.minimum(self.rows, self.n - first), BLOCK) as i:
            values = vectors(k, waiting.at(t * self.rows + i), BLOCK)
            store_codes(k, self.y.bytes(t * self.pitch), self.n, (first + i) // BLOCK, values)


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
