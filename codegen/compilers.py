"""Kernels compiled on several cores at once.

llvmlite holds one lock around every call into LLVM, so threads would only wait: helper processes
(codegen/compile_child.py) take the IR texts, the longest first, while this process still builds the
next ones; once they are all built, it takes its share. A helper that dies costs time and nothing
else: this process compiles what is left.
"""

from __future__ import annotations

import contextlib
import errno
import json
import queue
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codegen.child import read_frame, start_child, write_frame

PER_HELPER = 4  # kernels that pay for starting one
MAX_HELPERS = 7
_CHILD = Path(__file__).with_name("compile_child.py")
_POLL_SECONDS = 0.01


def helpers_worth(n_kernels: int, n_processes: int) -> int:
    """Helpers to start beside this process."""
    return max(0, min(n_processes - 1, n_kernels // PER_HELPER, MAX_HELPERS))


@dataclass
class Compilers:
    """`n` helpers beside `compile_one`. `machine` holds the arguments of jit.machine_for;
    `folders` are those that llvmlite and codegen are imported from; `done` is told, from any
    thread, how many are compiled."""

    machine: Mapping[str, str]
    folders: Sequence[str]
    compile_one: Callable[[str], bytes]
    n: int
    done: Callable[[int], None] | None = None
    _texts: queue.PriorityQueue[tuple[int, str, str]] = field(default_factory=queue.PriorityQueue)
    notes: list[str] = field(default_factory=list)
    _done: dict[str, bytes] = field(default_factory=dict)
    _all_built: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def compile(self, texts: Iterable[tuple[str, str]]) -> dict[str, bytes]:
        """Object code by name, of (name, IR text) pairs; once per object.

        Raises what `compile_one` raises for a text that LLVM refuses.
        """
        threads = [threading.Thread(target=self._feed_helper, daemon=True) for _ in range(self.n)]
        for thread in threads:
            thread.start()
        try:
            for name, text in texts:
                self._texts.put((-len(text), name, text))  # the longest comes out first
            self._all_built.set()
            self._compile_here()
            for thread in threads:
                thread.join()
            self._compile_here()  # what a dead helper gave back
        finally:
            while self._take():  # after an error: nothing is left for the helpers
                pass
            self._all_built.set()
        return self._done

    def _take(self) -> tuple[int, str, str] | None:
        try:
            return self._texts.get_nowait()
        except queue.Empty:
            return None

    def _compile_here(self) -> None:
        while task := self._take():
            self._finish(task[1], self.compile_one(task[2]))

    def _finish(self, name: str, payload: bytes) -> None:
        with self._lock:
            self._done[name] = payload
            if self.done:
                self.done(len(self._done))

    def _feed_helper(self) -> None:
        """A helper's thread: notes what is wrong with it, as the work is done without it."""
        try:
            with self._start() as helper:
                self._feed(helper)
        except OSError as problem:
            why = problem.strerror or type(problem).__name__
            self.notes.append(f"a helper process for compiling failed: {why}")

    def _feed(self, helper: subprocess.Popen[bytes]) -> None:
        """Hands it one text after another until none is left to come. Raises BrokenPipeError."""
        while not (self._all_built.is_set() and self._texts.empty()):
            try:
                task = self._texts.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if not self._ask(helper, task):
                self._texts.put(task)
                raise BrokenPipeError(errno.EPIPE, "it ended early")

    def _ask(self, helper: subprocess.Popen[bytes], task: tuple[int, str, str]) -> bool:
        assert helper.stdin is not None and helper.stdout is not None
        body = None
        with contextlib.suppress(BrokenPipeError):
            write_frame(helper.stdin, task[2].encode())
            body = read_frame(helper.stdout)
        if body is None:
            return False
        self._finish(task[1], body)
        return True

    def _start(self) -> subprocess.Popen[bytes]:
        helper = start_child(_CHILD, self.folders)
        assert helper.stdin is not None
        write_frame(helper.stdin, json.dumps(self.machine).encode())
        return helper
