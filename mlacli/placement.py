"""Which CPUs the threads run on: what masks and --numa choose of what this process may use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path

from mlacli.cpu_count import CPUS, allowed_cpus, core_first
from mlacli.errors import UsageError
from mlacli.numa import (
    NODES,
    Node,
    cpu_list_text,
    first_cpu,
    nodes_with_cpus,
    numa_balancing,
)

NUMA = ("distribute", "isolate", "numactl")


@dataclass(frozen=True)
class Machine:
    """What a choice is made from: the CPUs this process may use, the nodes that have CPUs, and the
    CPU it started on."""

    allowed: frozenset[int]
    nodes: tuple[Node, ...]
    started_on: int | None
    sysfs: Path = CPUS


def this_machine() -> Machine:
    """As it is now."""
    return Machine(allowed_cpus(), _nodes(), first_cpu())


@cache
def _nodes() -> tuple[Node, ...]:
    return nodes_with_cpus(NODES)


def chosen_cpus(machine: Machine, flag: str, mask: int | None, numa: str | None) -> frozenset[int]:
    """The CPUs that threads may run on. Raises UsageError when there is none."""
    wanted = machine.allowed if mask is None else machine.allowed & cpus_of_mask(mask)
    if not wanted:
        cpus, allowed = cpu_list_text(cpus_of_mask(mask or 0)), cpu_list_text(machine.allowed)
        raise UsageError(f"{flag}: names CPUs {cpus}, but this process may run on {allowed} only")
    if numa != "isolate" or len(machine.nodes) < 2:
        return wanted
    home = next((node for node in machine.nodes if machine.started_on in node.cpus), None)
    if home is None:
        raise UsageError("--numa isolate: the system does not tell on which node this process is")
    if not wanted & home.cpus:
        raise UsageError(
            f"--numa isolate: node {home.number}, where this process started, has none of the "
            f"CPUs {cpu_list_text(wanted)}"
        )
    return wanted & home.cpus


def thread_cpus(
    machine: Machine, cpus: frozenset[int], *, numa: str | None, strict: bool, in_order: bool
) -> tuple[frozenset[int], ...]:
    """The CPUs of thread 0, 1, ..., and then of thread 0 again; none when there is no choice.

    `strict`: one CPU each, by number with `in_order`, else one of every core before any second.
    """
    groups = [cpus]
    if numa == "distribute" and len(machine.nodes) > 1:
        groups = [cpus & node.cpus for node in machine.nodes if cpus & node.cpus]
    if strict:
        orders = [sorted(g) if in_order else core_first(g, machine.sysfs) for g in groups]
        return tuple(frozenset({cpu}) for cpu in _in_turn(orders))
    return () if groups == [machine.allowed] else tuple(groups)


def _in_turn(orders: Sequence[Sequence[int]]) -> Iterable[int]:
    """The first of each, then the second of each, and so on."""
    return (cpu for cpu in chain.from_iterable(zip_longest(*orders)) if cpu is not None)


def cpus_of_mask(mask: int) -> frozenset[int]:
    """CPU i for bit i."""
    return frozenset(i for i in range(mask.bit_length()) if mask >> i & 1)


def mask_notes(machine: Machine, flag: str, mask: int | None) -> list[str]:
    """What a mask names in vain."""
    outside = cpus_of_mask(mask or 0) - machine.allowed
    if not outside:
        return []
    cpus, allowed = cpu_list_text(outside), cpu_list_text(machine.allowed)
    return [f"{flag}: CPUs {cpus} are not used: this process may run on {allowed}"]


def numa_notes(machine: Machine, numa: str | None, balancing: int | None = None) -> list[str]:
    """What is to be known of --numa on this machine."""
    if numa is None:
        return []
    if len(machine.nodes) < 2:
        return [f"--numa {numa} has no effect: the machine has one NUMA node"]
    found = []
    every = frozenset().union(*(node.cpus for node in machine.nodes))
    if numa == "numactl" and machine.allowed >= every:
        found.append(
            "--numa numactl: numactl chose no CPUs: threads run on all of them "
            f"({cpu_list_text(machine.allowed)})"
        )
    balancing = numa_balancing() if balancing is None else balancing
    if balancing:
        found.append(
            f"/proc/sys/kernel/numa_balancing is {balancing}: it moves pages about and costs "
            "speed; as root: sysctl kernel.numa_balancing=0"
        )
    return found
