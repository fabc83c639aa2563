"""What `mlacli run` writes: one JSON object, a line per token, log lines, the prompt."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlacli import __version__
from mlacli.__main__ import main
from mlacli.cli import console
from mlacli.gguf.reader import open_gguf
from mlacli.settings import default_model
from mlacli.text.tokenizer import Tokenizer
from mlacli.text.vocabulary import tokenizer_data

QUESTION = "What does json.dumps do?"
ANSWER = "Serialize ``obj`` to a JSON formatted ``s``."
GREEDY = ("-p", QUESTION, "--temp", "0", "-c", "256")
WILD = ("--temp", "4", "--top-k", "0", "--top-p", "1", "--min-p", "0", "-s", "11", "--ignore-eos")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> tuple[int, str, str]:
        code = main(["run", *words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    file = open_gguf(default_model())
    return Tokenizer(tokenizer_data(file.metadata, "demo"))


def only(out: str) -> dict[str, Any]:
    assert out.endswith("}\n") and out.count("\n") == 1
    found: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    return found


def test_the_object_says_what_happened(run: Run, tokenizer: Tokenizer) -> None:
    code, out, err = run(*GREEDY, "--json", "--json-tokens", "-s", "5", "-l", "3-inf", "-t", "2")
    found = only(out)
    assert code == 0 and found["text"] == ANSWER and found["finish_reason"] == "end"
    ids = found["token_ids"]
    marked = f"<｜begin▁of▁sentence｜><｜User｜>{QUESTION}<｜Assistant｜>"
    assert ids["prompt"] == tokenizer.encode(marked, special=True)
    assert tokenizer.decode(ids["generated"]).decode() == ANSWER
    n_prompt, n = len(ids["prompt"]), len(ids["generated"])
    assert found["tokens"] == {
        "prompt": n_prompt, "reused": 0, "evaluated": n_prompt, "generated": n
    }  # fmt: skip
    told = dict(re.findall(r"llama_print_timings: +(.*) time = +([\d.]+) ms", err))
    times = found["timings"]
    names = {"load": "load_s", "sample": "sampling_s", "prompt eval": "prompt_s"}
    for words, name in (names | {"eval": "generation_s"}).items():
        assert 1e3 * times[name] == pytest.approx(float(told[words]), abs=0.006)
    assert times["prompt_s"] <= times["first_token_s"] < times["total_s"] - times["load_s"]
    assert times["generation_tokens_per_s"] == pytest.approx(n / times["generation_s"], rel=1e-3)
    model = found["model"]
    assert model["file"] == str(default_model()) and model["architecture"] == "deepseek2"
    assert model["bytes"] == default_model().stat().st_size
    sizes = (tensor.shape for tensor in open_gguf(default_model()).tensors.values())
    assert model["parameters"] == sum(_product(shape) for shape in sizes)
    settings = {"n_ctx": 256, "mla": 3, "flash_attn": True, "type_k": "f16", "type_v": None}
    assert settings.items() <= found["settings"].items() and found["settings"]["n_threads"] == 2
    assert found["sampling"]["seed"] == 5 and found["sampling"]["logit_bias"] == [[3, "-inf"]]
    assert found["sampling"]["samplers"][-2:] == ["temperature", "adaptive_p"]
    assert found["mlacli"] == __version__ and found["context_shifts"] == 0
    assert found["memory"]["peak_rss_bytes"] > (found["memory"]["anonymous_bytes"] or 0)


def _product(shape: tuple[int, ...]) -> int:
    found = 1
    for n in shape:
        found *= n
    return found


@pytest.mark.parametrize(
    ("words", "reason", "text"),
    [
        ((*GREEDY, "-n", "3"), "length", ANSWER[:4]),
        ((*GREEDY, "-n", "0"), "length", ""),
        ((*GREEDY, "--regex", "[ab]{3}"), "grammar", None),
        ((*GREEDY, "-r", "JSON"), "stop", ANSWER[: ANSWER.index("JSON") + 4]),
        (("-p", "word " * 150, "--no-cnv", "-c", "256", "-n", "-2"), "context", None),
    ],
)
def test_why_an_answer_ended(run: Run, words: tuple[str, ...], reason: str, text: str) -> None:
    code, out, _ = run(*words, "--json", "--no-perf")
    found = only(out)
    assert code == 0 and found["finish_reason"] == reason
    assert text is None or found["text"] == text
    if reason == "grammar":
        assert re.fullmatch("[ab]{3}", found["text"])
    if reason == "context":  # the last token is drawn, but has no room
        assert found["tokens"]["prompt"] + found["tokens"]["generated"] == 257


def test_an_interrupted_answer_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written, write = [], console.write

    def interrupt(text: str) -> None:
        write(text)
        written.append(text)
        if len(written) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(console, "write", interrupt)
    code, out, err = run("-p", "x", "-n", "-2", "-c", "2048", "--jsonl", "--log-disable")
    assert code == 130 and err == ""
    *tokens, result = map(json.loads, out.splitlines())
    assert result["finish_reason"] == "cancelled" and result["type"] == "result"
    assert "".join(token["text"] for token in tokens) == result["text"]
    assert 5 <= result["tokens"]["generated"] == sum(t["id"] is not None for t in tokens) < 1500


def test_lines_are_the_text_of_a_plain_run(run: Run) -> None:
    """Nearly random tokens: some are bytes of characters that never become whole."""
    words = ("-p", "x", "-n", "60", "-c", "256", *WILD)
    _, plain, _ = run(*words)
    _, out, _ = run(*words, "--jsonl", "--json-tokens")
    assert out.isascii() and "\ufffd" in plain
    *tokens, result = map(json.loads, out.splitlines())
    assert {token["type"] for token in tokens} == {"token"}
    assert "".join(token["text"] for token in tokens) + "\n" == plain == result["text"] + "\n"
    ids = [token["id"] for token in tokens if token["id"] is not None]
    assert ids == result["token_ids"]["generated"] and len(ids) == 60
    assert json.loads(run(*words, "--json")[1])["text"] == result["text"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run -p x --json --jsonl", "--json and --jsonl: give one of them, not both"),
        ("run -p x --json-tokens", "--json-tokens: needs --json or --jsonl"),
        ("run -i --jsonl", "--jsonl: is for one answer, not for a conversation (give -p TEXT"),
        ("chat --json", "--json: is for one answer (mlacli run), not a conversation"),
        ("run -p x -lv -1", "-lv: -1 is out of range"),
        ("run -p x -co red", "--color: 'red' is not one of on, off, auto"),
        ("run -p x --log-colors red", "--log-colors: 'red' is not one of on, off, auto"),
        ("run -p x --log-jsonl", "--log-jsonl: log lines are plain text"),
    ],
)
def test_what_is_refused(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {message}") and shown.err.count("\n") == 1
    assert shown.out == ""


def test_an_error_is_a_line_and_no_object(run: Run) -> None:
    code, out, err = run("-p", "word " * 400, "-c", "256", "--json", "--log-disable")
    assert (
        (code, out) == (2, "") and err.startswith("error: the prompt has") and err.count("\n") == 1
    )


# -- the log --------------------------------------------------------------------------------------


def test_levels(run: Run, tmp_path: Path) -> None:
    words = (*GREEDY, "-n", "1", "-ctv", "q8_0")
    note = "note: -ctv q8_0 has no effect with -mla 3: V is a part of the cached row\n"
    for quiet in (("-lv", "0"), ("--verbosity", "1"), ("--log-disable",)):
        assert run(*words, *quiet) == (0, "S\n", "")
    assert run(*words, "-lv", "2") == (0, "S\n", note)
    told = run(*words)[2]
    assert (
        note in told and "KV self size" in told and "load time" in told and "mla: mode" not in told
    )
    assert "mla: mode 3" in run(*words, "-lv", "4")[2]
    assert "load time" not in run(*words, "--no-perf")[2]
    assert "load time" not in run(*words, "--no-show-timings")[2]


def test_the_log_file_has_what_stderr_has(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "log"
    words = (*GREEDY, "-n", "1", "--log-file", str(path))
    assert run(*words)[2] == path.read_text() != ""
    assert run(*words, "--log-disable")[2] == "" and "load time" in path.read_text()
    assert run("-p", "x", "-c", "256", "-f", "y", *words[-2:])[0] == 2  # errors, too
    assert path.read_text() == "error: -p and -f: give one of them, not both\n"
    code, _, err = run(*words[:-1], str(tmp_path / "none" / "log"))
    assert code == 5 and re.fullmatch(r"error: --log-file: \S+: No such file or directory\n", err)


def test_a_log_never_replaces_the_model(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"weights")
    code, _, err = run("-p", "x", "-m", str(path), "--log-file", f"{tmp_path}/./m.gguf")
    assert (code, err) == (2, f"error: --log-file: {path} is a file that this command uses\n")
    assert path.read_bytes() == b"weights"
    path.write_bytes(b"GGUF of another command")
    code, _, err = run("-p", "x", "--log-file", str(path))
    assert (code, err) == (2, f"error: --log-file: {path} is a model file\n")
    prompt = tmp_path / "prompt"
    prompt.write_text("What is it?")
    assert run("-f", str(prompt), "--log-file", str(prompt))[0] == 2
    assert prompt.read_text() == "What is it?"


def test_prefix_and_time(run: Run) -> None:
    words = (*GREEDY, "-n", "1", "-ctv", "q8_0", "--log-prefix")
    lines = run(*words, "--log-timestamps")[2].splitlines()
    assert all(re.match(r"\d+\.\d\d\.\d{3}\.\d{3} [IW] ", line) for line in lines)
    assert {line.split()[1] for line in lines if "note: " in line} == {"W"}
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    assert run("-p", "word " * 400, "-c", "256", "--log-prefix", "-lv", "0")[2].startswith(
        "E error: the prompt has"
    )


def test_the_prompt_is_shown_and_listed(run: Run, tokenizer: Tokenizer) -> None:
    marked = f"<｜begin▁of▁sentence｜><｜User｜>{QUESTION}<｜Assistant｜>"
    code, out, err = run(*GREEDY, "--display-prompt", "--verbose-prompt", "--color", "off")
    assert code == 0 and out == f"{marked}{ANSWER}\n"
    ids = tokenizer.encode(marked, special=True)
    assert f"number of tokens in prompt = {len(ids)}\n" in err
    listed = re.findall(r"^ *(\d+) -> '(.*)'$", err, re.MULTILINE)
    assert [int(token) for token, _ in listed] == ids
    assert "".join(text for _, text in listed) == marked
    coloured = run(*GREEDY, "-n", "0", "--display-prompt", "-co")[1]
    assert coloured == f"\x1b[33m{marked}\x1b[0m\n"
    _, out, err = run(*GREEDY, "-n", "0", "--display-prompt", "--json")
    only(out)
    assert "note: --display-prompt has no effect with --json" in err
