"""Flags set by the configuration file and by variables: what counts more, and what is refused."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mlacli.__main__ import main
from mlacli.config_file import MAX_BYTES, changed
from mlacli.settings import default_model


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    path.write_text("")
    monkeypatch.setenv("MLACLI_CONFIG", str(path))
    return path


def _settings(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, tuple[Any, str]]:
    """What `mlacli config` shows: key -> (value, where it is from)."""
    assert main(["config", *words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    return {row["key"]: (row["value"], row["origin"]) for row in rows}


def _error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed.removeprefix("error: ").rstrip()


def test_each_place_counts_more_than_those_before(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def seen(*words: str) -> tuple[Any, str]:
        return _settings(capsys, "report", "-m", "/x/a.gguf", *words)["ubatch-size"]

    assert seen() == ("512", "default")
    config.write_text("ubatch-size = 1\n")
    assert seen() == ("1", f"{config}: ubatch-size")
    config.write_text("ubatch-size = 1\n[report]\nubatch_size = 2\n")
    assert seen() == ("2", f"{config}: report.ubatch_size")
    config.write_text(config.read_text() + '[models."a.g*"]\nub = 3\n')
    assert seen() == ("3", f'{config}: models."a.g*".ub')
    monkeypatch.setenv("LLAMA_ARG_UBATCH", "4")
    assert seen() == ("4", "LLAMA_ARG_UBATCH")
    monkeypatch.setenv("MLACLI_UBATCH_SIZE", "5")
    assert seen() == ("5", "MLACLI_UBATCH_SIZE")
    monkeypatch.setenv("MLACLI_UBATCH_SIZE", "")  # as if it were not set
    assert seen() == ("4", "LLAMA_ARG_UBATCH")
    # and what is typed counts most, as the report itself says
    monkeypatch.setenv("MLACLI_CTX_SIZE", "1024")
    for words, n_ctx in (([], 1024), (["-c", "256"], 256)):
        assert main(["report", *words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["n_ctx"] == n_ctx


def test_values_of_every_kind_reach_the_command(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(
        'ctx-size = 1024\ncache-type-k = "q8_KV"\nflash-attn = true\nfmoe = false\nmla = 1\n'
        'temp = 0.5\nreverse-prompt = ["a", "b"]\nrtr = true\n'
    )
    found = _settings(capsys, "run")
    assert found["cache-type-k"][0] == "q8_KV" and found["temp"][0] == "0.5"
    assert found["reverse-prompt"][0] == ["a", "b"] and found["run-time-repack"][0] is True
    assert found["fused-moe"][0] is False and found["mla-use"][0] == "1"
    assert main(["report", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["n_ctx"], report["mla"]) == (1024, 1)
    assert "q8_KV" in "".join(report["buffer_lines"])


def test_settings_of_other_commands_and_models_are_left_alone(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text('n-gen = 8\n[bench]\nr = 2\n[models."other.gguf"]\nthreads = 1\n')
    assert "n-gen" not in _settings(capsys, "report")
    assert _settings(capsys, "report")["threads"][1] == "default"
    assert main(["report"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("ctx-sise = 1", "ctx-sise: no such flag; did you mean ctx-size?"),
        ("[report]\nn-gen = 1", "report.n-gen: no such flag"),
        ("[models.x]\nthread = 1", None),  # of another model: not looked at
        ('[models."demo.gguf"]\nthread = 1', 'models."demo.gguf".thread: no such flag; did you'),
        ('[models."demo.gguf"]\nmodel = "x"', 'models."demo.gguf".model: has no place here'),
        ("[reports]", "[reports]: no such table (one of run, "),
        ("models = 1", 'models: is not a table [models."NAME"]'),
        ("[models]\nthreads = 1", 'models.threads: belongs into [models."NAME"]'),
        ("ctx-size = 'abc'", "ctx-size: 'abc' is not a whole number (0 to 2147483647)"),
        ("ctx-size = true", "ctx-size: 'true' is not a whole number (0 to 2147483647)"),
        ("mla-threshold = [1, 2]", "mla-threshold: takes one value (got 2)"),
        ("ctx-size = 1979-05-27", "ctx-size: is not a string, number or boolean, nor a list"),
        ("ctx-size = 1\nctx_size = 2", "ctx_size and ctx-size: give one of them"),
        ("ub = 1\nubatch-size = 2", "says the same flag"),
        ("mlock = 'maybe'", "mlock: 'maybe' is not one of on, auto, 1, off, 0"),
        ("ctk = 'q4_0'", "ctk: q4_0 cannot hold the latent rows of -mla 3"),
        ("prompt = 'hi'", "prompt: this flag is for the command line only"),
        ("interactive = true", "interactive: this flag is for the command line only"),
        ("a = 1\nb = = 2", "line 2: is not TOML: "),
        ("a = " + "[" * 5000, "is not TOML: too deeply nested"),
        ("a = " + "1" * 5000, "is not TOML: "),
        ("a = 1\nb = 'x", "line 2: is not TOML: "),
        ("#" * MAX_BYTES + "#", "is longer than 256 KiB"),
    ],
)
def test_what_cannot_work_is_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], text: str, line: str | None
) -> None:
    config.write_text(text)
    if line is None:
        assert main(["report"]) == 0
    else:
        found = _error(capsys, "report")
        assert found.startswith(f"{config}: ") and line in found
        assert main(["config", "--path"]) == 0  # which is how one finds it


def test_files_that_cannot_be_read(
    tmp_path: Path,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config.write_bytes(b"a = 1\nb = '\xff'\n")
    assert _error(capsys, "report") == f"{config}: line 2: is not UTF-8"
    monkeypatch.setenv("MLACLI_CONFIG", str(tmp_path))
    assert _error(capsys, "report") == f"{tmp_path}: is a folder"
    monkeypatch.setenv("MLACLI_CONFIG", str(tmp_path / "none"))
    assert _error(capsys, "report") == f"{tmp_path / 'none'}: No such file or directory"
    monkeypatch.setenv("MLACLI_CONFIG", "/dev/null")
    assert _error(capsys, "report") == "/dev/null: is no regular file"


def test_the_users_file_need_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLACLI_CONFIG")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["report"]) == 0
    assert main(["config", "set", "ctx-size", "64"]) == 0
    assert (tmp_path / "mlacli" / "config.toml").read_text() == "ctx-size = 64\n"
    capsys.readouterr()
    assert main(["config", "--path"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/mlacli/config.toml\n"
    monkeypatch.setenv("MLACLI_CONFIG", "")
    assert _settings(capsys, "report")["ctx-size"][1] == "default"
    assert "is empty" in _error(capsys, "config", "set", "ctx-size", "64")


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"MLACLI_CTX_SIZE": "x"}, "error: MLACLI_CTX_SIZE: 'x' is not a whole number (0 to "),
        ({"LLAMA_ARG_THREADS": "0"}, "error: LLAMA_ARG_THREADS: 0 is out of range (1 to 1024)"),
        ({"MLACLI_RTR": "perhaps"}, "error: MLACLI_RTR: 'perhaps' is not one of on, "),
        ({"LLAMA_ARG_MODEL": "/no/x.gguf"}, "(-m is from LLAMA_ARG_MODEL)"),
        ({"MLACLI_BATCH_SIZE": "8"}, "error: -ub: 16 is more than -b 8 (-b is from MLACLI_BATCH_"),
        (
            {"MLACLI_CTX_SISE": "8"},
            "note: MLACLI_CTX_SISE: no such variable; did you mean MLACLI_C",
        ),
        ({"MLACLI_PROMPT": "hi"}, "note: MLACLI_PROMPT: this flag is for the command line only"),
        ({"MLACLI_N_GEN": "8", "MLACLI_TARGET": "generic"}, ""),
        ({"LLAMA_ARG_PORT": "8", "LLAMA_ARG_FLASH_ATTN": "enabled"}, ""),
    ],
)
def test_variables(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    line: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code = main(["report", "-ub", "16"])
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == bool(line)
    assert bool(code) == ("error: " in printed)


def test_the_old_form_of_llama_cpps_negatives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMA_ARG_NO_MMAP", "1")
    for command, value in (("run", False), ("bench", ["off"])):
        assert _settings(capsys, command)["mmap"] == (value, "LLAMA_ARG_NO_MMAP")
    monkeypatch.setenv("MLACLI_NO_MMAP", "off")
    assert _settings(capsys, "run")["mmap"] == (True, "MLACLI_NO_MMAP")


def test_nearer_flags_displace_those_that_they_exclude(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text("system-prompt = 'be brief'\ngrammar = 'root ::= \"a\"'\n")
    monkeypatch.setenv("MLACLI_REGEX", "a+")
    found = _settings(capsys, "run")
    assert found["grammar"][1] == "default" and found["regex"] == ("a+", "MLACLI_REGEX")
    assert _error(capsys, "run", "-p", "x", "-sysf", "/no/file") == (
        "-sysf: /no/file: No such file or directory"
    )


def test_verbose_says_what_is_from_where(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text("ubatch-size = 64\n")
    monkeypatch.setenv("MLACLI_CTX_SIZE", "512")
    assert main(["report", "-c", "256", "-v"]) == 0
    assert capsys.readouterr().err.splitlines()[:2] == [
        f"note: -ub is from {config}: ubatch-size",
        "note: -c from MLACLI_CTX_SIZE is overridden",
    ]
    assert main(["report", "-c", "256"]) == 0
    assert capsys.readouterr().err == ""


def test_set_and_unset(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("# mine\nub = 64 # small\n\n[run]\ntemp = 0.5\n")
    for words in (
        "set ubatch_size 128",
        "set run.n-predict -1",
        "set cache-type-k q8_0 -m /models/a.gguf",
        "set mmap off",
        "set reverse-prompt User: Me:",
        "unset run.temp",
        "unset run.temp",
    ):
        assert main(["config", *words.split()]) == 0
    assert tomllib.loads(config.read_text()) == {
        "ubatch-size": 128,
        "mmap": False,
        "reverse-prompt": ["User:", "Me:"],
        "run": {"n-predict": -1},
        "models": {"a.gguf": {"cache-type-k": "q8_0"}},
    }
    assert config.read_text().startswith("# mine\n")
    assert main(["config", "unset", "cache-type-k", "-m", "a.gguf"]) == 0
    assert "models" not in tomllib.loads(config.read_text())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("set ctx-size abc", "-c: 'abc' is not a whole number (0 to 2147483647)"),
        ("set ctx-sise 1", "ctx-sise: no such flag; did you mean ctx-size?"),
        ("set ctx-size", "config set: takes KEY VALUE (got 1)"),
        ("unset ctx-size 1", "config unset: takes KEY (got 2)"),
        ("set ctx-size 1 2", "ctx-size: takes one value (got 2)"),
        ("set prompt x", "prompt: this flag is for the command line only"),
        ("set runs.ctx-size 1", "runs.ctx-size: 'runs' is not one of run, "),
        ("set model x -m y", "model: cannot be set for one model"),
        ("sets", "config: 'sets' is not one of run, "),
    ],
)
def test_what_cannot_be_set(
    config: Path, capsys: pytest.CaptureFixture[str], words: str, line: str
) -> None:
    assert _error(capsys, "config", *words.split()).startswith(line)
    assert config.read_text() == ""


def test_a_link_is_followed_when_the_file_is_changed(config: Path, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.toml"
    config.rename(real)
    config.symlink_to(real)
    assert main(["config", "set", "threads", "1"]) == 0
    assert config.is_symlink() and real.read_text() == "threads = 1\n"


def test_a_malformed_file_is_not_changed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("a = = 1\n")
    assert "line 1: is not TOML" in _error(capsys, "config", "set", "threads", "1")
    assert config.read_text() == "a = = 1\n"


@pytest.mark.parametrize(
    "before",
    ["", "[run]\ntemp = 1\n", "a = 1 # x\n[models.'m']\nb = 2\n\n[bench]\n", "models.m.b = 2\n"],
)
def test_changes_keep_everything_else(before: str) -> None:
    after = changed(before, ("models", "n.gguf"), {"t": 1})
    after = changed(after, (), {"top": "x"})
    expected = tomllib.loads(before) | {"top": "x"}
    expected["models"] = {"n.gguf": {"t": 1}} | expected.get("models", {})
    assert tomllib.loads(after) == expected
    assert all(line in after for line in before.splitlines())
    back = changed(changed(after, ("models", "n.gguf"), {"t": None}), (), {"top": None})
    assert tomllib.loads(back) == tomllib.loads(before)


def test_what_excludes_another_flag_gives_way(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one nearest to the command line counts."""
    config.write_text("model = 'x.gguf'\nmlock = true\n[run]\njson = true\n")
    assert main(["run", "-hf", "a/b", "--offline", "-p", "x"]) == 3
    assert capsys.readouterr().err.startswith("error: -hf a/b: it is not in the cache")
    monkeypatch.setenv("LLAMA_ARG_NO_MMAP", "1")
    assert main(["report", "-m", str(default_model()), "-lm", "mmap", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["weight_bytes"] > 0
    words = ["run", "-m", str(default_model()), "-p", "x", "-n", "1", "--jsonl", "-dr"]
    assert main(words) == 0 and json.loads(capsys.readouterr().out)["n_ctx"] == 2048


def test_a_token_or_being_offline_may_be_set_for_all(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text("offline = true\nhf-token = 'x'\nfit = true\nn-predict = -1\n")
    assert main(["report", "-c", "256,512"]) == 0  # report's --fit is another flag than run's
    assert main(["sweep", "-c", "256", "-ub", "256", "-n", "1"]) == 0
    capsys.readouterr()
    config.write_text("[models.'demo.gguf']\nhf-repo = 'a/b'\n")
    assert "has no place here" in _error(capsys, "report")
    config.write_text('log-file = "a\\u0000b"\n')
    assert "holds a NUL character" in _error(capsys, "report")


def test_a_list_for_a_report(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("[report]\nctx-size = [256, 512]\n")
    assert main(["report", "--json"]) == 0
    assert [row["n_ctx"] for row in json.loads(capsys.readouterr().out)] == [256, 512]
