"""The experts' kernels against numpy in f64, and the fused ones against the separate ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest

from codegen.formats import F32, IQ4_NL, Q8_0, BlockFormat
from codegen.kernel import KernelSpec
from codegen.kernels import moe, moe_few
from codegen.kernels.activations import quantize, row_bytes
from codegen.kernels.layers import silu_mul
from codegen.kernels.panel import panel_bytes
from codegen.kernels.router import moe_sum
from codegen.targets.base import Target
from tests.kernels import numpy_ops
from tests.kernels.harness import (
    Array,
    assert_threads_agree,
    each_target,
    host_targets,
    run_guarded,
    run_kernel,
)
from tests.kernels.matrices import (
    FORMATS,
    Rows,
    activations,
    assert_close,
    each_format,
    exact_activations,
    exact_weights,
    weights,
)

MOST_THREADS = 5
SIZES = ((33, 96), (7, 352), (31, 160), (1, 32), (48, 1408))  # (rows, columns)
N_EXPERT, N_USED = 7, 3
BUSY, IDLE = 2, 5  # experts that every token and that no token chooses
# silu amplifies rounding: its argument is a sum, and its slope at most 1.1.
STEEPEST_SILU = 1.1


@dataclass(frozen=True)
class Layer:
    """Experts, and tokens that visit them; some slots are dropped."""

    target: Target
    fmt: BlockFormat
    n_rows: int
    n_cols: int
    n_tokens: int
    exact: bool = False

    def rng(self, seed: int) -> np.random.Generator:
        return np.random.default_rng((self.n_rows, self.n_cols, self.n_tokens, seed))

    def stack(self, seed: int) -> Rows:
        make = exact_weights if self.exact else weights
        return make(self.fmt, N_EXPERT * self.n_rows, self.n_cols, self.rng(seed))

    @cached_property
    def gate(self) -> Rows:
        return self.stack(1)

    @cached_property
    def up(self) -> Rows:
        return self.stack(2)

    def inputs(self, n: int) -> Rows:
        make = exact_activations if self.exact else activations
        return make(self.fmt, self.target.weight_bias, n, self.n_cols, self.rng(3))

    @cached_property
    def ids(self) -> Array:
        rng = self.rng(4)
        others = [e for e in range(N_EXPERT) if e not in (BUSY, IDLE)]
        chosen = [[BUSY, *rng.permutation(others)[: N_USED - 1]] for _ in range(self.n_tokens)]
        ids = np.array([rng.permutation(row) for row in chosen], np.int32)
        drop = np.zeros(ids.shape, np.bool_)
        drop[::3, N_USED - 1] = self.n_tokens > 1
        return np.where(drop, np.int32(-1), ids)

    @cached_property
    def factors(self) -> Array:
        """A weight per slot: a power of two, so that exact cases stay exact."""
        return (2.0 ** self.rng(5).integers(-2, 1, self.ids.shape)).astype(np.float32)

    @cached_property
    def groups(self) -> tuple[Array, Array, Array]:
        return numpy_ops.group_tokens(self.ids, N_EXPERT)

    @property
    def n_slots(self) -> int:
        return self.ids.size

    @property
    def kept(self) -> Array:
        """Slots in sorted order, dropped ones left out."""
        order: Array = self.groups[1]
        return order[order >= 0]

    def experts(self, w: Rows) -> Array:
        return w.values.reshape(N_EXPERT, self.n_rows, self.n_cols)

    def product(self, w: Rows, x: Array) -> tuple[Array, Array]:
        """w[expert of slot i] x[i] and the sums of its terms' sizes; zero for dropped slots."""
        flat = self.ids.ravel()
        matrices = self.experts(w)[flat] * (flat >= 0)[:, None, None]
        y = np.einsum("src,sc->sr", matrices, x)
        return y, np.einsum("src,sc->sr", np.abs(matrices), np.abs(x))

    def gated(self, x: Array) -> tuple[Array, Array]:
        """silu(gate x) * (up x) per slot, and what an error is relative to."""
        (gate, gate_sizes), (up, up_sizes) = self.product(self.gate, x), self.product(self.up, x)
        return gated(gate, up, gate_sizes, up_sizes)

    def scratch(self, coded_tokens: int = 0) -> tuple[Array, int]:
        room = -(-panel_bytes(self.target, self.fmt, self.n_cols) // 64) * 64
        room += moe.waiting_bytes(self.target, coded_tokens)
        return np.zeros(MOST_THREADS * room, np.uint8), room

    @property
    def sizes(self) -> dict[str, Any]:
        return {"n_rows": self.n_rows, "n_cols": self.n_cols}

    @property
    def pair(self) -> dict[str, Any]:
        return self.sizes | {"fmt_gate": self.fmt, "fmt_up": self.fmt}


def gated(gate: Array, up: Array, gate_sizes: Array, up_sizes: Array) -> tuple[Array, Array]:
    hidden = numpy_ops.silu(gate)
    return hidden * up, np.abs(hidden) * up_sizes + STEEPEST_SILU * gate_sizes * np.abs(up)


def result(n_rows: int, n_values: int) -> Array:
    return np.full((n_rows, n_values), np.nan, np.float32)


Run = tuple[KernelSpec, dict[str, Any]]


def codes(n_rows: int, n_values: int) -> Array:
    return np.zeros((n_rows, row_bytes(n_values)), np.uint8)


def as_codes(layer: Layer, rows: Array) -> Array:
    """f32 rows, quantised by a kernel of its own."""
    found = codes(len(rows), layer.n_rows)
    args: dict[str, Any] = {"y": found, "x": rows, "n_tokens": len(rows)}
    run_kernel(quantize(n=layer.n_rows), layer.target, args, 1)
    return found


def prompt_gate(layer: Layer, x: Rows, coded: bool = False) -> Run:
    most = layer.n_tokens if coded else 0
    scratch, room = layer.scratch(most)
    spec = moe.moe_up_gate(**layer.pair, n_expert=N_EXPERT, scratch_bytes=room, coded_tokens=most)
    rows = x.data[layer.kept // N_USED]
    y = (codes if coded else result)(len(rows), layer.n_rows)
    table = {"offsets": layer.groups[0], "scratch": scratch}
    return spec, {"y": y, "gate": layer.gate.data, "up": layer.up.data, "x": rows} | table


def prompt_matmul(layer: Layer, w: Rows, rows: Array) -> Run:
    """`rows` lie sorted already."""
    scratch, room = layer.scratch()
    spec = moe.moe_matmul(**layer.sizes, fmt=layer.fmt, n_expert=N_EXPERT, scratch_bytes=room)
    y = result(len(rows), layer.n_rows)
    args = {"y": y, "w": w.data, "x": rows, "offsets": layer.groups[0], "scratch": scratch}
    return spec, args


def prompt_down(layer: Layer, x: Rows, y: Array) -> Run:
    scratch, room = layer.scratch()
    spec = moe.moe_down(
        **layer.sizes, fmt=layer.fmt, n_expert=N_EXPERT, n_used=N_USED, scratch_bytes=room
    )
    offsets, order, _ = layer.groups
    tables = {"offsets": offsets, "order": order, "weights": layer.factors}
    inputs = {"w": layer.gate.data, "x": x.data[layer.kept], "scratch": scratch}
    return spec, {"y": y.copy()} | inputs | tables


def few_gate(layer: Layer, x: Rows, coded: bool = False) -> Run:
    spec = moe_few.moe_up_gate_vec(**layer.pair, n_used=N_USED, coded=coded)
    y = (codes if coded else result)(layer.n_slots, layer.n_rows)
    weights = {"gate": layer.gate.data, "up": layer.up.data}
    return spec, {"y": y, "x": x.data, "ids": layer.ids, "n_tokens": layer.n_tokens} | weights


def first_expert(layer: Layer, x: Rows, coded: bool) -> dict[str, Any]:
    size = layer.n_rows * layer.fmt.row_bytes(layer.n_cols)
    return {
        "y": (codes if coded else result)(layer.n_tokens, layer.n_rows),
        "gate": layer.gate.data.reshape(-1)[:size],
        "up": layer.up.data.reshape(-1)[:size],
        "x": x.data,
        "n_tokens": layer.n_tokens,
    }


def dense_few_gate(layer: Layer, x: Rows, coded: bool = False) -> Run:
    most = layer.n_tokens if coded else 0
    return moe_few.up_gate_vec(**layer.pair, coded_tokens=most), first_expert(layer, x, coded)


def dense_gate(layer: Layer, x: Rows, coded: bool = False) -> Run:
    most = layer.n_tokens if coded else 0
    scratch, room = layer.scratch(most)
    spec = moe.up_gate(**layer.pair, scratch_bytes=room, coded_tokens=most)
    return spec, first_expert(layer, x, coded) | {"scratch": scratch}


def few_matmul(layer: Layer, w: Rows, x: Rows, per_slot: bool) -> Run:
    spec = moe_few.moe_matmul_vec(**layer.sizes, fmt=layer.fmt, n_used=N_USED, per_slot=per_slot)
    y = result(layer.n_slots, layer.n_rows)
    args = {"y": y, "w": w.data, "x": x.data, "ids": layer.ids, "n_tokens": layer.n_tokens}
    return spec, args


def run(layer: Layer, case: Run, n_threads: int = 2) -> Array:
    """The kernel's y."""
    spec, args = case
    fresh = args | {"y": args["y"].copy()}
    run_kernel(spec, layer.target, fresh, n_threads)
    y: Array = fresh["y"]
    return y


def check_harder(layer: Layer, case: Run) -> None:
    """Any number of threads gives the same bits, and only the given memory is touched."""
    spec, args = case

    def make() -> dict[str, Any]:
        return args | {"y": args["y"].copy()}

    agreed = assert_threads_agree(spec, layer.target, make, ["y"])["y"]
    starts_empty = bool(np.isnan(args["y"]).all())
    updates = (["scratch"] if "scratch" in args else []) + ([] if starts_empty else ["y"])
    outputs = ["y"] if starts_empty else []
    found = run_guarded(spec, layer.target, make(), outputs=outputs, updates=updates)
    assert found["y"].tobytes() == agreed.tobytes()


def size_for(target: Target, fmt: BlockFormat) -> tuple[int, int]:
    names = [t.name for t in host_targets()]
    return SIZES[(FORMATS.index(fmt) + names.index(target.name)) % len(SIZES)]


@each_target
@each_format
def test_experts_of_a_prompt(target: Target, fmt: BlockFormat) -> None:
    for n_tokens in (1, 5, 40):
        layer = Layer(target, fmt, *size_for(target, fmt), n_tokens)
        by_token, by_slot = layer.inputs(n_tokens), layer.inputs(layer.n_slots)
        x = np.repeat(by_token.values, N_USED, axis=0)
        start = np.ones((n_tokens, layer.n_rows), np.float32)
        expected, sizes = layer.gated(x)
        gate = prompt_gate(layer, by_token)
        assert_close(run(layer, gate), expected[layer.kept], sizes[layer.kept])
        product = prompt_matmul(layer, layer.gate, by_slot.data[layer.kept])
        expected, sizes = layer.product(layer.gate, by_slot.values)
        assert_close(run(layer, product), expected[layer.kept], sizes[layer.kept])
        down = prompt_down(layer, by_slot, start)
        weighted, sizes = (weigh(layer, part) for part in (expected, sizes))
        assert_close(run(layer, down), start + weighted, start + sizes)
        if n_tokens == 5:
            for case in (gate, product, down):
                check_harder(layer, case)


def weigh(layer: Layer, slots: Array) -> Array:
    """Sum over each token's slots of factor * slot."""
    parts = slots.reshape(layer.n_tokens, N_USED, layer.n_rows)
    total: Array = (layer.factors[..., None].astype(np.float64) * parts).sum(axis=1)
    return total


@each_target
@each_format
def test_experts_of_few_tokens(target: Target, fmt: BlockFormat) -> None:
    for n_tokens in (1, 2, 3, 5):
        layer = Layer(target, fmt, *size_for(target, fmt), n_tokens)
        by_token, by_slot = layer.inputs(n_tokens), layer.inputs(layer.n_slots)
        x = np.repeat(by_token.values, N_USED, axis=0)
        gate = few_gate(layer, by_token)
        assert_close(run(layer, gate), *layer.gated(x))
        shared = few_matmul(layer, layer.up, by_token, per_slot=False)
        assert_close(run(layer, shared), *layer.product(layer.up, x))
        own = few_matmul(layer, layer.gate, by_slot, per_slot=True)
        expected, sizes = layer.product(layer.gate, by_slot.values)
        assert_close(run(layer, own), expected, sizes)
        if n_tokens == 5:
            for case in (gate, shared, own):
                check_harder(layer, case)


@each_target
@each_format
def test_one_expert_for_all(target: Target, fmt: BlockFormat) -> None:
    """Dense layers and shared experts."""
    n_rows, n_cols = size_for(target, fmt)
    for n_tokens in (1, 2, 3, 5, 16, 17, 40):
        layer = Layer(target, fmt, n_rows, n_cols, n_tokens)
        x = layer.inputs(n_tokens)
        gate, up = (layer.experts(w)[0] for w in (layer.gate, layer.up))
        parts = [(w @ x.values.T).T for w in (gate, up)]
        sizes = [(np.abs(w) @ np.abs(x.values).T).T for w in (gate, up)]
        for case in (dense_few_gate(layer, x), dense_gate(layer, x)):
            assert_close(run(layer, case), *gated(*parts, *sizes))
            if n_tokens == 17:
                check_harder(layer, case)


@each_target
@pytest.mark.parametrize("n_rows", [32, 64, 160])
def test_up_and_gate_as_codes(target: Target, n_rows: int) -> None:
    """a8 rows are what quantising the f32 rows gives, bit by bit; also those of dropped slots."""
    for n_tokens in (1, 5, 130) if n_rows == 64 else (5,):
        layer = Layer(target, IQ4_NL, n_rows, 96, n_tokens)
        x = layer.inputs(n_tokens)
        for make in (prompt_gate, few_gate, dense_few_gate, dense_gate):
            wanted, case = as_codes(layer, run(layer, make(layer, x))), make(layer, x, coded=True)
            assert run(layer, case).tobytes() == wanted.tobytes()
            if n_tokens == 5:
                check_harder(layer, case)


@each_target
@pytest.mark.parametrize("fmt", [IQ4_NL, F32], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("exact", [False, True], ids=["normal", "exact"])
def test_fused_is_separate(target: Target, fmt: BlockFormat, exact: bool) -> None:
    """-fmoe and -no-fmoe give the same bits, for prompts and for few tokens."""
    layer = Layer(target, fmt, 64, 96, 5, exact)
    by_token, by_slot = layer.inputs(layer.n_tokens), layer.inputs(layer.n_slots)
    start = layer.rng(6).normal(size=(layer.n_tokens, layer.n_rows)).astype(np.float32)

    parts = [
        run(layer, prompt_matmul(layer, w, by_token.data[layer.kept // N_USED]))
        for w in (layer.gate, layer.up)
    ]
    fused = run(layer, prompt_gate(layer, by_token))
    assert fused.tobytes() == separate_gate(layer, parts).tobytes()
    z = run(layer, prompt_matmul(layer, layer.gate, by_slot.data[layer.kept]))
    fused = run(layer, prompt_down(layer, by_slot, start))
    assert fused.tobytes() == separate_sum(layer, z, layer.groups[2], start).tobytes()

    parts = [run(layer, few_matmul(layer, w, by_token, False)) for w in (layer.gate, layer.up)]
    fused = run(layer, few_gate(layer, by_token))
    assert fused.tobytes() == separate_gate(layer, parts).tobytes()
    z = run(layer, few_matmul(layer, layer.gate, by_slot, True))
    if exact:
        expected, _ = layer.product(layer.gate, by_slot.values)
        np.testing.assert_array_equal(z, expected)


def separate_gate(layer: Layer, parts: list[Array]) -> Array:
    gate, up = parts
    y = np.empty_like(gate)
    args: dict[str, Any] = {"y": y, "gate": gate, "up": up, "n_tokens": len(gate)}
    run_kernel(silu_mul(n=layer.n_rows), layer.target, args)
    return y


def separate_sum(layer: Layer, z: Array, place: Array, start: Array) -> Array:
    y = start.copy()
    args: dict[str, Any] = {"y": y, "z": z, "weights": layer.factors, "place": place}
    args["n_tokens"] = layer.n_tokens
    run_kernel(moe_sum(n=layer.n_rows, n_used=N_USED), layer.target, args)
    return y


@each_target
def test_dropped_slots_are_zero(target: Target) -> None:
    """What follows quantises every row, and 0 * NaN would poison the sum."""
    layer = Layer(target, Q8_0, 33, 96, 5)
    x = layer.inputs(layer.n_tokens)
    for case in (few_gate(layer, x), few_matmul(layer, layer.gate, x, per_slot=False)):
        y = run(layer, case)
        assert (layer.ids < 0).any()
        assert not y[layer.ids.ravel() < 0].any()
        assert y[layer.ids.ravel() >= 0].all()
