"""scripts/plot_roofline.py reads what --profile prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.plot_roofline import Point, apart, main, tables

PROFILE = """1/1: tg8 15.54 t/s

profile of tg8: per token, mean of 8
| op          |   calls |     ms |   share |   wait ms |   MB |   GOP |   GB/s |   TOP/s |   limit |
|-------------|---------|--------|---------|-----------|------|-------|--------|---------|---------|
| matmul q    |      27 |  4.177 |   6.5 % |     0.024 |   50 |  0.25 |   22.9 |   0.081 |  87.3 % |
| rms_norm h  |      27 |  0.033 |   0.1 % |     0.064 |    - |     - |      - |       - |       - |
| barriers    |         |  1.442 |   2.2 % |           |      |       |        |         |         |
| total       |     647 | 64.491 | 100.0 % |     1.442 | 1405 |  4.93 |   21.8 |   0.076 |  83.2 % |
machine: int8 1.40 TOP/s, bf16 0.200 TOP/s, f32 0.210 TOP/s, read 25.0 GB/s
"""


def test_ops_with_work_are_points() -> None:
    (table,) = tables(PROFILE)
    assert (table.title, table.peak, table.bandwidth) == ("tg8", 1.4, 25.0)
    assert table.points == [Point("matmul q", 5.0, 0.081, 6.5)]


def test_points_close_to_a_larger_one_have_no_name() -> None:
    small, large, far = Point("a", 1.0, 1.0, 2.0), Point("b", 1.2, 0.9, 5.0), Point("c", 9, 1, 1)
    assert apart([small, large, far]) == [large, far]


def test_a_picture(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(PROFILE)
    assert main([str(tmp_path / "p.txt"), str(tmp_path / "p.svg")]) == 0
    assert "25 GB/s read" in (tmp_path / "p.svg").read_text()


def test_files_without_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", PROFILE.replace("machine", "computer")):
        (tmp_path / "p.txt").write_text(text)
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path / "p.txt"), "p.svg"])
        assert stop.value.code == 2
    assert "no profile with ops" in capsys.readouterr().err
