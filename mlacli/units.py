"""Numbers as people read them."""

from __future__ import annotations

MIB = 2**20
GIB = 1024 * MIB


def size_text(n: int) -> str:
    """MiB below one GiB, else GiB."""
    return f"{n / GIB:.2f} GiB" if n >= GIB else f"{n / MIB:.2f} MiB"


def count_text(n: int) -> str:
    """Billions or millions, as llama-bench writes parameters."""
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"
