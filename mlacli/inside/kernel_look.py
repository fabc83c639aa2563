"""What `mlacli kernels` shows: the list, one kernel's code, one kernel's speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from codegen import jit
from codegen.kernel import KernelSpec
from codegen.targets.base import Target
from mlacli.cpu_count import available_cpus
from mlacli.errors import UsageError
from mlacli.inside.graph_facts import planned
from mlacli.inside.kernel_bench import bench_lines
from mlacli.inside.kernel_facts import (
    facts,
    find,
    kernels_json,
    kernels_text,
    target_called,
    uses,
)
from mlacli.machine import object_cache
from mlacli.settings import RunSettings

_TEXTS: dict[str, Callable[[KernelSpec, Target], str]] = {
    "--ir": lambda spec, target: spec.ir(target),
    "--ir-opt": jit.optimised_ir,
    "--asm": jit.assembly,
}


def kernel_list(settings: RunSettings, target: str | None, *, as_json: bool) -> str:
    """Every kernel of the context. Raises MlaError."""
    chosen = target_called(target)
    found = facts(uses(planned(settings, chosen)).values(), chosen, object_cache())
    return (kernels_json if as_json else kernels_text)(found, chosen)


def kernel_text(settings: RunSettings, target: str | None, flag: str, name: str) -> str:
    """One kernel's IR or assembly. Raises MlaError."""
    chosen = target_called(target)
    spec = find(name, flag, uses(planned(settings, chosen))).spec
    return _TEXTS[flag](spec, chosen).rstrip() + "\n"


def bench_kernel(
    settings: RunSettings, target: str | None, name: str, note: Callable[[str], None]
) -> Iterator[str]:
    """Lines with one kernel's speed, the first one its name. Raises MlaError."""
    chosen = _runnable(target)
    plan = planned(settings, chosen)
    use = find(name, "--bench", uses(plan))
    compiler = jit.Jit(chosen, object_cache(), available_cpus())
    yield use.spec.symbol
    yield from bench_lines(plan, use, compiler)
    for line in compiler.notes:
        note(f"note: {line}")


def _runnable(name: str | None) -> Target:
    if name is None:
        return target_called(None)
    try:
        return jit.host_target(name)
    except ValueError as problem:
        raise UsageError(f"--target: {problem}") from problem
