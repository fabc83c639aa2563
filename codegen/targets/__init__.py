"""The targets by name, and the choice for this machine.

`choose(host)` takes plain facts (triple, CPU name, feature names) so that it can be tested for
machines other than this one; codegen/jit.py asks LLVM for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from codegen.targets import arm, x86
from codegen.targets.base import Target
from codegen.targets.generic import generic

NAMES = ("avx512vnni-bf16", "avx512vnni", "avx512", "avx2vnni", "avx2", "neon", "generic")


@dataclass(frozen=True)
class Host:
    """What LLVM says of a machine. `missing` are the features that it looked for and did not find:
    a virtual machine can hide some that its CPU model has."""

    triple: str
    cpu: str
    features: frozenset[str]
    missing: frozenset[str] = frozenset()

    @property
    def is_x86(self) -> bool:
        return self.triple.startswith(("x86_64", "amd64"))


_NEEDS: dict[str, frozenset[str]] = {
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "avx2vnni": frozenset({"avx2", "fma", "f16c", "avxvnni"}),
    "avx512": frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"}),
    "neon": frozenset({"neon", "dotprod"}),
    "generic": frozenset(),
}
_NEEDS["avx512vnni"] = _NEEDS["avx512"] | {"avx512vnni"}
_NEEDS["avx512vnni-bf16"] = _NEEDS["avx512vnni"] | {"avx512bf16"}


def needs(name: str) -> frozenset[str]:
    """The features, in LLVM's words, that a target uses."""
    return _NEEDS[name]


def can_run(name: str, host: Host) -> bool:
    """Whether the machine has the instructions of a target."""
    family = "neon" if name == "neon" else "x86"
    fits = name == "generic" or host.is_x86 == (family == "x86")
    return fits and _NEEDS[name] <= host.features


def build(name: str, host: Host | None = None) -> Target:
    """The target called `name`; tuned for the host's own CPU model when it can run there.

    Raises ValueError for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"unknown target {name!r} (one of: {', '.join(NAMES)})")
    tuned: dict[str, Any] = {}
    if host is not None and can_run(name, host):
        wanted = sorted(host.features if name.startswith("avx512vnni") else _NEEDS[name])
        signed = ["+" + name for name in wanted] + ["-" + name for name in sorted(host.missing)]
        tuned = {"triple": host.triple, "features": ",".join(signed)}
        if name != "generic":
            tuned["cpu"] = host.cpu if name.startswith("avx512vnni") else _BASE_CPU[name]
    match name:
        case "avx512vnni-bf16":
            return x86.avx512_vnni(**tuned, bf16=True)
        case "avx512vnni":
            return x86.avx512_vnni(**tuned)
        case "avx512":
            return x86.avx512(**tuned)
        case "avx2vnni":
            return x86.avx2_vnni(**tuned)
        case "avx2":
            return x86.avx2(**tuned)
        case "neon":
            return arm.neon_dotprod(**tuned)
    return generic(host.triple if host else x86.TRIPLE)


_BASE_CPU = {"avx512": "skylake-avx512", "avx2vnni": "alderlake", "avx2": "haswell"}
_BASE_CPU["neon"] = "neoverse-n1"


def choose(host: Host, wanted: str | None = None) -> Target:
    """The best target of the host, or the one asked for by name.

    Raises ValueError when the host cannot run the one asked for.
    """
    if wanted:
        if wanted in NAMES and not can_run(wanted, host):
            missing = ", ".join(sorted(_NEEDS[wanted] - host.features))
            raise ValueError(f"this CPU cannot run target {wanted!r} (lacks: {missing})")
        return build(wanted, host)
    return build(next(name for name in NAMES if can_run(name, host)), host)
