"""Ranges and per-layer arrays of the metadata under one architecture's prefix."""

from __future__ import annotations

from collections.abc import Iterable

from mlacli.errors import ModelError
from mlacli.gguf.metadata import Metadata
from mlacli.gguf.problem import model_error


class Keys:
    """The metadata under `<arch>.`, each value with its range."""

    def __init__(self, metadata: Metadata, arch: str) -> None:
        self.metadata = metadata
        self.prefix = arch + "."

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def fail(self, key: str, problem: str, got: object = None, limit: object = None) -> ModelError:
        return model_error(self.metadata.path, self.prefix + key, problem, got=got, limit=limit)

    def integer(
        self,
        key: str,
        low: int,
        high: int,
        default: int | None = None,
        layers: Iterable[int] = (),
    ) -> int:
        """One value; a per-layer array is taken when it says the same for all `layers`."""
        full = self.prefix + key
        if not self.metadata.is_array(full):
            return self.metadata.integer(full, default, low=low, high=high)
        numbers = self.metadata.numbers(full)
        wanted = list(layers)
        if not wanted or wanted[-1] >= numbers.size:
            raise self.fail(key, "unexpected per-layer array", f"{numbers.size} values")
        chosen = sorted({int(numbers[i]) for i in wanted})
        if len(chosen) > 1:
            raise self.fail(key, "layers that differ in it are not supported", chosen)
        if not low <= chosen[0] <= high:
            raise self.fail(key, "out of range", chosen[0], f"{low}..{high}")
        return chosen[0]

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A float within low..high."""
        value = self.metadata.number(self.prefix + key, default)
        if not low <= value <= high:  # true for NaN, too
            raise self.fail(key, "out of range", f"{value:g}", f"{low:g}..{high:g}")
        return value
