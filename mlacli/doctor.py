"""`mlacli doctor`: what this machine offers, what of it is used, and what to do about the rest.

Here the system is asked; what is made of its answers are the functions of checks_cpu.py and
checks_memory.py.
"""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

from codegen.cache_dir import ObjectCache
from codegen.jit import host, version
from codegen.pool import Pool
from mlacli import __version__, checks_cpu, checks_memory
from mlacli.cpu_count import CPUS, allowed_cpus, cpu_quota, default_threads, physical_cores
from mlacli.debug import ENV
from mlacli.errors import MlaError
from mlacli.files import system_text
from mlacli.findings import PROBLEM, Finding
from mlacli.free_memory import container_bytes
from mlacli.gguf.reader import open_gguf
from mlacli.machine import cpu_name, make_jit, measure_peaks
from mlacli.memory import resident_share
from mlacli.numa import numa_balancing, numa_nodes, parse_cpu_list
from mlacli.report import make_report
from mlacli.settings import RunSettings

_CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def examine(model: Path | None) -> Iterator[Finding]:
    """Every finding, those of a model last. Takes seconds: peaks are measured."""
    found = host()
    target = checks_cpu.target_check(found, ENV.target)
    yield checks_cpu.cpu_check(cpu_name(), found.cpu, platform.machine())
    yield target
    yield from _cpu(runs=target.status != PROBLEM)
    yield from _memory(model)
    yield _objects()
    yield _versions()
    if model is not None:
        yield from _model(model, runs=target.status != PROBLEM)


def _cpu(*, runs: bool) -> Iterator[Finding]:
    allowed = allowed_cpus()
    online = parse_cpu_list(system_text(CPUS / "online")) or allowed
    yield checks_cpu.threads_check(
        len(online),
        physical_cores(online, CPUS),
        allowed,
        cpu_quota(*_CGROUPS),
        default_threads(),
    )
    if runs:
        yield from _or_problem("peaks", _peaks)
    yield checks_cpu.governor_check(*checks_cpu.governors(allowed, CPUS))
    yield checks_cpu.numa_check(numa_nodes(), numa_balancing())


def _peaks() -> Iterator[Finding]:
    jit, n_threads = make_jit(), default_threads()
    pool = Pool(jit, n_threads)
    try:
        yield checks_cpu.peaks_check(measure_peaks(jit, pool, n_threads))
    finally:
        pool.close()


def _memory(model: Path | None) -> Iterator[Finding]:
    import psutil

    ram, swap = psutil.virtual_memory(), psutil.swap_memory()
    yield checks_memory.memory_check(
        ram.total, ram.available, container_bytes(*_CGROUPS), swap.total, swap.used
    )
    pages = checks_memory.huge_pages(
        Path("/sys/kernel/mm/transparent_hugepage"),
        system_text(Path("/proc/meminfo")),
        resource.getpagesize(),
    )
    yield checks_memory.pages_check(pages)
    soft, hard = (
        None if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_MEMLOCK)
    )
    exempt = checks_memory.may_lock(system_text(Path("/proc/self/status")))
    yield checks_memory.memlock_check(soft, hard, _weight_bytes(model), exempt=exempt)


def _weight_bytes(model: Path | None) -> int | None:
    """None without a model, or with one that cannot be read: that is found later."""
    try:
        return open_gguf(model).size_bytes if model else None
    except MlaError:
        return None


def _objects() -> Finding:
    folder = ENV.cache_dir
    if folder is None:
        return checks_memory.cache_check(None, 0, 0, "")
    cache = ObjectCache(folder / "objects")
    problem = cache.notes[0].partition(f"{cache.folder} ")[2] if cache.notes else ""
    if not problem and not os.access(cache.folder, os.W_OK):
        problem = "cannot be written"
    n_files, n_bytes = cache.size()
    return checks_memory.cache_check(cache.folder, n_files, n_bytes, problem)


def _versions() -> Finding:
    import numpy

    llvmlite, llvm = version().split(" LLVM ")
    versions = {"mlacli": __version__, "Python": platform.python_version()}
    versions |= {"llvmlite": llvmlite.removeprefix("llvmlite "), "LLVM": llvm}
    return checks_memory.versions_check(versions | {"numpy": numpy.__version__})


def _model(path: Path, *, runs: bool) -> Iterator[Finding]:
    """Without `runs`, no more than where the file lies."""
    found = list(_or_problem("model", lambda: _file(path)))
    yield from found
    if runs and all(one.status != PROBLEM for one in found):
        yield from _or_problem("fit", lambda: _fit(path))


def _fit(path: Path) -> Iterator[Finding]:
    report = make_report(RunSettings(model=path))
    yield checks_memory.fit_check(report.memory, report.n_ctx)


def _file(path: Path) -> Iterator[Finding]:
    file = open_gguf(path)
    status, real = path.stat(), path.resolve()
    mounts = system_text(Path("/proc/self/mountinfo"))
    disk = checks_memory.disk_of(real, mounts, status.st_dev, Path("/sys/dev/block"))
    yield checks_memory.disk_check(disk)
    told = status.st_uid == os.geteuid() or os.access(path, os.W_OK)
    shares = [resident_share(part.bytes) if told else None for part in file.files]
    weights = [part.bytes.size for part in file.files]
    share = None
    if None not in shares:
        share = sum(s * w for s, w in zip(shares, weights, strict=True) if s) / sum(weights)
    yield checks_memory.page_cache_check(share, file.size_bytes)


def _or_problem(title: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a check finds, or what keeps it (and mlacli) from running."""
    try:
        yield from check()
    except MlaError as problem:
        yield Finding(title, str(problem), PROBLEM, exit_code=problem.exit_code)
