"""Pictures through matplotlib (the extra `plot`): what every one of them has in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlacli.errors import SpaceError, UsageError
from mlacli.files import check_target, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(flag: str, path: Path) -> None:
    """Raise UsageError, before anything is measured, where no picture can be drawn into `path`."""
    check_target(flag, path, SUFFIXES)
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError(f"{flag}: needs matplotlib: pip install 'mlacli[plot]'") from None


def new_figure(width: float = 7.0, height: float = 4.0) -> Figure:
    """An empty figure, in inches, whose text stays text in SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "mlacli"}
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path, flag: str) -> None:
    """Write a figure, whole or not at all; alike figures give alike files. Raises SpaceError."""
    import io

    metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
    stream = io.BytesIO()
    figure.savefig(stream, format=path.suffix[1:], metadata=metadata, dpi=144)
    try:
        write_whole(path, [stream.getvalue()])
    except OSError as problem:
        raise SpaceError(f"{flag}: {path}: {problem.strerror}") from problem
