"""Work per node adds up to what the roofline counts."""

from __future__ import annotations

from typing import Any

import pytest

from mlacli.engine import Engine
from mlacli.machine import Peaks
from mlacli.roofline import batch_seconds, layer_attention, weight_work
from mlacli.work import Batch, Work, node_work
from tests.conftest import TinyModel
from tests.engines import make_engine

PEAKS = Peaks(1, int8=8e9, bf16=2e9, f32=1e9, bandwidth=4e9)
PROMPT, PART, TOKEN = Batch(24, 40, 1), Batch(24, 24, 0), Batch(1, 40, 1)


def of_nodes(engine: Engine, graph: str, batch: Batch) -> list[Work]:
    layout = engine.plan.layout
    row_bytes = {kind: n / layout.n_ctx for kind, n in layout.bytes_per_layer().items()}
    nodes = engine.plan.graphs[graph].graph.operations
    return [work for node in nodes for work in node_work(node, batch, row_bytes)]


def of_roofline(engine: Engine, path: Any, batch: Batch) -> list[Work]:
    config, weights = engine.model.config, engine.model.weights
    ways = layer_attention(config, weights, engine.plan.layout, engine.settings, batch)
    return weight_work(config, weights, batch) + config.n_layer * ways[path]


def sums(works: list[Work]) -> dict[str, float]:
    """Multiply-adds by unit, and all bytes."""
    found = {"bytes": sum(w.nbytes for w in works)}
    for work in works:
        found[work.unit] = found.get(work.unit, 0.0) + work.multiply_adds
    return found


@pytest.mark.parametrize("batch", [PROMPT, PART, TOKEN], ids=["prompt", "part", "token"])
@pytest.mark.parametrize(
    ("type", "flags"),
    [
        ("Q8_0", {"mla": 3, "type_k": "q8_0"}),
        ("F32", {"mla": 3, "type_k": "f32"}),
        ("F16", {"mla": 3, "type_k": "bf16", "fmoe": False}),
        ("Q8_0", {"mla": 3, "rtr": True}),
        ("Q8_0", {"mla": 0, "type_k": "q8_0", "type_v": "f32"}),
        ("Q8_0", {"mla": 1, "flash_attn": False}),
        ("F16", {"mla": 2, "flash_attn": False, "amb_mib": 1}),
        ("Q8_0", {"mla": 0, "flash_attn": False}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_nodes_add_up_to_the_roofline(
    tiny_model: TinyModel, type: str, flags: dict[str, Any], batch: Batch
) -> None:
    engine = make_engine(tiny_model("tiny-v3", type), n_ubatch=64, **flags)
    for name in engine.plan.graphs:
        path = ("standard" if flags["mla"] == 0 else "absorbed") if name == "few" else name
        expected = sums(of_roofline(engine, path, batch))
        assert sums(of_nodes(engine, name, batch)) == pytest.approx(expected)


def test_the_limit_is_that_of_the_cheaper_path(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model("tiny-v3", "Q8_0"), n_ubatch=64)
    for batch in (PROMPT, TOKEN):
        limit = batch_seconds(
            engine.model.config,
            engine.model.weights,
            engine.plan.layout,
            engine.settings,
            PEAKS,
            batch,
        )
        by_path = [
            sum(work.seconds(PEAKS) for work in of_roofline(engine, path, batch))
            for path in ("absorbed", "expanded")
        ]
        assert limit == pytest.approx(min(by_path))


def test_a_batch_pairs_each_token_with_the_rows_before_it() -> None:
    assert Batch(3, 3, 1).pairs == 1 + 2 + 3
    assert Batch(2, 12, 1).pairs == 11 + 12


def test_work_takes_as_long_as_its_slower_half() -> None:
    assert Work(16e9, 4e9, "int8").seconds(PEAKS) == 2.0
    assert Work(16e9, 80e9, "int8").seconds(PEAKS) == 20.0
    assert Work(2e9, 0, "bf16").seconds(PEAKS) == 1.0
    assert Work(2e9, 0, "bf16").seconds(Peaks(1, 8e9, 1e9, 2e9, 4e9)) == 1.0
