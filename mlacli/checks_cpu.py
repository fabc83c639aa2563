"""The doctor's checks of the processor: instructions, threads, peaks, clock, NUMA nodes.

Each is a function of plain values; mlacli/doctor.py reads them from the system.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from codegen.targets import NAMES, Host, can_run, needs
from mlacli.files import system_text
from mlacli.findings import NOTE, OK, PROBLEM, Finding
from mlacli.fit import size_text
from mlacli.machine import Peaks
from mlacli.numa import Node, cpu_list_text

# LLVM's names of the CPU models that have what a target needs: where it is missing, a virtual
# machine hides it.
_BFLOAT = "cooperlake sapphirerapids emeraldrapids graniterapids graniterapids-d diamondrapids"
_VNNI = "cascadelake icelake-client icelake-server tigerlake rocketlake"
_AVX512 = "skylake-avx512 cannonlake"
_AVX_VNNI = "alderlake raptorlake meteorlake arrowlake arrowlake-s lunarlake pantherlake gracemont"
_AVX2 = "haswell broadwell skylake znver1 znver2 znver3"
_HAVE: dict[str, frozenset[str]] = {
    "avx512vnni-bf16": frozenset(f"{_BFLOAT} znver4 znver5".split())
}
_HAVE["avx512vnni"] = _HAVE["avx512vnni-bf16"] | set(_VNNI.split())
_HAVE["avx512"] = _HAVE["avx512vnni"] | set(_AVX512.split())
_HAVE["avx2vnni"] = frozenset(_AVX_VNNI.split()) | set(_BFLOAT.split()[1:]) | {"znver5"}
_HAVE["avx2"] = _HAVE["avx512"] | _HAVE["avx2vnni"] | set(_AVX2.split())
_GAIN = {
    "avx512vnni-bf16": "bf16 products of weights and cached rows in one instruction",
    "avx512vnni": "int8 products in one instruction instead of three",
    "avx512": "vectors of 512 bits and 32 registers",
    "avx2vnni": "int8 products in one instruction instead of three",
    "avx2": "vectors of 256 bits",
    "neon": "int8 products in one instruction",
}


def cpu_check(name: str, model: str, architecture: str) -> Finding:
    """The processor as the system and LLVM call it."""
    values = {"name": name, "llvm_name": model, "architecture": architecture}
    return Finding("CPU", f"{name} ({model}, {architecture})", values=values)


def target_check(host: Host, wanted: str | None) -> Finding:
    """The target that kernels are generated for, and what a better one lacks."""
    best = next(name for name in NAMES if can_run(name, host))
    values: dict[str, object] = {
        "target": wanted or best,
        "best_target": best,
        "MLACLI_TARGET": wanted,
    }
    if wanted and (wanted not in NAMES or not can_run(wanted, host)):
        why = "is none" if wanted not in NAMES else "cannot run here"
        return Finding(
            "target",
            f"MLACLI_TARGET={wanted}: that target {why}",
            PROBLEM,
            f"unset MLACLI_TARGET, or set it to one of {', '.join(_runnable(host))}",
            values,
            exit_code=2,
        )
    if wanted and NAMES.index(wanted) > NAMES.index(best):
        return Finding(
            "target",
            f"{wanted}, because MLACLI_TARGET says so; this CPU can run {best}",
            NOTE,
            f"unset MLACLI_TARGET: {best} has {_GAIN[best]}",
            values,
        )
    better = _next_better(host, best)
    if not better:
        return Finding("target", f"{best}: the best there is", values=values)
    missing = sorted(needs(better) - host.features)
    hidden = host.cpu in _HAVE.get(better, ())
    values |= {"better_target": better, "missing": missing, "hidden": hidden}
    text = f"{best}: the best that this CPU shows; {better} would need {', '.join(missing)}"
    if not hidden:
        return Finding("target", text, values=values)
    return Finding(
        "target",
        f"{text}, which {host.cpu} has: a virtual machine or the firmware hides it",
        NOTE,
        f"let the machine show it (qemu: -cpu host): {_GAIN[better]}",
        values,
    )


def _runnable(host: Host) -> list[str]:
    return [name for name in NAMES if can_run(name, host)]


def _next_better(host: Host, best: str) -> str:
    """The best target that the CPU model is known to have, or the next one above; "" for none."""
    family = [name for name in NAMES if (name == "neon") != host.is_x86 and name != "generic"]
    above = [name for name in family if NAMES.index(name) < NAMES.index(best)]
    known = [name for name in above if host.cpu in _HAVE.get(name, ())]
    return (known or above[-1:] or [""])[0]


def threads_check(
    n_cpus: int, n_cores: int, allowed: Collection[int], quota: float | None, threads: int
) -> Finding:
    """`n_cpus` and `n_cores` of the machine, what of them this process may use, and -t."""
    smt = f"{n_cpus / n_cores:g} threads each" if n_cpus > n_cores else "one thread each"
    text = f"{n_cores} cores, {smt}; may run on CPUs {cpu_list_text(allowed)}; "
    text += f"CPU quota {quota:g}; " if quota is not None else "no CPU quota; "
    values = {
        "cpus": n_cpus,
        "cores": n_cores,
        "allowed": sorted(allowed),
        "quota": quota,
        "default_threads": threads,
    }
    advice = []
    if len(allowed) < n_cpus:
        advice.append("the rest of the CPUs is kept from it by taskset, numactl or a cpuset")
    if quota is not None and quota < min(n_cores, len(allowed)):
        advice.append("raise the container's CPU limit for more threads (docker: --cpus)")
    status = NOTE if advice else OK
    return Finding("threads", f"{text}default -t {threads}", status, "; ".join(advice), values)


def peaks_check(peaks: Peaks) -> Finding:
    """Measured now: what bench --roof compares with."""
    rates = ", ".join(f"{n} {getattr(peaks, n) / 1e9:.0f}" for n in ("int8", "bf16", "f32"))
    threads = f"{peaks.n_threads} thread{'s' * (peaks.n_threads > 1)}"
    return Finding(
        "peaks",
        f"{rates} billion multiply-adds/s, {peaks.bandwidth / 1e9:.1f} GB/s read, on {threads}",
        values=asdict(peaks),
    )


def governors(cpus: Collection[int], sysfs: Path) -> tuple[set[str], str]:
    """(governors of these CPUs, driver); empty where they are not visible."""
    found = {system_text(sysfs / f"cpu{cpu}/cpufreq/scaling_governor") for cpu in cpus} - {""}
    return found, system_text(sysfs / f"cpu{min(cpus)}/cpufreq/scaling_driver") if cpus else ""


def governor_check(found: Collection[str], driver: str) -> Finding:
    """How the clock frequency is chosen."""
    names = ", ".join(sorted(found))
    values = {"governors": sorted(found), "driver": driver}
    if not found:
        return Finding("clock", "governor not visible (usual in a virtual machine)", values=values)
    if set(found) <= {"performance", "schedutil"}:
        return Finding("clock", f"governor {names} ({driver})", values=values)
    return Finding(
        "clock",
        f"governor {names} ({driver}): the clock may be slow to rise, or stay low",
        NOTE,
        "as root: cpupower frequency-set -g performance",
        values,
    )


def numa_check(nodes: Sequence[Node], balancing: int) -> Finding:
    """Nodes and numa_balancing."""
    running = [node for node in nodes if node.cpus]
    values = {
        "nodes": [
            {"node": n.number, "cpus": sorted(n.cpus), "memory_bytes": n.memory_bytes}
            for n in nodes
        ],
        "numa_balancing": balancing,
    }
    if len(running) < 2:
        only = [f"node {n.number}" for n in nodes if not n.cpus]
        more = f" ({', '.join(only)}: memory only)" if only else ""
        return Finding("NUMA", f"one node{more}", values=values)
    each = "; ".join(
        f"node {n.number}: CPUs {cpu_list_text(n.cpus) or 'none'}, {size_text(n.memory_bytes)}"
        for n in nodes
    )
    state = f"numa_balancing is {balancing}"
    advice = "compare --numa distribute and --numa isolate with bench (docs/tuning.md)"
    if balancing:
        advice += "; as root: sysctl kernel.numa_balancing=0"
    return Finding("NUMA", f"{each}; {state}", NOTE, advice, values)
