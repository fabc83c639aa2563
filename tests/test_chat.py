"""`mlacli chat` at a terminal and in a script: every command, Ctrl-C, what is reused."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

MLACLI = (sys.executable, "-m", "mlacli")
QUESTION = "What does json.dumps do?"
ANSWER = "Serialize ``obj`` to a JSON formatted ``s``."
SECONDS = 60


def _heeds_ctrl_c() -> None:
    """Whoever runs the tests in the background may ignore SIGINT, and Python leaves that be."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A process that believes to talk to a person."""

    def __init__(self, *words: str, folder: Path) -> None:
        self.master, slave = pty.openpty()
        env = os.environ | {"TERM": "xterm", "XDG_STATE_HOME": str(folder), "COLUMNS": "200"}
        env |= {"PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONFAULTHANDLER": "1"}
        env.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [*MLACLI, *words], stdin=slave, stdout=slave, stderr=slave, env=env, cwd=folder,
            start_new_session=True, preexec_fn=_heeds_ctrl_c,
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def type(self, line: str) -> None:
        os.write(self.master, line.encode() + b"\n")

    def until(self, pattern: str) -> str:
        """What is shown up to and with the pattern, from where the last wait ended."""
        end = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end, (
                f"{pattern!r} does not come; there is {self.text[-800:]!r}"
            )
            if select.select([self.master], [], [], 1)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    pytest.fail(f"ended before {pattern!r}; there is {self.text[-800:]!r}")
        shown, self.text = self.text[: found.end()], self.text[found.end() :]
        return shown.replace("\r", "")

    def say(self, line: str, pattern: str = r"\n(?:\x1b\[0m)?> ") -> str:
        self.type(line)
        return self.until(pattern)

    def leave(self, seconds: float = SECONDS) -> int:
        """The exit code; a process that does not end is made to tell where it hangs."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait()
            pytest.fail(os.read(self.master, 1 << 16).decode(errors="replace"))


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal("chat", "--temp", "0", "-c", "512", folder=tmp_path)
    made.until(r"\n> ")
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.wait()
    os.close(made.master)


def test_every_command(terminal: Terminal, tmp_path: Path) -> None:
    assert ANSWER in terminal.say(QUESTION)
    again = terminal.say("/regen")
    assert ANSWER in again and "Prompt: 1 tokens (14 reused)" in again
    assert "Put a file's text before the next message." in terminal.say("/help")
    assert re.search(r"context: \d+ of 512 tokens", terminal.say("/show"))
    assert "assistant: " + ANSWER in terminal.say("/show messages")
    assert "top_k = 40" in terminal.say("/show parameters")
    assert "prompt eval time" in terminal.say("/show timings")
    terminal.say("/set system Be brief.")
    assert "Be brief." in terminal.say("/show system")
    terminal.say("/set top-k 5")
    assert "top_k = 5" in terminal.say("/show parameters")
    assert "error: --top-k: -5 is out of range" in terminal.say("/set top_k -5")
    assert "no such setting: tpo_k; did you mean top_k?" in terminal.say("/set tpo_k 5")
    assert "saved: log.json (3 messages)" in terminal.say("/save log.json")
    terminal.say("/clear")
    assert "user:" not in terminal.say("/show messages")
    assert "loaded: log.json (3 messages)" in terminal.say("/load log.json")
    assert f"user: {QUESTION}" in terminal.say("/show messages")
    assert "error: /load: none: No such file" in terminal.say("/load none")
    (tmp_path / "note.txt").write_text("import os\n")
    assert "read: note.txt (9 characters)" in terminal.say("/read note.txt")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("B\n")
    shown = terminal.say("/glob **/*.txt")
    assert "read: deep/b.txt (1 characters)" in shown and "read: note.txt (9 " in shown
    assert "error: /glob: '*.none' matches no file" in terminal.say("/glob *.none")
    terminal.say("/set verbose on")
    assert "eval time" in terminal.say("What is this?")
    files = "--- File: deep/b.txt ---\nB\n\n--- File: note.txt ---\nimport os\n\n"
    assert f"user: import os\n\n{files}What is this?" in terminal.say("/show messages")
    assert "error: /sho: no such command; did you mean /show? (/help)" in terminal.say("/sho")
    assert "error: /save: needs FILE" in terminal.say("/save")
    terminal.type("/exit")
    assert terminal.leave() == 0
    history = tmp_path / "mlacli" / "history"
    assert QUESTION in history.read_text() and history.stat().st_mode & 0o777 == 0o600
    saved = json.loads((tmp_path / "log.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]


def test_messages_of_several_lines(terminal: Terminal) -> None:
    terminal.type("one\\")
    terminal.until(r"\. ")
    terminal.say("two")
    terminal.type('"""three')
    terminal.until(r"\. ")
    terminal.say('four"""')
    shown = terminal.say("/show messages")
    assert "user: one\ntwo" in shown and "user: three\nfour" in shown


