"""Models from the Hugging Face hub, through huggingface_hub (the extra `hub`) and its cache.

`user/repo:quant` names a file as llama.cpp does: the one whose name has that quantisation, by
default Q4_K_M, else the first; of a split model every part. huggingface_hub resumes what was
interrupted and reads HF_TOKEN, HF_HOME and HF_ENDPOINT.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlacli.errors import ModelError, UsageError
from mlacli.limits import Text, check_fields, ruled

DEFAULT_QUANT = "Q4_K_M"
Note = Callable[[str], None]
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_MAX_PARTS = 1024


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as flags name it. Raises UsageError."""

    hf_repo: str = field(metadata=ruled(Text("-hf", 3, 200)))  # user/repo or user/repo:quant
    hf_file: str | None = field(default=None, metadata=ruled(Text("-hff", 1, 500)))
    hf_token: str | None = field(default=None, metadata=ruled(Text("-hft", 1, 500)))
    offline: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", self.hf_repo, re.ASCII):
            raise UsageError(f"-hf: {self.hf_repo!r} is not of the form user/repo[:quant]")
        if ":" in self.hf_repo and self.hf_file:
            raise UsageError(f"-hff: {self.hf_file!r} and the quantisation in -hf: give one")

    @property
    def repo(self) -> str:
        return self.hf_repo.partition(":")[0]

    @property
    def quant(self) -> str:
        """What stands behind the colon."""
        return self.hf_repo.partition(":")[2]


def fetch(wanted: HubFile, note: Note, *, bars: bool = False) -> Path:
    """The path of a model in the hub's cache, downloaded if it is not there yet.

    `bars`: show progress on stderr. When the hub cannot be reached, what the cache has is used.
    Raises UsageError without huggingface_hub, ModelError naming what the hub says.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, logging
    except ModuleNotFoundError:
        raise UsageError("-hf: needs huggingface_hub: pip install 'mlacli[hub]'") from None
    logging.set_verbosity_error()
    (enable_progress_bars if bars else disable_progress_bars)()
    with _explained(wanted):
        sizes, offline = _listing(wanted, note)
        chosen = choose(wanted, list(sizes))
        total = sum(sizes[name] or 0 for name in chosen)
        if not offline:
            size = f" ({total / 2**30:.2f} GiB)" if total else ""
            note(f"hub: {wanted.repo}: {chosen[0]}{size}")
        paths = [
            hf_hub_download(wanted.repo, name, token=wanted.hf_token, local_files_only=offline)
            for name in chosen
        ]
    return Path(paths[0])


def choose(wanted: HubFile, names: Sequence[str]) -> list[str]:
    """The files to fetch, the first part of a split model first. Raises ModelError."""
    files = sorted(n for n in names if n.endswith(".gguf") and "mmproj" not in n.lower())
    if wanted.hf_file:
        if wanted.hf_file not in names:
            raise _problem(wanted, f"has no file {wanted.hf_file!r}{_listed(files)}")
        first = wanted.hf_file
    elif not files:
        raise _problem(wanted, "has no GGUF file")
    else:
        first = _of_quant(files, wanted.quant or DEFAULT_QUANT) or (
            "" if wanted.quant else files[0]
        )
        if not first:
            raise _problem(wanted, f"has no file of quantisation {wanted.quant!r}{_listed(files)}")
    return _parts(wanted, first, names)


def _of_quant(files: Sequence[str], quant: str) -> str:
    """The first file whose name has this quantisation as a whole word, if any."""
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
    return next((name for name in files if word.search(name)), "")


def _parts(wanted: HubFile, first: str, names: Sequence[str]) -> list[str]:
    split = _PART.search(first)
    if not split:
        return [first]
    n = int(split[2])
    if not 1 <= n <= _MAX_PARTS:
        raise _problem(wanted, f"{first}: {n} parts are out of range (1 to {_MAX_PARTS})")
    stem = first[: split.start()]
    parts = [f"{stem}-{i:05d}-of-{n:05d}.gguf" for i in range(1, n + 1)]
    missing = [part for part in parts if part not in names]
    if missing:
        raise _problem(wanted, f"lacks a part of the model: {missing[0]}")
    return parts


def _listing(wanted: HubFile, note: Note) -> tuple[Mapping[str, int | None], bool]:
    """(bytes by file name, whether only the cache is to be used)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if wanted.offline:
        return dict.fromkeys(_cached(wanted)), True
    try:
        info = HfApi().model_info(
            wanted.repo, files_metadata=True, token=wanted.hf_token, timeout=20
        )
        return {file.rfilename: file.size for file in info.siblings or ()}, False
    except (HTTPError, OfflineModeIsEnabled) as problem:
        if isinstance(problem, HfHubHTTPError):  # the hub has answered
            raise
        names = _cached(wanted)
        note(f"note: -hf: the hub cannot be reached ({_line(problem)}): the cache is used")
        return dict.fromkeys(names), True


def _cached(wanted: HubFile) -> list[str]:
    """The names of a repository's files in the cache. Raises LocalEntryNotFoundError."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=wanted.repo, repo_type="model")
    commit = folder / "refs" / "main"
    if not commit.is_file():
        raise LocalEntryNotFoundError("the cache has nothing of it")
    snapshot = folder / "snapshots" / commit.read_text(errors="replace").strip()
    return [f.relative_to(snapshot).as_posix() for f in snapshot.rglob("*.gguf") if f.is_file()]


@contextmanager
def _explained(wanted: HubFile) -> Iterator[None]:
    """Turns what huggingface_hub raises into ModelError; a full disk stays what it is."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as problem:
        text = "access must be asked for on the hub, and a token given (-hft or HF_TOKEN)"
        raise _problem(wanted, text) from problem
    except errors.RepositoryNotFoundError as problem:
        text = "no such repository, or it is private and no valid token was given"
        raise _problem(wanted, text) from problem
    except errors.LocalEntryNotFoundError as problem:
        text = "it is not in the cache" + (
            "" if wanted.offline else ", and the hub cannot be reached"
        )
        raise _problem(wanted, text) from problem
    except (errors.HTTPError, errors.EntryNotFoundError, errors.HFValidationError) as problem:
        raise _problem(wanted, _line(problem)) from problem
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise _problem(wanted, _line(problem)) from problem


def _line(problem: Exception) -> str:
    """The first line of what an exception says."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


def _listed(files: Sequence[str]) -> str:
    shown = ", ".join(files[:6])
    return f" (there are {shown}{', ...' if len(files) > 6 else ''})" if files else ""


def _problem(wanted: HubFile, text: str) -> ModelError:
    return ModelError(f"-hf {wanted.hf_repo}: {text}")
