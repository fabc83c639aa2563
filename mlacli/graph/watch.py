"""Watching a step: who wants to see values between its launches, and what the step is about."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mlacli.graph.node import Dim, Node


@dataclass(frozen=True)
class Step:
    """What one step evaluates, and on which graph; `cells` are the cache rows of its tokens."""

    graph: str
    tokens: Sequence[int]
    positions: Sequence[int]
    cells: npt.NDArray[np.int32]
    sizes: Mapping[Dim, int]


class Watcher(Protocol):
    """Sees values between the launches of a step."""

    def begin(self, step: Step) -> Collection[Node]:
        """The nodes to be seen in this step."""

    def see(self, node: Node, address: int) -> None:
        """A node was just computed; its memory is at `address`."""
