"""The command line from outside: what reaches the engine, and how every run ends."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlacli.__main__ import main
from mlacli.cli import console
from mlacli.errors import ModelError, SessionError, SpaceError, UsageError
from mlacli.settings import Request, RunSettings, default_model


class Session:
    """Stands for the engine: remembers what it was asked and answers as it is told to."""

    def __init__(self) -> None:
        self.settings = RunSettings()
        self.request = Request("nothing yet")
        self.answer: Callable[..., int] = lambda write, note: 0

    def run_prompt(
        self,
        settings: RunSettings,
        request: Request,
        *,
        output: Any,
        note: Any,
        watch: Any,
        profile: bool,
    ) -> int:
        self.settings, self.request = settings, request
        return self.answer(lambda text: output.piece(0, text), note)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    made = Session()
    module = types.ModuleType("mlacli.session")
    monkeypatch.setattr(module, "run_prompt", made.run_prompt, raising=False)
    monkeypatch.setitem(sys.modules, "mlacli.session", module)
    return made


def test_defaults_reach_the_session(session: Session) -> None:
    assert main(["run", "-p", "hello"]) == 0
    assert session.settings == RunSettings()
    assert session.request == Request("hello")
    assert session.settings.model == default_model()


def test_every_flag_reaches_its_field(session: Session) -> None:
    line = (
        "run -m a.gguf -p hi -n 5 -c 4096 -b 1024 -ub 256 -t 3 -tb 4 -mla 2 -fa off -ctk q8_KV "
        "-ctv f32 -amb 64 -rtr -no-fmoe -ser 4,0.3 -thp --mlock --no-mmap --mla-threshold 99 -v "
        "--temp 0 --top-k 7 --top-p 0.5 --min-p 0.1 -s 42 --repeat-penalty 1.1 "
        "--repeat-last-n 9 --ignore-eos --no-cnv"
    )
    assert main(line.split()) == 0
    assert session.settings == RunSettings(
        model=Path("a.gguf"),
        n_ctx=4096,
        n_batch=1024,
        n_ubatch=256,
        n_threads=3,
        n_threads_batch=4,
        mla=2,
        mla_threshold=99,
        flash_attn=False,
        type_k="q8_KV",
        type_v="f32",
        amb_mib=64,
        rtr=True,
        fmoe=False,
        ser=(4, 0.3),
        thp=True,
        mlock=True,
        mmap=False,
        verbose=True,
    )
    request, sampling = session.request, session.request.sampling
    assert (request.prompt, request.n_predict, request.raw) == ("hi", 5, True)
    assert (sampling.temp, sampling.top_k, sampling.top_p, sampling.min_p) == (0, 7, 0.5, 0.1)
    assert (sampling.seed, sampling.repeat_penalty, sampling.repeat_last_n) == (42, 1.1, 9)
    assert sampling.ignore_eos


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["-fa"], "flash_attn", True),
        (["-fa", "-t", "1"], "flash_attn", True),
        (["-fa", "AUTO"], "flash_attn", True),
        (["-fa", "0"], "flash_attn", False),
        (["-fa=off"], "flash_attn", False),
        (["-no-fa"], "flash_attn", False),
        (["--ubatch_size", "64"], "n_ubatch", 64),
        (["--ubatch_size=64"], "n_ubatch", 64),
        (["-ub=64"], "n_ubatch", 64),
        (["-c4096"], "n_ctx", 4096),
        (["-c=0"], "n_ctx", 0),
        (["-ub", "64", "-ub", "32"], "n_ubatch", 32),
        (["--cache_type_k", "q8_0"], "type_k", "q8_0"),
        (["-no-fmoe", "-fmoe"], "fmoe", True),
        (["-ser", "-1,0"], "ser", None),
        (["--debug"], "mla", 3),
    ],
)
def test_spellings(session: Session, words: list[str], field: str, value: object) -> None:
    assert main(["run", "-p", "x", *words]) == 0
    assert getattr(session.settings, field) == value


@pytest.mark.parametrize("text", ["-x", "--", "-ub256", "a=b", "-1", "two words"])
def test_a_prompt_may_look_like_a_flag(session: Session, text: str) -> None:
    assert main(["run", "-p", text]) == 0
    assert session.request.prompt == text
    assert main(["run", f"-p={text}"]) == 0
    assert session.request.prompt == text


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"one\n", "one"),
        (b"one\n\n", "one\n"),
        (b"\xef\xbb\xbfa\r\n\0", "\ufeffa\r\n\0"),
        (b"\xff\xfe", "\udcff\udcfe"),
        ("größe".encode(), "größe"),
    ],
)
def test_prompt_from_file_and_stdin(
    session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    prompt: str,
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    assert main(["run", "-f", str(file)]) == 0
    assert session.request.prompt == prompt
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    session.request = Request("nothing yet")
    assert main(["run"]) == 0
    assert session.request.prompt == prompt


@pytest.mark.parametrize(
    ("stdin", "line"),
    [
        (io.BytesIO(b""), "the prompt is empty (give -p TEXT, -f FILE or standard input)"),
        (io.BytesIO(b"\n"), "the prompt is empty (give -p TEXT, -f FILE or standard input)"),
        (None, "no prompt: give -p TEXT, -f FILE or standard input"),
    ],
)
def test_no_prompt(
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stdin: io.BytesIO | None,
    line: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin and io.TextIOWrapper(stdin))
    assert main(["run"]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"one\ntwo\tthree\r", "one\ntwo\tthree\r"),
        (r"\"a\" \'b\'", "\"a\" 'b'"),
        (r"\\n \\\n", "\\n \\\n"),
        (r"\x41\xc3\xa9\xff", "Aé\udcff"),
        ("\\d \\x4 \\xg1 é\\", "\\d \\x4 \\xg1 é\\"),
        ("\udcff\\n", "\udcff\n"),
        (r"\u00e9 \0", r"\u00e9 \0"),
    ],
)
def test_escapes(session: Session, typed: str, meant: str) -> None:
    assert main(["run", "-p", typed, "-sys", typed]) == 0
    assert (session.request.prompt, session.request.system) == (meant, meant)
    assert main(["run", "-p", typed, "-sys", typed, "--no-escape"]) == 0
    assert (session.request.prompt, session.request.system) == (typed, typed)
    assert main(["run", "-p", typed, "--no-escape", "-e"]) == 0
    assert session.request.prompt == meant


def test_files_have_no_escapes(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(r"print('\n')" + "\n")
    assert main(["run", "-f", str(file), "-sysf", str(file)]) == 0
    assert session.request.prompt == session.request.system == r"print('\n')"


def test_system_message(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-p", "x", "-sys", "be brief"]) == 0
    assert session.request == Request("x", system="be brief")
    assert capsys.readouterr().err == ""
    assert main(["run", "-p", "x", "--system_prompt", "be brief", "--no-cnv"]) == 0
    note = "note: -sys has no effect with --no-cnv: no chat template is used\n"
    assert capsys.readouterr().err == note


def test_switching_off_what_is_never_done(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--no-display-prompt", "-p", "x", "--no-warmup"]) == 0
    assert session.request == Request("x") and session.settings == RunSettings()
    assert capsys.readouterr().err == ""
    assert main(["run", "-p", "x", "--no-warmup=1"]) == 2
    assert capsys.readouterr().err == "error: --no-warmup: takes no value (got '1')\n"


def test_endless_prompt_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-f", "/dev/zero"]) == 2
    assert capsys.readouterr().err == "error: -f: /dev/zero: is longer than 64 MiB\n"


def test_flags_without_effect_are_named(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-p", "x", "-ctv", "q8_0"]) == 0
    note = "note: -ctv q8_0 has no effect with -mla 3: V is a part of the cached row\n"
    assert capsys.readouterr().err == note


@pytest.mark.parametrize(
    ("problem", "code", "line"),
    [
        (UsageError("-c: too much"), 2, "error: -c: too much"),
        (ModelError("a.gguf: not a GGUF file"), 3, "error: a.gguf: not a GGUF file"),
        (SessionError("s: damaged"), 4, "error: s: damaged"),
        (SpaceError("needs 412 GiB"), 5, "error: needs 412 GiB"),
        (MemoryError(), 5, "error: out of memory"),
        (OSError(28, "No space left on device", "x.bin"), 5, "error: x.bin: No space left"),
        (KeyError("x"), 70, "error: internal: KeyError: 'x' (--debug shows where)"),
        (OSError(2, "No such file"), 70, "error: internal: FileNotFoundError"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_exit_codes(
    session: Session,
    capsys: pytest.CaptureFixture[str],
    problem: BaseException,
    code: int,
    line: str,
) -> None:
    def fail(write: object, note: object) -> int:
        raise problem

    session.answer = fail
    assert main(["run", "-p", "x"]) == code
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == bool(line)


def test_the_sessions_own_code_is_kept(session: Session) -> None:
    session.answer = lambda write, note: 130
    assert main(["run", "-p", "x"]) == 130


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_debug_shows_where(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    session.answer = lambda write, note: dict[str, int]()["missing"]
    if by == "variable":
        monkeypatch.setenv("MLACLI_DEBUG", "1")
    assert main(["run", "-p", "x", *["--debug"] * (by == "flag")]) == 70
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: internal: KeyError: 'missing'"


def test_error_line_is_short_and_safe(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(write: object, note: object) -> int:
        raise ModelError("a\x1b[2J\n\u202eb\udcff" + "x" * 1000)

    session.answer = fail
    assert main(["run", "-p", "x"]) == 3
    line = capsys.readouterr().err
    assert line.startswith(r"error: a\x1b[2J\n\u202eb\udcffxxx") and line.endswith("...\n")
    assert len(line) == 301


def test_text_goes_to_stdout_and_notes_to_stderr(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(write: Callable[[str], None], note: Callable[[str], None]) -> int:
        note("load time")
        write("par")
        write("tial")
        return 0

    session.answer = answer
    assert main(["run", "-p", "x"]) == 0
    assert capsys.readouterr() == ("partial", "load time\n")


def test_closed_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SpaceError, match="stdout: is closed"):
        console.write("x")
