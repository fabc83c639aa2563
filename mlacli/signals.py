"""Ctrl-C and SIGTERM during a step, which is one native call."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mlacli.engine import Engine
from mlacli.errors import EXIT_SIGINT, EXIT_SIGTERM

EXIT_OF_SIGNAL: dict[int, int] = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}


@contextmanager
def stop_on_signals(engine: Engine) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the step under way within a tile; yields what was received.

    Python runs its handlers only between bytecodes, and a step is one native call: so the bytes
    that its C handler writes to the wakeup socket are read by a thread, which sets the cancel word.
    A second Ctrl-C leaves at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    received: list[int] = []
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while data := reader.recv(1):
            if data[0] not in EXIT_OF_SIGNAL:
                continue
            if received:
                os._exit(EXIT_SIGINT)
            received.append(signal.Signals(data[0]))
            engine.cancel()

    watcher = threading.Thread(target=watch, daemon=True)
    old = {number: signal.signal(number, lambda *_: None) for number in EXIT_OF_SIGNAL}
    old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher.start()
    try:
        yield received
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in old.items():
            signal.signal(number, handler)
        writer.close()
        watcher.join()
        reader.close()
