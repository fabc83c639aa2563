"""`mlacli run` as a user starts it: answers, signals, memory."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import TinyModel

MLACLI = (sys.executable, "-m", "mlacli")
ANSWER = "Serialize ``obj`` to a JSON formatted ``s``."


def mlacli(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MLACLI, *words], capture_output=True, text=True, timeout=120, input=text
    )


@pytest.mark.parametrize("mla", ["0", "1", "2", "3"])
@pytest.mark.parametrize("flash", ["on", "off"])
def test_the_bundled_model_answers_in_every_mode(mla: str, flash: str) -> None:
    prompt = "What does json.dumps do?"
    done = mlacli("run", "-p", prompt, "--temp", "0", "-mla", mla, "-fa", flash)
    assert done.returncode == 0
    assert done.stdout == ANSWER + "\n"
    assert "eval time" in done.stderr


def test_interleaved_weights_answer_the_same() -> None:
    done = mlacli("run", "-rtr", "-p", "What does json.dumps do?", "--temp", "0")
    assert done.returncode == 0
    assert done.stdout == ANSWER + "\n"
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("-rtr: "))
    assert re.fullmatch(r"-rtr: ([\d.]+ MiB) of \1 interleaved \(100 %\)", line)


def test_prompt_from_standard_input_is_answered_and_the_program_ends() -> None:
    done = mlacli("run", "--temp", "0", "-n", "3", text="What does json.dumps do?")
    assert done.returncode == 0
    assert done.stdout == ANSWER[: len(done.stdout) - 1] + "\n"


def test_raw_completion_goes_on_with_the_text() -> None:
    done = mlacli("run", "--no-cnv", "-p", "import os\n\ndef ", "--temp", "0", "-n", "8")
    assert done.returncode == 0
    assert done.stdout.strip()


@pytest.mark.parametrize("words", [("run", "-n", "1"), ("bench", "-n", "0", "-r", "1")], ids=str)
def test_an_object_cache_that_cannot_be_used_is_said(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlacli").mkdir()
    (tmp_path / "mlacli" / "objects").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = mlacli(*words, "-p", "4")
    assert done.returncode == 0
    assert len(re.findall("note: object cache .*objects cannot be made", done.stderr)) == 1


def test_seeded_sampling_repeats_itself() -> None:
    words = ("run", "-p", "What is math.sqrt?", "-s", "42", "--temp", "1.2", "-n", "24")
    assert mlacli(*words).stdout == mlacli(*words).stdout


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_a_signal_ends_the_answer_with_timings(number: int, code: int) -> None:
    words = ("run", "-p", "What is math.sqrt?", "-n", "-2", "--ignore-eos", "-c", "2048")
    process = subprocess.Popen(
        [*MLACLI, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.read(1)
    start = time.monotonic()
    process.send_signal(number)
    _, notes = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - start < 2
    assert "eval time" in notes
    assert "Traceback" not in notes


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    done = mlacli("run", "-p", "word " * 400, "-c", "256")
    assert done.returncode == 2
    assert re.fullmatch(r"error: the prompt has \d+ tokens, more than -c 256 [^\n]*\n", done.stderr)


_POLL = """
import json, sys
from pathlib import Path
import numpy as np
from tests.engines import make_engine

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith("RssAnon")).split()[1])

path, n_ctx, flags = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
import mlacli.engine, tests.reference
base = anonymous()
engine = make_engine(path, n_ctx=n_ctx, n_out_max=1, **flags)
tokens = np.random.default_rng(0).integers(0, 4096, n_ctx).tolist()
engine.eval(tokens, range(n_ctx))
plan = engine.plan
derived = sum(m.nbytes for m in plan.derived())
told = plan.cache_bytes + plan.arena_bytes + plan.output_bytes + derived
print(json.dumps({"used": anonymous() - base, "told": told, "cache": plan.cache_bytes,
                  "derived": derived, "file": path.stat().st_size}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "flags",
    [
        {"mla": 3, "type_k": "f16"},
        {"mla": 1, "type_k": "q8_KV", "flash_attn": False},
        {"mla": 0, "type_k": "q8_0"},
        {"mla": 3, "type_k": "f16", "rtr": True},
    ],
    ids=["mla3", "mla1-no-fa", "mla0", "rtr"],
)
def test_memory_in_use_is_what_the_report_says(
    tiny_model: TinyModel, flags: dict[str, object]
) -> None:
    path = tiny_model("tiny-v3", "Q8_0", "joint", n_embd=1024, kv_lora=512, n_exp=128)
    words = [sys.executable, "-c", _POLL, str(path), "4096", json.dumps(flags)]
    root = Path(__file__).parent.parent
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["used"] <= 1.05 * seen["told"] + 150 * 2**20
    copied = seen["derived"] if flags.get("rtr") else 0
    assert seen["used"] >= seen["cache"] + copied  # the whole cache was filled
    assert copied == 0 or copied >= 0.9 * seen["file"]
    assert seen["file"] > 150 * 2**20
    # weights stay in the mapped file: a copy would show
    assert seen["used"] <= seen["told"] + seen["file"] / 2


def test_a_bench_shows_where_the_time_goes() -> None:
    done = mlacli("bench", "-p", "16", "-n", "4", "-r", "1", "--profile")
    assert done.returncode == 0, done.stderr
    assert "profile" not in done.stdout and "| tg4 |" in re.sub(" +", " ", done.stdout)
    tables = done.stderr.split("profile of ")
    assert [t.partition("\n")[0] for t in tables[1:]] == [
        "pp16: per batch, mean of 1 batches of 16 tokens",
        "tg4: per token, mean of 4",
    ]
    for text in tables[1:]:
        assert "matmul result_output" in text and re.search(r"moe_(down|sum) ffn_moe_out", text)
        assert re.search(r"\| barriers .*\| unaccounted .*\| total .* 100\.0 %", text, re.DOTALL)


def test_a_run_shows_where_the_time_went() -> None:
    words = ("run", "-p", "What is math.sqrt?", "-n", "4", "--temp", "0", "--profile", "-v")
    done = mlacli(*words)
    assert done.returncode == 0, done.stderr
    headings = re.findall("profile of (.*): per (batch|token)", done.stderr)
    assert headings == [
        ("prompt", "batch"),
        ("prompt by layer", "batch"),
        ("generation", "token"),
        ("generation by layer", "token"),
    ]
    assert "matmul attn_out-5" in done.stderr
