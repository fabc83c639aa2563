"""The engine as sessions use it: sequences, truncation, wanted rows, threads, cancelling."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codegen.ahead import WALK_WORDS
from codegen.cache_dir import ObjectCache
from codegen.jit import Jit
from codegen.pool import Pool
from mlacli import machine
from mlacli.engine import Cancelled
from mlacli.errors import SpaceError, UsageError
from mlacli.graph.node import Node
from mlacli.graph.program import Program
from mlacli.model.choose import MachineProfile
from mlacli.settings import fitted
from mlacli.signals import stop_on_signals
from tests import reference
from tests.conftest import TinyModel
from tests.engines import (
    all_logits,
    logits_and_experts,
    make_engine,
    oracle,
    shared_jit,
    shared_pool,
)

TOKENS = np.random.default_rng(3).integers(0, 4096, 150).tolist()
EXACT = 1e-10
MODES = pytest.mark.parametrize(
    ("mla", "flash_attn"), [(mla, fa) for mla in (0, 1, 2) for fa in (True, False)]
)


# -- the same numbers, whoever computes them ----------------------------------------------------


@MODES
def test_threads_do_not_change_a_bit(tiny_model: TinyModel, mla: int, flash_attn: bool) -> None:
    path, runs = tiny_model("tiny-v3", "Q8_0"), []
    for n_threads in (1, 2, 3, 5):
        engine = make_engine(
            path,
            mla=mla,
            flash_attn=flash_attn,
            mla_threshold=30 if mla == 2 else None,
            n_ubatch=64,
            n_threads=n_threads,
        )
        runs.append(all_logits(engine, TOKENS))
        token = engine.eval([5], [len(TOKENS)])
        runs[-1] = np.concatenate([runs[-1], token])
    assert all(np.array_equal(run, runs[0]) for run in runs)


def test_object_code_from_disk_gives_the_same_bits(tiny_model: TinyModel, tmp_path: Path) -> None:
    path, target = tiny_model("tiny-v3", "Q8_0"), shared_jit().target
    runs = []
    for _ in ("cold", "warm"):
        jit = Jit(target, ObjectCache(tmp_path / "objects"))
        runs.append(all_logits(make_engine(path, n_ubatch=64, jit=jit), TOKENS))
    assert jit.compiled == 0
    assert jit.loaded > 10
    assert np.array_equal(runs[0], runs[1])


@pytest.mark.parametrize("n_ubatch", [64, 3])
@pytest.mark.parametrize("type", ["F32", "Q8_0"])
def test_fused_and_separate_experts_agree(tiny_model: TinyModel, type: str, n_ubatch: int) -> None:
    path = tiny_model("tiny-v3", type)
    fused = all_logits(make_engine(path, n_ubatch=n_ubatch), TOKENS)
    separate = all_logits(make_engine(path, n_ubatch=n_ubatch, fmoe=False), TOKENS)
    assert reference.nmse(separate, fused) <= EXACT


@pytest.mark.parametrize("n_ubatch", [64, 3])
def test_reduction_to_one_expert_is_the_model_with_one_expert(
    tiny_model: TinyModel, n_ubatch: int
) -> None:
    both, one = tiny_model("tiny-v3", "F32"), tiny_model("tiny-v3", "F32", n_used=1)
    flags: dict[str, Any] = {"n_ubatch": n_ubatch, "type_k": "f32"}
    for fmoe in (True, False):
        got = all_logits(make_engine(both, ser=(1, 1.0), fmoe=fmoe, **flags), TOKENS)
        expected = oracle(one).forward(TOKENS)
        assert reference.nmse(got, expected) <= EXACT
    all_of_them = all_logits(make_engine(both, ser=(2, 1.0), **flags), TOKENS)
    assert np.array_equal(all_of_them, all_logits(make_engine(both, **flags), TOKENS))


def test_reduction_drops_what_weighs_little(tiny_model: TinyModel) -> None:
    path = tiny_model("tiny-v3", "F32")
    dropped = []
    for threshold in (0.0, 0.8, 0.9, 1.0):
        engine = make_engine(path, ser=(1, threshold), n_ubatch=64, keep_experts=True)
        _, experts = logits_and_experts(engine, TOKENS)
        assert all((layer[:, 0] >= 0).all() for layer in experts)
        dropped.append(sum(int((layer < 0).sum()) for layer in experts))
    assert dropped == sorted(dropped)
    assert dropped[0] == 0 < dropped[1] < dropped[2] < dropped[3] == 3 * len(TOKENS)


# -- the cache ----------------------------------------------------------------------------------


@MODES
def test_two_sequences_in_one_cache_do_not_see_each_other(
    tiny_model: TinyModel, mla: int, flash_attn: bool
) -> None:
    path = tiny_model("tiny-v3", "F32")
    flags: dict[str, Any] = {"mla": mla, "flash_attn": flash_attn, "type_k": "f32", "type_v": "f32"}
    engine = make_engine(path, n_ubatch=64, mla_threshold=30 if mla == 2 else None, **flags)
    first, second = TOKENS[:40], TOKENS[40:80]
    mixed = [t for pair in zip(first, second, strict=True) for t in pair]
    positions = [i // 2 for i in range(80)]
    both = engine.eval(mixed, positions, [i % 2 for i in range(80)], wanted=range(80))
    for sequence, alone in enumerate((first, second)):
        expected = oracle(path).forward(alone)
        assert reference.nmse(both[sequence::2], expected) <= EXACT


@pytest.mark.parametrize("flash_attn", [True, False])
def test_truncated_sequence_goes_on_as_if_the_rest_had_never_been(
    tiny_model: TinyModel, flash_attn: bool
) -> None:
    engine = make_engine(tiny_model("tiny-v3", "Q8_0"), n_ubatch=64, flash_attn=flash_attn)
    all_logits(engine, TOKENS[:20])
    expected = engine.eval(TOKENS[20:30], range(20, 30), wanted=range(10)).copy()
    engine.cache.truncate(0, 20)
    engine.eval(TOKENS[100:130], range(20, 50))
    engine.cache.truncate(0, 20)
    got = engine.eval(TOKENS[20:30], range(20, 30), wanted=range(10))
    assert np.array_equal(got, expected)


def test_a_context_can_be_filled_to_the_last_cell_and_no_further(tiny_model: TinyModel) -> None:
    path, tokens = tiny_model("tiny-v3", "F32"), TOKENS + TOKENS[:106]
    engine = make_engine(path, n_ctx=256, n_ubatch=100, type_k="f32")
    got = all_logits(engine, tokens)
    assert engine.cache.n_used == engine.n_ctx == len(tokens)
    expected = all_logits(make_engine(path, n_ctx=512, n_ubatch=100, type_k="f32"), tokens)
    assert np.array_equal(got, expected)
    with pytest.raises(SpaceError, match=r"the context is full: 256 of 256 cells are in use"):
        engine.eval([1], [256])
    assert engine.cache.n_used == 256
    engine.cache.truncate(0, 255)
    again = engine.eval(tokens[255:], [255])
    assert reference.nmse(again, got[255:]) <= EXACT  # computed by another program
    assert engine.cache.n_used == 256


# -- wanted rows --------------------------------------------------------------------------------


def test_only_wanted_logits_are_computed(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model("tiny-v3", "Q8_0"), n_ubatch=64, n_out_max=3)
    full = make_engine(tiny_model("tiny-v3", "Q8_0"), n_ubatch=64)
    expected = all_logits(full, TOKENS)
    for wanted in ([149], [0, 63, 64], [1, 70, 140, 149]):
        engine.cache.clear()
        got = engine.eval(TOKENS, range(150), wanted=wanted)
        assert np.array_equal(got, expected[wanted])
    assert engine.plan.output_bytes == 3 * 4 * 4096
    with pytest.raises(UsageError, match="logits of 4 tokens wanted, at most 3 planned"):
        engine.step(TOKENS[10:14], range(10, 14), [0] * 4, range(4))


def test_more_logits_than_planned_come_in_smaller_batches(tiny_model: TinyModel) -> None:
    path = tiny_model("tiny-v3", "F32")
    flags: dict[str, Any] = {"n_ubatch": 64, "type_k": "f32"}
    got = all_logits(make_engine(path, n_out_max=3, **flags), TOKENS[:10])
    assert reference.nmse(got, all_logits(make_engine(path, **flags), TOKENS[:10])) <= EXACT


# -- ending a step ------------------------------------------------------------------------------


def test_cancel_ends_a_long_prompt_and_leaves_the_cache_usable(tiny_model: TinyModel) -> None:
    tokens = (TOKENS * 20)[:3000]
    engine = make_engine(
        tiny_model("tiny-lite", "F32"), n_ctx=4096, n_ubatch=3000, n_out_max=1, mla=1
    )
    engine.eval(TOKENS[:50], range(50))
    expected = engine.eval(TOKENS[50:100], range(50, 100)).copy()
    engine.cache.truncate(0, 50)
    asked = 0.0

    def cancel() -> None:
        nonlocal asked
        asked = time.monotonic()
        engine.cancel()

    timer = threading.Timer(0.2, cancel)
    timer.start()
    with pytest.raises(Cancelled):
        engine.eval(tokens, range(50, 3050))
    assert asked > 0
    assert time.monotonic() - asked <= 1.0  # 0.25 s on a machine of one's own
    timer.join()
    assert engine.cache.n_used == 50
    assert np.array_equal(engine.eval(TOKENS[50:100], range(50, 100)), expected)


# -- which path ---------------------------------------------------------------------------------


def test_a_signal_that_comes_when_nothing_runs_ends_no_later_step(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model("tiny-v3"))
    with stop_on_signals(engine) as received:
        os.kill(os.getpid(), signal.SIGINT)
        while not received:
            time.sleep(0.001)
    assert engine.eval([1], [0]).shape == (1, engine.model.config.n_vocab)


def test_machines_with_other_rates_choose_other_paths(tiny_model: TinyModel) -> None:
    path = tiny_model("tiny-v3", "F32")
    slow_matrices = MachineProfile(1e12, 1e12, 1e6, 1e6)
    slow_absorbed = MachineProfile(1e9, 1e12, 1e12, 1e12)
    runs = {}
    for profile, chosen in ((slow_matrices, "absorbed"), (slow_absorbed, "expanded")):
        engine = make_engine(path, type_k="f32", n_ubatch=64, profile=profile)
        engine.eval(TOKENS[:100], range(100))
        assert engine.graph_name(50) == chosen
        assert engine.graph_name(1) == "few"
        runs[chosen] = engine.eval(TOKENS[100:], range(100, 150), wanted=range(50)).copy()
    assert not np.array_equal(runs["absorbed"], runs["expanded"])
    assert reference.nmse(runs["absorbed"], runs["expanded"]) <= EXACT


# -- memory asked for ahead -----------------------------------------------------------------------

READERS = ("matmul", "up_gate", "absorb_q", "matmul_heads", "moe_up_gate", "moe_matmul")


def test_what_reads_weights_asks_for_the_next_ones(tiny_model: TinyModel) -> None:
    """Also for the chosen experts' once they are known; the last one of a step for nothing."""
    engine = make_engine(tiny_model("tiny-v3", "IQ4_NL"), type_k="f32")
    program = engine.program("few")
    nodes = program.nodes
    weights = [node.inputs[0] for node in nodes]
    readers = [
        i
        for i, node in enumerate(nodes)
        if node.op in READERS and _is_matrix(weights[i]) and node is not nodes[i - 1]
    ]  # absorb_q has two launches, the second one rotates
    asked = {i: words for i in range(len(nodes)) if (words := _walk(program, i))}
    assert set(asked) <= {0, *readers}  # the first launch looks up embeddings
    for i, after in zip([0, *readers], [*readers, None], strict=True):
        if after is None or nodes[after].op == "moe_up_gate":
            assert i not in asked  # nothing is left, or experts are yet to be chosen
            continue
        base, n, parts, pitch, part_bytes, ids = asked[i]
        matrix = weights[after].attrs["matrix"]
        assert base == engine.model.weights.address(matrix)
        chosen = nodes[after].op == "moe_matmul"
        assert (n, pitch, ids != 0) == (
            engine.model.config.n_expert_used if chosen else matrix.n_mats,
            matrix.pitch,
            chosen,
        )
        rows = part_bytes // matrix.fmt.row_bytes(matrix.n_cols)
        assert rows % 32 == 0 and (parts - 1) * rows < matrix.n_rows <= parts * rows


