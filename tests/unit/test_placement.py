"""CPUs for threads: masks, NUMA nodes and what is made of them, on machines that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlacli import cpu_count, numa, placement, settings
from mlacli.bench import BenchRow, Grid, cases
from mlacli.bench_records import record
from mlacli.bench_table import markdown
from mlacli.errors import UsageError
from mlacli.limits import CpuMask, CpuRange
from mlacli.numa import Node, cpu_list_text, last_cpu, nodes_with_cpus, numa_nodes, parse_cpu_list
from mlacli.placement import Machine, chosen_cpus, mask_notes, numa_notes, thread_cpus
from mlacli.settings import RunSettings, notes

GIB = 2**30


def make_node(sysfs: Path, number: int, cpus: str, kib: int = 1024**2) -> None:
    folder = sysfs / f"node{number}"
    folder.mkdir(parents=True)
    (folder / "cpulist").write_text(cpus + "\n")
    (folder / "meminfo").write_text(f"Node {number} MemTotal:       {kib} kB\n")


def make_siblings(sysfs: Path, *cores: str) -> None:
    """A folder for every CPU of these cores, each a list such as `0,4`."""
    for core in cores:
        for cpu in parse_cpu_list(core):
            folder = sysfs / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(core + "\n")


def two_nodes(tmp_path: Path, *, allowed: str = "0-7", started_on: int | None = 5) -> Machine:
    """Two nodes of four CPUs, which are two cores of two threads."""
    for number, cpus in enumerate(("0-1,4-5", "2-3,6-7")):
        make_node(tmp_path / "node", number, cpus)
    make_siblings(tmp_path / "cpu", "0,4", "1,5", "2,6", "3,7")
    nodes = nodes_with_cpus(tmp_path / "node")
    return Machine(parse_cpu_list(allowed), nodes, started_on, tmp_path / "cpu")


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0-3,8\n", {0, 1, 2, 3, 8}), ("5\n", {5}), ("\n", set()), ("0,2,4", {0, 2, 4})],
)
def test_cpu_lists(text: str, cpus: set[int]) -> None:
    assert parse_cpu_list(text) == cpus
    assert cpu_list_text(cpus) == text.strip()


def test_nodes_offline_and_with_memory_only(tmp_path: Path) -> None:
    make_node(tmp_path, 0, "0-1")
    make_node(tmp_path, 10, "2-3", 2 * 1024**2)
    make_node(tmp_path, 2, "")  # memory of an expander
    make_node(tmp_path, 3, "4-5")
    (tmp_path / "online").write_text("0-2,10\n")
    (tmp_path / "node_of_something").mkdir()
    assert numa_nodes(tmp_path) == (
        Node(0, frozenset({0, 1}), GIB),
        Node(2, frozenset(), GIB),
        Node(10, frozenset({2, 3}), 2 * GIB),
    )
    assert [node.number for node in nodes_with_cpus(tmp_path)] == [0, 10]
    (tmp_path / "online").unlink()
    assert [node.number for node in numa_nodes(tmp_path)] == [0, 2, 3, 10]
    assert numa_nodes(tmp_path / "nothing") == ()


def test_the_cpu_that_a_process_is_on(tmp_path: Path) -> None:
    own = last_cpu(Path("/proc/self/stat"))
    assert own in cpu_count.allowed_cpus()
    fields = ["S", *map(str, range(4, 53))]  # numbered as in man proc_pid_stat
    (tmp_path / "stat").write_text(f"17 (a (bad) name 7) {' '.join(fields)}\n")
    assert last_cpu(tmp_path / "stat") == 39
    assert last_cpu(tmp_path / "missing") is None


@pytest.mark.parametrize(("text", "level"), [("0\n", 0), ("1\n", 1), ("2\n", 2), (None, 0)])
def test_numa_balancing(tmp_path: Path, text: str | None, level: int) -> None:
    if text is not None:
        (tmp_path / "numa_balancing").write_text(text)
    assert numa.numa_balancing(tmp_path / "numa_balancing") == level


# -- what is chosen --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "numa", "cpus"),
    [
        (None, None, "0-7"),
        (0b1111, None, "0-3"),
        (0xFF0, None, "4-7"),
        (None, "isolate", "0-1,4-5"),  # it started on CPU 5
        (0b110, "isolate", "1"),
        (None, "distribute", "0-7"),
        (None, "numactl", "0-7"),
    ],
)
def test_chosen(tmp_path: Path, mask: int | None, numa: str | None, cpus: str) -> None:
    assert cpu_list_text(chosen_cpus(two_nodes(tmp_path), "-C", mask, numa)) == cpus


@pytest.mark.parametrize(
    ("machine", "mask", "numa", "line"),
    [
        ({}, 0xF00, None, "-C: names CPUs 8-11, but this process may run on 0-7 only"),
        ({"allowed": "1"}, 5, None, "-C: names CPUs 0,2, but this process may run on 1 only"),
        (
            {},
            0b1100,
            "isolate",
            "--numa isolate: node 0, where this process started, has none of the CPUs 2-3",
        ),
        (
            {"started_on": None},
            None,
            "isolate",
            "--numa isolate: the system does not tell on which node this process is",
        ),
    ],
)
def test_nothing_to_choose(
    tmp_path: Path, machine: dict[str, Any], mask: int | None, numa: str | None, line: str
) -> None:
    with pytest.raises(UsageError) as caught:
        chosen_cpus(two_nodes(tmp_path, **machine), "-C", mask, numa)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("cpus", "flags", "threads"),
    [
        ("0-7", {}, []),
        ("0-3", {}, ["0-3"]),
        ("0-7", {"numa": "distribute"}, ["0-1,4-5", "2-3,6-7"]),
        ("0-3", {"numa": "distribute"}, ["0-1", "2-3"]),
        ("0-1", {"numa": "distribute"}, ["0-1"]),
        ("0-7", {"numa": "numactl"}, []),
        ("0-1,4-5", {"numa": "isolate"}, ["0-1,4-5"]),
        ("0,4-5", {"strict": True, "in_order": True}, ["0", "4", "5"]),
        # one CPU of each core before any second thread of a core
        ("0-1,4-5", {"strict": True}, ["0", "1", "4", "5"]),
        ("0,4-5", {"strict": True}, ["0", "5", "4"]),
        ("0-7", {"strict": True, "numa": "distribute"}, ["0", "2", "1", "3", "4", "6", "5", "7"]),
        ("0-2", {"strict": True, "in_order": True, "numa": "distribute"}, ["0", "2", "1"]),
    ],
)
def test_threads(tmp_path: Path, cpus: str, flags: dict[str, Any], threads: list[str]) -> None:
    flags = {"numa": None, "strict": False, "in_order": False} | flags
    found = thread_cpus(two_nodes(tmp_path), parse_cpu_list(cpus), **flags)
    assert [cpu_list_text(one) for one in found] == threads


def test_one_node_is_nothing_to_distribute_over(tmp_path: Path) -> None:
    machine = Machine(frozenset({0, 1}), (Node(0, frozenset({0, 1}), GIB),), 0)
    assert (
        thread_cpus(machine, machine.allowed, numa="distribute", strict=False, in_order=False) == ()
    )
    assert chosen_cpus(machine, "-C", None, "isolate") == {0, 1}
    assert numa_notes(machine, "isolate", 1) == [
        "--numa isolate has no effect: the machine has one NUMA node"
    ]


def test_notes(tmp_path: Path) -> None:
    machine = two_nodes(tmp_path)
    assert mask_notes(machine, "-C", 0xF) == mask_notes(machine, "-C", None) == []
    assert mask_notes(machine, "-C", 0x1F0) == [
        "-C: CPUs 8 are not used: this process may run on 0-7"
    ]
    assert numa_notes(machine, None, 1) == numa_notes(machine, "distribute", 0) == []
    [line] = numa_notes(machine, "distribute", 1)
    assert line.startswith("/proc/sys/kernel/numa_balancing is 1: ")
    [line] = numa_notes(machine, "numactl", 0)
    assert line == "--numa numactl: numactl chose no CPUs: threads run on all of them (0-7)"
    bound = Machine(frozenset({0, 1}), machine.nodes, 0)
    assert numa_notes(bound, "numactl", 0) == []


# -- as settings -----------------------------------------------------------------------------------


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = two_nodes(tmp_path)
    monkeypatch.setattr(settings, "this_machine", lambda: machine)
    monkeypatch.setattr(settings, "available_cpus", lambda: 8)
    monkeypatch.setattr(cpu_count, "CPUS", machine.sysfs)
    monkeypatch.setattr(cpu_count, "cpu_quota", lambda membership, mount: None)
    monkeypatch.setattr(cpu_count, "allowed_cpus", lambda: machine.allowed)
    monkeypatch.setattr(settings, "default_threads", cpu_count.default_threads.__wrapped__)
    monkeypatch.setattr(placement, "numa_balancing", lambda: 1)
    return machine


def test_threads_follow_the_cpus_chosen(made_up: Machine) -> None:
    assert RunSettings().n_threads == 4  # cores of eight CPUs
    assert RunSettings(cpu_mask=0b10001).n_threads == 1  # both threads of one core
    assert RunSettings(cpu_range=0b11, numa="isolate").n_threads == 2
    assert RunSettings(numa="isolate").n_threads == RunSettings(numa="isolate").n_threads_batch == 2
    assert RunSettings(cpu_mask=1, n_threads=3).n_threads == 3
    batch = RunSettings(cpu_mask=1, cpu_range_batch=0b1111)
    assert (batch.n_threads, batch.n_threads_batch) == (1, 4)


def test_policies(made_up: Machine) -> None:
    assert RunSettings().policy().cpus == RunSettings().policy(batch=True).cpus == ()
    both = RunSettings(cpu_mask=0b100, cpu_range=0b11, poll=7, prio=1)
    assert both.policy() == both.policy(batch=True)
    assert both.policy().cpus == (frozenset({0, 1, 2}),)
    assert (both.policy().poll, both.policy().priority) == (7, 1)
    own = RunSettings(cpu_mask=1, cpu_mask_batch=6, cpu_strict_batch=True, poll_batch=0)
    assert own.policy().cpus == (frozenset({0}),)
    assert own.policy(batch=True).cpus == (frozenset({1}), frozenset({2}))
    assert (own.policy().poll, own.policy(batch=True).poll) == (50, 0)
    assert RunSettings(cpu_strict=True).policy().cpus_of(8) == frozenset({0})


def test_what_settings_note(made_up: Machine) -> None:
    assert notes(RunSettings(cpu_mask=3)) == []
    assert "-Cr: CPUs 8-9" in notes(RunSettings(cpu_range=0x300 | 1))[0]
    assert notes(RunSettings(cpu_mask=1, n_threads=2)) == [
        "2 threads share 1 CPUs: slower than -t 1"
    ]
    assert "numa_balancing is 1" in notes(RunSettings(numa="distribute"))[0]


def test_a_bench_varies_cpus(made_up: Machine) -> None:
    axes: dict[str, list[Any]] = {"cpu_mask": [0b10001, 0b1111], "cpu_strict": [False, True]}
    grid = Grid((Path("a.gguf"),), axes | {"poll": [0], "numa": ["isolate"]}, n_gen=(0,))
    rows = [BenchRow(case, error="not run") for case in cases(grid)]
    assert [row.case.settings.n_threads for row in rows] == [1, 1, 2, 2]
    head, *lines = (
        [cell.strip() for cell in line.split("|")[5:10]] for line in markdown(rows).splitlines()[:6]
    )
    assert head == ["threads", "cpu_mask", "cpu_strict", "poll", "numa"]
    assert lines[1:] == [
        ["1", "0x11", "0", "0", "isolate"],
        ["1", "0x11", "1", "0", "isolate"],
        ["2", "0xf", "0", "0", "isolate"],
        ["2", "0xf", "1", "0", "isolate"],
    ]
    found = record(rows[-1])
    assert (found["cpu_mask"], found["cpu_strict"], found["poll"]) == ("0xf", True, 0)
    plain = record(BenchRow(cases(Grid((Path("a"),)))[0]))
    assert (plain["cpu_mask"], plain["poll"], plain["prio"], plain["numa"]) == ("0x0", 50, 0, "")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"cpu_mask": 0x100}, "-C: names CPUs 8, but this process may run on 0-7 only"),
        ({"cpu_range_batch": 0x300}, "-Crb: names CPUs 8-9, but this process may run on 0-7 only"),
        ({"cpu_mask": 0x100, "cpu_range": 0x200}, "-C and -Cr: names CPUs 8-9, but "),
        ({"cpu_mask": 0}, "-C: names CPUs , but"),
        ({"cpu_mask": 1 << 4096}, "-C: names CPUs 4096, but"),
        ({"numa": "mirror"}, "--numa: 'mirror' is not one of distribute, isolate, numactl"),
        ({"prio": 4}, "--prio: 4 is out of range (-1 to 3)"),
        ({"poll": 101}, "--poll: 101 is out of range (0 to 100)"),
        ({"poll_batch": -1}, "--poll-batch: -1 is out of range (0 to 100)"),
    ],
)
def test_refused(made_up: Machine, values: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        RunSettings(**values)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("text", "mask"), [("f", 15), ("0x0F", 15), ("0Xa0", 160), ("1" * 1024, int("1" * 1024, 16))]
)
def test_masks_are_read(text: str, mask: int) -> None:
    assert CpuMask("-C").parse(text) == mask


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("xyz", "-C: 'xyz' is not a hexadecimal mask"),
        ("", "-C: '' is not a hexadecimal mask"),
        ("0x", "-C: '0x' is not a hexadecimal mask"),
        ("-1", "-C: '-1' is not a hexadecimal mask"),
        ("f_f", "-C: 'f_f' is not a hexadecimal mask"),
        ("0", "-C: a mask names at least one CPU (0 to 4095)"),
        ("1" + "0" * 1024, "-C: a mask names at least one CPU (0 to 4095)"),
        ("f" * 10**6, "-C: a mask names at least one CPU (0 to 4095)"),
    ],
)
def test_masks_that_are_none(text: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        CpuMask("-C").parse(text)
    assert str(caught.value) == line


def test_ranges_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    parse = CpuRange("-Cr").parse
    assert (parse("2-3"), parse("-3"), parse("6-"), parse("9-")) == (0b1100, 0b1111, 0xC0, 0x200)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("3", "-Cr: '3' is not a range of CPUs (as 0-7, 4- or -3)"),
        ("-", "-Cr: '-' is not a range of CPUs (as 0-7, 4- or -3)"),
        ("a-b", "-Cr: 'a-b' is not a range of CPUs (as 0-7, 4- or -3)"),
        ("3-1", "-Cr: '3-1' ends before it begins"),
        ("0-4096", "-Cr: 4096 is out of range (0 to 4095)"),
    ],
)
def test_ranges_that_are_none(text: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        CpuRange("-Cr").parse(text)
    assert str(caught.value) == line
