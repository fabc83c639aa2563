"""`--plot` and `--plot-with`: what bench and sweep measured as a picture, or in the terminal."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from mlacli.cli import console
from mlacli.cli.options import flag
from mlacli.errors import UsageError

_FLAG, _WITH = "--plot", "--plot-with"
_TERMINAL = "-"
_OURS = "mlacli"
Plot = Annotated[
    list[str] | None,
    flag(
        _FLAG,
        "Output",
        "FILE",
        "Draw t/s along what varies: .png, .svg, .pdf, or - for the terminal; may be repeated.",
    ),
]
PlotWith = Annotated[
    list[str] | None,
    flag(
        _WITH,
        "Output",
        "NAME=FILE",
        "Draw the rows of such a .jsonl file as well (of a peer's bench, too); may be repeated.",
    ),
]


@dataclass
class Plots:
    """Where to draw, and which earlier rows go with what is measured now."""

    places: Sequence[str]
    others: dict[str, Any] = field(default_factory=dict)  # name -> rows
    x: str = "depth"

    def plan(self, rows: Sequence[Any]) -> None:
        """Choose what goes along, from rows as they will be. Raises UsageError."""
        from mlacli.plot_results import no_x, what_varies

        if self.places:
            found = what_varies([rows, *self.others.values()])
            if found is None:
                raise no_x(_FLAG)
            self.x = found

    def show(self, rows: Sequence[Any], title: str) -> None:
        """Draw everywhere; nothing when nothing was measured. Raises SpaceError."""
        from mlacli.plot_results import draw, picture_of, terminal_plot

        if not self.places or not rows:
            return
        name = _OURS if self.others else ""
        picture = picture_of({name: rows, **self.others}, self.x, title)
        for place in self.places:
            if place == _TERMINAL:
                console.note(terminal_plot(picture, *_terminal()).rstrip("\n"))
            else:
                draw(picture, Path(place), _FLAG)


def plots_of(plot: Sequence[str] | None, plot_with: Sequence[str] | None) -> Plots:
    """Read and check everything that can be before a measurement. Raises UsageError."""
    places = tuple(plot or ())
    if plot_with and not places:
        raise UsageError(f"{_WITH}: needs {_FLAG} FILE")
    for place in places:
        if place != _TERMINAL:
            from mlacli.pictures import check_picture

            check_picture(_FLAG, Path(place))
    return Plots(places, dict(_named_rows(text) for text in plot_with or ()))


def _named_rows(text: str) -> tuple[str, Any]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UsageError(f"{_WITH}: {text!r} is not NAME=FILE.jsonl")
    from mlacli.results import rows_of

    try:
        rows = rows_of(Path(path))
    except OSError as problem:
        raise UsageError(f"{_WITH}: {path}: {problem.strerror}") from problem
    except ValueError as problem:
        raise UsageError(f"{_WITH}: {problem}") from problem
    if not rows:
        raise UsageError(f"{_WITH}: {path}: has no rows")
    return name, rows


def _terminal() -> tuple[int, bool]:
    """Width of stderr in characters, and whether it shows colours."""
    if sys.stderr is None or not sys.stderr.isatty():
        return shutil.get_terminal_size().columns, False
    columns = os.get_terminal_size(sys.stderr.fileno()).columns
    return max(40, columns), console.shows_colours(sys.stderr)
