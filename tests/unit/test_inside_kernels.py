"""mlacli kernels: the list, one kernel's code for any target, one kernel's time."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from codegen import jit
from codegen.cache_dir import ObjectCache
from codegen.kernel import KernelSpec
from codegen.targets import NAMES
from mlacli.__main__ import main
from mlacli.errors import UsageError
from mlacli.graph.node import Dim
from mlacli.graph.ops import KNOWN_OPS
from mlacli.inside import kernel_bench
from mlacli.inside.graph_facts import planned
from mlacli.inside.kernel_bench import Memory, bench_lines, launch_work
from mlacli.inside.kernel_data import pattern
from mlacli.inside.kernel_facts import KernelUse, facts, find, target_called, uses
from mlacli.inside.kernel_look import kernel_text
from mlacli.machine import Peaks, this_target
from mlacli.settings import RunSettings, fitted
from mlacli.work import Batch, node_work
from tests.conftest import TinyModel
from tests.engines import make_engine, shared_jit

SETTINGS = RunSettings(n_ctx=512, n_threads=1, n_ubatch=32, n_batch=32)


@cache
def known(mla: int = 3, flash_attn: bool = True, fmoe: bool = True) -> dict[str, KernelUse]:
    settings = RunSettings(
        n_ctx=512, n_threads=1, n_ubatch=32, n_batch=32, mla=mla, flash_attn=flash_attn, fmoe=fmoe
    )
    return uses(planned(settings, this_target()))


class Asked(Exception):
    """What an engine wants to have compiled."""


class NoJit:
    """Stands for a compiler: only remembers what it was asked for."""

    target = this_target()

    def load_all(self, specs: Iterable[KernelSpec], progress: object = None) -> None:
        raise Asked({spec.symbol for spec in specs})


def test_the_list_is_what_programs_load() -> None:
    jit: Any = NoJit()
    engine = make_engine(
        SETTINGS.model, n_ctx=512, n_threads=1, n_ubatch=32, n_batch=32, jit=jit, n_out_max=1
    )
    with pytest.raises(Asked) as asked:
        engine.prepare("few", "absorbed", "expanded")
    assert asked.value.args[0] == set(known())
    few = sum(len(use.launches.get("few", ())) for use in known().values())
    assert few > sum(1 for _ in engine.plan.graphs["few"].graph.operations)


def test_what_is_compiled_is_told(tmp_path: Path) -> None:
    store = ObjectCache(tmp_path / "objects")
    use = known()[next(s for s in known() if s.startswith("route"))]
    before, after = facts([use], this_target(), store)[0], None
    assert not before.compiled and before.code_bytes is None
    assert (before.ops, before.launches["few"], before.makes) == (("route",), 5, ("ffn_moe_topk",))
    jit.Jit(this_target(), store).load(use.spec)
    after = facts([use], this_target(), store)[0]
    assert after.compiled and after.code_bytes is not None and 100 < after.code_bytes < 100_000


def test_code_bytes_are_those_of_the_instructions(tmp_path: Path) -> None:
    """binutils, where it is, counts the same."""
    store = ObjectCache(tmp_path / "objects")
    spec = find("route", "--asm", known()).spec
    jit.Jit(this_target(), store).load(spec)
    stored = store.get(spec.key(this_target(), jit.version()))
    assert stored is not None
    (tmp_path / "a.o").write_bytes(stored[1:])
    try:
        told = subprocess.run(
            ["objdump", "-h", tmp_path / "a.o"], capture_output=True, text=True, check=True
        ).stdout
    except FileNotFoundError:
        pytest.skip("no objdump here")
    sizes = re.findall(r" \.l?text\S* +([0-9a-f]+)", told)
    assert sum(int(size, 16) for size in sizes) == jit.code_bytes(stored[1:])


def test_a_name_may_be_a_unique_beginning() -> None:
    whole = next(symbol for symbol in known() if symbol.startswith("flash_expanded"))
    assert find(whole, "--ir", known()).spec.symbol == whole
    assert find("flash_exp", "--ir", known()).spec.symbol == whole
    with pytest.raises(UsageError, match=r"--ir: 'matvec' begins the names of .* more: write more"):
        find("matvec", "--ir", known())
    with pytest.raises(UsageError, match=r"no kernel is called 'flsh' \(nearest: flash_"):
        find("flsh", "--asm", known())


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("avx2", r"\bvfmadd\w+\s.*%ymm"), ("avx512", r"%zmm\d"), ("neon", r"\bfm(la|ul)\s+v\d+\.4s")],
)
def test_assembly_for_any_cpu(target: str, instruction: str) -> None:
    text = kernel_text(SETTINGS, target, "--asm", "rms_norm_256")
    assert re.search(instruction, text), text[:2000]


def test_ir_before_and_after_optimisation() -> None:
    plain = kernel_text(SETTINGS, None, "--ir", "rms_norm_256")
    better = kernel_text(SETTINGS, None, "--ir-opt", "rms_norm_256")
    symbol = find("rms_norm_256", "--ir", known()).spec.symbol
    assert f'define void @"{symbol}"' in plain and f"define void @{symbol}" in better
    assert len(better) < len(plain)


# -- timing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mla", "flash_attn", "fmoe"), [(3, True, True), (0, True, True), (1, False, False)]
)
def test_a_kernel_has_its_node_s_work(mla: int, flash_attn: bool, fmoe: bool) -> None:
    """The parts of a node's launches add up to what --profile counts for the node."""
    settings = RunSettings(
        n_ctx=512, n_threads=1, n_ubatch=32, n_batch=32, mla=mla, flash_attn=flash_attn, fmoe=fmoe
    )
    plan, batch = planned(settings, this_target()), Batch(32, 512, 1)
    row_bytes = {kind: n / 512 for kind, n in plan.layout.bytes_per_layer().items()}
    totals: dict[str, float] = {}
    nodes = {}
    for use in uses(plan).values():
        for launch in (launch for each in use.launches.values() for launch in each):
            key = f"{launch.node.name} {id(launch.node)}"
            work = sum(w.multiply_adds + w.nbytes for w in launch_work(plan, launch, batch))
            totals[key], nodes[key] = totals.get(key, 0.0) + work, launch.node
    assert {n.op for n in nodes.values()} <= KNOWN_OPS
    for key, node in nodes.items():
        wanted = sum(w.multiply_adds + w.nbytes for w in node_work(node, batch, row_bytes))
        assert totals[key] == pytest.approx(wanted), node


