"""Settings refuse what cannot work and name what has no effect."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from codegen.formats import CACHE_FORMATS, LATENT_CACHE_TYPES
from mlacli import cpu_count, settings
from mlacli.errors import UsageError
from mlacli.limits import Choice, Limit, Switch, parse_list, parse_pairs, rules
from mlacli.sampling_settings import MAX_SEED, SAMPLERS, SamplingSettings
from mlacli.settings import Request, RunSettings, fitted, notes


def test_defaults() -> None:
    chosen = RunSettings()
    assert (chosen.mla, chosen.flash_attn, chosen.type_k, chosen.n_ubatch) == (3, True, "f16", 512)
    assert chosen.n_ctx is None and chosen.amb_mib == 256 and chosen.fmoe
    assert chosen.n_threads == chosen.n_threads_batch == cpu_count.default_threads()
    assert notes(chosen) == []


def test_prompt_threads_follow_threads() -> None:
    assert RunSettings(n_threads=1).n_threads_batch == 1
    assert RunSettings(n_threads=1, n_threads_batch=2).n_threads_batch == 2


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"n_threads": 0}, "-t: 0 is out of range (1 to 1024)"),
        ({"n_threads_batch": 0}, "-tb: 0 is out of range (1 to 1024)"),
        ({"n_ctx": -5}, "-c: -5 is out of range (0 to 2147483647)"),
        ({"n_batch": 0}, "-b: 0 is out of range (1 to 1048576)"),
        ({"n_ubatch": 0}, "-ub: 0 is out of range (1 to 65536)"),
        ({"n_ubatch": 513, "n_batch": 512}, "-ub: 513 is more than -b 512"),
        ({"mla": 7}, "-mla: 7 is out of range (0 to 3)"),
        ({"mla": -1}, "-mla: -1 is out of range (0 to 3)"),
        ({"mla_threshold": 0}, "--mla-threshold: 0 is out of range (1 to 2147483647)"),
        ({"amb_mib": -5}, "-amb: -5 is out of range (0 to 1048576)"),
        ({"ser": (0, 0.5)}, "-ser Kmin: 0 is out of range (1 to 65536)"),
        ({"ser": (2, float("nan"))}, "-ser t: nan is out of range (0 to 1)"),
        (
            {"type_k": "q5_0", "mla": 1},
            "-ctk: q5_0 cannot hold the latent rows of -mla 1 "
            "(one of f32, f16, bf16, q8_0, q8_KV, q6_0, or -mla 0)",
        ),
        (
            {"type_v": "q8_0", "flash_attn": False},
            "-ctv: q8_0 needs flash attention (-fa on): "
            "without it V is kept transposed, which blocks of values do not allow",
        ),
    ],
)
def test_refused(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        RunSettings(**values)
    assert str(caught.value) == line


@pytest.mark.parametrize("type_k", CACHE_FORMATS)
@pytest.mark.parametrize("mla", [0, 1, 2, 3])
def test_every_cache_type_has_a_place(type_k: str, mla: int) -> None:
    if mla == 0 or type_k in LATENT_CACHE_TYPES:
        assert RunSettings(type_k=type_k, mla=mla).type_k == type_k
    else:
        with pytest.raises(UsageError, match=f"-ctk: {type_k} cannot hold"):
            RunSettings(type_k=type_k, mla=mla)


@pytest.mark.parametrize(
    ("values", "note"),
    [
        (
            {"type_v": "q8_0"},
            "-ctv q8_0 has no effect with -mla 3: V is a part of the cached row",
        ),
        (
            {"type_v": "f32", "mla": 1, "flash_attn": False},
            "-ctv f32 has no effect with -mla 1: V is a part of the cached row",
        ),
        (
            {"type_v": "bf16", "mla": 0, "flash_attn": False},
            "-ctv bf16: without flash attention V is kept transposed, as f16",
        ),
        (
            {"amb_mib": 64, "mla": 1},
            "-amb 64 has no effect with -fa on and -mla 1: K*Q is never stored",
        ),
        (
            {"mla_threshold": 64, "mla": 0},
            "--mla-threshold has no effect with -mla 0: one path only",
        ),
    ],
)
def test_notes(values: dict[str, Any], note: str) -> None:
    assert notes(RunSettings(**values)) == [note]


@pytest.mark.parametrize(
    "values",
    [
        {"type_v": "q8_0", "mla": 0},
        {"type_v": "f32", "mla": 0, "flash_attn": False},
        {"amb_mib": 64, "mla": 3},
        {"amb_mib": 64, "mla": 0, "flash_attn": False},
        {"mla_threshold": 64, "mla": 2},
    ],
)
def test_flags_with_an_effect_have_no_note(values: dict[str, Any]) -> None:
    assert notes(RunSettings(**values)) == []


def test_more_threads_than_cpus_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "available_cpus", lambda: 2)
    assert "64 threads share 2 CPUs" in notes(RunSettings(n_threads=64))[0]


def test_batches_go_together() -> None:
    assert fitted(n_ubatch=4096).n_batch == 4096
    assert fitted(n_batch=128).n_ubatch == 128
    assert fitted(n_batch=4096).n_ubatch == 512
    assert fitted().n_batch == 2048


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"temp": math.nan}, "--temp: nan is out of range (0 to 1000)"),
        ({"temp": math.inf}, "--temp: inf is out of range (0 to 1000)"),
        ({"temp": -1}, "--temp: -1 is out of range (0 to 1000)"),
        ({"top_k": -5}, "--top-k: -5 is out of range (0 to 2147483647)"),
        ({"top_p": 7}, "--top-p: 7 is out of range (0 to 1)"),
        ({"top_p": -1}, "--top-p: -1 is out of range (0 to 1)"),
        ({"top_p": math.nan}, "--top-p: nan is out of range (0 to 1)"),
        ({"min_p": 2}, "--min-p: 2 is out of range (0 to 1)"),
        ({"min_p": math.nan}, "--min-p: nan is out of range (0 to 1)"),
        ({"repeat_penalty": 0}, "--repeat-penalty: 0 is out of range (0.01 to 100)"),
        ({"repeat_penalty": math.nan}, "--repeat-penalty: nan is out of range (0.01 to 100)"),
        ({"repeat_penalty": math.inf}, "--repeat-penalty: inf is out of range (0.01 to 100)"),
        ({"repeat_last_n": -2}, "--repeat-last-n: -2 is out of range (-1 to 2147483647)"),
        ({"seed": 2**32}, "-s: 4294967296 is out of range (-1 to 4294967295)"),
        ({"seed": -2}, "-s: -2 is out of range (-1 to 4294967295)"),
    ],
)
def test_sampling_out_of_range(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingSettings(**values)
    assert str(caught.value) == line


def test_sampling_at_the_edges() -> None:
    SamplingSettings(
        temp=0, top_k=0, top_p=0, min_p=0, repeat_penalty=0.01, repeat_last_n=-1, seed=-1
    )
    SamplingSettings(
        temp=1000, top_k=2**31 - 1, top_p=1, min_p=1, repeat_penalty=100, seed=MAX_SEED
    )


def test_sampling_defaults_are_llama_cpps() -> None:
    settings = SamplingSettings()
    assert (settings.temp, settings.top_k, settings.top_p, settings.min_p) == (0.8, 40, 0.95, 0.05)
    assert (settings.repeat_penalty, settings.repeat_last_n, settings.seed) == (1.0, 64, -1)
    assert (settings.typical_p, settings.tfs_z, settings.top_n_sigma) == (1.0, 1.0, -1.0)
    assert (settings.dry_base, settings.dry_allowed_length) == (1.75, 2)
    assert (settings.mirostat_ent, settings.mirostat_lr) == (5.0, 0.1)
    off = (settings.dry_multiplier, settings.xtc_probability, settings.dynatemp_range)
    assert off == (0.0, 0.0, 0.0) and not settings.mirostat and not settings.ignore_eos


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("samplers", "top-k; TEMP;nucleus", ("top_k", "temperature", "top_p")),
        ("samplers", "typ_p;tfs;top_nsigma", ("typical_p", "tfs_z", "top_n_sigma")),
        ("samplers", "", ()),
        ("sampling_seq", "edskfypmxtw", SAMPLERS),
        ("sampling_seq", "ktn", ("top_k", "temperature", "top_n_sigma")),
        ("logit_bias", "29905+1.5", (29905, 1.5)),
        ("logit_bias", "7-inf", (7, -math.inf)),
        ("logit_bias", "7-.5", (7, -0.5)),
    ],
)
def test_what_sampling_flags_read(field: str, text: str, value: Any) -> None:
    assert rules(SamplingSettings)[field].parse(text) == value


@pytest.mark.parametrize(
    ("field", "text", "line"),
    [
        ("samplers", "topk", "did you mean top_k?"),
        ("samplers", "infill", "--samplers: 'infill' is not a sampler of mlacli"),
        ("samplers", "bogus", "--samplers: 'bogus' is not one of penalties, dry, "),
        ("sampling_seq", "kz", "--sampling-seq: 'z' is not one of e penalties, d dry, "),
        ("sampling_seq", "i", "--sampling-seq: 'i' (infill) is not a sampler of mlacli"),
        ("logit_bias", "7", "-l: '7' is not a token and a bias such as 29905-1.5"),
        ("logit_bias", "7+inf", "-l: '7+inf' is not a token and a bias such as 29905-1.5"),
        ("logit_bias", "-1+1", "-l: '-1+1' is not a token and a bias such as 29905-1.5"),
        ("dry_sequence_breaker", "", "--dry-sequence-breaker: 0 characters are out of range"),
        ("mirostat", "3", "--mirostat: 3 is out of range (0 to 2)"),
    ],
)
def test_what_sampling_flags_refuse(field: str, text: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        rules(SamplingSettings)[field].parse(text)
    assert line in str(caught.value)


def test_one_list_of_samplers_only() -> None:
    with pytest.raises(UsageError, match=r"^--samplers and --sampling-seq: give one"):
        SamplingSettings(samplers=("top_k",), sampling_seq=("top_k",))


def test_request_needs_a_prompt() -> None:
    assert Request("x").n_predict == -1
    with pytest.raises(UsageError, match="the prompt is empty"):
        Request("")
    with pytest.raises(UsageError, match="-n: -3 is out of range"):
        Request("x", n_predict=-3)


def test_every_field_that_a_flag_sets_has_a_rule() -> None:
    ruled = rules(RunSettings)
    assert set(RunSettings.__dataclass_fields__) - set(ruled) == {"model", "verbose", "rope"}


WHOLE, DECIMAL = Limit("-n", 0, 1000), Limit("-x", 0, 2, float)


@pytest.mark.parametrize("text", ["", "abc", "1e3", "1_0", "0x10", " 1", "1.0", "+1", "٣", "--1"])
def test_not_a_whole_number(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        WHOLE.parse(text)
    assert str(caught.value) == f"-n: {text!r} is not a whole number (0 to 1000)"


@pytest.mark.parametrize("text", ["", "nan", "inf", "-inf", "1,5", "1e", "0x1p3", "1" * 41])
def test_not_a_number(text: str) -> None:
    with pytest.raises(UsageError, match="is not a number"):
        DECIMAL.parse(text)


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1.0), ("1.5", 1.5), (".5", 0.5), ("1e-3", 0.001), ("2.", 2.0)]
)
def test_numbers(text: str, value: float) -> None:
    assert DECIMAL.parse(text) == value


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("512", [512]),
        ("1,2,4", [1, 2, 4]),
        ("1-4", [1, 2, 3, 4]),
        ("1-9+2", [1, 3, 5, 7, 9]),
        ("1-64*2", [1, 2, 4, 8, 16, 32, 64]),
        ("1-3,7", [1, 2, 3, 7]),
        ("5-5", [5]),
    ],
)
def test_lists(text: str, values: list[int]) -> None:
    assert parse_list(WHOLE, text) == values


@pytest.mark.parametrize("text", ["8-1", "1-8*1", "0-8*2", "1-8+0", "1-2-3", "1,,2", "1-8/2", "-"])
def test_bad_lists(text: str) -> None:
    with pytest.raises(UsageError, match="-n: "):
        parse_list(WHOLE, text)


def test_list_length_is_limited() -> None:
    with pytest.raises(UsageError, match="more than 1024 values"):
        parse_list(Limit("-n", 0, 2**31), "0-2147483647")


def test_lists_of_words_and_switches() -> None:
    assert parse_list(Choice("-ctk", ("f16", "q8_0")), "f16,q8_0") == ["f16", "q8_0"]
    assert parse_list(Switch("-fa"), "0,on,AUTO") == [False, True, True]


def test_expert_reduction() -> None:
    rule = rules(RunSettings)["ser"]
    assert rule.parse("4,0.3") == (4, 0.3)
    assert parse_list(rule, "-1,0;6,1") == [None, (6, 1.0)]
    for text in ("4", "a,1", "0,1", "4,1.5", "4,nan", "4,", "1,2,3"):
        with pytest.raises(UsageError, match="-ser"):
            rule.parse(text)


def test_pairs() -> None:
    assert parse_pairs(WHOLE, "512,128;1,2") == [(512, 128), (1, 2)]
    for text in ("512", "512,128,1", "a,b", ""):
        with pytest.raises(UsageError, match="-n: "):
            parse_pairs(WHOLE, text)


def _sysfs(root: Path, siblings: dict[int, str]) -> Path:
    for cpu, text in siblings.items():
        folder = root / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    return root


def test_smt_siblings_count_once(tmp_path: Path) -> None:
    sysfs = _sysfs(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    assert cpu_count.physical_cores({0, 1, 2, 3}, sysfs) == 2
    assert cpu_count.physical_cores({0, 2}, sysfs) == 1


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"pod/cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "150000 100000\n", "pod/cpu.max": "400000 100000\n"}, 1.5),
        ({"cpu.max": "nonsense"}, None),
    ],
)
def test_quota_v2(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    (tmp_path / "member").write_text("0::/pod/ctr\n")
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert cpu_count.cpu_quota(tmp_path / "member", tmp_path / "fs") == quota


def test_quota_v1(tmp_path: Path) -> None:
    (tmp_path / "member").write_text("4:memory:/x\n3:cpu,cpuacct:/pod\n0::/\n")
    folder = tmp_path / "fs" / "cpu" / "pod"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("200000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_count.cpu_quota(tmp_path / "member", tmp_path / "fs") == 2
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_count.cpu_quota(tmp_path / "member", tmp_path / "fs") is None


def test_no_cgroups_no_quota(tmp_path: Path) -> None:
    assert cpu_count.cpu_quota(tmp_path / "missing", tmp_path) is None


@pytest.mark.parametrize(("quota", "threads"), [(None, 2), (0.5, 1), (1.9, 1), (64.0, 2)])
def test_default_threads(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, threads: int
) -> None:
    monkeypatch.setattr(cpu_count, "physical_cores", lambda cpus, sysfs: 2)
    monkeypatch.setattr(cpu_count, "cpu_quota", lambda membership, mount: quota)
    assert cpu_count.default_threads.__wrapped__() == threads
