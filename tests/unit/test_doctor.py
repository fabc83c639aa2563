"""The doctor's checks on made-up machines, and the command on this one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codegen.cache_dir import ObjectCache
from codegen.targets import Host
from mlacli import checks_cpu, checks_memory
from mlacli.__main__ import main
from mlacli.checks_memory import Disk, HugePages
from mlacli.findings import NOTE, OK, PROBLEM, Finding, exit_code_of, lines_of
from mlacli.machine import Peaks
from mlacli.memory import resident_share
from mlacli.numa import Node
from mlacli.report import FITS, PAGES, TOO_LARGE, MemoryFacts
from mlacli.settings import default_model

GIB = 2**30
AVX2 = frozenset({"avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


def intel(cpu: str, features: frozenset[str]) -> Host:
    return Host("x86_64-unknown-linux-gnu", cpu, features)


@pytest.mark.parametrize(
    ("host", "wanted", "status", "text", "advice"),
    [
        (
            intel("znver5", AVX512 | {"avx512vnni", "avx512bf16"}),
            None,
            OK,
            "avx512vnni-bf16: the best there is",
            "",
        ),
        (
            intel("emeraldrapids", AVX512 | {"avx512vnni"}),
            None,
            NOTE,
            "avx512vnni: the best that this CPU shows; avx512vnni-bf16 would need avx512bf16, "
            "which emeraldrapids has: a virtual machine or the firmware hides it",
            "-cpu host",
        ),
        (
            intel("cascadelake", AVX512 | {"avx512vnni"}),
            None,
            OK,
            "avx512vnni: the best that this CPU shows; avx512vnni-bf16 would need avx512bf16",
            "",
        ),
        (
            intel("haswell", AVX2),
            None,
            OK,
            "avx2: the best that this CPU shows; avx2vnni would need avxvnni",
            "",
        ),
        (
            intel("icelake-server", AVX2),
            None,
            NOTE,
            "avx2: the best that this CPU shows; avx512vnni would need avx512bw, avx512dq, "
            "avx512f, avx512vl, avx512vnni, which icelake-server has: "
            "a virtual machine or the firmware hides it",
            "int8 products in one instruction instead of three",
        ),
        (
            intel("haswell", AVX2),
            "generic",
            NOTE,
            "generic, because MLACLI_TARGET says so; this CPU can run avx2",
            "unset MLACLI_TARGET: avx2 has vectors of 256 bits",
        ),
        (
            intel("haswell", AVX2),
            "avx512",
            PROBLEM,
            "MLACLI_TARGET=avx512: that target cannot run here",
            "set it to one of avx2, generic",
        ),
        (intel("haswell", AVX2), "best", PROBLEM, "MLACLI_TARGET=best: that target is none", ""),
        (
            Host("aarch64-linux", "neoverse-v1", frozenset({"neon", "dotprod"})),
            None,
            OK,
            "neon: the best there is",
            "",
        ),
        (
            Host("aarch64-linux", "cortex-a72", frozenset({"neon"})),
            None,
            OK,
            "generic: the best that this CPU shows; neon would need dotprod",
            "",
        ),
        (Host("riscv64-linux", "", frozenset()), None, OK, "generic: ", ""),
    ],
)
def test_target(host: Host, wanted: str | None, status: str, text: str, advice: str) -> None:
    found = checks_cpu.target_check(host, wanted)
    assert (found.status, found.exit_code) == (status, 2 if status == PROBLEM else 0)
    assert found.text.startswith(text) if text.endswith(" ") else found.text == text
    assert advice in found.advice and bool(found.advice) == (status != OK)


@pytest.mark.parametrize(
    ("numbers", "text", "advice"),
    [
        (
            (2, 2, {0, 1}, None, 2),
            "2 cores, one thread each; may run on CPUs 0-1; no CPU quota",
            "",
        ),
        ((16, 8, set(range(16)), None, 8), "8 cores, 2 threads each; may run on CPUs 0-15;", ""),
        ((16, 8, {0, 8}, None, 1), "may run on CPUs 0,8; no CPU quota; default -t 1", "taskset"),
        ((8, 8, set(range(8)), 2.5, 2), "CPU quota 2.5; default -t 2", "--cpus"),
        ((4, 4, set(range(4)), 64.0, 4), "CPU quota 64; default -t 4", ""),
    ],
)
def test_threads(numbers: tuple[Any, ...], text: str, advice: str) -> None:
    found = checks_cpu.threads_check(*numbers)
    assert text in found.text and advice in found.advice
    assert found.status == (NOTE if advice else OK)


def test_peaks() -> None:
    found = checks_cpu.peaks_check(Peaks(1, 2.5e11, 4e10, 1e11, 1.23e10))
    assert found.text == (
        "int8 250, bf16 40, f32 100 billion multiply-adds/s, 12.3 GB/s read, on 1 thread"
    )
    assert found.values["int8"] == 2.5e11


@pytest.mark.parametrize(
    ("words", "status"),
    [((), OK), (("performance", "performance"), OK), (("powersave", "performance"), NOTE)],
)
def test_clock(tmp_path: Path, words: tuple[str, ...], status: str) -> None:
    for cpu, word in enumerate(words):
        folder = tmp_path / f"cpu{cpu}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(word + "\n")
        (folder / "scaling_driver").write_text("acpi-cpufreq\n")
    found = checks_cpu.governor_check(*checks_cpu.governors({0, 1}, tmp_path))
    assert found.status == status
    assert found.values["driver"] == ("acpi-cpufreq" if words else "")
    assert ("cpupower" in found.advice) == (status == NOTE)


def test_numa() -> None:
    zero, one = (Node(i, frozenset({2 * i, 2 * i + 1}), 64 * GIB) for i in (0, 1))
    memory = Node(2, frozenset(), 128 * GIB)
    assert checks_cpu.numa_check([], 1).text == "one node"
    assert checks_cpu.numa_check([zero, memory], 1).text == "one node (node 2: memory only)"
    found = checks_cpu.numa_check([zero, one, memory], 1)
    assert found.text == (
        "node 0: CPUs 0-1, 64.00 GiB; node 1: CPUs 2-3, 64.00 GiB; "
        "node 2: CPUs none, 128.00 GiB; numa_balancing is 1"
    )
    assert found.status == NOTE and "sysctl kernel.numa_balancing=0" in found.advice
    assert "sysctl" not in checks_cpu.numa_check([zero, one], 0).advice


MEMINFO = "MemTotal: 100 kB\nHugePages_Total:  {total}\nHugePages_Free: 3\nHugepagesize: 2048 kB\n"


@pytest.mark.parametrize(
    ("enabled", "total", "status", "text", "advice"),
    [
        ("always [madvise] never", 0, OK, "transparent huge pages: madvise; hugetlb pool: no", ""),
        ("always madvise [never]", 0, NOTE, "pages: never", "echo madvise >"),
        (None, 0, NOTE, "pages: none", "-thp has no effect"),
        ("[always] madvise never", 8, NOTE, "8 pages of 2.00 MiB, 3 of them free", "16.00 MiB"),
    ],
)
def test_pages(
    tmp_path: Path, enabled: str | None, total: int, status: str, text: str, advice: str
) -> None:
    if enabled:
        (tmp_path / "enabled").write_text(enabled + "\n")
    pages = checks_memory.huge_pages(tmp_path, MEMINFO.format(total=total), 4096)
    assert pages.pool_free == 3 and pages.pool_page_bytes == 2 << 20
    found = checks_memory.pages_check(pages)
    assert found.status == status
    assert found.text.startswith("4 KiB; ") and text in found.text and advice in found.advice
    assert isinstance(pages, HugePages)


@pytest.mark.parametrize(
    ("soft", "hard", "weights", "exempt", "status", "text"),
    [
        (None, None, 9 * GIB, False, OK, "no limit"),
        (8 << 20, 8 << 20, None, False, NOTE, "8.00 MiB: --mlock cannot hold most models"),
        (8 << 20, None, GIB, False, NOTE, "8.00 MiB: --mlock cannot hold the weights (1.00 GiB)"),
        (2 * GIB, None, GIB, False, OK, "2.00 GiB"),
        (0, 0, GIB, True, OK, "0.00 MiB, which does not bind this process (CAP_IPC_LOCK)"),
    ],
)
def test_memlock(
    soft: int | None, hard: int | None, weights: int | None, exempt: bool, status: str, text: str
) -> None:
    found = checks_memory.memlock_check(soft, hard, weights, exempt=exempt)
    assert (found.status, found.text) == (status, text)
    assert ("limits.conf" in found.advice) == (status == NOTE and hard is not None)


@pytest.mark.parametrize(
    ("mask", "may"), [("0000000000004000", True), ("00000000a80425fb", False), ("", False)]
)
def test_capability_to_lock(mask: str, may: bool) -> None:
    assert checks_memory.may_lock(f"CapPrm:\tffff\nCapEff:\t{mask}\n") == may


@pytest.mark.parametrize(
    ("numbers", "text", "advice"),
    [
        ((8, 6, None, 0, 0), "8.00 GiB, 6.00 GiB available; no container limit; no swap", ""),
        ((8, 6, 2**33, 0, 0), "no container limit", ""),
        ((8, 6, 7, 4, 0), "container leaves 7.00 GiB; swap 0.00 MiB of 4.00 GiB used", ""),
        ((8, 6, 2, 0, 0), "container leaves 2.00 GiB", "docker: --memory"),
        ((8, 6, None, 4, 1), "swap 1.00 GiB of 4.00 GiB used", "swapped out"),
    ],
)
def test_memory(numbers: tuple[int | None, ...], text: str, advice: str) -> None:
    found = checks_memory.memory_check(*[n and n * GIB for n in numbers])  # type: ignore[arg-type]
    assert text in found.text and advice in found.advice
    assert found.status == (NOTE if advice else OK)


def test_objects(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path / "objects")
    for key in ("aa" * 32, "bb" * 32):
        cache.put(key, b"code")
    (tmp_path / "objects" / "other.tmp").write_bytes(b"x")
    n_files, n_bytes = cache.size()
    assert (n_files, n_bytes) == (2, sum(f.stat().st_size for f in cache.folder.glob("*.obj")))
    found = checks_memory.cache_check(cache.folder, n_files, n_bytes, "")
    assert found.status == OK and found.text.startswith("2 compiled kernels, 0.00 MiB, in /")
    found = checks_memory.cache_check(cache.folder, 0, 0, "belongs to another user")
    assert found.status == NOTE and found.text.endswith(": belongs to another user")
    assert "MLACLI_CACHE_DIR" in checks_memory.cache_check(None, 0, 0, "").advice


@pytest.mark.parametrize(
    ("verdict", "status", "code"), [(FITS, OK, 0), (PAGES, NOTE, 0), (TOO_LARGE, PROBLEM, 5)]
)
def test_fit(verdict: str, status: str, code: int) -> None:
    found = checks_memory.fit_check(MemoryFacts(GIB, 2 * GIB, 3 * GIB, verdict), 4096)
    assert (found.status, found.exit_code) == (status, code)
    assert found.text.startswith(f"{verdict}: 1.00 GiB needed for -c 4096, 2.00 GiB of weights")


MOUNTS = r"""22 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw
30 22 0:40 / /mnt/my\040models rw - nfs4 server:/models rw
31 22 0:41 / /home/u/remote rw - fuse.sshfs u@h:/ rw
32 22 254:0 / /data rw - xfs /dev/vda rw
broken line
"""


@pytest.mark.parametrize(
    ("path", "disk", "status"),
    [
        ("/models/a.gguf", Disk("/", "ext4", "/dev/sda2", True), NOTE),
        ("/mnt/my models/a.gguf", Disk("/mnt/my models", "nfs4", "server:/models", None), NOTE),
        ("/home/u/remote/a", Disk("/home/u/remote", "fuse.sshfs", "u@h:/", None), NOTE),
        ("/data/a.gguf", Disk("/data", "xfs", "/dev/vda", None), OK),
    ],
)
def test_disks(tmp_path: Path, path: str, disk: Disk, status: str) -> None:
    queue = tmp_path / "8:2" / "queue"  # a partition: its disk is the folder above
    queue.mkdir(parents=True)
    (queue / "rotational").write_text("1\n")
    device = os.makedev(8, 2) if disk.mount == "/" else os.makedev(0, 40)
    found = checks_memory.disk_of(Path(path), MOUNTS, device, tmp_path)
    assert found == disk
    assert checks_memory.disk_check(found).status == status


def test_a_disk_that_is_not_known(tmp_path: Path) -> None:
    assert checks_memory.disk_of(Path("/x"), "", 0, tmp_path) is None
    assert checks_memory.disk_check(None).text == "not known"


def test_page_cache(tmp_path: Path) -> None:
    assert "only the file's owner" in checks_memory.page_cache_check(None, 5).text
    half = checks_memory.page_cache_check(0.5, GIB)
    assert half.text == "50 % of the file's 1.00 GiB are in memory" and half.advice
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    block = np.memmap(path, np.uint8, "r")
    assert resident_share(block) == 1.0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    share = resident_share(np.memmap(path, np.uint8, "r"))
    assert share is not None and 0.0 <= share <= 1.0


def test_lines() -> None:
    lines = lines_of(Finding("clock", "too " * 30 + "slow", NOTE, "do something: " * 10))
    assert lines[0].startswith("note     clock       too too")
    assert all(len(line) <= 100 for line in lines)
    assert next(line[21:24] for line in lines if "do some" in line) == "-> "
    assert " ".join(" ".join(lines).split()).count("too") == 30


def test_the_first_problem_is_the_exit_code() -> None:
    note, bad = Finding("a", "x", NOTE), Finding("b", "x", PROBLEM, exit_code=3)
    assert exit_code_of([note, bad, Finding("c", "x", PROBLEM, exit_code=5)]) == 3
    assert exit_code_of([note]) == 0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks as they might be: measuring them takes seconds."""
    peaks = Peaks(2, 3e11, 8e10, 7e10, 1e10)
    monkeypatch.setattr("mlacli.doctor.measure_peaks", lambda jit, pool, n: peaks)


