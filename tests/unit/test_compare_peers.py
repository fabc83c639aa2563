"""scripts/compare_peers.py: what is run, in which order, and what is made of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts.compare_peers import (
    OURS,
    BenchCase,
    Engine,
    all_cases,
    compare,
    header,
    main,
    parse_peer,
    row,
    tokens_per_second,
)

MODEL = Path("m.gguf")


def json_rows(*rates: float) -> str:
    return "log line\n" + json.dumps([{"avg_ts": rate} for rate in rates])


def test_engines_take_turns_and_ratios_pair_runs_of_a_round() -> None:
    engines, order = [Engine(OURS, ("a",)), Engine("peer", ("b",))], []
    rates = iter((10.0, 5.0, 30.0, 10.0, 20.0, 20.0))

    def run(arguments: Sequence[str]) -> str:
        order.append(arguments[0])
        return json_rows(next(rates))

    found = compare(engines, MODEL, BenchCase(512, 0, 0), 3, run)
    assert order == ["a", "b"] * 3
    assert row(BenchCase(512, 0, 0), found) == ["pp512", "20.00", "10.00", "2.00 (1.00 .. 3.00)"]
    assert header(engines) == ["test", "mlacli t/s", "peer t/s", "ours / peer"]


def test_command_lines() -> None:
    new, old = Engine("x", ("x", "-fa", "1")), Engine("y", ("y",), knows_depth=False)
    base = ["-m", "m.gguf", "-r", "1", "-o", "json"]
    prompt, deep = BenchCase(64, 0, 0), BenchCase(0, 8, 4096)
    assert new.arguments(MODEL, prompt) == ["x", "-fa", "1", *base, "-p", "64", "-n", "0"]
    assert new.arguments(MODEL, deep)[-6:] == ["-p", "0", "-n", "8", "-d", "4096"]
    assert old.arguments(MODEL, deep)[-2:] == ["-gp", "4096,8"]
    assert (prompt.name, deep.name) == ("pp64", "tg8 @ d4096")
    with pytest.raises(ValueError, match="no -d"):
        old.arguments(MODEL, BenchCase(64, 0, 4096))


def test_tests_are_prompts_then_generation_at_each_depth() -> None:
    names = [test.name for test in all_cases([512, 0], [8], [0, 16])]
    assert names == ["pp512", "tg8", "tg8 @ d16"]


def test_what_cannot_be_used_is_refused() -> None:
    assert tokens_per_second(json_rows(3.5)) == 3.5
    for output in (json_rows(1.0, 2.0), "[]", json.dumps([{"error": "no", "avg_ts": 1}])):
        with pytest.raises(ValueError, match="not one row"):
            tokens_per_second(output)
    with pytest.raises(ValueError, match="name=command"):
        parse_peer("/no/name")


def test_a_peer_that_knows_depth_says_so() -> None:
    assert parse_peer("p=bin -fa 1", lambda _: "  -d, --n-depth <n>").knows_depth
    assert not parse_peer("p=bin", lambda _: "-gp <pp,tg>").knows_depth


def test_whole_run_with_a_binary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_peer: str
) -> None:
    code = main([str(bundled()), "-p", "8", "-n", "0", "--rounds", "1", "--peer", tiny_peer])
    out = capsys.readouterr().out
    assert code == 0
    assert "| pp8" in out
    assert "ours / tiny" in out


def bundled() -> Path:
    import mlacli

    return Path(mlacli.__file__).parent / "data" / "demo.gguf"


@pytest.fixture
def tiny_peer(tmp_path: Path) -> str:
    script = tmp_path / "peer.py"
    script.write_text(
        "import sys\nprint('--n-depth' if '--help' in sys.argv else '[{\"avg_ts\": 4.0}]')"
    )
    launcher = tmp_path / "peer"
    launcher.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {script} "$@"\n')
    launcher.chmod(0o755)
    return f"tiny={launcher}"
