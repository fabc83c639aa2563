"""Dumped intermediates against the float64 oracle, in every mode and graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlacli.__main__ import main
from mlacli.engine import Engine
from mlacli.errors import SpaceError, UsageError
from mlacli.inside import dump as dump_module
from mlacli.inside.dump import Dumper, npz_parts, run_dump
from mlacli.settings import Request, RunSettings, fitted
from tests import reference
from tests.conftest import TinyModel
from tests.engines import make_engine, oracle

Array = NDArray[Any]
TOKENS = np.random.default_rng(5).integers(0, 4096, 21).tolist()
BATCH = 16  # 16 tokens and 5
EXACT = 1e-10
MODES: dict[str, dict[str, Any]] = {
    "mla0": {"mla": 0},
    "mla1": {"mla": 1},
    "mla2": {"mla": 2, "mla_threshold": 1},
    "plain0": {"mla": 0, "flash_attn": False},
    "plain1": {"mla": 1, "flash_attn": False},
    "plain2": {"mla": 2, "mla_threshold": 1, "flash_attn": False},
    "unfused": {"mla": 1, "fmoe": False},
}


@pytest.fixture(scope="module")
def path(tiny_model: TinyModel) -> Path:
    return tiny_model("tiny-odd", "F32", n_layer=3)


def dumped(path: Path, expression: str = "", tokens: list[int] = TOKENS, **flags: Any) -> Any:
    """Arrays by name, those of all micro-batches joined along the tokens."""
    flags = {"type_k": "f32", "type_v": "f32", "n_ubatch": BATCH, **flags}
    dumper = Dumper(make_engine(path, n_out_max=1, **flags), re.compile(expression))
    dumper.dump(tokens)
    return dumper.arrays


def tapped(path: Path, tokens: list[int]) -> tuple[dict[str, Array], reference.Forward]:
    seen: dict[str, Array] = {}
    result = oracle(path).run(tokens, tap=lambda name, value: seen.update({name: value.copy()}))
    return seen, result


def expected(path: Path, tokens: list[int]) -> dict[str, Array]:
    """What the tensors must be for all tokens, under llama.cpp's names, tokens first."""
    model = oracle(path)
    seen, result = tapped(path, tokens)
    c, found = model.config, {}
    same = ("attn_norm", "ffn_inp", "ffn_norm", "ffn_out", "l_out", "ffn_shexp", "ffn_moe_out")
    for name, value in seen.items():
        if name.startswith((*same, "ffn_moe_logits", "result_norm")):
            found[name] = value
    weights = "ffn_moe_weights" + ("_norm" if c.weights_norm else "")
    weights = "ffn_moe_weights_scaled" if c.weights_scale != 1 else weights
    for layer in range(c.n_layer):
        at = f"-{layer}"
        q, k, kv, kv_a = (seen[name + at] for name in ("q", "k", "kv", "kv_a"))
        uk = model._kv_b(layer)[:, : c.nope]
        q_latent = np.einsum("thd,hdc->thc", q[..., : c.nope], uk)
        row = np.concatenate([seen["c_kv" + at], seen["k_pe" + at]], axis=-1)[:, None]
        found |= {
            "kv_cmpr_pe" + at: kv_a,
            "kv_cmpr" + at: seen["c_kv" + at],
            "k_pe" + at: seen["k_pe" + at][:, None],
            "q_nope" + at: q[..., : c.nope],
            "q_pe" + at: q[..., c.nope :],
            "q_nope_absorbed_perm" + at: q_latent,
            "Qcur/c" + at: np.concatenate([q_latent, q[..., c.nope :]], axis=-1),
            "Qcur/h" + at: q,
            "Kcur/c" + at: row,
            "Kcur/h" + at: k,
            "Vcur" + at: row[..., : c.kv_lora],
            "kv" + at: kv.reshape(len(tokens), -1),
            "Vcur_cont" + at: kv[..., c.nope :],
            "kqv_out" + at: seen["kqv_out" + at].reshape(len(tokens), -1),
        }
    for routing in result.routing:
        found[f"ffn_moe_topk-{routing.layer}"] = routing.experts
        found[f"{weights}-{routing.layer}"] = routing.weights
        gate, up = _by_slot(model, routing, seen[f"ffn_norm-{routing.layer}"])
        hidden = gate * reference.sigmoid(gate) * up
        found[f"ffn_moe_gate-{routing.layer}"], found[f"ffn_moe_up-{routing.layer}"] = gate, up
        found[f"ffn_moe_swiglu-{routing.layer}"] = hidden
        slots = zip(routing.experts.ravel(), hidden.reshape(-1, hidden.shape[-1]), strict=True)
        down = np.array([_expert(model, routing.layer, int(e))[2] @ h for e, h in slots])
        found[f"ffn_moe_down-{routing.layer}"] = down.reshape(*routing.experts.shape, -1)
    found["result_output"] = result.logits
    return found