def test_batches_ask_for_nothing_ahead(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model("tiny-v3", "IQ4_NL"), type_k="f32")
    assert not engine.program("absorbed").table[:, 3].any()


def _is_matrix(node: Node) -> bool:
    return node.op == "weight" and node.attrs["matrix"].n_rows > 1


def _walk(program: Program, i: int) -> tuple[int, ...]:
    address = int(program.table[i, 3])
    return tuple((ctypes.c_int64 * WALK_WORDS).from_address(address)) if address else ()


# -- the machine's profile ------------------------------------------------------------------------


def test_only_what_is_chosen_by_it_needs_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One per cache type, measured once, and kept."""
    monkeypatch.setenv("MLACLI_CACHE_DIR", str(tmp_path))
    measured: list[str] = []

    def measure(jit: Jit, pool: Pool, n_threads: int, type_k: str) -> MachineProfile:
        measured.append(type_k)
        return MachineProfile(1e9, 2e9, 3e9, 4e9)

    monkeypatch.setattr(machine, "measure_profile", measure)
    jit, pool = shared_jit(), shared_pool()
    for flags in ({"mla": 0}, {"mla": 2}, {"mla_threshold": 7}):
        assert machine.machine_profile(jit, pool, fitted(**flags)) is None
    for type_k in ("f16", "q8_KV", "f16", "q8_KV"):
        found = machine.machine_profile(jit, pool, fitted(type_k=type_k))
        assert found == MachineProfile(1e9, 2e9, 3e9, 4e9)
    assert measured == ["f16", "q8_KV"]
    assert machine.kept_profile(jit.target, fitted().n_threads_batch, "q6_0") is None
