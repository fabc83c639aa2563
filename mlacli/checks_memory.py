"""The doctor's checks of memory, the object cache and a model file: functions of plain values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlacli.errors import EXIT_SPACE
from mlacli.files import system_text
from mlacli.findings import NOTE, OK, PROBLEM, Finding
from mlacli.fit import size_text
from mlacli.report import FITS, TOO_LARGE, MemoryFacts

_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "afs")
_NETWORK_FUSE = (
    "sshfs",
    "s3fs",
    "gcsfuse",
    "rclone",
    "goofys",
    "blobfuse",
    "glusterfs",
    "mount-s3",
)
_KIB = 1024
_CAP_IPC_LOCK = 14
_VIRTUAL_DISKS = ("/dev/vd", "/dev/xvd")  # they say that they turn unless told otherwise


@dataclass(frozen=True)
class HugePages:
    """`setting` of transparent huge pages ("" where there are none); the pool of fixed ones."""

    page_bytes: int
    setting: str
    pool_pages: int
    pool_free: int
    pool_page_bytes: int


def huge_pages(sysfs: Path, meminfo: str, page_bytes: int) -> HugePages:
    """`sysfs` is /sys/kernel/mm/transparent_hugepage, `meminfo` the text of /proc/meminfo."""
    chosen = re.search(r"\[(\w+)\]", system_text(sysfs / "enabled"))
    numbers = dict(re.findall(r"^(\w+):\s+(\d+)", meminfo, re.MULTILINE))
    return HugePages(
        page_bytes,
        chosen[1] if chosen else "",
        int(numbers.get("HugePages_Total", 0)),
        int(numbers.get("HugePages_Free", 0)),
        _KIB * int(numbers.get("Hugepagesize", 0)),
    )


def pages_check(pages: HugePages) -> Finding:
    """Page size, transparent huge pages, hugetlb pool."""
    text = f"{pages.page_bytes // _KIB} KiB; transparent huge pages: {pages.setting or 'none'}; "
    text += f"hugetlb pool: {pages.pool_pages or 'no'} pages"
    if pages.pool_pages:
        text += f" of {size_text(pages.pool_page_bytes)}, {pages.pool_free} of them free"
    status, advice = OK, []
    if pages.setting in ("", "never"):
        status = NOTE
        advice.append("-thp has no effect")
    if pages.setting == "never":
        advice.append(
            "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, "
            "then compare bench -thp 0,1"
        )
    if pages.pool_pages:
        status = NOTE
        held = size_text(pages.pool_pages * pages.pool_page_bytes)
        advice.append(f"mlacli does not use the pool: its {held} are lost to it")
    return Finding("pages", text, status, "; ".join(advice), vars(pages))


def may_lock(status: str) -> bool:
    """Whether a process has CAP_IPC_LOCK, to which the limit does not apply; from the text of
    /proc/self/status."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> _CAP_IPC_LOCK & 1)


def memlock_check(
    soft: int | None, hard: int | None, weights: int | None, *, exempt: bool = False
) -> Finding:
    """RLIMIT_MEMLOCK in bytes (None: no limit) against the size of the weights, if known."""
    limit = "no limit" if soft is None else size_text(soft)
    values = {"soft_bytes": soft, "hard_bytes": hard, "weight_bytes": weights, "exempt": exempt}
    if exempt and soft is not None:
        limit += ", which does not bind this process (CAP_IPC_LOCK)"
    if exempt or soft is None or (weights is not None and weights <= soft):
        return Finding("memlock", limit, values=values)
    need = f"the weights ({size_text(weights)})" if weights else "most models"
    raised = "ulimit -l unlimited" if hard is None else "memlock in /etc/security/limits.conf"
    return Finding(
        "memlock",
        f"{limit}: --mlock cannot hold {need}",
        NOTE,
        f"only if you want --mlock: {raised} (docker: --ulimit memlock=-1)",
        values,
    )


def memory_check(
    total: int, available: int, container: int | None, swap: int, used: int
) -> Finding:
    """Bytes of memory, what is free for us, what the container leaves, and swap.

    A container's limit above the machine's memory is none (cgroups v1 write it as 2^63).
    """
    container = None if container is None or container >= total else container
    values = {
        "total_bytes": total,
        "available_bytes": available,
        "container_bytes": container,
        "swap_bytes": swap,
        "swap_used_bytes": used,
    }
    text = f"{size_text(total)}, {size_text(available)} available; "
    text += (
        "no container limit; "
        if container is None
        else f"container leaves {size_text(container)}; "
    )
    text += f"swap {size_text(used)} of {size_text(swap)} used" if swap else "no swap"
    advice = ""
    if container is not None and container < available:
        advice = "the container's limit counts, not the machine's memory (docker: --memory)"
    elif swap and 10 * used > swap:
        advice = "something was swapped out: close what takes memory, or weights may follow"
    return Finding("memory", text, NOTE if advice else OK, advice, values)


