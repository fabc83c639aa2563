"""-rtr: quantised weights are copied once, their rows interleaved as the kernels like to read them.

All copies of a context lie in one anonymous block. What the file holds is read once, front to back
per matrix, by all threads of the pool; matrices made at load (k_b) are made and interleaved one at
a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from codegen.call import Call
from codegen.kernels.blocks import BLOCK
from codegen.kernels.repacked import interleave_rows
from mlacli.graph.matrix import Matrix
from mlacli.memory import Block, allocate
from mlacli.model.weights import Weights
from mlacli.progress import Progress

if TYPE_CHECKING:
    from codegen.jit import Jit
    from codegen.pool import Pool

LINE = 64


def repack(
    weights: Weights,
    matrices: Sequence[Matrix],
    jit: Jit,
    pool: Pool,
    *,
    huge: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Make the interleaved ones of these matrices, but for those that there are already.

    False when the pool was cancelled meanwhile: what is missing can be made by another call. Raises
    SpaceError. `huge` asks for huge pages; `progress` is told bytes.
    """
    wanted = [m for m in matrices if m.source and not weights.has_made(m)]
    total = sum(m.nbytes for m in wanted)
    if not wanted:
        return True
    block = allocate(sum(map(_room, wanted)), "-rtr: the copy of the weights", huge=huge)
    at = done = 0
    for matrix in wanted:
        place = block[at : at + matrix.nbytes]
        if not _interleave(weights, matrix, place, jit, pool):
            return False
        weights.keep(matrix, place)
        at, done = at + _room(matrix), done + matrix.nbytes
        if progress:
            progress(done, total)
    return True


def _room(matrix: Matrix) -> int:
    """Its bytes, on cache-line boundaries."""
    return -(-matrix.nbytes // LINE) * LINE


def _interleave(weights: Weights, matrix: Matrix, place: Block, jit: Jit, pool: Pool) -> bool:
    source = matrix.source
    assert source is not None
    per_matrix = matrix.n_rows // matrix.fmt.interleaved
    sizes = (matrix.n_mats * per_matrix, matrix.n_cols // BLOCK, per_matrix, source.pitch)
    spec = interleave_rows(fmt=matrix.fmt)
    return Call(jit, spec, [place, weights.data(source), *sizes]).run(pool, pool.n_threads)
