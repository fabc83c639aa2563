"""Environment variables, and where the cache goes when the surroundings are odd."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlacli.debug import ENV


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLACLI_TARGET", "MLACLI_CACHE_DIR", "MLACLI_DEBUG", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_nothing_set() -> None:
    assert ENV.target is None and not ENV.debug


def test_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLACLI_TARGET", "avx2")
    monkeypatch.setenv("MLACLI_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MLACLI_DEBUG", "1")
    assert (ENV.target, ENV.cache_dir, ENV.debug) == ("avx2", tmp_path, True)


@pytest.mark.parametrize("off", ["", "0"])
def test_off(monkeypatch: pytest.MonkeyPatch, off: str) -> None:
    monkeypatch.setenv("MLACLI_DEBUG", off)
    assert not ENV.debug


def test_relative_folder_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLACLI_CACHE_DIR", "cache")
    assert ENV.cache_dir is None


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ENV.cache_dir == tmp_path / "mlacli"


@pytest.mark.parametrize("home", ["", "relative", "/caf\udce9"])
def test_odd_cache_home_gives_an_absolute_folder_or_none(
    monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.delenv("HOME", raising=False)
    folder = ENV.cache_dir
    assert folder is None or folder.is_absolute()


def test_nothing_can_be_set() -> None:
    with pytest.raises(AttributeError):
        ENV.target = "avx2"  # type: ignore[misc]
