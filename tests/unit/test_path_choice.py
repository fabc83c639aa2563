"""scripts/path_choice.py: both paths of a batch are timed, and the chosen one is compared."""

from __future__ import annotations

import pytest

from scripts.path_choice import Point, main
from tests.conftest import TinyModel


def test_loss_is_relative_to_the_faster_path() -> None:
    seconds = {"absorbed": 3.0, "expanded": 2.0}
    assert Point(4, 0, seconds, "absorbed").loss == 0.5
    assert Point(4, 0, seconds, "expanded").loss == 0.0


def test_every_point_of_the_grid(tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"-m {tiny_model('tiny-lite', 'F32')} -ctk f32 -t 1 --tokens 16,4 --depths 40,0"
    assert main([*words.split(), "--rounds", "1"]) == 0
    first, _, _, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("-mla 3 expands from ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in rows] == [["0", "4"], ["0", "16"], ["40", "4"], ["40", "16"]]
    for _, _, absorbed, expanded, path, loss in rows:
        times = {"absorbed": float(absorbed), "expanded": float(expanded)}
        assert min(times.values()) >= 0 and path in times and loss.endswith("%")
    assert rows[0][4] == rows[1][4] == "expanded"  # a prompt's start always is
