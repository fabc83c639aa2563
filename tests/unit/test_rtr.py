"""-rtr: the same logits from copied weights, and the report knows every copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from codegen.formats import interleave
from mlacli.engine import Cancelled, load_model
from mlacli.fit import planned_need
from mlacli.graph.matrix import Matrix
from mlacli.loading import progress_lines
from mlacli.report import Report, make_report
from mlacli.report_format import format_report
from mlacli.settings import RunSettings, notes
from tests.conftest import TinyModel
from tests.engines import all_logits, make_engine, shared_jit
from tests.reference import per_token_nmse

TOKENS = np.random.default_rng(3).integers(0, 4096, 150).tolist()
LANES = shared_jit().target.lanes


def copies(matrices: list[Matrix]) -> list[Matrix]:
    return [m for m in matrices if m.source]


# -- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mla", [0, 1, 2])
@pytest.mark.parametrize(("type_", "flash_attn"), [("IQ4_NL", True), ("Q8_0", False)])
def test_prompts_keep_every_bit_and_tokens_all_but_rounding(
    tiny_model: TinyModel, mla: int, type_: str, flash_attn: bool
) -> None:
    """Batches of three tokens, as in generation, are added up in another order: a sum's last bit
    can change a code of what is multiplied next, and what comes later sees it."""
    path = tiny_model("tiny-odd", type_)
    flags: dict[str, Any] = {"mla": mla, "flash_attn": flash_attn}
    flags["mla_threshold"] = 30 if mla == 2 else None
    for n_ubatch in (64, 3):
        engine = make_engine(path, rtr=True, n_ubatch=n_ubatch, **flags)
        assert len(copies(engine.plan.derived())) >= 34  # all but norms, biases, router, embedding
        expected = all_logits(make_engine(path, n_ubatch=n_ubatch, **flags), TOKENS)
        found = all_logits(engine, TOKENS)
        if n_ubatch == 64:
            assert np.array_equal(found, expected)
        else:
            assert per_token_nmse(found[:1], expected[:1])[0] < 1e-9


@pytest.mark.parametrize("kv_b", ["both", "split"])
def test_not_a_bit_is_changed_with_split_kv_b(tiny_model: TinyModel, kv_b: str) -> None:
    path = tiny_model("tiny-v3", "Q4_0", kv_b)
    flags: dict[str, Any] = {"mla": 2, "mla_threshold": 30, "n_ubatch": 64}
    expected = all_logits(make_engine(path, **flags), TOKENS)
    got = all_logits(make_engine(path, rtr=True, **flags), TOKENS)
    assert np.array_equal(got, expected)


def test_threads_do_not_change_a_bit(tiny_model: TinyModel) -> None:
    path, runs = tiny_model("tiny-odd", "IQ4_NL"), []
    for n_threads in (1, 2, 3, 5):
        flags: dict[str, Any] = {"mla": 2, "mla_threshold": 30, "n_threads": n_threads}
        engine = make_engine(path, rtr=True, n_ubatch=64, **flags)
        token = all_logits(engine, TOKENS), engine.eval([5], [len(TOKENS)])
        runs.append(np.concatenate(token))
    assert all(np.array_equal(run, runs[0]) for run in runs)


# -- copying ------------------------------------------------------------------------------------


def test_all_is_copied_once_and_told(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model("tiny-odd", "IQ4_NL"), rtr=True)
    told: list[tuple[int, int]] = []
    engine.repack(lambda done, total: told.append((done, total)))
    wanted = copies(engine.plan.derived())
    total = sum(m.nbytes for m in wanted)
    assert [done for done, _ in told] == list(np.cumsum([m.nbytes for m in wanted]))
    assert {total for _, total in told} == {total}
    addresses = [engine.model.weights.address(m) for m in wanted]
    engine.repack(lambda done, total: pytest.fail("copied again"))
    engine.eval(TOKENS[:20], range(20))
    assert [engine.model.weights.address(m) for m in wanted] == addresses


def test_copying_can_be_cancelled_and_goes_on_later(tiny_model: TinyModel) -> None:
    path = tiny_model("tiny-odd", "IQ4_NL")
    engine = make_engine(path, rtr=True)
    with pytest.raises(Cancelled):
        engine.repack(lambda done, total: engine.cancel())
    expected = make_engine(path).eval(TOKENS[:20], range(20))
    assert np.array_equal(engine.eval(TOKENS[:20], range(20)), expected)


def test_what_has_not_been_copied_has_no_address(tiny_model: TinyModel) -> None:
    weights = load_model(tiny_model("tiny-odd", "IQ4_NL")).weights
    matrix = weights.interleaved(weights.matrix("output.weight"), 16)
    with pytest.raises(LookupError, match=r"output\.weight has not been interleaved"):
        weights.address(matrix)


def test_which_matrices_are_interleaved(tiny_model: TinyModel) -> None:
    weights = load_model(tiny_model("tiny-odd", "IQ4_NL")).weights
    experts = weights.matrix("blk.1.ffn_up_exps.weight")
    made = weights.interleaved(experts, 16)
    assert made.fmt == interleave(experts.fmt, 16)
    assert (made.derived, made.is_copy, made.source) == (True, True, experts)
    assert (made.pitch, made.nbytes) == (experts.pitch, experts.nbytes)
    v_b = weights.v_b(0)
    made = weights.interleaved(v_b, 16)
    assert v_b.offset > 0 and made.offset == 0
    assert made.pitch == v_b.n_rows * v_b.fmt.row_bytes(v_b.n_cols) < v_b.pitch
    assert made.name == v_b.name
    k_b = weights.interleaved(weights.k_b(0), 16)
    assert k_b.fmt.name == "Q8_0_R16" and not k_b.is_copy  # the file has no k_b
    assert weights.interleaved(experts, 0) is experts
    assert weights.interleaved(experts, 64) is experts  # 96 rows
    for name in ("token_embd.weight", "blk.1.ffn_gate_inp.weight", "output_norm.weight"):
        matrix = weights.matrix(name)
        assert weights.interleaved(matrix, 1) is matrix


# -- telling ------------------------------------------------------------------------------------


def reported(tiny_model: TinyModel, type_: str, **given: Any) -> Report:
    path = tiny_model("v2-lite", type_, sparse=True)
    return make_report(RunSettings(model=path, rtr=True, **given), 2**60)


def test_report_lists_the_copies(tiny_model: TinyModel) -> None:
    """V2-Lite: all but the embedding and the float tensors; k_b is made, not copied."""
    report = reported(tiny_model, "IQ4_NL")
    listed = {d.name: (d.type, d.count, d.nbytes, d.is_copy) for d in report.derived}
    iq4_nl = f"IQ4_NL_R{LANES}"
    assert listed["ffn_up_exps.weight"] == (iq4_nl, 26, 26 * 64 * 1408 * 1152, True)
    assert listed["attn_kv_b.weight"] == (iq4_nl, 2 * 27, 27 * 4096 * 288, True)
    assert listed["output.weight"] == (iq4_nl, 1, 102400 * 1152, True)
    assert listed["attn_k_b.weight"] == (f"Q8_0_R{LANES}", 27, 27 * 16 * 512 * 136, False)
    assert "token_embd.weight" not in listed
    in_file = report.model.tensor_types["IQ4_NL"].nbytes
    copied = sum(d.nbytes for d in report.derived if d.is_copy)
    assert copied == in_file - 102400 * 1152
    assert report.derived_bytes == copied + 27 * 16 * 512 * 136
    assert not any("-rtr" in note for note in report.notes)


def test_copies_count_as_memory_and_their_originals_do_not_page(tiny_model: TinyModel) -> None:
    report = reported(tiny_model, "IQ4_NL")
    needed = report.memory.needed_bytes
    assert needed == (
        report.derived_bytes + report.cache.nbytes + report.compute_bytes + report.output_bytes
    )
    path, gib = tiny_model("v2-lite", "IQ4_NL", sparse=True), 2**30
    verdicts = {
        room: make_report(RunSettings(model=path, rtr=True), needed + room).memory.verdict
        for room in (-1, 0, gib // 2)
    }
    assert verdicts == {
        -1: "does not fit",
        0: "weights will page from disk",  # the embedding
        gib // 2: "fits",
    }


def test_report_text_marks_the_copies(tiny_model: TinyModel) -> None:
    path = tiny_model("v2-lite", "IQ4_NL", sparse=True)
    lines = format_report(make_report(RunSettings(model=path, rtr=True))).splitlines()
    (down,) = (line for line in lines if line.startswith("  ffn_down_exps.weight"))
    assert (
        down.split() == f"ffn_down_exps.weight 2574.00 MiB 26 x IQ4_NL_R{LANES}, -rtr copy".split()
    )
    assert "-rtr" not in format_report(make_report(RunSettings(model=path)))


def test_a_flag_without_effect_says_so(tiny_model: TinyModel) -> None:
    for type_ in ("F32", "BF16", "Q4_K"):
        path = tiny_model("tiny-v3", type_, sparse=True, q_lora=256, kv_lora=256, n_ff_exp=256)
        report = make_report(RunSettings(model=path, rtr=True, mla=0))
        assert report.derived == ()
        line = "-rtr has no effect: no weight can be interleaved (Q8_0, Q4_0 and IQ4_NL can)"
        assert line in report.notes


def test_what_stays_as_it_is_is_named(tiny_model: TinyModel) -> None:
    path = tiny_model("tiny-v3", "Q8_0", vocab=4090)
    report = make_report(RunSettings(model=path, rtr=True))
    (line,) = (note for note in report.notes if "-rtr" in note)
    assert line == "-rtr leaves as it is: output.weight (Q8_0, 4090 rows)"
    flags: dict[str, Any] = {"n_ubatch": 64, "mla": 1}
    expected = all_logits(make_engine(path, **flags), TOKENS[:70])
    assert np.array_equal(all_logits(make_engine(path, rtr=True, **flags), TOKENS[:70]), expected)


def test_two_copies_of_the_weights_are_named() -> None:
    line = "--no-mmap with -rtr holds the weights twice: the copies alone are what is read"
    assert line in notes(RunSettings(rtr=True, mmap=False))
    assert line not in notes(RunSettings(rtr=True)) + notes(RunSettings(mmap=False))


def test_need_of_a_plan_counts_copies(tiny_model: TinyModel) -> None:
    path = tiny_model("tiny-odd", "IQ4_NL")
    plain, repacked = (planned_need(make_engine(path, rtr=rtr).plan) for rtr in (False, True))
    assert repacked.derived > plain.derived
    assert (repacked.cache, repacked.compute) == (plain.cache, plain.compute)


def test_progress_is_a_line_per_tenth_of_much_and_one_of_little() -> None:
    lines: list[str] = []
    progress = progress_lines(lines.append)
    for done in range(0, 8 * 2**30 + 1, 2**26):
        progress(done, 8 * 2**30)
    assert len(lines) == 10
    assert lines[0] == "-rtr: 832.00 MiB of 8.00 GiB interleaved (10 %)"
    assert lines[-1] == "-rtr: 8.00 GiB of 8.00 GiB interleaved (100 %)"
    lines.clear()
    progress = progress_lines(lines.append)
    for done in range(0, 11):
        progress(done * 2**20, 10 * 2**20)
    assert lines == ["-rtr: 10.00 MiB of 10.00 MiB interleaved (100 %)"]
