"""What the report says of models, checked by hand on header-only files."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlacli import report as report_module
from mlacli.engine import Model, load_model
from mlacli.errors import ModelError
from mlacli.gguf.reader import GGUFFile
from mlacli.memory import MIB
from mlacli.model.choose import MachineProfile
from mlacli.report import Report, make_report, report_json
from mlacli.report_format import format_report
from mlacli.settings import RunSettings
from tests.conftest import TinyModel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def v2_lite(tiny_model: TinyModel) -> Model:
    return load_model(tiny_model("v2-lite", "IQ4_NL", sparse=True))


@pytest.fixture(scope="module")
def v3(tiny_model: TinyModel) -> Model:
    return load_model(tiny_model("v3", "IQ4_NL", sparse=True))


@pytest.fixture
def no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "kept_profile", lambda *_: None)


def reported(model: Model, available: int = 2**60, **given: Any) -> Report:
    return make_report(RunSettings(model=model.file.path, **given), available)


def test_model_facts(v2_lite: Model) -> None:
    facts = reported(v2_lite).model
    assert (facts.arch, facts.name, facts.file_type) == ("deepseek2", "random v2-lite", "IQ4_NL")
    assert facts.n_params == 15_706_484_224  # DeepSeek-V2-Lite's own count
    assert {name: t.count for name, t in facts.tensor_types.items()} == {"IQ4_NL": 269, "F32": 108}
    assert facts.file_bytes == v2_lite.file.path.stat().st_size
    in_tensors = sum(t.nbytes for t in facts.tensor_types.values())
    assert 0.99 * facts.file_bytes < in_tensors < facts.file_bytes


def test_bytes_per_token(v2_lite: Model, v3: Model) -> None:
    small, large = reported(v2_lite).cache, reported(v3).cache
    assert small.bytes_per_token == 30.375 * 1024
    assert small.plain_bytes_per_token == 270 * 1024
    assert large.bytes_per_token == 68.625 * 1024
    assert large.plain_bytes_per_token == 4880 * 1024
    quantised = reported(v2_lite, type_k="q8_KV").cache
    assert quantised.bytes_per_token == 27 * 584
    assert quantised.plain_bytes_per_token == 12312 * MIB // 65536
    plain = reported(v2_lite, mla=0).cache
    assert plain.bytes_per_token == plain.plain_bytes_per_token == 270 * 1024
    kinds = reported(v2_lite, mla=1, flash_attn=False, type_k="q8_KV", n_ctx=65536).cache.kinds
    assert {name: kind.nbytes / MIB for name, kind in kinds.items()} == {
        "c^KV (q8_KV)": 985.5,
        "kv^T (f16)": 1728.0,
    }
    exact = reported(v2_lite, mla=1, flash_attn=False, type_k="f32", n_ctx=65536)
    assert {name: kind.nbytes / MIB for name, kind in exact.cache.kinds.items()} == {
        "c^KV (f32)": 3888.0,
        "kv^T (f32)": 3456.0,
    }
    assert "kv^T (f32): 3456.00 MiB" in "\n".join(exact.buffer_lines)


def test_graphs_are_those_of_the_plan(v2_lite: Model) -> None:
    report = reported(v2_lite, n_threads=2)
    assert [(g.name, g.n_tokens_max) for g in report.graphs] == [
        ("few", 2),
        ("absorbed", 512),
        ("expanded", 512),
    ]
    assert report.compute_bytes == max(g.arena_bytes for g in report.graphs)
    for graph in report.graphs:
        assert graph.n_nodes > 27 * 15
        assert graph.scratch and max(graph.scratch.values()) <= graph.arena_bytes
    assert "flash_absorbed" in report.graphs[0].scratch
    assert "flash_expanded" in report.graphs[2].scratch
    assert [g.name for g in reported(v2_lite, mla=0).graphs] == ["few", "standard"]
    assert [g.name for g in reported(v2_lite, mla=1).graphs] == ["few", "absorbed"]


def test_amb_bounds_the_chunks_of_expanded_attention(v2_lite: Model) -> None:
    """A chunk of K and V takes at most min(-amb, 32 MiB): its codes take less than its rows."""
    small, large, huge = (
        reported(v2_lite, mla=2, n_ctx=65536, amb_mib=amb).graphs[2].scratch["flash_expanded"]
        for amb in (8, 32, 0)
    )
    assert small < 8 * MIB < 16 * MIB < large == huge < 32 * MIB


@pytest.mark.parametrize(
    ("kv_b", "mla", "name", "count"),
    [
        ("joint", 1, "attn_k_b.weight", 27 * 16 * 512 * 136),
        ("joint", 0, None, 0),
        ("both", 3, None, 0),
        ("split", 1, None, 0),
        ("split", 3, "attn_uk.weight", 27 * 16 * 128 * 544),
    ],
)
def test_derived_weights(
    tiny_model: TinyModel, kv_b: str, mla: int, name: str | None, count: int
) -> None:
    model = load_model(tiny_model("v2-lite", "IQ4_NL", kv_b, sparse=True))
    report = reported(model, mla=mla)
    assert [(d.name, d.type, d.count) for d in report.derived] == (
        [(name, "Q8_0", 27)] if name else []
    )
    assert report.derived_bytes == count == sum(d.nbytes for d in report.derived)


@pytest.mark.usefixtures("no_profile")
def test_multiply_adds(v2_lite: Model) -> None:
    per_row = reported(v2_lite).work.per_row
    assert per_row == {"standard": 320, "absorbed": 1088, "expanded": 320 + 131072 / 512}
    for n, expanded in ((171, 1086.5), (2048, 384.0)):
        given = {"n_ubatch": n, "n_batch": 2048}
        assert reported(v2_lite, **given).work.per_row["expanded"] == pytest.approx(
            expanded, abs=0.01
        )
    work = reported(v2_lite, n_ctx=256).work  # no batch is longer than the context
    assert (work.n_batch, work.per_row["expanded"]) == (256, 320 + 131072 / 256)


@pytest.mark.usefixtures("no_profile")
def test_work_per_token(v2_lite: Model) -> None:
    work = reported(v2_lite, n_ctx=65536).work
    shares = {"_exps.": 6 / 64, "_norm.": 0}
    met = sum(
        math.prod(t.shape) * next((s for part, s in shares.items() if part in name), 1)
        for name, t in v2_lite.file.tensors.items()
        if name not in ("token_embd.weight", "output.weight")
    )
    assert work.weights_per_token == met
    assert work.logits_per_token == 2048 * 102400
    attention = 27 * 16 * 65536
    standard, absorbed = met + attention * 320, met + attention * 1088
    kv_b = 27 * 512 * 16 * 256
    expanded = met - kv_b + attention * 576
    assert [(m.prompt_path, m.prompt_per_token) for m in work.modes] == [
        ("standard", standard),
        ("absorbed", absorbed),
        ("expanded", expanded),
        ("expanded", expanded),
    ]
    assert [(m.generation_path, m.generation_per_token) for m in work.modes] == [
        ("standard", standard),
        *[("absorbed", absorbed)] * 3,
    ]


@pytest.mark.usefixtures("no_profile")
@pytest.mark.parametrize(
    ("given", "crossover", "source"),
    [
        ({"mla": 0}, None, "one path"),
        ({"mla": 1}, None, "one path"),
        ({"mla": 2}, 128, "default"),
        ({"mla": 2, "mla_threshold": 1}, 1, "--mla-threshold"),
        ({"mla": 3, "mla_threshold": 900}, 900, "--mla-threshold"),
        ({"mla": 3}, 171, "unmeasured"),
    ],
)
def test_crossover(
    v2_lite: Model, given: dict[str, Any], crossover: int | None, source: str
) -> None:
    switching = reported(v2_lite, **given).switching
    assert (switching.crossover, switching.source) == (crossover, source)


def test_the_kept_profile_decides(v2_lite: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name, profile in (
        ("fast matrices", MachineProfile(1e9, 1e9, 8e9, 8e9)),
        ("slow matrices", MachineProfile(8e9, 8e9, 1e9, 1e9)),
    ):
        monkeypatch.setattr(report_module, "kept_profile", lambda *_, kept=profile: kept)
        report = reported(v2_lite)
        found[name] = (report.switching.crossover, report.work.modes[3].prompt_path)
        assert report.switching.source == "measured"
    assert found == {"fast matrices": (22, "expanded"), "slow matrices": (1366, "absorbed")}


@pytest.mark.parametrize(
    ("given", "slack", "verdict"),
    [
        ({}, -1, "does not fit"),
        ({}, 0, "weights will page from disk"),
        ({}, "weights", "fits"),
        ({"mmap": False}, 0, "does not fit"),
        ({"mmap": False}, "weights", "fits"),
        ({"mlock": True}, 0, "does not fit"),
    ],
)
def test_verdict(v2_lite: Model, given: dict[str, Any], slack: int | str, verdict: str) -> None:
    plain = reported(v2_lite, n_ctx=4096)
    need = plain.cache.nbytes + plain.compute_bytes + plain.output_bytes + plain.derived_bytes
    assert plain.memory.needed_bytes == need
    available = need + (plain.model.file_bytes if slack == "weights" else int(slack))
    assert reported(v2_lite, available, n_ctx=4096, **given).memory.verdict == verdict


def test_a_context_that_cannot_be_had_is_reported_all_the_same(v2_lite: Model) -> None:
    report = reported(v2_lite, 2**33, n_ctx=2**31 - 1)
    assert report.n_ctx == 2**31
    assert report.memory.verdict == "does not fit"
    assert report.notes == ("-c 2147483647: the model was trained on 163840 tokens",)


def test_the_default_context_is_what_fits(v2_lite: Model) -> None:
    report = reported(v2_lite, 1280 * 27 * 1152 + 4 * 102400)
    assert report.n_ctx == 1280
    assert report.notes == ("the context is 1280 tokens: memory for 4096 is not available",)


def test_json_holds_the_same_numbers(v2_lite: Model) -> None:
    settings = RunSettings(model=v2_lite.file.path, n_ctx=65536, type_k="q8_KV", mla=1)
    report = make_report(settings)
    found = json.loads(report_json(report))
    assert found["n_ctx"] == 65536
    assert found["cache"]["nbytes"] == report.cache.nbytes == 27 * 65536 * 584
    assert found["cache"]["kinds"]["c^KV (q8_KV)"]["bytes_per_token"] == 27 * 584
    assert found["compute_bytes"] == report.compute_bytes
    assert [g["arena_bytes"] for g in found["graphs"]] == [g.arena_bytes for g in report.graphs]
    assert found["work"]["per_row"]["absorbed"] == 1088
    assert found["buffer_lines"] == list(report.buffer_lines)


def test_text_holds_the_lines_that_scripts_look_for(v2_lite: Model) -> None:
    settings = RunSettings(model=v2_lite.file.path, n_ctx=65536, mla=1)
    report = make_report(settings)
    text = format_report(report)
    assert "\n".join(report.buffer_lines) in text
    assert text.endswith("\n") and "\n\n\n" not in text


def test_no_weight_is_read_and_nothing_compiled(
    v2_lite: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: object, **__: object) -> None:
        raise AssertionError("a weight was touched, or something was compiled")

    monkeypatch.setattr(GGUFFile, "data", touched)
    monkeypatch.setattr(GGUFFile, "address", touched)
    monkeypatch.setattr("codegen.jit.Jit.__init__", touched)
    monkeypatch.setattr("codegen.kernel.KernelSpec.build", touched)
    for mla in range(4):
        assert format_report(make_report(RunSettings(model=v2_lite.file.path, mla=mla)))


def test_a_type_that_kernels_cannot_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("tiny-v3", "Q8_0", sparse=True)
    data = bytearray(source.read_bytes()[: 2**22])
    name = b"blk.0.attn_output.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # behind n_dims and two dimensions: the type
    assert data[at : at + 4] == (8).to_bytes(4, "little")
    data[at : at + 4] = (6).to_bytes(4, "little")  # Q5_0: smaller blocks, so it lies in the file
    path = tmp_path / "other.gguf"
    path.write_bytes(data)
    os.truncate(path, source.stat().st_size)
    line = r"blk\.0\.attn_output\.weight: this tensor type is not supported \(got Q5_0"
    with pytest.raises(ModelError, match=line):
        make_report(RunSettings(model=path))


def test_a_v3_sized_file_takes_less_than_0_7_s(v3: Model, tmp_path: Path) -> None:
    """Time on the CPU, the best of four; on a machine that is slow just now as much longer as
    loading two libraries takes, which is 0.14 s else.

    The first run compiles Python's bytecode, as an installation does.
    """
    surroundings = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    surroundings["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    command = [sys.executable, "-m", "mlacli", "report", "-m", str(v3.file.path), "-c", "0"]

    def taken(*words: str) -> tuple[float, str]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            words, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout

    runs = [(taken(*command), taken(sys.executable, "-c", "import numpy, typer")) for _ in range(4)]
    assert all("KV self size  = 10980.00 MiB" in told for (_, told), _ in runs)
    seconds, libraries = (min(one) for one in zip(*((a[0], b[0]) for a, b in runs), strict=True))
    assert seconds < 0.7 * max(1, libraries / 0.14), f"{seconds:.2f} s, libraries {libraries:.2f} s"
