"""What a container leaves to its processes, read from made-up cgroup folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlacli import free_memory
from mlacli.free_memory import available_bytes, container_bytes


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def membership(tmp_path: Path, line: str) -> Path:
    path = tmp_path / "cgroup"
    path.write_text(line + "\n")
    return path


def test_version_2_counts_page_cache_as_free(tmp_path: Path) -> None:
    stat = "anon 500\nactive_file 100\ninactive_file 50\nshmem 7"
    group(tmp_path / "m/a", memory__max=1000, memory__current=600, memory__stat=stat)
    assert container_bytes(membership(tmp_path, "0::/a"), tmp_path / "m") == 1000 - 450


def test_the_tightest_ancestor_counts(tmp_path: Path) -> None:
    group(tmp_path / "m/a/b", memory__max="max", memory__current=5, memory__stat="")
    group(tmp_path / "m/a", memory__max=300, memory__current=100, memory__stat="")
    group(tmp_path / "m", memory__max=1000, memory__current=900, memory__stat="")
    assert container_bytes(membership(tmp_path, "0::/a/b"), tmp_path / "m") == 100


def test_version_1(tmp_path: Path) -> None:
    stat = "inactive_file 1\ntotal_active_file 30\ntotal_inactive_file 20"
    group(
        tmp_path / "m/memory/a",
        memory__limit_in_bytes=1000,
        memory__usage_in_bytes=400,
        memory__stat=stat,
    )
    other = {"memory__limit_in_bytes": 10, "memory__usage_in_bytes": 0}
    group(tmp_path / "m/memory/x", **other)  # not this process's: /x is its cpu group
    found = container_bytes(membership(tmp_path, "3:cpu:/x\n4:hugetlb,memory:/a"), tmp_path / "m")
    assert found == 1000 - 350


def test_nothing_is_left_of_an_overdrawn_group(tmp_path: Path) -> None:
    group(tmp_path / "m", memory__max=100, memory__current=170, memory__stat="")
    assert container_bytes(membership(tmp_path, "0::/"), tmp_path / "m") == 0


@pytest.mark.parametrize("line", ["0::/a", "4:memory:/a", "1:cpu:/a", "0::/../.."])
def test_no_limit(tmp_path: Path, line: str) -> None:
    group(tmp_path / "m/a", memory__max="max", memory__current=600)
    assert container_bytes(membership(tmp_path, line), tmp_path / "m") is None


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert container_bytes(tmp_path / "nothing", tmp_path / "m") is None


def test_a_limit_only_lowers_what_the_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "container_bytes", lambda *_: None)
    free = available_bytes()
    assert free > 2**20
    monkeypatch.setattr(free_memory, "container_bytes", lambda *_: 12345)
    assert available_bytes() == 12345
    monkeypatch.setattr(free_memory, "container_bytes", lambda *_: 2**62)
    assert available_bytes() < 2**62
