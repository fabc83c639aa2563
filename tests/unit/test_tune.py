"""Tuning with a made-up machine: what is chosen under noise, how time is kept, what is written."""

from __future__ import annotations

import math
import random
import tomllib
from pathlib import Path

import pytest

from mlacli.__main__ import main
from mlacli.bench import BenchCase, BenchResult, ModelFacts
from mlacli.errors import Interrupted, SpaceError
from mlacli.model.choose import PathChooser
from mlacli.tune import NEVER, Trial, Tuned, Tuner, batch_sizes, choose, thread_counts
from mlacli.tune_table import changes, table_lines

FACTS = ModelFacts("deepseek2", 1, 1)


class Machine:
    """Two fast cores of four, 256 tokens at once fill its caches, expanding pays from 100 on."""

    def __init__(self, noise: float = 0.0) -> None:
        self.now, self.noise, self.random = 0.0, noise, random.Random(1)
        self.cases: list[BenchCase] = []

    def __call__(self, case: BenchCase) -> BenchResult:
        self.cases.append(case)
        s = case.settings
        if s.n_ubatch > 1024:
            raise SpaceError("does not fit")
        if case.n_gen:
            seconds = case.n_gen * (0.1 if s.n_threads == 2 else 0.2)
        else:
            seconds = case.n_prompt * 0.01 * (2 / min(s.n_threads_batch, 4))
            seconds *= 1 + abs(math.log2(min(s.n_ubatch, 10_000) / 256)) / 10
            if s.mla_threshold is not None:
                expanded = case.n_prompt >= s.mla_threshold
                seconds *= 1.0 if expanded == (case.n_prompt >= 100) else 1.5
        seconds *= math.exp(self.random.gauss(0, self.noise))
        self.now += seconds
        return BenchResult(FACTS, "cpu", "now", (round(seconds * 1e9),))

    def tuner(self, seconds: float, **given: object) -> Tuner:
        def chooser(case: BenchCase) -> PathChooser:
            return PathChooser(3, threshold=30)

        return Tuner(
            given, self, chooser, lambda line: None, seconds, lambda: self.now, default_t=4, cpus=4
        )


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_what_is_faster_is_found(noise: float) -> None:
    machine = Machine(noise)
    found = {t.name: t for t in machine.tuner(2000).tune(["mla-threshold", "ub", "tb", "t"])}
    assert list(found) == ["t", "tb", "ub", "mla-threshold"]
    assert {name: tuned.chosen for name, tuned in found.items()} == {
        "t": 2,
        "tb": 4,
        "ub": 256,
        "mla-threshold": 120,  # sizes 7, 15, 30, 60 and 120 were tried
    }
    assert "0.5" not in found["t"].reason and found["tb"].reason.startswith("no other is 3%")
    (error,) = (trial.error for trial in found["ub"].trials if trial.value == 2048)
    assert error == "does not fit"
    marks = [line for line in table_lines(found.values()) if line[0] == "-t"]
    assert [line[1] for line in marks if "chosen" in line[-1]] == ["2"]


def test_noise_alone_changes_nothing() -> None:
    """Of 200 times that three values are alike, the default stays in at least 95 of 100."""
    source = random.Random(2)

    def trial(value: int) -> Trial:
        return Trial(value, [math.exp(source.gauss(0, 0.1)) for _ in range(10)])

    kept = sum(choose(1, [trial(1), trial(2), trial(3)])[0] == 1 for _ in range(200))
    assert kept >= 190


def test_few_rounds_decide_nothing() -> None:
    value, reason = choose(1, [Trial(1, [2.0, 2.0]), Trial(2, [1.0, 1.0])])
    assert value == 1 and reason.startswith("only 2 rounds")
    assert choose(1, [Trial(1, [2.0] * 3), Trial(2, [1.0] * 3)])[0] == 2
    assert choose(1, [Trial(1, [], "no memory"), Trial(2, [1.0] * 3)]) == (1, "no memory")


