"""Kernels from elsewhere: docs/own-kernel.md's example works, the swap is real, and what cannot
work is refused before anything runs."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from codegen.cache_dir import ObjectCache
from codegen.call import Call
from codegen.dtypes import f32
from codegen.jit import Jit
from codegen.kernel import kernel, ptr
from mlacli import Lowering, load
from mlacli.errors import UsageError
from mlacli.graph.lower import At, Launch, Lower, Scratch
from mlacli.graph.node import Dim, Node
from tests.engines import shared_jit, shared_pool

DOCS = Path(__file__).parent.parent.parent / "docs"
SCRIPT = DOCS / "examples" / "own_attention.py"


def imported(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


own = imported(SCRIPT, "own_attention")


def with_scale(factor: float) -> dict[str, Lowering]:
    """The example's kernel with a wrong scale."""

    def launches(lower: Lower, node: Node) -> list[Launch]:
        (launch,) = own.launches(lower, node)
        sizes = dict(launch.spec.sizes)
        sizes["scale"] *= factor
        return [replace(launch, spec=own.own_attention(**sizes))]

    return {"flash_absorbed": Lowering(launches, where=own.suits)}


# -- the example ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(8, 128, 32, 100), (6, 64, 32, 11), (5, 512, 64, 130)], ids=str)
def test_the_kernel_alone_is_the_formula(sizes: tuple[int, int, int, int]) -> None:
    assert own.check_alone(*sizes) <= 1e-5


@pytest.mark.parametrize("type_k", ["f16", "f32"])
def test_the_example_agrees_with_the_built_in_kernel(type_k: str) -> None:
    flags: dict[str, Any] = {"type_k": type_k, "n_threads": 2}
    with load(**flags) as built_in, load(**flags, kernels=own.OWN) as other:
        found = own.compare(other, built_in, depth=300, n=12)
        assert 0 < found.error <= own.TOLERANCE and found.same_text
        assert all(ms > 0 for ms in found.ms)
        # The swap is real: every layer's generated tokens, and no prompt.
        layers = [f"kqv-{i}" for i in range(6)]
        assert all(other.kernels()[name][0].startswith("own_attention_") for name in layers)
        assert all(built_in.kernels()[name][0].startswith("flash_attn_") for name in layers)
        assert other.kernels(100) == built_in.kernels(100)
    with load(**flags) as built_in, load(**flags, kernels=with_scale(0.5)) as wrong:
        assert own.compare(wrong, built_in, depth=300, n=12).error > 10 * own.TOLERANCE


def test_a_cache_that_it_does_not_suit_keeps_the_built_in_kernel() -> None:
    with pytest.raises(UsageError, match="flash_absorbed takes the place of nothing"):
        load(type_k="q8_0", kernels=own.OWN)
    with pytest.raises(UsageError, match="flash_absorbed takes the place of nothing"):
        load(mla=0, kernels=own.OWN)


def test_the_page_shows_the_code_as_it_is() -> None:
    code, page = SCRIPT.read_text(), (DOCS / "own-kernel.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shown = [line for block in blocks for line in block.splitlines() if line.strip()]
    there = {line.strip() for line in code.splitlines()}
    assert [line for line in shown if line.strip() not in there] == []
    start, end = code.index("@kernel("), code.index("def launches(")
    kernel_lines = [line.strip() for line in code[start:end].splitlines() if line.strip()]
    assert set(kernel_lines) <= {line.strip() for line in shown}  # none is left out


# -- object code of kernels from elsewhere --------------------------------------------------------

_SOURCE = """
from codegen.dtypes import f32
from codegen.kernel import kernel, ptr
from {helper} import FACTOR

@kernel(y=ptr(f32))
def scaled(k, y):
    y[0] = y[0] * FACTOR
"""


def test_a_changed_kernel_never_meets_its_old_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its own file changes, or one that it imports."""
    monkeypatch.syspath_prepend(str(tmp_path))
    store, seen = ObjectCache(tmp_path / "objects"), []
    for i, (factor, more) in enumerate([(2.0, ""), (2.0, ""), (3.0, ""), (3.0, " + 1.0")]):
        name = f"own_helper_{i}"
        (tmp_path / f"{name}.py").write_text(f"FACTOR = {factor}\n")
        path = tmp_path / "own_scaled.py"
        path.write_text(_SOURCE.format(helper=name).rstrip() + more + "\n")
        jit = Jit(shared_jit().target, store)
        y = np.array([5.0], np.float32)
        Call(jit, imported(path, f"own_scaled_{i}").scaled(), [y]).run(shared_pool(), 1)
        seen.append((float(y[0]), jit.compiled))
    assert seen == [(10.0, 1), (10.0, 0), (15.0, 1), (16.0, 1)]


def test_two_kernels_of_one_name_are_refused() -> None:
    def made(factor: float) -> Any:
        @kernel(y=ptr(f32))
        def twin(k: Any, y: Any) -> None:
            y[0] = y[0] * factor

        return twin()

    jit = Jit(shared_jit().target)
    jit.load(made(2.0))
    with pytest.raises(ValueError, match="two kernels are called twin_"):
        jit.load(made(3.0))


# -- launches that cannot work --------------------------------------------------------------------


@kernel(y=ptr(f32))
def touch(k: Any, y: Any) -> None:
    y[0] = 0.0


@pytest.mark.parametrize(
    ("operands", "line"),
    [
        (lambda node: (), "touch: 0 operands for 1 parameters"),
        (lambda node: (At(node), Dim.N_TOKENS), "touch: 2 operands for 1 parameters"),
        (lambda node: (Dim.N_KV,), "touch: parameter y is a ptr, got Dim"),
        (lambda node: (0,), "touch: parameter y is a ptr, got int"),
        (lambda node: (Scratch(node),), "touch: parameter y is scratch, of which it declares none"),
    ],
)
def test_operands_that_do_not_fit_the_parameters(operands: Any, line: str) -> None:
    lowering = Lowering(lambda lower, node: [Launch(node, touch(), operands(node))])
    with pytest.raises(UsageError, match="kernels: flash_absorbed: " + line):
        with load(n_threads=1, n_ctx=256, kernels={"flash_absorbed": lowering}) as model:
            model.kernels()


def test_a_launch_for_another_node() -> None:
    def launches(lower: Lower, node: Node) -> list[Launch]:
        return [Launch(node.inputs[0], touch(), (At(node),))]

    with pytest.raises(UsageError, match=r"its launch is for q_c-0:.*, not for kqv-0:"):
        with load(n_threads=1, n_ctx=256, kernels={"flash_absorbed": Lowering(launches)}) as model:
            model.kernels()
