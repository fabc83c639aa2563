"""Fixtures that every test folder shares."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import pytest

# The oracle's matrices are small: numpy's threads only wait for one another (5 times slower).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from scripts.make_model import make_model

# Tests, and the processes that they start, know nothing of what a developer has set for himself.
for _name in [name for name in os.environ if name.startswith(("MLACLI_", "LLAMA_ARG_"))]:
    if _name not in ("MLACLI_TARGET", "MLACLI_CACHE_DIR"):
        del os.environ[_name]
os.environ["MLACLI_CONFIG"] = ""


class TinyModel(Protocol):
    """`tiny_model(preset, type, kv_b, sparse=..., **geometry)` -> path; made once per session."""

    def __call__(
        self,
        preset: str = "tiny-v3",
        type: str = "F32",
        kv_b: str = "joint",
        *,
        sparse: bool = False,
        **geometry: float | bool,
    ) -> Path: ...


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Random-weight GGUF files (scripts/make_model.py); treat them as read-only."""
    folder = tmp_path_factory.mktemp("models")

    def make(
        preset: str = "tiny-v3",
        type: str = "F32",
        kv_b: str = "joint",
        *,
        sparse: bool = False,
        **geometry: float | bool,
    ) -> Path:
        changes = "".join(f"-{key}={value}" for key, value in sorted(geometry.items()))
        path = folder / f"{preset}-{type}-{kv_b}{'-sparse' * sparse}{changes}.gguf"
        if not path.exists():
            make_model(path, preset=preset, type=type, kv_b=kv_b, overrides=geometry, sparse=sparse)
        return path

    return make
