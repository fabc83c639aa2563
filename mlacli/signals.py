"""Ctrl-C and SIGTERM during a step, which is one native call.

Python runs its handlers only between bytecodes: so the bytes that its C handler writes to the
wakeup socket are read by a thread, which sets the cancel word that kernels look at.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from codegen.pool import Pool
from mlacli.engine import Engine
from mlacli.errors import EXIT_SIGINT, EXIT_SIGTERM

EXIT_OF_SIGNAL: dict[int, int] = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}


@contextmanager
def stop_on_signals(engine: Engine) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the step under way within a tile; yields what was received.

    A second Ctrl-C leaves at once.
    """
    if not _in_main_thread():
        yield []
        return
    received: list[int] = []

    def seen(number: int) -> None:
        if number not in EXIT_OF_SIGNAL:
            return
        if received:
            os._exit(EXIT_SIGINT)
        received.append(signal.Signals(number))
        engine.cancel()

    watcher = _Watcher(seen)
    old = {number: signal.signal(number, lambda *_: None) for number in EXIT_OF_SIGNAL}
    old_fd = signal.set_wakeup_fd(watcher.fileno(), warn_on_full_buffer=False)
    try:
        yield received
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in old.items():
            signal.signal(number, handler)
        watcher.close()
        engine.pool.clear_cancel()  # it may have come when there was no step left to end


class Interrupts:
    """Ctrl-C for callers of a pool: `with interrupts:` around what must not be torn.

    The step under way ends within a tile, and KeyboardInterrupt comes where the block ends. Only in
    the main thread, and only while Ctrl-C means KeyboardInterrupt: another handler is left alone,
    and Python calls it after the step. Bytes of other signals go where they went before.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._watcher: _Watcher | None = None  # made once: starting a thread takes a while
        self._lock = threading.Lock()
        self._inside = self._came = False
        self._old_fd = -1

    def __enter__(self) -> None:
        if not _in_main_thread():
            return
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return
        self._watcher = self._watcher or _Watcher(self._seen)
        self._came, self._inside = False, True
        signal.signal(signal.SIGINT, self._note)
        self._old_fd = signal.set_wakeup_fd(self._watcher.fileno(), warn_on_full_buffer=False)

    def __exit__(self, *_: object) -> None:
        if not self._inside or not _in_main_thread():
            return
        signal.set_wakeup_fd(self._old_fd)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # runs what is pending first
        with self._lock:
            self._inside = False
        if self._came:
            self.close()  # a byte not read yet must not reach the next block
            self._pool.clear_cancel()
            raise KeyboardInterrupt from None

    def close(self) -> None:
        """Ends the thread; the next block starts another one."""
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None

    def _note(self, *_: object) -> None:
        self._came = True

    def _seen(self, number: int) -> None:
        with self._lock:
            if self._inside and number == signal.SIGINT:
                self._pool.cancel()
            if self._inside and self._old_fd >= 0:
                with contextlib.suppress(OSError):  # as in C: a full pipe loses what it is told
                    os.write(self._old_fd, bytes([number]))


class _Watcher:
    """A socket for signal.set_wakeup_fd, and a thread that calls `seen` for each byte."""

    def __init__(self, seen: Callable[[int], None]) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, args=(seen,), daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._writer.fileno()

    def close(self) -> None:
        self._writer.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._reader.close()

    def _watch(self, seen: Callable[[int], None]) -> None:
        while data := self._reader.recv(1):
            seen(data[0])


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
