"""Rows interleaved at load: copied as codegen/formats.py says, and multiplied to the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from codegen.formats import F16, IQ4_NL, Q4_0, Q4_K, Q8_0, BlockFormat, interleave
from codegen.kernels import moe, moe_few
from codegen.kernels.repacked import interleave_rows
from codegen.targets.base import Target
from tests.kernels.harness import (
    Array,
    assert_threads_agree,
    each_target,
    run_guarded,
    run_kernel,
)
from tests.kernels.matrices import Rows, exact_weights, weights
from tests.kernels.test_matmul import Case, run_both_ends
from tests.kernels.test_moe import (
    Layer,
    Run,
    check_harder,
    few_gate,
    few_matmul,
    prompt_down,
    prompt_gate,
    prompt_matmul,
    result,
    run,
)

each_format = pytest.mark.parametrize("fmt", [Q8_0, Q4_0, IQ4_NL], ids=lambda fmt: fmt.name)


def interleaved(data: Array, fmt: BlockFormat, lanes: int) -> Array:
    """The bytes of whole groups of rows, (rows, bytes) as before: field by field, rows side by
    side, codes in units of 4 bytes."""
    n_rows, row_bytes = data.shape
    blocks = data.reshape(n_rows // lanes, lanes, row_bytes // fmt.block_bytes, fmt.block_bytes)
    blocks = blocks.transpose(0, 2, 1, 3)  # (groups, blocks, lanes, bytes)
    parts = []
    for field, unit in (("d", 2), ("qs", 4)):
        at = fmt.field_offset(field)
        n_bytes = next(f.nbytes for f in fmt.fields if f.name == field)
        units = blocks[..., at : at + n_bytes].reshape(*blocks.shape[:3], -1, unit)
        parts.append(units.transpose(0, 1, 3, 2, 4).reshape(*blocks.shape[:2], -1))
    return np.ascontiguousarray(np.concatenate(parts, axis=-1)).reshape(n_rows, row_bytes)


def repacked(rows: Rows, fmt: BlockFormat, lanes: int) -> Rows:
    return Rows(interleaved(rows.data, fmt, lanes), rows.values)


def test_only_formats_with_an_integer_dot_can_be_interleaved() -> None:
    made = interleave(IQ4_NL, 16)
    assert (made.name, made.interleaved, made.size) == ("IQ4_NL_R16", 16, 32)
    assert made.row_bytes(64) == IQ4_NL.row_bytes(64)
    for fmt in (F16, Q4_K, made):
        with pytest.raises(ValueError, match=f"{fmt.name}: rows cannot be interleaved"):
            interleave(fmt, 8)


@each_target
@each_format
def test_rows_are_copied(target: Target, fmt: BlockFormat) -> None:
    """Three matrices of two groups each, with rows between them that are nobody's."""
    n, n_cols, n_mats, between = target.lanes, 96, 3, 5
    rng = np.random.default_rng(1)
    step = 2 * n + between
    rows = weights(fmt, n_mats * step, n_cols, rng).data
    wanted = np.concatenate([rows[m * step : m * step + 2 * n] for m in range(n_mats)])
    spec = interleave_rows(fmt=interleave(fmt, n))

    def make() -> dict[str, Any]:
        sizes = {"n_groups": 2 * n_mats, "n_blocks": n_cols // 32, "per_matrix": 2}
        sizes["pitch"] = step * fmt.row_bytes(n_cols)
        return {"y": np.zeros_like(wanted), "w": rows[:-between], **sizes}

    found = run_guarded(spec, target, make(), outputs=["y"])["y"]
    np.testing.assert_array_equal(found, interleaved(wanted, fmt, n))
    assert_threads_agree(spec, target, make, ["y"])


# (groups, columns, heads, residual): odd numbers of groups leave a panel half full.
SIZES = ((1, 32, 1, True), (3, 352, 2, False))


def assert_same(spec: Any, found: Any, expected: Any) -> None:
    """Bit by bit, except for few tokens: there, rows one after another are added up by columns."""
    if "vec" in spec.name:
        largest = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * largest)
    else:
        assert found.tobytes() == expected.tobytes(), spec.name


