"""This machine: its compiler, its peaks measured by generated kernels, and what is kept of them.

`Peaks` are the limits that `bench --roof` compares with; `MachineProfile` feeds -mla 3's cost model
and is measured once, then kept beside the object cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from codegen.cache_dir import ObjectCache
from codegen.call import Call, aligned_bytes
from codegen.jit import Jit, host_target, version
from codegen.kernels import roof
from codegen.pool import Pool
from codegen.targets.base import Target
from mlacli.calibrate import measure_profile
from mlacli.cpu_count import available_cpus
from mlacli.debug import ENV
from mlacli.errors import UsageError
from mlacli.files import write_whole
from mlacli.memory import allocate, mostly_huge
from mlacli.model.choose import MachineProfile, is_measured
from mlacli.settings import RunSettings

_ROUNDS = 100_000
_READ_BYTES = 256 << 20


@dataclass(frozen=True)
class Peaks:
    """Multiply-adds per second of each kind, and bytes read per second, on `n_threads` threads."""

    n_threads: int
    int8: float
    bf16: float
    f32: float
    bandwidth: float


def this_target() -> Target:
    """This CPU, or what MLACLI_TARGET says. Raises UsageError."""
    try:
        return host_target(ENV.target)
    except ValueError as problem:
        raise UsageError(f"MLACLI_TARGET: {problem}") from problem


def make_jit() -> Jit:
    """The compiler for `this_target` with the object cache. Raises UsageError."""
    return Jit(this_target(), object_cache(), available_cpus())


def object_cache() -> ObjectCache | None:
    """Where compiled kernels are kept; None when there is no folder for it."""
    folder = ENV.cache_dir
    return ObjectCache(folder / "objects") if folder else None


class Roof:
    """The roof kernels with what they work on: memory of the kind of pages the weights lie in."""

    def __init__(
        self, jit: Jit, pool: Pool, n_threads: int, *, read_bytes: int = _READ_BYTES
    ) -> None:
        self._pool, self._n_threads, self._target = pool, n_threads, jit.target
        out, seed = aligned_bytes(64 * n_threads).view(np.float32), aligned_bytes(256)
        self._peaks = {
            what: Call(jit, roof.peak(what=what), [out, seed, _ROUNDS]) for what in roof.OPERATIONS
        }
        data = allocate(read_bytes, "--roof", huge=mostly_huge())
        data[:] = 1
        self._read_bytes = data.nbytes
        self._read = Call(jit, roof.read_memory(), [out, data.view(np.uint32), data.nbytes])

    def measure(self) -> Peaks:
        """The best of a few short runs of every kernel."""
        n, rates = self._n_threads, {}
        for what, call in self._peaks.items():
            per_round = roof.multiply_adds(what, self._target.lanes, self._target.registers)
            seconds = best_of(partial(call.run, self._pool, n), 3)
            rates[what] = n * _ROUNDS * per_round / seconds
        seconds = best_of(partial(self._read.run, self._pool, n), 3)
        return Peaks(n, rates["int8"], rates["bf16"], rates["f32"], self._read_bytes / seconds)


def measure_peaks(jit: Jit, pool: Pool, n_threads: int, *, read_bytes: int = _READ_BYTES) -> Peaks:
    """What this machine can do just now."""
    return Roof(jit, pool, n_threads, read_bytes=read_bytes).measure()


def mean_peaks(found: Sequence[Peaks]) -> Peaks:
    """Of measurements spread over a time."""
    columns = zip(*(astuple(peaks)[1:] for peaks in found), strict=True)
    return Peaks(found[0].n_threads, *(sum(column) / len(found) for column in columns))


def best_of(run: Callable[[], object], times: int) -> float:
    """Shortest of several runs, in seconds."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine_profile(jit: Jit, pool: Pool, settings: RunSettings) -> MachineProfile | None:
    """The kept profile of this machine, target, thread count and cache type; measured when there is
    none. None where nothing is chosen by it."""
    if not is_measured(settings):
        return None
    n_threads, type_k = settings.n_threads_batch, settings.type_k
    kept = kept_profile(jit.target, n_threads, type_k)
    if kept is not None:
        return kept
    profile = measure_profile(jit, pool, n_threads, type_k)
    path = _profile_path(jit.target, n_threads, type_k)
    if path is not None:
        with contextlib.suppress(OSError):
            _write(path, json.dumps(asdict(profile)))
    return profile


def kept_profile(target: Target, n_threads: int, type_k: str) -> MachineProfile | None:
    """What an earlier run measured; None when there was none, or when it makes no sense."""
    path = _profile_path(target, n_threads, type_k)
    if path is None:
        return None
    with contextlib.suppress(OSError, ValueError, TypeError):
        profile = MachineProfile(**json.loads(path.read_text()))
        if all(0.0 < rate < math.inf for rate in astuple(profile)):
            return profile
    return None


def _profile_path(target: Target, n_threads: int, type_k: str) -> Path | None:
    parts = "\0".join((repr(target), version(), str(n_threads), type_k))
    digest = hashlib.sha256(parts.encode()).hexdigest()[:16]
    folder = ENV.cache_dir
    return folder / f"machine-{digest}.json" if folder else None


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(path, [text.encode()])


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