@pytest.mark.parametrize("seconds", [10, 60, 300])
def test_time_is_kept(seconds: float) -> None:
    machine = Machine()
    found = machine.tuner(seconds).tune(["t", "tb", "ub", "mla-threshold"])
    assert machine.now <= 1.3 * seconds + 3
    skipped = [tuned for tuned in found if not tuned.is_decided]
    assert all("little time" in tuned.reason for tuned in skipped)
    assert bool(skipped) == (seconds < 300)


def test_what_is_given_holds() -> None:
    machine = Machine()
    found = machine.tuner(500, type_k="q8_0", mla=1, n_batch=256).tune(["ub", "mla-threshold"])
    assert {case.settings.type_k for case in machine.cases} == {"q8_0"}
    assert max(case.settings.n_ubatch for case in machine.cases) == 256
    assert found[1].reason == "-mla 0 and 1 have one path only"


def test_candidates() -> None:
    assert thread_counts(2, 2) == [2, 1]
    assert thread_counts(64, 128) == [128, 64, 48, 32, 16]
    assert batch_sizes(31, 512) == [7, 15, 31, 62, 124]
    assert batch_sizes(NEVER, 512) == batch_sizes(128, 512) == [32, 64, 128, 256, 512]


def _tuned(name: str, default: int | None, chosen: int | None, rounds: int = 3) -> Tuned:
    return Tuned(name, "", default, [Trial(default, [1.0] * rounds)], chosen, "")


def test_what_is_written() -> None:
    t, tb, ub = _tuned("t", 4, 2), _tuned("tb", 4, 4), _tuned("ub", 512, 512)
    none: dict[str, int | None] = {"tb": None, "ub": None}
    assert changes([t, tb, ub], {}, (), 4) == none | {
        "threads": 2,
        "ubatch-size": None,
        "threads-batch": 4,
    }
    assert changes([_tuned("t", 4, 4), tb], {}, (), 4) == {
        "tb": None,
        "threads": None,
        "threads-batch": None,
    }
    assert changes([ub], {}, ["ubatch-size"], 4) == {"ub": None, "ubatch-size": 512}
    assert changes([t], {"threads-batch": 3}, (), 4) == {"threads": 2}
    assert changes([_tuned("ub", 512, 64, rounds=2)], {"ubatch-size": 9}, (), 4) == {}


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the engine, on the model that comes along; then stopped, and without writing."""
    config = tmp_path / "config.toml"
    monkeypatch.setenv("MLACLI_CONFIG", str(config))
    words = ["tune", "--only", "ub"]
    monkeypatch.setattr("mlacli.tune.MAX_ROUNDS", 3)
    monkeypatch.setattr("mlacli.tune._MAX_PROMPT", 512)
    monkeypatch.setattr("mlacli.tune.choose", lambda default, trials: (256, "made up"))
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "| -ub    | 256     | pp512  |" in printed and "\n-ub 256: made up\n" in printed
    assert tomllib.loads(config.read_text()) == {"models": {"demo.gguf": {"ubatch-size": 256}}}

    def stopped(*_: object) -> BenchResult:
        raise Interrupted(130)

    monkeypatch.setattr("mlacli.bench_runner.EngineRunner.__call__", stopped)
    before = config.read_text()
    assert main(words) == 130 and config.read_text() == before
    monkeypatch.setattr("mlacli.bench_runner.EngineRunner.__call__", Machine().__call__)
    assert main([*words, "--dry-run"]) == 0 and config.read_text() == before


def test_nothing_is_measured_where_nothing_could_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLACLI_CONFIG", "")
    for words, line in (
        ([], "MLACLI_CONFIG: is empty, so there is no file to write to (or --dry-run)"),
        (["--only", "t,x"], "--only: 'x' is not one of t, tb, ub, mla-threshold"),
        (["--time", "0"], "--time: 0 is out of range (1 to 86400)"),
    ):
        assert main(["tune", *words]) == 2
        assert capsys.readouterr().err == f"error: {line}\n"