def _expert(model: reference.ReferenceModel, layer: int, expert: int) -> tuple[Array, ...]:
    return model._ffn(f"blk.{layer}.", "exps.weight", int(expert))


def _by_slot(
    model: reference.ReferenceModel, routing: reference.Routing, x: Array
) -> tuple[Array, Array]:
    """gate x and up x of each token's experts."""
    both = [
        [[matrix @ row for matrix in _expert(model, routing.layer, e)[:2]] for e in chosen]
        for row, chosen in zip(x, routing.experts, strict=True)
    ]
    found = np.array(both)
    return found[:, :, 0], found[:, :, 1]


def wanted_for(name: str, mode: str, known: dict[str, Array]) -> Array | None:
    """The oracle's tensor of a dumped name."""
    if name.startswith(("Qcur", "Kcur")):
        kind = "c" if mode.endswith("1") or mode == "unfused" else "h"
        name = name.replace("cur-", f"cur/{kind}-")
    return known.get(name)


@pytest.mark.parametrize("mode", MODES)
def test_all_that_is_dumped_is_what_the_oracle_has(path: Path, mode: str) -> None:
    known, n_layer, seen = expected(path, TOKENS), oracle(path).config.n_layer, set()
    for name, value in dumped(path, **MODES[mode]).items():
        base, _, batch = name.partition(".")
        rows = slice(BATCH, None) if batch else slice(0, BATCH)
        wanted = wanted_for(base, mode, known)
        if wanted is None:
            continue
        seen.add(base.rpartition("-")[0] or base)
        wanted = wanted[rows]
        is_last = base.endswith(f"-{n_layer - 1}") and base.startswith(("ffn", "l_out"))
        if is_last or base.startswith("result"):
            wanted = wanted[-1:]
        assert value.shape == wanted.shape, name
        assert reference.nmse(value, wanted) < EXACT, name
    assert len(seen) >= (25 if mode == "unfused" else 20), seen


@pytest.mark.parametrize("n_tokens", [1, 2])
def test_a_few_tokens_have_their_own_graph(path: Path, n_tokens: int) -> None:
    tokens = TOKENS[:n_tokens]
    known, found = expected(path, tokens), dumped(path, "moe", tokens, mla=1)
    assert "ffn_moe_down-1" in found  # rows by slot, not sorted by expert
    for name, value in found.items():
        if name in known:
            assert reference.nmse(value, known[name][-len(value) :]) < EXACT, name


@pytest.mark.parametrize("mode", ["plain0", "plain1", "plain2"])
def test_scores_of_all_heads_are_joined(path: Path, mode: str) -> None:
    """-amb 1 cuts K*Q into slices; the weighted sum of the values must be kqv."""
    arrays = dumped(path, "kq_soft_max-1|kqv-1|Vcur", **MODES[mode], amb_mib=1)
    weights, kqv = arrays["kq_soft_max-1"], arrays["kqv-1"]
    n_head = oracle(path).config.n_head
    assert weights.shape[:2] == (n_head, BATCH) and kqv.shape[:2] == (n_head, BATCH)
    assert np.allclose(weights.sum(axis=-1), 1)
    assert not np.triu(weights[:, :, :BATCH], 1).any()  # causal
    if mode == "plain1":
        values = arrays["Vcur-1"][:, 0]
        assert np.allclose(weights[:, :, :BATCH] @ values, kqv, atol=1e-4)


def test_watching_changes_nothing(path: Path) -> None:
    """Also where a later op takes over the memory: the logits are those of an unwatched step."""
    engine = make_engine(path, mla=1, n_out_max=1)
    plain = engine.eval(TOKENS, range(len(TOKENS))).copy()
    engine.cache.clear()
    dumper = Dumper(engine, re.compile("result_output"))
    dumper.dump(TOKENS)
    assert np.array_equal(dumper.arrays["result_output"], plain)


