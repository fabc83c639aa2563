"""Helper processes that compile: the same object code as without, whatever happens to them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import llvmlite
import pytest

from codegen import jit
from codegen.compilers import Compilers, helpers_worth

FOLDERS = tuple(str(Path(str(m.__file__)).parent.parent) for m in (jit, llvmlite))
TARGET = jit.host_target()
MACHINE = {"triple": TARGET.triple, "cpu": TARGET.cpu, "features": TARGET.features}
TEXTS = [
    (f"f{i}", f'target triple = "{TARGET.triple}"\ndefine i64 @f{i}(i64 %x) {{\n'
     f"  %y = mul i64 %x, {i + 3}\n  ret i64 %y\n}}\n")
    for i in range(9)
]  # fmt: skip


def compile_one(text: str) -> bytes:
    machine = jit.target_machine(TARGET)
    payload: bytes = machine.emit_object(jit.optimise(text, machine))
    return payload


class Counted:
    """`compile_one` that knows how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, text: str) -> bytes:
        self.calls += 1
        return compile_one(text)


def compilers(
    here: Callable[[str], bytes], n: int, folders: tuple[str, ...] = FOLDERS
) -> Compilers:
    return Compilers(MACHINE, folders, here, n)


@pytest.fixture(scope="module")
def expected() -> dict[str, bytes]:
    return {name: compile_one(text) for name, text in TEXTS}


def test_helpers_make_the_same_object_code(expected: dict[str, bytes]) -> None:
    """All of it is made by the helpers: here, the texts only end once they are done."""
    here = Counted()
    group = compilers(here, 2)
    made = group._done

    def texts() -> Iterator[tuple[str, str]]:
        yield from TEXTS
        while len(made) < len(TEXTS):
            threading.Event().wait(0.01)

    assert group.compile(texts()) == expected
    assert here.calls == 0


def test_a_helper_that_dies_loses_nothing(expected: dict[str, bytes]) -> None:
    """With nothing to import from, it ends at once."""
    here = Counted()
    group = compilers(here, 2, folders=("/nonexistent",))
    assert group.compile(TEXTS) == expected
    assert here.calls == len(TEXTS)
    assert all("helper process for compiling failed" in note for note in group.notes)


def test_no_more_processes(expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    group = compilers(Counted(), 2)
    assert group.compile(TEXTS) == expected
    assert len(group.notes) == 2 and "No such file" in group.notes[0]


@pytest.mark.parametrize("n", [0, 2])
def test_what_llvm_refuses_is_raised(n: int) -> None:
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="expected"):
        compilers(compile_one, n).compile([*TEXTS, ("bad", "define nonsense" + " " * 4096)])
    helpers = set(threading.enumerate()) - before
    for thread in helpers:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in helpers)


def test_helpers_that_are_worth_starting() -> None:
    assert helpers_worth(43, 1) == 0
    assert helpers_worth(3, 64) == 0
    assert helpers_worth(43, 2) == 1
    assert helpers_worth(16, 64) == 4
    assert helpers_worth(1000, 64) == 7