def test_the_command(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-m", str(default_model())]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "ok       fit         fits: " in text
    assert main(["doctor", "--json", "-m", str(default_model())]) == 0
    records = json.loads(capsys.readouterr().out)
    titles = [record["check"] for record in records]
    assert titles == [
        *("CPU", "target", "threads", "peaks", "clock", "NUMA", "memory", "pages", "memlock"),
        *("objects", "versions", "disk", "page cache", "fit"),
    ]
    assert all(f" {title} " in text for title in titles)
    assert {record["status"] for record in records} <= {OK, NOTE}
    assert records[3]["values"]["bandwidth"] == 1e10


def test_what_keeps_it_from_running(
    quick: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    assert main(["doctor", "-m", str(tmp_path / "none.gguf")]) == 3
    text = capsys.readouterr().out
    assert text.count("problem") == 1 and "none.gguf" in text.replace("\n", "")
    monkeypatch.setenv("MLACLI_TARGET", "sparc")
    assert main(["doctor"]) == 2
    text = capsys.readouterr().out
    assert text.count("problem  target") == 1 and "peaks" not in text


def test_the_peaks_of_this_machine_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    from mlacli import doctor, machine

    small = partial(machine.measure_peaks, read_bytes=1 << 20)
    monkeypatch.setattr(machine, "_ROUNDS", 1000)
    monkeypatch.setattr(doctor, "measure_peaks", small)
    [found] = doctor._peaks()
    values = found.values
    assert min(values[name] for name in ("int8", "bf16", "f32", "bandwidth")) > 1e6


def test_marks_are_coloured_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlacli.cli import console

    assert console.marked("ok", OK) == "ok"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert console.marked("problem", PROBLEM) == "\x1b[1;31mproblem\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.marked("problem", PROBLEM) == "problem"