def cache_check(folder: Path | None, n_files: int, n_bytes: int, problem: str) -> Finding:
    """The object cache; `problem` says why it cannot be used."""
    values = {"folder": str(folder) if folder else None, "files": n_files, "bytes": n_bytes}
    title = "objects"
    if folder is None:
        return Finding(
            title,
            "no folder for compiled kernels: no home folder, or MLACLI_CACHE_DIR is not absolute",
            NOTE,
            "set MLACLI_CACHE_DIR to an absolute path: else every start compiles anew",
            values,
        )
    text = f"{n_files} compiled kernels, {size_text(n_bytes)}, in {folder}"
    if problem:
        return Finding(
            title,
            f"{text}: {problem}",
            NOTE,
            "set MLACLI_CACHE_DIR to a folder of your own: else every start compiles anew",
            values,
        )
    return Finding(title, f"{text} (rm -r it to clear: it is filled again)", values=values)


def versions_check(versions: Mapping[str, str]) -> Finding:
    """Of mlacli, Python, llvmlite with its LLVM, numpy."""
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding("versions", text, values=versions)


# -- with a model -------------------------------------------------------------------------------


def fit_check(memory: MemoryFacts, n_ctx: int) -> Finding:
    """Whether the model runs in this memory, as `mlacli report` says."""
    needed, weights = size_text(memory.needed_bytes), size_text(memory.weight_bytes)
    text = f"{memory.verdict}: {needed} needed for -c {n_ctx}, {weights} of weights, "
    text += f"{size_text(memory.available_bytes)} available"
    values = {**vars(memory), "n_ctx": n_ctx}
    if memory.verdict == FITS:
        return Finding("fit", text, values=values)
    if memory.verdict == TOO_LARGE:
        advice = "a smaller -c, -ctk q8_KV, or a smaller -ub takes less: see mlacli report"
        return Finding("fit", text, PROBLEM, advice, values, exit_code=EXIT_SPACE)
    advice = "it runs at the disk's speed: a smaller quantisation of the model would fit"
    return Finding("fit", text, NOTE, advice, values)


@dataclass(frozen=True)
class Disk:
    """Where a file lies; `rotational` is None where that is not known."""

    mount: str
    kind: str
    source: str
    rotational: bool | None


def disk_of(path: Path, mountinfo: str, device: int, blocks: Path) -> Disk | None:
    """From the text of /proc/self/mountinfo, the file's st_dev and /sys/dev/block; None when the
    system does not tell."""
    found = None
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if len(fields) < 5 or len(kinds) < 2:
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
        deeper = found is None or len(mount) >= len(found[0])
        if deeper and path.is_relative_to(mount):
            found = mount, kinds[0], kinds[1]
    if found is None:
        return None
    name = f"{os.major(device)}:{os.minor(device)}"
    words = [system_text(blocks / name / up / "queue/rotational") for up in (".", "..")]
    virtual = found[2].startswith(_VIRTUAL_DISKS)
    spins = "" if virtual else next((word for word in words if word), "")
    return Disk(*found, rotational={"0": False, "1": True}.get(spins))


def disk_check(disk: Disk | None) -> Finding:
    """A network file system or a disk that turns."""
    if disk is None:
        return Finding("disk", "not known")
    text, values = f"{disk.kind} on {disk.source}, mounted at {disk.mount}", vars(disk)
    kind, _, inner = disk.kind.partition(".")
    network = kind in _NETWORK or (kind == "fuse" and inner in _NETWORK_FUSE)
    if network:
        advice = "copy the model to a local disk, or read it once with --no-mmap"
        return Finding("disk", f"{text}: a network file system", NOTE, advice, values)
    if disk.rotational:
        advice = "the first run reads as slowly as the disk turns: an SSD is far faster"
        return Finding("disk", f"{text}: a disk that turns", NOTE, advice, values)
    return Finding("disk", text, values=values)


def page_cache_check(share: float | None, size: int) -> Finding:
    """How much of the file is in memory already; None: the system does not tell."""
    values = {"resident_share": share, "file_bytes": size}
    if share is None:
        return Finding("page cache", "not known: only the file's owner is told", values=values)
    text = f"{100 * share:.0f} % of the file's {size_text(size)} are in memory"
    advice = "" if share > 0.99 else "the first run reads the rest from disk"
    return Finding("page cache", text, OK, advice, values)
