"""scripts/kernel_bench.py times every kind of kernel; here on small shapes."""

from __future__ import annotations

import re

import pytest

from scripts.kernel_bench import main
from scripts.kernel_work import MAKERS, cases

LINE = re.compile(
    r"(?P<name>.+ t\d+) +1 +[\d.]+ us +[\d.]+ TOP/s +[\d.]+ GB/s +(?P<percent>[\d.]+) % of"
)


def test_every_maker_has_a_case() -> None:
    assert {case.maker for case in cases(1)} == set(MAKERS)


def test_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    """One line per case and number of threads, with a share of the limit."""
    main(["--smoke", "--threads", "1", "--filter", "exps +Q8_0|k_b +Q8_0"])
    target, *lines = capsys.readouterr().out.splitlines()
    found = [LINE.match(line) for line in lines]
    assert target.startswith("target ")
    assert len(lines) == len([c for c in cases(16) if re.search("exps +Q8_0|k_b +Q8_0", c.name)])
    assert all(match and float(match["percent"]) > 0 for match in found), lines


def test_processor_time_is_one_thread_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--cpu-time", "--threads", "2"])
    assert "--threads 1" in capsys.readouterr().err