def test_codes_of_quantised_weights_are_decoded(tiny_model: TinyModel) -> None:
    """Q8_0 weights meet 8-bit activations: ffn_swiglu is what is multiplied, rounded to 8 bits."""
    path = tiny_model("tiny-odd", "Q8_0", n_layer=3)
    exact = oracle(path)
    h = dumped(path, "ffn_norm-0|ffn_swiglu-0", TOKENS[:16], mla=1)
    gate, up, _ = exact._ffn("blk.0.", "weight")
    gated = h["ffn_norm-0"] @ gate.T
    wanted = gated * reference.sigmoid(gated) * (h["ffn_norm-0"] @ up.T)
    error = reference.nmse(h["ffn_swiglu-0"], wanted)
    assert 1e-8 < error < 2e-4


# -- the command ----------------------------------------------------------------------------------


def silent(_: str) -> None:
    """A note that nobody reads."""


def test_run_writes_an_npz_file(path: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    file = tmp_path / "t.npz"
    request = Request("hello hello", raw=True)
    settings = fitted(model=path, mla=1, n_ubatch=BATCH, n_ctx=256, n_threads=2, type_k="f32")
    pattern = re.compile("^l_out-[01]$")
    assert run_dump(settings, request, pattern, file, write=lines.append, note=silent) == 0
    with np.load(file) as found:
        assert set(found) == {"inp_tokens", "inp_pos", "l_out-0", "l_out-1"}
        tokens = found["inp_tokens"].tolist()
        assert found["inp_pos"].tolist() == list(range(len(tokens)))
        assert found["l_out-0"].dtype == np.float32
        assert reference.nmse(found["l_out-1"], expected(path, tokens)["l_out-1"]) < EXACT
        total = found["l_out-1"].sum(dtype=np.float64)
    assert f"sum = {total:.6f}" in lines[-1] and len(lines) == 4


def test_what_matches_nothing_is_refused(monkeypatch: Any, tmp_path: Path) -> None:
    """Before anything is compiled, with the nearest names."""
    prepare: Callable[..., None] = lambda *_: pytest.fail("compiled")  # noqa: E731
    monkeypatch.setattr(Engine, "prepare", prepare)
    file, settings = tmp_path / "t.npz", RunSettings(mla=1)
    with pytest.raises(UsageError, match=r"no tensor matches 'lout-3' \(nearest: l_out-3"):
        run_dump(settings, Request("hi"), re.compile("lout-3"), file, write=silent, note=silent)


def test_more_than_there_is_memory_for_is_refused(monkeypatch: Any, path: Path) -> None:
    monkeypatch.setattr(dump_module, "available_bytes", lambda: 1 << 20)
    dumper = Dumper(make_engine(path, mla=1), re.compile("l_out"))
    with pytest.raises(SpaceError, match=r"--dump-tensors: these tensors take .* MiB, 1.00 MiB av"):
        dumper.check(["absorbed"], 1 << 16)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--dump-tensors", "("], "--dump-tensors: '(' is no expression (missing )"),
        (["--dump-tensors", ""], "--dump-tensors: the expression is empty"),
        (["--dump-tensors", "a", "--dump-file", "a.txt"], "--dump-file: a.txt: the name does not"),
        (["--dump-file", "a.npz"], "--dump-file: needs --dump-tensors REGEX"),
        (["--dump-tensors", "a", "-i"], "--dump-tensors: needs a prompt"),
    ],
)
def test_wrong_flags_give_one_line(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-p", "hi", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"error: {complaint}")
    assert captured.err.count("\n") == 1


def test_an_npz_file_is_made_piece_by_piece(tmp_path: Path) -> None:
    arrays = {"a-1": np.arange(6.0).reshape(2, 3), "b.1": np.ones(0, np.int32)}
    file = tmp_path / "t.npz"
    parts = list(npz_parts(arrays))
    file.write_bytes(b"".join(parts))
    assert len(parts) == 3
    with np.load(file) as found:
        assert {name: found[name].tolist() for name in found} == {
            name: a.tolist() for name, a in arrays.items()
        }
