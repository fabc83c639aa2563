"""One kernel as a launch table of its own: for measuring, tests and work outside a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from codegen import job as job_layout
from codegen.kernel import KernelSpec
from codegen.pool import LAUNCH_WORDS, Pool, aligned_words

if TYPE_CHECKING:
    from codegen.jit import Jit

Argument = npt.NDArray[Any] | int


class Call:
    """A kernel with its arguments: arrays for pointers, integers for values and dims.

    Keeps the arrays alive; `run` may be called any number of times. Raises TypeError for an
    argument of the wrong kind.
    """

    def __init__(self, jit: Jit, spec: KernelSpec, arguments: Sequence[Argument]) -> None:
        address, n_counters = jit.load(spec)
        self._keep = (jit, arguments)
        self._counters = aligned_words(job_layout.LINE_WORDS * max(1, n_counters))
        self._sizes = np.zeros(len(arguments) + 1, np.int64)
        self._args = aligned_words(len(arguments) + 1)
        for slot, ((name, param), given) in enumerate(
            zip(spec.params.items(), arguments, strict=True)
        ):
            if isinstance(given, np.ndarray) != (param.kind == "ptr"):
                raise TypeError(
                    f"{spec.name}: {name} is a {param.kind}, got {type(given).__name__}"
                )
            if isinstance(given, np.ndarray):
                self._args[slot] = given.ctypes.data
            elif param.kind == "dim":
                self._sizes[slot] = given
                self._args[slot] = self._sizes[slot:].ctypes.data
            else:
                self._args[slot] = given
        self._args[len(arguments)] = self._counters.ctypes.data
        self._table = np.zeros((1, LAUNCH_WORDS), np.int64)
        self._table[0, :2] = address, self._args.ctypes.data

    def run(self, pool: Pool, n_threads: int) -> bool:
        """False when it was cancelled."""
        self._counters[:] = 0
        return pool.run(self._table, n_threads)


def aligned_bytes(n: int) -> npt.NDArray[np.uint8]:
    """n zeroed bytes that start on a cache line."""
    return aligned_words(-(-n // 8)).view(np.uint8)[:n]
