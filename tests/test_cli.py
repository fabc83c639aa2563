"""The command line from outside: what is refused with which line, and how every run ends."""

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

CACHE_TYPES = "f32, f16, bf16, q8_0, q8_KV, q6_0, q4_0, iq4_nl, q5_0"

# command line -> the line after "error: "; exit code 2, before any model is looked for
REFUSED = {
    "run -t 0": "-t: 0 is out of range (1 to 1024)",
    "run -t -1": "-t: -1 is out of range (1 to 1024)",
    "run -t abc": "-t: 'abc' is not a whole number (1 to 1024)",
    "run -t 1e3": "-t: '1e3' is not a whole number (1 to 1024)",
    "run -t 99999999999": "-t: 99999999999 is out of range (1 to 1024)",
    "run -t 4096": "-t: 4096 is out of range (1 to 1024)",
    "run -tb 0": "-tb: 0 is out of range (1 to 1024)",
    "run -c -5": "-c: -5 is out of range (0 to 2147483647)",
    "run -c 99999999999": "-c: 99999999999 is out of range (0 to 2147483647)",
    "run -b 0": "-b: 0 is out of range (1 to 1048576)",
    "run -ub -1": "-ub: -1 is out of range (1 to 65536)",
    "run -p x -ub 1024 -b 512": "-ub: 1024 is more than -b 512",
    "run -n abc": "-n: 'abc' is not a whole number (-2 to 2147483647)",
    "run -n -3": "-n: -3 is out of range (-2 to 2147483647)",
    "run -ctk foo": f"-ctk: 'foo' is not one of {CACHE_TYPES}",
    "run -p x -ctk q4_0 -mla 1": "-ctk: q4_0 cannot hold the latent rows of -mla 1 "
    "(one of f32, f16, bf16, q8_0, q8_KV, q6_0, or -mla 0)",
    "run -p x -ctv q8_0 -no-fa": "-ctv: q8_0 needs flash attention (-fa on): "
    "without it V is kept transposed, which blocks of values do not allow",
    "run -mla 7": "-mla: 7 is out of range (0 to 3)",
    "run -mla -1": "-mla: -1 is out of range (0 to 3)",
    "run -amb -5": "-amb: -5 is out of range (0 to 1048576)",
    "run -fa maybe": "-fa: 'maybe' is not one of on, auto, 1, off, 0",
    "run -ser 4": "-ser: '4' is not a pair Kmin,t such as 4,0.3 (-1,0 is off)",
    "run --temp nan": "--temp: 'nan' is not a number (0 to 1000)",
    "run --temp inf": "--temp: 'inf' is not a number (0 to 1000)",
    "run --temp -1": "--temp: -1.0 is out of range (0 to 1000)",
    "run --top-p 7": "--top-p: 7.0 is out of range (0 to 1)",
    "run --top-k -5": "--top-k: -5 is out of range (0 to 2147483647)",
    "run --min-p 2": "--min-p: 2.0 is out of range (0 to 1)",
    "run --repeat-penalty 0": "--repeat-penalty: 0.0 is out of range (0.01 to 100)",
    "run -s abc": "-s: 'abc' is not a whole number (-1 to 4294967295)",
    "run -s 18446744073709551616": "-s: 18446744073709551616 is out of range (-1 to 4294967295)",
    "run -p x -f y": "-p and -f: give one of them, not both",
    "run -p x -sys y -sysf z": "-sys and -sysf: give one of them, not both",
    "run -p x -sysf missing.txt": "-sysf: missing.txt: No such file or directory",
    "run -p=": "the prompt is empty (give -p TEXT, -f FILE or standard input)",
    "run -f .": "-f: .: Is a directory",
    "run -f missing.txt": "-f: missing.txt: No such file or directory",
    # spelling
    "run -ub256": "-ub256: write a space before the value: -ub 256",
    "run -mla3": "-mla3: write a space before the value: -mla 3",
    "run -m./x.gguf": "-m./x.gguf: write a space before the value: -m ./x.gguf",
    "run -mlx 3": "-mlx: no such flag; did you mean -mla?",
    "run --ubatch-sise 3": "--ubatch-sise: no such flag; did you mean --ubatch-size?",
    "run --temperatur 1": "--temperatur: no such flag; did you mean --temperature?",
    "run --zzz": "--zzz: no such flag",
    "run -m": "-m: needs a value",
    "run -ctk -fa": "-ctk: needs a value, but the flag -fa follows",
    "run -ctk --ubatch_size 3": "-ctk: needs a value, but the flag --ubatch_size follows",
    "run --mlock=1": "--mlock: takes no value (got '1')",
    "run model.gguf": "'model.gguf': belongs to no flag (a value with spaces needs quotes)",
    "run -rtr 1": "'1': belongs to no flag (a value with spaces needs quotes)",
    # commands
    "rnu": "'rnu': no such command (one of run, bench, report)",
    "-m x.gguf": "-m: comes after a command, as in: mlacli run -m ...",
    "report -mla 4": "-mla: 4 is out of range (0 to 3)",
    "report -p x": "-p: no such flag",
    # bench
    "bench -p abc": "-p: 'abc' is not a whole number (0 to 16777216)",
    "bench -p 0 -n 0": "-p, -n, -pg, -gp: all are 0, so there is nothing to run",
    "bench -r 0": "-r: 0 is out of range (1 to 10000)",
    "bench -o xml": "-o: 'xml' is not one of md, json, jsonl, csv, sql",
    "bench -p 8-1": "-p: '8-1' is not a range (as 1-8, 1-9+2 or 1-64*2)",
    "bench -pg 3": "-pg: '3' is not a pair such as 512,128",
    "bench -ctk f16,foo": f"-ctk: 'foo' is not one of {CACHE_TYPES}",
    "bench -mla 0,4": "-mla: 4 is out of range (0 to 3)",
    "bench -p 1-1000 -d 1-1000": "1001000 combinations of flags are too many (10000)",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {REFUSED[line]}\n"
    assert printed.out == ""


class Session:
    """Stands for the engine: remembers what it was asked and answers as it is told to."""

    def __init__(self) -> None:
        self.settings = RunSettings()
        self.request = Request("nothing yet")
        self.answer: Callable[..., int] = lambda write, note: 0

    def run_prompt(self, settings: RunSettings, request: Request, *, write: Any, note: Any) -> int:
        self.settings, self.request = settings, request
        return self.answer(write, note)


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
    assert capsys.readouterr().err == "error: -f /dev/zero: is longer than 64 MiB\n"


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
