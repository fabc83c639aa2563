"""mlacli: run DeepSeek-style MLA language models (GGUF files) on CPUs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlacli.api import Answer, Model, Stream, load
    from mlacli.engine import Cancelled
    from mlacli.graph.lower import Lowering

__version__ = "0.1.0"
__all__ = ["Answer", "Cancelled", "Lowering", "Model", "Stream", "__version__", "load"]

# name: the module that has it; they need numpy and LLVM, which `mlacli --help` does not wait for
_LAZY = {
    "Answer": "mlacli.api",
    "Cancelled": "mlacli.engine",
    "Lowering": "mlacli.graph.lower",
    "Model": "mlacli.api",
    "Stream": "mlacli.api",
    "load": "mlacli.api",
}


if not TYPE_CHECKING:  # a type checker would take any name for one of the module's

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