def test_every_kind_of_kernel_can_be_timed(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made-up memory of the right size for each parameter. The settings are those of
    test_dump.py, so that most kernels are compiled once for both."""
    monkeypatch.setattr(kernel_bench, "Roof", NoRoof)
    monkeypatch.setattr(kernel_bench, "_REPEATS", 1)
    seen: set[tuple[str, str]] = set()
    for type, flags in (
        ("F32", {"mla": 0, "flash_attn": False}),
        ("F32", {"mla": 2, "flash_attn": False}),
        ("F32", {"mla": 1, "fmoe": False}),
        ("F32", {"mla": 2}),
        ("Q8_0", {"mla": 1}),
        ("Q8_0", {"mla": 1, "rtr": True}),
    ):
        settings = fitted(
            model=tiny_model("tiny-odd", type, n_layer=3), n_ctx=256, n_ubatch=16, n_threads=2,
            type_k="f32", type_v="f32", **flags,
        )  # fmt: skip
        plan = planned(settings, shared_jit().target)
        for use in uses(plan).values():
            kind = (use.spec.name, "rtr" if "rtr" in flags and use.spec.name == "matvec" else "")
            if kind in seen:
                continue
            seen.add(kind)
            lines = list(bench_lines(plan, use, shared_jit(), pool_bytes=1 << 20))
            assert len(lines) % 2 == 0 and all(" us" in line for line in lines[::2])
    assert len(seen) > 25 and ("matvec", "rtr") in seen


class NoRoof:
    """Stands for the measurement of a machine, which takes long."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def measure(self) -> Peaks:
        return Peaks(1, 1e12, 1e12, 1e12, 1e12)


def test_made_up_tables_are_consistent() -> None:
    """place is where order has the slot, and every expert's slots lie together."""
    plan = planned(SETTINGS, this_target())
    lower, batch = plan.graphs["absorbed"].lower, Batch(32, 512, 1)
    nodes = {node.name: node for node in plan.graphs["absorbed"].graph.nodes}
    memory = Memory(plan, lower, batch, 1 << 20)
    (ids,), (groups,) = (
        [a.view("i4") for a in memory.turns_of(nodes[f"ffn_moe_{name}-1"])]
        for name in ("topk", "groups")
    )
    n_slots = 2 * lower.bounds[Dim.N_TOKENS]
    offsets, order, place = groups[:9], groups[9 : 9 + n_slots], groups[9 + n_slots :]
    assert sorted(order) == list(range(n_slots)) and all(order[place] == range(n_slots))
    for expert in range(8):
        slots = order[offsets[expert] : offsets[expert + 1]]
        assert all(ids[slots] == expert)


def test_interleaved_patterns_hold_whole_groups() -> None:
    plan = planned(RunSettings(n_ctx=256, n_threads=1, rtr=True), this_target())
    formats = {m.fmt for m in plan.derived() if m.fmt.interleaved}
    assert formats
    for fmt in formats:
        data = pattern(fmt)
        group = fmt.interleaved * fmt.block_bytes
        assert data.size % group == 0
        assert (data[: 2 * fmt.interleaved].view("f2") == data[:2].view("f2")).all()


# -- the command ----------------------------------------------------------------------------------


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "-c", "512", "--json", "--target", "avx2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == "avx2"
    assert {op for k in found["kernels"] for op in k["ops"]} > {"flash_expanded", "moe_down"}


def test_bench_measures_beside_the_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_bench, "_REPEATS", 1)
    assert main(["kernels", "-c", "256", "-t", "1", "--bench", "matvec_f32"]) == 0
    name, line, machine = capsys.readouterr().out.splitlines()
    assert name.startswith("matvec_f32_")
    share = re.fullmatch(
        r"few, 1 token of 256: [\d.]+ us, [\d.]+ TOP/s, [\d.]+ GB/s, ([\d.]+) % of the limit "
        r"\([\d.]+ us of (reading|computing)\)",
        line,
    )
    assert share and float(share[1]) > 0
    assert machine.startswith("machine: int8 ") and "(1 threads, " in machine


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--asm", "route", "--target", "sse2"], "--target: unknown target 'sse2'"),
        (["--ir", "a", "--asm", "b"], "--ir and --asm: give one of them, not both"),
        (["--ir", "a", "--json"], "--ir and --json: give one of them, not both"),
        (["--bench", "nothing"], "--bench: no kernel is called 'nothing' (nearest: "),
    ],
)
def test_wrong_flags_give_one_line(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"error: {complaint}")
    assert captured.err.count("\n") == 1


def test_only_what_runs_here_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    other = "neon" if jit.host().is_x86 else "avx2"
    assert main(["kernels", "--bench", "route", "--target", other]) == 2
    assert f"--target: this CPU cannot run target '{other}'" in capsys.readouterr().err
    assert {target_called(name).name for name in NAMES} == set(NAMES)
