from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from codegen.kernels.router import Routing, gather_rows, group_tokens, moe_sum, route
from tests.kernels import numpy_ops
from tests.kernels.harness import (
    Array,
    assert_threads_agree,
    each_target,
    run_guarded,
    run_kernel,
)

V2_LITE = Routing(n_expert=64, n_used=6, gating="softmax")
V2 = Routing(160, 6, "softmax", n_group=8, n_group_used=3, scale=16.0)
V3 = Routing(
    256, 8, "sigmoid", biased=True, n_group=8, n_group_used=4, group_score="top2", normalise=True,
    scale=2.5,
)  # fmt: skip
ROUTINGS = {
    "v2-lite": V2_LITE,
    "v2": V2,
    "v3": V3,
    "tiny": Routing(8, 2, "sigmoid", biased=True, normalise=True),
    "odd": Routing(21, 3, "softmax", n_group=3, n_group_used=2, group_score="top2"),
    "k2": Routing(384, 8, "sigmoid", biased=True, normalise=True, scale=2.827),
    "ser": replace(V3, ser_min=3, ser_threshold=0.95),
    "ser softmax": replace(V2_LITE, ser_min=1, ser_threshold=0.4, normalise=True),
    "all": Routing(4, 4, "softmax", normalise=True),
}
each_routing = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
each_count = pytest.mark.parametrize("n_tokens", [1, 31, 32, 33])


def inputs(r: Routing, n_tokens: int, logits: Array | None = None) -> dict[str, Any]:
    rng = np.random.default_rng(n_tokens + r.n_expert)
    if logits is None:
        logits = rng.normal(size=(n_tokens, r.n_expert)) * 2
    bias = (rng.normal(size=r.n_expert) * 0.1).astype(np.float32)
    return {
        "ids": np.empty((n_tokens, r.n_used), np.int32),
        "weights": np.empty((n_tokens, r.n_used), np.float32),
        "logits": logits.astype(np.float32),
        "bias": bias if r.biased else np.zeros(0, np.float32),
        "n_tokens": n_tokens,
    }


def expected(args: dict[str, Any], r: Routing) -> tuple[Array, Array]:
    return numpy_ops.route(args["logits"], args["bias"] if r.biased else None, r)


@each_target
@each_routing
@each_count
def test_route(target: Any, routing: Routing, n_tokens: int) -> None:
    args = inputs(routing, n_tokens)
    ids, weights = expected(args, routing)
    spec = route(routing=routing)

    def make() -> dict[str, Any]:
        return args | {name: np.empty_like(args[name]) for name in ("ids", "weights")}

    found = assert_threads_agree(spec, target, make, ["ids", "weights"])
    np.testing.assert_array_equal(found["ids"], ids)
    np.testing.assert_allclose(found["weights"], weights, rtol=3e-6)
    if n_tokens != 32:
        run_guarded(spec, target, args, outputs=["ids", "weights"], n_threads=2)


def test_reduction_drops_and_keeps() -> None:
    """The two cases above with smart expert reduction really do both."""
    for name in ("ser", "ser softmax"):
        ids, weights = expected(inputs(ROUTINGS[name], 33), ROUTINGS[name])
        assert (ids < 0).any() and (ids[:, -1] >= 0).any(), name
        np.testing.assert_array_equal(weights == 0, ids < 0)


@each_target
@each_routing
def test_ties_go_to_the_lower_id(target: Any, routing: Routing) -> None:
    r = replace(routing, biased=False)
    logits = np.random.default_rng(4).integers(-1, 2, (9, r.n_expert))
    logits[0] = 1
    args = inputs(r, 9, logits)
    run_kernel(route(routing=r), target, args)
    ids, weights = expected(args, r)
    np.testing.assert_array_equal(args["ids"], ids)
    np.testing.assert_allclose(args["weights"], weights, rtol=3e-6)


def dense(ids: Array, weights: Array, n_expert: int) -> Array:
    table = np.zeros((len(ids), n_expert))
    for row, of, w in zip(table, ids, weights, strict=True):
        np.add.at(row, of[of >= 0], w[of >= 0])
    return table


@each_target
@pytest.mark.parametrize("name", ["v2-lite", "v2", "odd", "all"])
@pytest.mark.parametrize("scale", [1e4, 6e4, 1e8, 1e-8, 0.0])
def test_softmax_range(target: Any, name: str, scale: float) -> None:
    """Far apart, only the best expert counts; which of the weightless follow does not matter."""
    r = ROUTINGS[name]
    logits = np.random.default_rng(6).uniform(-1, 1, (5, r.n_expert)) * scale
    args = inputs(r, 5, logits)
    run_kernel(route(routing=r), target, args)
    ids, weights = expected(args, r)
    found = dense(args["ids"], args["weights"], r.n_expert)
    if scale > 1:
        np.testing.assert_allclose(found, dense(ids, weights, r.n_expert), atol=1e-7 * r.scale)
    else:
        np.testing.assert_allclose(args["weights"], weights, rtol=1e-5)
    assert ((args["ids"] >= 0) & (args["ids"] < r.n_expert)).all()


