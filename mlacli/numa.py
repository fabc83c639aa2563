"""NUMA nodes as Linux describes them, and lists of CPUs as it writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mlacli.files import system_text

NODES = Path("/sys/devices/system/node")
BALANCING = Path("/proc/sys/kernel/numa_balancing")


@dataclass(frozen=True)
class Node:
    """A node that is online; one with memory only has no CPUs."""

    number: int
    cpus: frozenset[int]
    memory_bytes: int


def numa_nodes(sysfs: Path = NODES) -> tuple[Node, ...]:
    """The nodes that are online, by number; none where the system does not tell."""
    found = [
        _node(folder, int(folder.name.removeprefix("node")))
        for folder in sysfs.glob("node*")
        if re.fullmatch(r"node\d+", folder.name)
    ]
    online = system_text(sysfs / "online")
    kept = found if not online else [n for n in found if n.number in parse_cpu_list(online)]
    return tuple(sorted(kept, key=lambda node: node.number))


def nodes_with_cpus(sysfs: Path = NODES) -> tuple[Node, ...]:
    """Those where threads can run."""
    return tuple(node for node in numa_nodes(sysfs) if node.cpus)


def _node(folder: Path, number: int) -> Node:
    total = re.search(r"MemTotal:\s+(\d+) kB", system_text(folder / "meminfo"))
    cpus = parse_cpu_list(system_text(folder / "cpulist"))
    return Node(number, cpus, 1024 * int(total[1]) if total else 0)


@cache
def first_cpu() -> int | None:
    """The CPU that this process was on when it first asked; None where the system does not tell."""
    return last_cpu(Path("/proc/self/stat"))


def last_cpu(stat: Path) -> int | None:
    """The CPU that a process last ran on, from its /proc/PID/stat."""
    words = system_text(stat).rpartition(")")[2].split()  # the name before may hold anything
    return int(words[36]) if len(words) > 36 else None


def numa_balancing(path: Path = BALANCING) -> int:
    """Nonzero: the kernel moves pages and threads between nodes by itself."""
    text = system_text(path).strip()
    return int(text) if text.isdecimal() else 0


def parse_cpu_list(text: str) -> frozenset[int]:
    """The numbers of `0-3,8`; other text holds none."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)


def cpu_list_text(cpus: Iterable[int]) -> str:
    """`0-3,8`."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)
