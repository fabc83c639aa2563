"""The kernels that a context launches: what they are for, and whether they are compiled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from codegen import jit
from codegen.cache_dir import ObjectCache
from codegen.kernel import KernelSpec
from codegen.targets import build
from codegen.targets.base import Target
from mlacli.context import ContextPlan
from mlacli.errors import UsageError
from mlacli.graph.lower import Launch
from mlacli.graph.ops import lower_graph
from mlacli.machine import this_target

_HEADER = ("kernel", "for", "launches", "object code", "code bytes")
_SHOWN, _NAMES = 5, 3
_LAYER = re.compile(r"-\d+(?:\.\d+)?")


@dataclass
class KernelUse:
    """A kernel and its launches, by graph."""

    spec: KernelSpec
    launches: dict[str, list[Launch]] = field(default_factory=dict)

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that it is a part of."""
        found = (launch.node.op for each in self.launches.values() for launch in each)
        return tuple(dict.fromkeys(found))

    @property
    def makes(self) -> tuple[str, ...]:
        """The names of the nodes that it computes, without their layers."""
        found = (launch.node.name for each in self.launches.values() for launch in each)
        return tuple(dict.fromkeys(_LAYER.sub("", name) for name in found))


@dataclass(frozen=True)
class KernelFacts:
    """One kernel in plain words; `code_bytes` are known of compiled ones."""

    symbol: str
    function: str
    ops: tuple[str, ...]
    makes: tuple[str, ...]
    launches: dict[str, int]
    compiled: bool
    code_bytes: int | None


def target_called(name: str | None) -> Target:
    """A target to generate code for, also one that this CPU cannot run. Raises UsageError."""
    if name is None:
        return this_target()
    try:
        return build(name, jit.host())
    except ValueError as problem:
        raise UsageError(f"--target: {problem}") from problem


def uses(plan: ContextPlan) -> dict[str, KernelUse]:
    """Symbol -> kernel, in the order of their first launch."""
    found: dict[str, KernelUse] = {}
    for name, planned in plan.graphs.items():
        for launch in lower_graph(planned.lower, planned.graph):
            use = found.setdefault(launch.spec.symbol, KernelUse(launch.spec))
            use.launches.setdefault(name, []).append(launch)
    return found


def find(name: str, flag: str, known: dict[str, KernelUse]) -> KernelUse:
    """The kernel of this symbol, or of which this is the unique prefix. Raises UsageError."""
    if name in known:
        return known[name]
    matches = [symbol for symbol in known if symbol.startswith(name)]
    if len(matches) == 1:
        return known[matches[0]]
    if matches:
        more = f" and {len(matches) - _SHOWN} more" if len(matches) > _SHOWN else ""
        shown = ", ".join(matches[:_SHOWN])
        raise UsageError(f"{flag}: {name!r} begins the names of {shown}{more}: write more of one")
    near = _near(name, list(known))
    raise UsageError(f"{flag}: no kernel is called {name!r} (nearest: {', '.join(near)})")


def _near(name: str, known: Sequence[str]) -> list[str]:
    import difflib

    functions = {symbol: symbol[: len(name) + 2] for symbol in known}
    near = difflib.get_close_matches(name, list(functions.values()), n=_SHOWN, cutoff=0.0)
    return [s for start in dict.fromkeys(near) for s in known if functions[s] == start][:_SHOWN]


def facts(
    known: Iterable[KernelUse], target: Target, store: ObjectCache | None
) -> list[KernelFacts]:
    """Kernels in plain words; `store` says what is compiled."""
    found = []
    for use in known:
        stored = store.get(use.spec.key(target, jit.version())) if store else None
        found.append(
            KernelFacts(
                symbol=use.spec.symbol,
                function=use.spec.name,
                ops=use.ops,
                makes=use.makes,
                launches={name: len(each) for name, each in use.launches.items()},
                compiled=stored is not None,
                code_bytes=None if stored is None else jit.code_bytes(stored[1:]),
            )
        )
    return found


def kernels_text(kernels: Sequence[KernelFacts], target: Target) -> str:
    """A table, and what it comes to."""
    import tabulate

    rows = [
        (
            k.symbol,
            f"{', '.join(k.ops)}: {_some(k.makes)}",
            ", ".join(f"{name} {n}" for name, n in k.launches.items()),
            "compiled" if k.compiled else "-",
            k.code_bytes or "",
        )
        for k in kernels
    ]
    lines = tabulate.tabulate(
        rows, _HEADER, tablefmt="simple", colalign=("left",) * 4 + ("right",)
    ).splitlines()
    n, total = sum(k.compiled for k in kernels), sum(k.code_bytes or 0 for k in kernels)
    last = f"{len(kernels)} kernels for {target.name}, {n} compiled ({total} bytes of code)"
    return "\n".join([*lines, "", last, ""])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more


def kernels_json(kernels: Sequence[KernelFacts], target: Target) -> str:
    """The same as JSON."""
    return (
        json.dumps({"target": target.name, "kernels": [asdict(k) for k in kernels]}, indent=2)
        + "\n"
    )