@each_target
@each_routing
def test_faulty_logits_stay_inside(target: Any, routing: Routing) -> None:
    """Not-a-numbers give weights that are none either, and ids that no kernel could trip over."""
    logits = np.random.default_rng(6).normal(size=(3, routing.n_expert))
    logits[0] = np.nan
    logits[1] = -np.inf
    logits[2, 1] = np.nan
    args = inputs(routing, 3, logits)
    run_kernel(route(routing=routing), target, args)
    ids = args["ids"]
    assert ((ids >= -1) & (ids < routing.n_expert)).all()
    assert np.isnan(args["weights"][0]).any()


@each_target
@pytest.mark.parametrize("n_expert", [8, 64, 384])
@pytest.mark.parametrize(("n_tokens", "n_used"), [(1, 6), (31, 3), (33, 2), (512, 8)])
@pytest.mark.parametrize("drop", [False, True])
def test_group_tokens(target: Any, n_expert: int, n_tokens: int, n_used: int, drop: bool) -> None:
    rng = np.random.default_rng(n_tokens)
    ids = np.argsort(rng.random((n_tokens, n_expert)), axis=1)[:, :n_used].astype(np.int32)
    if drop:
        ids[rng.random(ids.shape) < 0.5] = -1
    offsets, order, place = numpy_ops.group_tokens(ids, n_expert)
    args: dict[str, Any] = {
        "offsets": np.empty_like(offsets),
        "order": np.empty_like(order),
        "place": np.empty_like(place),
        "ids": ids,
        "n_tokens": n_tokens,
    }
    spec = group_tokens(n_expert=n_expert, n_used=n_used)
    outputs = ["offsets", "order", "place"]
    found = run_guarded(spec, target, args, outputs=outputs, n_threads=2)
    for name, wanted in zip(outputs, (offsets, order, place), strict=True):
        np.testing.assert_array_equal(found[name], wanted, name)


def sorted_case(n_tokens: int, n_used: int, n_expert: int = 16) -> dict[str, Array]:
    """Slots of random experts, some dropped."""
    rng = np.random.default_rng(n_tokens)
    ids = np.argsort(rng.random((n_tokens, n_expert)), axis=1)[:, :n_used].astype(np.int32)
    ids[rng.random(ids.shape) < 0.3] = -1
    offsets, order, place = numpy_ops.group_tokens(ids, n_expert)
    weights = np.where(ids < 0, 0, rng.normal(size=ids.shape)).astype(np.float32)
    return {"ids": ids, "offsets": offsets, "order": order, "place": place, "weights": weights}


@each_target
@each_count
@pytest.mark.parametrize("pitch", [64, 192, 2560])
def test_gather_rows(target: Any, n_tokens: int, pitch: int) -> None:
    case = sorted_case(n_tokens, 3)
    count = int(case["offsets"][-1])
    x = np.random.default_rng(0).integers(0, 256, (n_tokens, pitch), np.uint8)
    y = np.zeros((3 * n_tokens, pitch), np.uint8)
    args: dict[str, Any] = {"y": y, "x": x, "order": case["order"], "offsets": case["offsets"]}
    padding = {"y": np.arange(3 * n_tokens)[:, None] >= count}
    spec = gather_rows(pitch=pitch, n_used=3, n_expert=16)
    found = run_guarded(spec, target, args, outputs=["y"], padding=padding, n_threads=2)["y"]
    np.testing.assert_array_equal(found[:count], x[case["order"][:count] // 3])


@each_target
@each_count
@pytest.mark.parametrize(("n", "n_used"), [(32, 1), (320, 3), (2048, 8)])
def test_moe_sum(target: Any, n_tokens: int, n: int, n_used: int) -> None:
    case = sorted_case(n_tokens, n_used)
    count = int(case["offsets"][-1])
    rng = np.random.default_rng(1)
    z = rng.normal(size=(n_tokens * n_used, n)).astype(np.float32)
    z[count:] = np.nan  # rows of no slot: never read
    y = rng.normal(size=(n_tokens, n)).astype(np.float32)
    by_expert = np.sort(np.where(case["ids"] < 0, 999, case["ids"]), axis=1)
    total = y.astype(np.float64)
    for t in range(n_tokens):
        for expert in by_expert[t][by_expert[t] < 999]:
            slot = t * n_used + int(np.flatnonzero(case["ids"][t] == expert)[0])
            row = z[case["place"][slot]].astype(np.float64)
            total[t] = (total[t] + case["weights"].ravel()[slot] * row).astype(np.float32)
    args: dict[str, Any] = {"z": z, "weights": case["weights"], "place": case["place"]}
    args["n_tokens"] = n_tokens
    spec = moe_sum(n=n, n_used=n_used)
    found = assert_threads_agree(spec, target, lambda: args | {"y": y.copy()}, ["y"])["y"]
    if target.name == "generic":  # no fused multiply-add: each product is rounded
        np.testing.assert_allclose(found, total, rtol=1e-5, atol=2e-6)
    else:
        np.testing.assert_array_equal(found, total.astype(np.float32))
    if n_tokens != 32:
        args |= {"z": np.ascontiguousarray(z[:count])}
        run_guarded(spec, target, args | {"y": y}, outputs=[], updates=["y"], n_threads=2)
