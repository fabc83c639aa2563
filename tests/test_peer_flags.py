"""No flag of the peers is unknown, and docs/flags.md says what the commands do."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import typer

from mlacli.__main__ import main
from mlacli.cli.accepted import ACCEPTED, WITH_VALUE
from mlacli.cli.app import build
from mlacli.cli.options import StrictCommand
from mlacli.cli.refused import REFUSED
from scripts import flag_table
from scripts.flag_table import SECTIONS, Row, flags_page
from scripts.make_cli_docs import ROOT
from tests.peer_flags import IK_LLAMA_CPP, LLAMA_CPP
from tests.test_cli import Session, session  # noqa: F401  (a fixture)

ROWS = [row for rows in SECTIONS.values() for row in rows]


def command(name: str) -> StrictCommand:
    group = build()
    found = group.get_command(typer.Context(group), name)
    assert isinstance(found, StrictCommand)
    return found


@pytest.mark.parametrize("name", ["run", "chat"])
def test_every_flag_of_the_peers_is_known(name: str) -> None:
    """Implemented, taken with a note, or refused with a reason."""
    known = command(name).flags().keys() | REFUSED.keys()
    assert [flag for flag in (*LLAMA_CPP, *IK_LLAMA_CPP) if flag not in known] == []


def test_a_flag_has_one_state() -> None:
    declared = {n for o in command("run").options() for n in (*o.opts, *o.secondary_opts)}
    assert not declared & ACCEPTED.keys()
    assert not ACCEPTED.keys() & REFUSED.keys()
    assert not command("run").rewrites.keys() & (ACCEPTED.keys() | REFUSED.keys())
    peers = {*LLAMA_CPP, *IK_LLAMA_CPP}
    assert not ACCEPTED.keys() - peers, "taken for the sake of no program"


@pytest.mark.parametrize("flag", ACCEPTED)
def test_what_is_taken_is_told(
    flag: str,
    session: Session,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    value = ["3"] if flag in WITH_VALUE else []
    assert main(["run", "-p", "x", flag, *value]) == 0
    note = f"note: {flag} has no effect: {ACCEPTED[flag]}\n" if ACCEPTED[flag] else ""
    assert capsys.readouterr().err == note


def test_values_of_what_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-p", "x", "-dt"]) == 2
    assert capsys.readouterr().err == "error: -dt: needs a value\n"
    assert main(["run", "-p", "x", "-gr=1"]) == 2
    assert capsys.readouterr().err == "error: -gr: takes no value (got '1')\n"


@pytest.mark.parametrize("flag", sorted(REFUSED.keys() - command("run").flags().keys()))
def test_what_is_refused_says_why(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-p", "x", flag, "1"]) == 2
    assert capsys.readouterr().err == f"error: {flag}: {REFUSED[flag]}\n"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.command} {row.flags.split()[0]}")
def test_rows_of_the_table_are_true(row: Row) -> None:
    known = command(row.command).flags()
    for flag in row.flags.split():
        if row.state == flag_table.REFUSED:
            assert flag in REFUSED and flag not in known
        else:
            assert row.state in (flag_table.DONE, flag_table.OTHERWISE) and flag in known


def test_the_page_is_fresh() -> None:
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page == flags_page(), "run: python -m scripts.flag_table"


# -- what some of them do


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("auto", (True, False)),
        ("none", (False, False)),
        ("mmap", (True, False)),
        ("mlock", (False, True)),
        ("mmap+mlock", (True, True)),
    ],
)
def test_load_modes(mode: str, expected: tuple[bool, bool], session: Session) -> None:  # noqa: F811
    assert main(["run", "-p", "x", "-lm", mode]) == 0
    assert (session.settings.mmap, session.settings.mlock) == expected


REFUSED_LINES = {
    "-lm dio": "-lm: dio: there is no direct I/O (none reads the file, mmap maps it)",
    "-lm fast": "-lm: 'fast' is not one of auto, none, mmap, mlock, mmap+mlock",
    "-lm none --mlock": "-lm and --mlock: give one of them, not both",
    "-lm none --mmap": "-lm and --mmap or --no-mmap: give one of them, not both",
    "--rope-scale 0.5": "--rope-scale: 0.5 is out of range (1 to 65536)",
    "--rope-freq-base abc": "--rope-freq-base: 'abc' is not a number (0 to 1000000000000.0)",
    "--yarn-orig-ctx -5": "--yarn-orig-ctx: -5.0 is out of range (0 to 1073741824)",
    "--reasoning-budget -2": "--reasoning-budget: -2 is out of range (-1 to 2147483647)",
    "--reasoning-format raw": "--reasoning-format: 'raw' is not one of auto, none, deepseek, "
    "deepseek-legacy",
    "--adaptive-target 2": "--adaptive-target: 2.0 is out of range (-1 to 1)",
    "-bf missing": "-bf: missing: No such file or directory",
    "-f a -bf b": "-f: a: No such file or directory",
    "-if --no-cnv": "-if: needs the chat template, which --no-cnv leaves out",
    "--context-shift maybe": "--context-shift: 'maybe' is not one of on, auto, 1, off, 0",
}


@pytest.mark.parametrize("line", REFUSED_LINES)
def test_values_that_cannot_work(
    line: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    prompt = [] if "-bf" in line.split() else ["-p", "x"]
    assert main(["run", *prompt, *line.split()]) == 2
    assert capsys.readouterr().err == f"error: {REFUSED_LINES[line]}\n"


def test_flags_of_an_answer_reach_the_request(session: Session, tmp_path: Any) -> None:  # noqa: F811
    (tmp_path / "p").write_bytes(b"a\\n\xff\n\n")
    line = (
        f"run -bf {tmp_path}/p -sp --reasoning-format none --reasoning-budget 7 -ptc 3 --warmup "
        "--context-shift --reasoning-effort high --no-reasoning-preserve "
        r"--reasoning-budget-message \n"
    )
    assert main(line.split()) == 0
    request = session.request
    assert request.prompt == "a\\n\udcff\n\n"
    assert (request.special, request.warmup, request.context_shift) == (True, True, True)
    assert (request.reasoning_format, request.reasoning_budget) == ("none", 7)
    assert (request.token_count, request.reasoning_message) == (3, "\n")
    assert request.template_kwargs == {"reasoning_effort": "high", "preserve_reasoning": False}
    for words in ("--no-context-shift", "--context-shift off", "--context-shift=0"):
        assert main(f"run -p x {words}".split()) == 0
        assert not session.request.context_shift
    assert main(["run", "-p", "x", "--repack", "--skip-chat-parsing"]) == 0
    assert session.settings.rtr and session.request.reasoning_format == "none"


# -- the bundled model

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}A: <think>\n"
QUESTION = ["-p", "What does json.dumps do?", "--temp", "0", "-n", "12"]


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    assert main(["run", *QUESTION, *words]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_thoughts_end_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    thinking = ("--chat-template", TEMPLATE, "--no-escape")
    text, log = answer(capsys, *thinking, "--reasoning-budget", "0", "-ptc", "4")
    assert text.startswith("</think>") and text.count("</think>") == 1
    assert "\ntokens consumed so far = 20 / 2048\n" in log
    free, _ = answer(capsys, *thinking)
    assert "</think>" not in free
    text, _ = answer(
        capsys, *thinking, "--reasoning-budget", "2", "--reasoning-budget-message", " enough"
    )
    thought, _, rest = text.partition(" enough</think>")
    assert free.startswith(thought) and rest
    hidden, _ = answer(capsys, *thinking, "--reasoning-budget", "2", "-rea", "off")
    text, _ = answer(capsys, *thinking, "--reasoning-budget", "2")
    assert hidden == text.partition("</think>")[2]


def test_control_tokens_are_shown_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    plain, _ = answer(capsys, "-n", "64")
    special, _ = answer(capsys, "-n", "64", "-sp", "--warmup")
    assert special == plain.removesuffix("\n") + "<｜end▁of▁sentence｜>\n"


def test_interactive_first_waits_for_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("and json.loads?\n/show messages\n"))
    assert main(["chat", *QUESTION, "-if", "--chat-template", "chatml"]) == 0
    shown = capsys.readouterr().err
    assert shown.count("[ Prompt:") == 1
    assert "user: What does json.dumps do?\n\nand json.loads?\n" in shown
