"""Progress bars on stderr (rich): for work of more than half a second, gone when it is done.

They are only shown to a terminal. Whatever else is written takes a bar away first, and the next
thing that the work tells brings it back, so that the two never mix.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mlacli.cli import console
from mlacli.progress import Progress

if TYPE_CHECKING:
    from rich import progress as rich_progress

_DELAY = 0.5  # seconds of work that is not worth a bar
_PER_SECOND = 4  # times that the time left is counted down
_MIB = 2**20


@contextlib.contextmanager
def bar(what: str, unit: str, *, background: bool = True) -> Iterator[Progress]:
    """A `Watch` for terminals. Not in the `background`, it is only drawn when the work tells
    something: then no thread takes time from what is measured."""
    shown = _Bar(what, unit, background) if console.shows_bars() else None
    if shown is None:
        yield lambda done, total: None
        return
    console.set_bar(shown.hide)
    try:
        yield shown.update
    finally:
        console.set_bar(None)
        shown.end()


class _Bar:
    """One piece of work. Locked, as the work, a timer and other lines come from several threads;
    what rich's own thread calls (`text`) only reads."""

    def __init__(self, what: str, unit: str, background: bool) -> None:
        self._what, self._unit, self._background = what, unit, background
        self._lock = threading.RLock()
        self._started = self._at = time.perf_counter()
        self._done = self._total = 0
        self._ended = False
        self._drawn: tuple[rich_progress.Progress, rich_progress.TaskID] | None = None
        self._worth = False  # it has lasted long enough
        self._timer = threading.Timer(_DELAY, self._appear)
        self._timer.daemon = True
        if background:
            self._timer.start()

    def update(self, done: int, total: int) -> None:
        with self._lock:
            self._done, self._total, self._at = done, total, time.perf_counter()
            if not self._background:
                self._worth = self._at - self._started >= _DELAY
            if self._worth:
                self._show()

    def hide(self) -> None:
        """Until the next update."""
        with self._lock:
            if self._drawn is not None:
                with contextlib.suppress(OSError):  # the terminal is gone
                    self._drawn[0].stop()
                self._drawn = None

    def end(self) -> None:
        """For good."""
        with self._lock:
            self._ended = True
            self._timer.cancel()
            self.hide()

    def text(self) -> str:
        """How far it is, how fast it goes, how long it will still take."""
        if not self._total:
            return ""
        scale, unit = (_MIB, "MiB") if self._unit == "bytes" else (1, self._unit)
        parts = [f"{self._done // scale}/{-(-self._total // scale)} {unit}"]
        seconds = self._at - self._started
        if self._done and seconds > 0:
            rate = self._done / seconds
            if unit in ("MiB", "tokens"):
                short = "t" if unit == "tokens" else unit
                parts.append(f"{rate / scale:.1f} {short}/s")
            left = (self._total - self._done) / rate - (time.perf_counter() - self._at)
            parts.append("{}:{:02d} left".format(*divmod(max(0, round(left)), 60)))
        return ", ".join(parts)

    def _appear(self) -> None:
        from rich import progress  # noqa: F401  (slow, so before the work could have to wait)

        self._worth = True
        self._show()

    def _show(self) -> None:
        with self._lock:
            if self._ended:
                return
            with contextlib.suppress(OSError):  # the terminal is gone
                if self._drawn is None:
                    self._drawn = self._start()
                shown, task = self._drawn
                shown.update(task, completed=self._done, total=self._total or None)
                if not self._background:
                    shown.refresh()

    def _start(self) -> tuple[rich_progress.Progress, rich_progress.TaskID]:
        shown = _bar_of(self.text, self._background)
        task = shown.add_task(self._what, completed=self._done, total=self._total or None)
        shown.start()
        shown.console.show_cursor(True)  # a process that is killed cannot bring it back
        return shown, task


def _bar_of(text: Callable[[], str], background: bool) -> rich_progress.Progress:
    from rich import progress
    from rich.text import Text

    class State(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            return Text(text())

    return new_bar(State(), background=background)


def new_bar(*columns: rich_progress.ProgressColumn, background: bool) -> rich_progress.Progress:
    """A bar on stderr: what is done, how far it is, and these columns. Not in the `background`, it
    is only drawn when it is told to. Only where `console.shows_bars`."""
    from rich import progress
    from rich.console import Console

    terminal = Console(
        file=sys.stderr, force_terminal=True, no_color=not console.shows_colours(sys.stderr)
    )
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        *columns,
        console=terminal,
        transient=True,
        auto_refresh=background,
        refresh_per_second=_PER_SECOND,
        redirect_stdout=False,
        redirect_stderr=False,
    )
