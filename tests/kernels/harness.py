"""Runs one kernel on numpy arrays: the tables a program would give it, threads, and guard pages.

`run_kernel` calls a kernel in this process. `run_guarded` calls it twice in a child whose arrays
lie against inaccessible pages (their end, then their start), inputs read-only and outputs filled
with a NaN payload: a stray access is a signal, and a signal, an element left unwritten or a
padding byte touched is a failed case.
"""

from __future__ import annotations

import ctypes
import faulthandler
import math
import mmap
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from codegen import jit, job
from codegen.kernel import KernelSpec
from codegen.targets import NAMES, build, can_run
from codegen.targets.base import Target

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
Args = Mapping[str, Array | int | float]

PAGE = mmap.PAGESIZE
CHILD_SECONDS = 30.0
# Two NaN payloads that differ in every byte: a byte that differs between runs was never written.
POISON = (0x7FA5A5A5, 0xFFDA5A5A)

_PROT_NONE, _PROT_READ = 0, 1
_SYMBOL_TABLE = 2  # ELF section type
_libc = ctypes.CDLL(None, use_errno=True)


def host_targets() -> list[Target]:
    """The targets whose instructions this machine has, best first."""
    here = jit.host()
    return [build(name, here) for name in NAMES if can_run(name, here)]


each_target = pytest.mark.parametrize("target", host_targets(), ids=lambda target: target.name)


class CheckedJit(jit.Jit):
    """Refuses object code that needs a symbol off the list: LLVM may add calls of its own."""

    def _link(self, spec: KernelSpec, payload: bytes, n_counters: int) -> None:
        strange = undefined_symbols(payload) - jit.EXTERNAL_SYMBOLS
        if strange:
            raise GuardFailure(f"{spec.symbol} on {self.target.name} calls {sorted(strange)}")
        super()._link(spec, payload, n_counters)


@cache
def compiler(target: Target) -> jit.Jit:
    """One compiler per target and test session: a kernel is compiled once."""
    return CheckedJit(target)