@each_target
@each_format
def test_products(target: Target, fmt: BlockFormat) -> None:
    """What the same rows one after another give; exact where nothing is to be rounded."""
    n = target.lanes
    for exact, (groups, n_cols, n_heads, residual) in zip((True, False), SIZES, strict=True):
        case = Case(fmt, target, (groups * n, n_cols, n_heads, residual), exact)
        plain = case.specs()
        other = Case(fmt, target, (groups * n, n_cols, n_heads, residual), exact)
        other.fmt, other.w = interleave(fmt, n), repacked(case.w, fmt, n)
        for before, spec in zip(plain, other.specs(), strict=True):
            for n_tokens in (1, 3, 5, 17, 40):
                args, expected = other.arguments(spec, n_tokens), case.arguments(before, n_tokens)
                run_kernel(spec, target, args, n_threads=2)
                run_kernel(before, target, expected, n_threads=2)
                assert_same(spec, other.heads(args["y"]), case.heads(expected["y"]))
                if exact:
                    found = other.heads(args["y"])
                    np.testing.assert_array_equal(found, other.expected(n_tokens)[0])

            def make(spec: Any = spec, other: Case = other) -> dict[str, Any]:
                return other.arguments(spec, 17)

            agreed = assert_threads_agree(spec, target, make, ["y"])["y"]
            run_both_ends(other, spec, make(), agreed)


@dataclass(frozen=True)
class Repacked(Layer):
    """A layer of experts whose IQ4_NL weights are interleaved."""

    def stack(self, seed: int) -> Rows:
        return repacked(self.before.stack(seed), IQ4_NL, self.target.lanes)

    @property
    def before(self) -> Layer:
        sizes = (self.n_rows, self.n_cols, self.n_tokens, self.exact)
        return Layer(self.target, IQ4_NL, *sizes)


def runs(layer: Layer) -> list[Run]:
    """Every kernel that reads experts, once."""
    by_token, by_slot = layer.inputs(layer.n_tokens), layer.inputs(layer.n_slots)
    start = np.ones((layer.n_tokens, layer.n_rows), np.float32)
    return [
        prompt_gate(layer, by_token),
        prompt_matmul(layer, layer.gate, by_slot.data[layer.kept]),
        prompt_down(layer, by_slot, start),
        few_gate(layer, by_token),
        few_matmul(layer, layer.up, by_token, per_slot=False),
        few_matmul(layer, layer.gate, by_slot, per_slot=True),
    ]


@each_target
@pytest.mark.parametrize("n_tokens", [1, 5, 40])
def test_experts(target: Target, n_tokens: int) -> None:
    n = target.lanes
    layer = Repacked(target, interleave(IQ4_NL, n), 3 * n, 96, n_tokens)
    for case, expected in zip(runs(layer), runs(layer.before), strict=True):
        found = run(layer, case)
        assert np.isfinite(found).all()
        assert_same(case[0], found, run(layer, expected))
        if n_tokens == 5:
            check_harder(layer, case)


@each_target
@pytest.mark.parametrize("few", [True, False])
def test_shared_expert_of_two_layouts(target: Target, few: bool) -> None:
    """up may be interleaved while gate is not: its type or number of rows may not allow it."""
    n, n_tokens, n_rows, n_cols = target.lanes, 5, 2 * target.lanes, 64
    layer = Layer(target, Q8_0, n_rows, n_cols, n_tokens)
    gate, up = (exact_weights(Q8_0, n_rows, n_cols, layer.rng(i)) for i in (1, 2))
    x, found = layer.inputs(n_tokens), []
    for fmt_up, data in ((Q8_0, up.data), (interleave(Q8_0, n), interleaved(up.data, Q8_0, n))):
        sizes = {"n_rows": n_rows, "n_cols": n_cols, "fmt_gate": Q8_0, "fmt_up": fmt_up}
        args: dict[str, Any] = {"gate": gate.data, "up": data, "x": x.data, "n_tokens": n_tokens}
        args["y"] = result(n_tokens, n_rows)
        if few:
            spec = moe_few.up_gate_vec(**sizes)
        else:
            args["scratch"], room = layer.scratch()
            spec = moe.up_gate(**sizes, scratch_bytes=room)
        found.append(run(layer, (spec, args)))
    assert np.isfinite(found[0]).all()
    assert_same(spec, found[0], found[1])
