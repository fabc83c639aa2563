"""How things that outlive a step lie in memory, in plain numbers: what graph nodes carry."""

from __future__ import annotations

from dataclasses import dataclass

from codegen.formats import BlockFormat


@dataclass(frozen=True)
class Matrix:
    """`n_mats` matrices of (n_rows, n_cols), `pitch` bytes apart, `offset` bytes into a tensor.

    `derived` matrices are made at load and lie in anonymous memory; `source` is what one with
    interleaved rows (-rtr) is made from.
    """

    tensor: str
    fmt: BlockFormat
    n_cols: int
    n_rows: int
    n_mats: int = 1
    offset: int = 0
    pitch: int = 0
    derived: bool = False
    source: Matrix | None = None

    @property
    def name(self) -> str:
        if self.source:
            return self.source.name
        return f"{self.tensor}+{self.offset}" if self.offset else self.tensor

    @property
    def nbytes(self) -> int:
        return self.n_mats * self.n_rows * self.fmt.row_bytes(self.n_cols)

    @property
    def is_copy(self) -> bool:
        """Whether all its values are in the file as well."""
        return self.source is not None and not self.source.derived


@dataclass(frozen=True)
class Heads:
    """Attention's sizes and storage; `scale` multiplies K*Q."""

    n_head: int
    n_nope: int
    n_rope: int
    n_v: int
    n_lora: int
    scale: float
    fmt_k: BlockFormat
    fmt_v: BlockFormat

    @property
    def q_width(self) -> int:
        """One head's query and key: nope + rope."""
        return self.n_nope + self.n_rope

    @property
    def c_width(self) -> int:
        """A cached row c: latent values and the RoPE'd key part."""
        return self.n_lora + self.n_rope