def test_ctrl_c_stops_the_answer_then_leaves(tmp_path: Path) -> None:
    terminal = Terminal("chat", "--ignore-eos", "-c", "2048", folder=tmp_path)
    terminal.until(r"\n> ")
    terminal.say("/set logit_bias 5-inf 6+1")
    terminal.type("Write a very long text.")
    terminal.until(r"text\.")
    time.sleep(0.5)
    os.killpg(terminal.process.pid, signal.SIGINT)
    shown = terminal.until(r"Generation: \d+ tokens")
    assert int(shown.rpartition(" ")[0].rpartition(" ")[2]) < 2000
    terminal.until("> ")
    # One that comes as readline starts to wait is only noticed with the next key or signal.
    for _ in range(SECONDS):
        os.killpg(terminal.process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            terminal.process.wait(1)
            break
    assert terminal.leave() == 130
    os.close(terminal.master)


def test_the_end_of_input_leaves(terminal: Terminal) -> None:
    os.write(terminal.master, b"\x04")
    assert terminal.leave() == 0


def script(*words: str, text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MLACLI, *words], input=text, capture_output=True, text=True, timeout=SECONDS
    )


def test_a_script_gets_an_answer_per_line_and_never_hangs() -> None:
    done = script("chat", "--temp", "0", text=f"{QUESTION}\n/clear\n{QUESTION}\n")
    assert done.returncode == 0 and done.stdout == f"{ANSWER}\n{ANSWER}\n"
    assert "> " not in done.stdout
    done = script("run", "-i", "--temp", "0", "-st", text=f"{QUESTION}\nnever read\n")
    assert done.returncode == 0 and done.stdout == f"{ANSWER}\n"
    assert script("chat", text="").returncode == 0


def test_a_reverse_prompt_ends_the_answer() -> None:
    done = script("chat", "--temp", "0", "-r", "JSON", text=QUESTION + "\n")
    assert done.stdout == ANSWER[: ANSWER.index("JSON") + 4] + "\n"


def test_prefix_and_suffix() -> None:
    text = "json.dumps\n/show messages\n"
    done = script(
        "chat", "--in-prefix", "What does ", "--in-suffix", " do?", "--temp", "0", text=text
    )
    assert done.stdout == ANSWER + "\n" and f"user: {QUESTION}" in done.stderr


def test_old_turns_are_forgotten_when_the_context_is_full() -> None:
    line = "word " * 60 + "\n"
    done = script("chat", "-c", "256", "-n", "4", "--temp", "0", text=line * 6)
    assert done.returncode == 0
    assert "note: the context is full: the oldest turn is forgotten" in done.stderr
    long = script("chat", "-c", "256", "--temp", "0", text="word " * 400 + f"\n{QUESTION}\n")
    assert "more than -c 256 leaves room for (limit 255)" in long.stderr
    assert long.returncode == 0 and long.stdout == ANSWER + "\n"  # the talk goes on


def test_a_template_by_name_and_by_text() -> None:
    named = script("run", "--chat-template", "chatml", "-p", "x", "-n", "2", text="")
    assert named.returncode == 0
    own = "{{ greeting }}{% for m in messages %}{{ m.content }}{% endfor %}"
    words = ("--chat-template", own, "--chat-template-kwargs", '{"greeting": "import os"}')
    done = script("run", *words, "-p", "\n\ndef ", "-n", "2", text="")
    assert done.returncode == 0
    wrong = script("run", "--chat-template", "nonsense", "-p", "x", text="")
    assert wrong.returncode == 2 and "neither a Jinja text nor one of deepseek2" in wrong.stderr
    wrong = script("run", "--chat-template-kwargs", "[1]", "-p", "x", text="")
    assert wrong.returncode == 2 and "is not a JSON object" in wrong.stderr


def test_a_session_goes_on_with_the_conversation(tmp_path: Path) -> None:
    path = tmp_path / "s"
    words = ("chat", "--temp", "0", "--prompt-cache", str(path), "--prompt-cache-all")
    assert script(*words, text=QUESTION + "\n").returncode == 0
    done = script(*words, text=QUESTION + "\n")
    assert re.search(r"Prompt: 1 tokens \(\d+ reused\)", done.stderr) and ANSWER in done.stdout
