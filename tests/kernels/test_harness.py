"""The harness must catch what it is there for: kernels that are wrong on purpose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from codegen.dtypes import f32, i64
from codegen.kernel import dim, kernel, ptr, value
from tests.kernels.harness import (
    GuardFailure,
    assert_threads_agree,
    each_target,
    host_targets,
    nmse,
    run_guarded,
    run_kernel,
)


@kernel(y=ptr(f32), x=ptr(f32), factor=value(f32), first=value(i64), n=dim())
def scale(
    k: Any, y: Any, x: Any, factor: Any, first: Any, n: Any, *, extra: int, back: int
) -> None:
    """y[i] = factor * x[i] for i in first .. n - 1, reading or writing past the ends on demand."""
    with k.tiles(n - first + extra) as i:
        y[i + first] = x[i + first - back] * factor


@kernel(y=ptr(f32), z=ptr(f32), x=ptr(f32), n=dim())
def turn_twice(k: Any, y: Any, z: Any, x: Any, n: Any) -> None:
    """y = x reversed, by tiles; then z = y reversed, by shares: wrong without the barrier."""
    with k.tiles(n) as i:
        y[i] = x[n - 1 - i]
    k.barrier()
    with k.loop(*k.my_share(n)) as i:
        z[i] = y[n - 1 - i]


@kernel(y=ptr(f32))
def libm(k: Any, y: Any) -> None:
    """What LLVM turns into a call, though no C function is named here."""
    y[0] = k.intrinsic("llvm.exp2.f32", f32, y[0])


def case(n: int = 33) -> dict[str, Any]:
    x = np.arange(1, n + 1, dtype=np.float32)
    return {"y": np.zeros(n, np.float32), "x": x, "factor": 0.5, "first": 0, "n": n}


@each_target
def test_runs(target: Any) -> None:
    args = case()
    found = assert_threads_agree(scale(extra=0, back=0), target, case, ["y"])
    assert np.array_equal(found["y"], args["x"] * 0.5)
    guarded = run_guarded(scale(extra=0, back=0), target, args, outputs=["y"], n_threads=3)
    assert np.array_equal(guarded["y"], args["x"] * 0.5)


@pytest.mark.parametrize("sizes", [{"extra": 1, "back": 1}, {"extra": 0, "back": 1}])
def test_stray_access_is_a_signal(sizes: dict[str, int]) -> None:
    with pytest.raises(GuardFailure, match="SIG"):
        run_guarded(scale(**sizes), host_targets()[0], case(), outputs=["y"])


def test_writing_an_input_is_a_signal() -> None:
    with pytest.raises(GuardFailure, match="SIG"):
        run_guarded(scale(extra=0, back=0), host_targets()[0], case(), outputs=[])


def test_unwritten_and_padding() -> None:
    spec, target = scale(extra=0, back=0), host_targets()[0]
    skipping = case() | {"first": 1}
    with pytest.raises(GuardFailure, match=r"left unwritten: y\[\[0\]\]"):
        run_guarded(spec, target, skipping, outputs=["y"])
    padding = {"y": np.arange(33) == 0}
    assert run_guarded(spec, target, skipping, outputs=["y"], padding=padding)["y"][1] == 1.0
    with pytest.raises(GuardFailure, match=r"wrote padding: y\[\[0\]\]"):
        run_guarded(spec, target, case(), outputs=["y"], padding=padding)


def test_parameters_are_checked() -> None:
    with pytest.raises(TypeError, match="wants"):
        run_kernel(scale(extra=0, back=0), host_targets()[0], {"y": np.zeros(1)})
    with pytest.raises(TypeError, match="contiguous"):
        strided = case() | {"x": np.zeros(66, np.float32)[::2]}
        run_kernel(scale(extra=0, back=0), host_targets()[0], strided)


def test_nmse() -> None:
    assert nmse(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0.0
    assert nmse(np.array([1.1]), np.array([1.0])) == pytest.approx(0.01)
    assert nmse(np.array([1.0]), np.array([0.0])) == float("inf")


@each_target
def test_barrier(target: Any) -> None:
    for n in (1, 2, 5, 4000):
        x = np.arange(n, dtype=np.float32)
        for n_threads in (1, 2, 3, 5, 8):
            args = {"y": np.zeros_like(x), "z": np.zeros_like(x), "x": x, "n": n}
            run_kernel(turn_twice(), target, args, n_threads, jitter=True)
            np.testing.assert_array_equal(args["z"], x)
            np.testing.assert_array_equal(args["y"], x[::-1])


def test_cancelled_before_the_first_tile() -> None:
    args = case()
    run_kernel(scale(extra=0, back=0), host_targets()[0], args, 2, cancelled=True)
    assert not args["y"].any()


def test_calls_that_llvm_adds_are_seen() -> None:
    with pytest.raises(GuardFailure, match="exp2f"):
        run_kernel(libm(), host_targets()[-1], {"y": np.zeros(1, np.float32)})
