"""How many bytes this process can still take: free memory, and what its container allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlacli.files import system_text


def available_bytes() -> int:
    """Memory to be had without swapping; page cache counts as free, it gives way."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = container_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return free if limit is None else min(free, limit)


def container_bytes(membership: Path, mount: Path) -> int | None:
    """What the cgroups of this process leave to it; None without a limit.

    `membership` is /proc/self/cgroup and `mount` /sys/fs/cgroup (v2: `memory.max`, v1:
    `memory.limit_in_bytes`). Every ancestor may set a limit; the tightest one counts.
    """
    left = []
    for folder, limit_name, used_name, prefix in _groups(membership, mount):
        limit, used = (_number(system_text(folder / name)) for name in (limit_name, used_name))
        if limit is not None and used is not None:
            used -= _page_cache(system_text(folder / "memory.stat"), prefix)
            left.append(max(0, limit - max(0, used)))
    return min(left, default=None)


def _groups(membership: Path, mount: Path) -> Iterator[tuple[Path, str, str, str]]:
    """(folder, file of the limit, file of the usage, prefix in memory.stat), innermost first."""
    for line in system_text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = mount / "memory" if controllers else mount
        folder = root / path.lstrip("/")
        for f in (folder, *folder.parents):
            if f != root and root not in f.parents:
                break
            if controllers:
                yield f, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
            else:
                yield f, "memory.max", "memory.current", ""


def _page_cache(stat: str, prefix: str) -> int:
    """File pages charged to a group, mapped weights among them: they give way."""
    values = dict(line.split(maxsplit=1) for line in stat.splitlines() if " " in line)
    found = (_number(values.get(prefix + name, "0")) for name in ("active_file", "inactive_file"))
    return sum(n or 0 for n in found)


def _number(text: str) -> int | None:
    """None for "max" and for nothing at all."""
    text = text.strip()
    return int(text) if text.isdecimal() else None
