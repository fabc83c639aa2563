"""How many threads are worth starting here: cores, affinity and container quota."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from mlacli.files import system_text

CPUS = Path("/sys/devices/system/cpu")


@cache
def default_threads(cpus: frozenset[int] | None = None) -> int:
    """min(physical cores among `cpus` or all we may run on, cgroup CPU quota), at least 1.

    A second thread on the same core adds nothing to matrix products, so SMT siblings count once.
    """
    cores = physical_cores(allowed_cpus() if cpus is None else cpus, CPUS)
    quota = cpu_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, min(cores, int(quota) if quota is not None else cores))


@cache
def available_cpus() -> int:
    """Logical CPUs that this process may run on."""
    return len(allowed_cpus())


def allowed_cpus() -> frozenset[int]:
    """The logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def core_first(cpus: Iterable[int], sysfs: Path) -> list[int]:
    """One CPU of every core, then the second ones, and so on; by number where cores are unknown."""
    seen: dict[str, int] = {}
    order = []
    for cpu in sorted(cpus):
        core = system_text(sysfs / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu)
        seen[core] = seen.get(core, -1) + 1
        order.append((seen[core], cpu))
    return [cpu for _, cpu in sorted(order)]


def physical_cores(cpus: Iterable[int], sysfs: Path) -> int:
    """Different cores behind the logical CPUs; asks psutil where there is no sysfs."""
    cpus = set(cpus)
    cores = set()
    for cpu in cpus:
        try:
            cores.add((sysfs / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            import psutil

            return min(psutil.cpu_count(logical=False) or len(cpus), len(cpus))
    return len(cores)


def cpu_quota(membership: Path, mount: Path) -> float | None:
    """CPUs' worth of time that the cgroups of this process allow; None without a limit.

    `membership` is /proc/self/cgroup and `mount` /sys/fs/cgroup (v2: `cpu.max`, v1:
    `cpu.cfs_quota_us`). Every ancestor may set a limit; the tightest one counts.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            limits += _limits_upwards(mount, path, _quota_v2)
        elif "cpu" in controllers.split(","):
            limits += _limits_upwards(mount / "cpu", path, _quota_v1)
    return min(limits, default=None)


def _limits_upwards(root: Path, path: str, read: Callable[[Path], float | None]) -> list[float]:
    folder = root / path.lstrip("/")
    found = [read(f) for f in (folder, *folder.parents) if f == root or root in f.parents]
    return [limit for limit in found if limit is not None]


def _quota_v2(folder: Path) -> float | None:
    match = re.fullmatch(r"(\d+) (\d+)\s*", system_text(folder / "cpu.max"))
    return int(match[1]) / int(match[2]) if match else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = (
        system_text(folder / "cpu.cfs_quota_us"),
        system_text(folder / "cpu.cfs_period_us"),
    )
    if re.fullmatch(r"\d+\s*", quota) and re.fullmatch(r"\d+\s*", period):
        return int(quota) / int(period)
    return None