def undefined_symbols(payload: bytes) -> set[str]:
    """The names that a 64-bit little-endian ELF object expects from elsewhere."""
    if payload[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF object")
    (sections_at,) = struct.unpack_from("<Q", payload, 40)
    entry_size, n_sections = struct.unpack_from("<HH", payload, 58)
    headers = [  # (type, offset, size, link) of each section
        struct.unpack_from("<4xI16xQQI", payload, sections_at + i * entry_size)
        for i in range(n_sections)
    ]
    names = set()
    for kind, offset, size, link in headers:
        if kind == _SYMBOL_TABLE:
            for at in range(offset + 24, offset + size, 24):  # the first symbol is empty
                name_at, section = struct.unpack_from("<I2xH", payload, at)
                if section == 0:
                    start = headers[link][1] + name_at
                    names.add(payload[start : payload.index(b"\0", start)].decode())
    return names


def run_kernel(
    spec: KernelSpec,
    target: Target,
    args: Args,
    n_threads: int = 1,
    *,
    jitter: bool = False,
    cancelled: bool = False,
) -> None:
    """Call the kernel from `n_threads` threads; `args` maps each parameter to its array or number.

    Arrays are passed by address, so outputs are written in place. With `jitter` each thread starts
    at a random moment. Raises TypeError for parameters that do not match the kernel's.
    """
    load_tables(spec, target, args, n_threads, cancelled)(jitter)


def load_tables(
    spec: KernelSpec, target: Target, args: Args, n_threads: int, cancelled: bool = False
) -> Callable[[bool], None]:
    """The compiled kernel with its argument table: what is left to do is to call it, once."""
    if set(args) != set(spec.params):
        raise TypeError(f"{spec.name}: got {sorted(args)}, wants {sorted(spec.params)}")
    _, n_counters = compiler(target).load(spec)
    native = compiler(target).function(spec)
    counters = np.zeros(max(1, n_counters) * job.LINE_WORDS, np.int64)
    keep: list[Array] = [counters]
    table = np.zeros(len(spec.params) + 1, np.int64)
    for slot, (name, param) in enumerate(spec.params.items()):
        given = args[name]
        if param.kind == "ptr":
            table[slot] = address(given)
        elif param.kind == "dim":
            keep.append(np.array([given], np.int64))
            table[slot] = address(keep[-1])
        elif param.type.is_float:
            table[slot : slot + 1].view(np.float32)[0] = given
        else:
            table[slot] = int(given)
    table[-1] = address(counters)
    cancel = np.array([cancelled], np.int64)
    words = np.zeros(job.JOB_WORDS, np.int64)
    words[job.N_THREADS], words[job.CANCEL] = n_threads, address(cancel)

    def work(thread: int, jitter: bool) -> None:
        if jitter:
            time.sleep(random.random() * 1e-3)
        native(address(table), address(words), thread)

    def call(jitter: bool) -> None:
        keep.extend((table, words, cancel))  # alive until the threads are done
        others = [threading.Thread(target=work, args=(i, jitter)) for i in range(1, n_threads)]
        for other in others:
            other.start()
        work(0, jitter)
        for other in others:
            other.join()

    return call


def address(array: Array | int | float) -> int:
    if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
        raise TypeError(f"a pointer parameter takes a contiguous array, not {type(array).__name__}")
    return int(array.ctypes.data)


# -- guard pages --------------------------------------------------------------------------------


def guarded(nbytes: int, end: bool = True) -> Bytes:
    """`nbytes` zeroed bytes, shared with child processes, between two inaccessible pages.

    They lie flush with the page after them, or with the one before when `end` is false.
    """
    inner = max(1, -(-nbytes // PAGE)) * PAGE
    memory = mmap.mmap(-1, inner + 2 * PAGE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, np.uint8)
    _protect(address(whole), PAGE, _PROT_NONE)
    _protect(address(whole) + PAGE + inner, PAGE, _PROT_NONE)
    first = PAGE + (inner - nbytes if end else 0)
    return whole[first : first + nbytes]


def read_only(array: Array) -> None:
    """Make the pages of a guarded array read-only, for good."""
    first = address(array) // PAGE * PAGE
    _protect(first, -(-(address(array) + array.nbytes - first) // PAGE) * PAGE, _PROT_READ)


def _protect(start: int, nbytes: int, protection: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), protection):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded_copy(array: Array, end: bool) -> Array:
    copy = guarded(array.nbytes, end).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def poisoned(array: Array, word: int, end: bool) -> Array:
    """A guarded array of the same shape, filled with a NaN payload."""
    raw = guarded(array.nbytes, end)
    pattern = np.frombuffer(word.to_bytes(4, "little"), np.uint8)
    raw[:] = np.resize(pattern, array.nbytes)
    return raw.view(array.dtype).reshape(array.shape)


class GuardFailure(AssertionError):
    """A kernel touched what it must not, or left undone what it must do."""


def run_guarded(
    spec: KernelSpec,
    target: Target,
    args: Args,
    *,
    outputs: Sequence[str],
    updates: Sequence[str] = (),
    padding: Mapping[str, NDArray[np.bool_]] | None = None,
    n_threads: int = 1,
) -> dict[str, Array]:
    """Run a case between guard pages and return its `outputs` and `updates` (by parameter name).

    `outputs` start as poison and must be written completely, except where `padding[name]` is true
    (a mask that broadcasts to the array): those elements must stay as they were. `updates` start
    with the contents given. All other arrays are read-only. Raises GuardFailure.
    """
    runs = []
    for end, word in ((True, POISON[0]), (False, POISON[1])):
        placed: dict[str, Array | int | float] = {}
        for name, given in args.items():
            if not isinstance(given, np.ndarray):
                placed[name] = given
            elif name in outputs:
                placed[name] = poisoned(given, word, end)
            else:
                placed[name] = guarded_copy(given, end)
        locked = [v for n, v in placed.items() if n not in (*outputs, *updates)]
        where = f"{spec.symbol} on {target.name}, {'end' if end else 'start'} guarded"
        run_in_child(load_tables(spec, target, placed, n_threads), locked, where)
        runs.append({name: np.asarray(placed[name]) for name in (*outputs, *updates)})
    for name in outputs:
        expected = (padding or {}).get(name, np.zeros((), np.bool_))
        check_written(spec.symbol, name, runs[0][name], runs[1][name], expected)
    for name in (*outputs, *updates):
        check_equal(spec.symbol, name, runs, (padding or {}).get(name))
    return {name: array.copy() for name, array in runs[0].items()}


def check_written(
    symbol: str, name: str, first: Array, second: Array, padding: NDArray[np.bool_]
) -> None:
    shape = (*first.shape, first.dtype.itemsize)
    raw = [np.frombuffer(a.tobytes(), np.uint8).reshape(shape) for a in (first, second)]
    poison = [
        np.resize(np.frombuffer(word.to_bytes(4, "little"), np.uint8), first.nbytes).reshape(shape)
        for word in POISON
    ]
    kept = np.logical_and(raw[0] == poison[0], raw[1] == poison[1])
    wanted = np.broadcast_to(padding, first.shape)
    touched = ~kept.all(axis=-1) & wanted
    skipped = kept.any(axis=-1) & ~wanted
    for mask, what in ((touched, "wrote padding"), (skipped, "left unwritten")):
        if mask.any():
            raise GuardFailure(f"{symbol}: {what}: {name}{np.argwhere(mask)[:4].tolist()}")


def check_equal(
    symbol: str, name: str, runs: list[dict[str, Array]], padding: NDArray[np.bool_] | None
) -> None:
    first, second = (
        np.where(False if padding is None else padding, np.zeros(1, run[name].dtype), run[name])
        for run in runs
    )
    if first.tobytes() != second.tobytes():
        raise GuardFailure(f"{symbol}: {name} depends on where the arrays lie")


def run_in_child(call: Callable[[bool], None], locked: Sequence[Any], where: str) -> None:
    """Fork, lock the inputs, call; a signal or a hang is a failed case."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.disable()
            for array in locked:
                if isinstance(array, np.ndarray):
                    read_only(array)
            call(False)
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + CHILD_SECONDS
    done, wait_status = os.waitpid(child, os.WNOHANG)
    while not done:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise GuardFailure(f"{where}: no end after {CHILD_SECONDS:.0f} s")
        time.sleep(2e-4)
        done, wait_status = os.waitpid(child, os.WNOHANG)
    if os.WIFSIGNALED(wait_status):
        raise GuardFailure(f"{where}: {signal.Signals(os.WTERMSIG(wait_status)).name}")
    if os.WEXITSTATUS(wait_status):
        raise GuardFailure(f"{where}: the child failed before the kernel ended")


# -- comparing ----------------------------------------------------------------------------------


def assert_threads_agree(
    spec: KernelSpec, target: Target, make: Callable[[], dict[str, Any]], outputs: Sequence[str]
) -> dict[str, Array]:
    """Run with 1, 2, 3 and 5 threads; the outputs must agree bit for bit. Returns them."""
    first: dict[str, Array] = {}
    for n_threads in (1, 2, 3, 5):
        args = make()
        run_kernel(spec, target, args, n_threads, jitter=n_threads > 1)
        for name in outputs:
            if n_threads == 1:
                first[name] = args[name].copy()
            assert args[name].tobytes() == first[name].tobytes(), (name, n_threads)
    return first


def nmse(found: Array, expected: Array) -> float:
    """Sum of squared differences over sum of squares, in f64."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    power = float(np.sum(expected * expected))
    error = float(np.sum((found - expected) ** 2))
    return error / power if power else (math.inf if error else 0.0)
