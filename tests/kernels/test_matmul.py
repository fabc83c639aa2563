"""matvec and matmul against numpy in f64 on the decoded weights, for every format and target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from codegen.formats import F32, IQ4_NL, Q8_0, BlockFormat
from codegen.kernel import KernelSpec
from codegen.kernels.matmul import Shape, matmul, matvec
from codegen.kernels.panel import panel_bytes
from codegen.kernels.panel_decode import TOKENS as WAITING
from codegen.kernels.rowdot import LONG_BYTES
from codegen.targets.base import Target
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
    a8_rows,
    activations,
    assert_close,
    each_format,
    exact_activations,
    exact_weights,
    weights,
)

MOST_THREADS = 5
TOKENS = (1, 2, 3, 5, 16, 17, 40, 100)
# (rows, columns, heads, residual): every size against every format and target is too many kernels,
# so each pair of format and target takes two of these in turn.
CASES = (
    (1, 32, 1, True),
    (7, 96, 3, False),
    (31, 160, 1, False),
    (33, 352, 2, True),
    (48, 1408, 1, True),
)
GAP = 5  # values between heads and tokens of y that are nobody's


class Case:
    """One product: sizes, inputs and what is expected."""

    def __init__(
        self,
        fmt: BlockFormat,
        target: Target,
        size: tuple[int, int, int, bool],
        exact: bool,
        n_tokens: int = max(TOKENS),
    ) -> None:
        n_rows, n_cols, n_heads, residual = size
        self.fmt, self.target, self.n_cols = fmt, target, n_cols
        rng = np.random.default_rng(n_rows + n_cols)
        make_w = exact_weights if exact else weights
        make_x = exact_activations if exact else activations
        self.w = make_w(fmt, n_heads * n_rows, n_cols, rng)
        self.x = make_x(fmt, target.weight_bias, n_tokens * n_heads, n_cols, rng)
        x_pitch = self.x.data.shape[1]
        self.shape = Shape(
            n_rows=n_rows,
            n_cols=n_cols,
            n_heads=n_heads,
            w_pitch=n_rows * fmt.row_bytes(n_cols),
            x_token=n_heads * x_pitch,
            x_head=x_pitch,
            y_token=n_heads * (n_rows + GAP) + GAP,
            y_head=n_rows + GAP,
            residual=residual,
        )
        self.residual = rng.integers(-99, 99, (n_tokens, self.shape.y_token)).astype(np.float32)

    def specs(self) -> list[KernelSpec]:
        room = panel_bytes(self.target, self.fmt, self.n_cols)
        return [
            matvec(shape=self.shape, fmt=self.fmt),
            matmul(shape=self.shape, fmt=self.fmt, scratch_bytes=-(-room // 64) * 64),
        ]

    def arguments(self, spec: KernelSpec, n_tokens: int) -> dict[str, Any]:
        s = self.shape
        rows = self.x.data[: n_tokens * s.n_heads]
        found = {
            "y": np.full((n_tokens, s.y_token), np.nan, np.float32),
            "w": self.w.data,
            "x": rows.copy(),
            "residual": self.residual[:n_tokens] if s.residual else np.zeros(0, np.float32),
            "n_tokens": n_tokens,
        }
        if "scratch" in spec.params:
            found["scratch"] = np.zeros(MOST_THREADS * dict(spec.sizes)["scratch_bytes"], np.uint8)
        return found

    def heads(self, flat: Array) -> Array:
        """(tokens, heads, rows) of what the kernel wrote."""
        s = self.shape
        rows = np.arange(s.n_heads)[:, None] * s.y_head + np.arange(s.n_rows)
        return flat[:, rows]

    def expected(self, n_tokens: int) -> tuple[Array, Array]:
        """(y, sums of the terms' absolute values)."""
        s = self.shape
        w = self.w.values.reshape(s.n_heads, s.n_rows, s.n_cols)
        x = self.x.values[: n_tokens * s.n_heads].reshape(n_tokens, s.n_heads, s.n_cols)
        added = self.heads(self.residual[:n_tokens].astype(np.float64)) * s.residual
        y = np.einsum("hrc,thc->thr", w, x) + added
        return y, np.einsum("hrc,thc->thr", np.abs(w), np.abs(x)) + np.abs(added)

    def padding(self) -> Array:
        """True for the values of a row of y that are nobody's."""
        mask = np.ones((1, self.shape.y_token), np.bool_)
        mask[0, self.heads(np.arange(self.shape.y_token)[None])] = False
        return mask


def cases(fmt: BlockFormat, target: Target) -> list[tuple[int, int, int, bool]]:
    turn = FORMATS.index(fmt) + [t.name for t in host_targets()].index(target.name)
    return [CASES[(turn + i) % len(CASES)] for i in (0, 2)]


@each_target
@each_format
def test_products(target: Target, fmt: BlockFormat) -> None:
    """Values within rounding, threads bitwise equal, nothing outside touched."""
    for size in cases(fmt, target):
        case = Case(fmt, target, size, exact=False)
        for spec in case.specs():
            for n_tokens in TOKENS:
                args = case.arguments(spec, n_tokens)
                run_kernel(spec, target, args, n_threads=2)
                assert_close(case.heads(args["y"]), *case.expected(n_tokens))

            def make(spec: KernelSpec = spec, case: Case = case) -> dict[str, Any]:
                return case.arguments(spec, 17)

            agreed = assert_threads_agree(spec, target, make, ["y"])["y"]
            run_both_ends(case, spec, make(), agreed)


def run_both_ends(case: Case, spec: KernelSpec, args: dict[str, Any], agreed: Array) -> None:
    updates = ["scratch"] if "scratch" in args else []
    found = run_guarded_rows(spec, case.target, args, case.padding(), updates)
    assert case.heads(found).tobytes() == case.heads(agreed).tobytes()
    args = case.arguments(spec, 1)
    found = run_guarded_rows(spec, case.target, args, case.padding(), updates)
    assert_close(case.heads(found), *case.expected(1))


def run_guarded_rows(
    spec: KernelSpec, target: Target, args: dict[str, Any], padding: Array, updates: list[str]
) -> Array:
    # One thread: what two leave in their scratch depends on who took which tile.
    found = run_guarded(
        spec, target, args, outputs=["y"], updates=updates, padding={"y": padding}, n_threads=1
    )
    return found["y"]


@each_target
@each_format
def test_exact(target: Target, fmt: BlockFormat) -> None:
    """Whole numbers and scales that are powers of two leave nothing to round."""
    for size in cases(fmt, target)[:2]:
        case = Case(fmt, target, size, exact=True)
        for spec in case.specs():
            for n_tokens in (1, 3, 40):
                args = case.arguments(spec, n_tokens)
                run_kernel(spec, target, args, n_threads=3)
                np.testing.assert_array_equal(case.heads(args["y"]), case.expected(n_tokens)[0])


@each_target
@pytest.mark.parametrize("fmt", [IQ4_NL, Q8_0, F32], ids=str)
def test_long_rows_are_walked_together(target: Target, fmt: BlockFormat) -> None:
    """Activations that fill the first-level cache; a matrix may end within such rows."""
    for n_rows in (5, 18):
        case = Case(fmt, target, (n_rows, LONG_BYTES // 2 + 96, 1, False), exact=True, n_tokens=2)
        spec = case.specs()[0]
        for n_tokens in (1, 2):
            args = case.arguments(spec, n_tokens)
            found = run_guarded_rows(spec, target, args, case.padding(), [])
            np.testing.assert_array_equal(case.heads(found), case.expected(n_tokens)[0])


@each_target
@pytest.mark.parametrize("fmt", [Q8_0, F32], ids=str)
def test_more_tokens_than_sums_can_wait(target: Target, fmt: BlockFormat) -> None:
    """Bitwise what the first and the last of them give alone."""
    n_tokens, few = WAITING + 19, 20
    case = Case(fmt, target, (7, 352, 1, False), exact=False, n_tokens=n_tokens)
    spec = case.specs()[1]
    args = case.arguments(spec, n_tokens)
    run_kernel(spec, target, args, n_threads=2)
    assert_close(case.heads(args["y"]), *case.expected(n_tokens))
    for chosen in (slice(0, few), slice(n_tokens - few, n_tokens)):
        alone = case.arguments(spec, few) | {"x": args["x"][chosen].copy()}
        run_kernel(spec, target, alone, n_threads=1)
        assert case.heads(alone["y"]).tobytes() == case.heads(args["y"])[chosen].tobytes()


@each_target
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_codes(target: Target, sign: int) -> None:
    """All weights -128 or 127 and all activations 127 or -127: no sum of pairs may saturate."""
    case = Case(Q8_0, target, CASES[3], exact=True)
    for code in (-128, 127):
        blocks = case.w.data.reshape(-1, Q8_0.block_bytes).copy()
        blocks[:, 2:] = np.array([code], np.int8).view(np.uint8)
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float64)
        case.w = Rows(blocks.reshape(case.w.data.shape), np.repeat(code * scales, 32, axis=1))
        n = len(case.x.data)
        codes = np.full((n, case.n_cols), sign * 127, np.int8)
        sums = np.full((n, case.n_cols // 32), -target.weight_bias * sign * 127 * 32, np.int32)
        case.x = a8_rows(codes, np.ones(sums.shape, np.float32), sums)
        for spec in case.specs():
            args = case.arguments(spec, 5)
            run_kernel(spec, target, args, n_threads=2)
            assert_close(case.heads(args["y"]), *case.expected(5))


@each_target
def test_rows_of_a_larger_matrix(target: Target) -> None:
    """v_b lies inside kv_b: heads further apart than their own rows, y in place of the residual."""
    for fmt in (Q8_0, F32):
        case = Case(fmt, target, (33, 96, 3, True), exact=True)
        step = 2 * case.shape.n_rows
        wide = Rows(np.repeat(case.w.data, 2, axis=0), np.repeat(case.w.values, 2, axis=0))
        kept = [h * step + r for h in range(3) for r in range(case.shape.n_rows)]
        case.shape = replace(case.shape, w_pitch=step * fmt.row_bytes(96))
        case.w = Rows(wide.data, wide.values[kept])
        for spec in case.specs():
            args = case.arguments(spec, 5)
            args["y"] = args["residual"] = args["residual"].copy()
            run_kernel(spec, target, args, n_threads=2)
            np.testing.assert_array_equal(case.heads(args["y"]), case.expected(5)[0])


@each_target
def test_a_set_cancel_word_ends_the_work(target: Target) -> None:
    case = Case(Q8_0, target, CASES[3], exact=True)
    for spec in case.specs():
        args = case.arguments(spec, 2)
        run_kernel(spec, target, args, cancelled=True)
        assert np.isnan(case.heads(args["y"])).any()
