"""How far a bench is: lines on stderr with --progress, a bar where stderr is a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from mlacli.cli import console
from mlacli.cli.progress import new_bar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class BenchProgress:
    """Told of each test and of each of its runs; a bar is redrawn then, and never in between, so
    that nothing but the engine runs while something is timed."""

    def __init__(self, n_tests: int, runs_per_test: int, lines: bool) -> None:
        self._n_tests, self._runs, self._lines = n_tests, runs_per_test, lines
        self._number = self._done = 0
        self._test = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> BenchProgress:
        if console.shows_bars():
            from rich.progress import TimeRemainingColumn

            self._bar = new_bar(TimeRemainingColumn(), background=False)
            self._task = self._bar.add_task("", total=self._n_tests * self._runs)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def test(self, name: str) -> None:
        """The next test begins."""
        self._number += 1
        self._done = (self._number - 1) * self._runs
        self._test = name
        self.run("starting")

    def run(self, what: str) -> None:
        """A part of the test begins: `warmup prompt run`, `depth run 1/5`, `prompt run 1/5`.

        What fills the cache counts as a part of the run that it is for.
        """
        if self._lines:
            self.line(f"mlacli bench: benchmark {self._number}/{self._n_tests}: {what}")
        self._show(what)
        if what != "starting" and "depth" not in what:
            self._done += 1

    def line(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is None:
            console.note(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, what: str) -> None:
        if self._bar is not None and self._task is not None:
            told = f"{self._number}/{self._n_tests} {self._test}: {what}"
            self._bar.update(self._task, completed=self._done, description=told, refresh=True)
