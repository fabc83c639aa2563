"""The weights as the graph sees them: matrices inside the mapped file, and the few derived ones.

The only place that changes weights. k_b (for the absorbed path), its counterpart w_uk (for the
expanded one) and v_b come from whichever of attn_kv_b, attn_k_b, attn_v_b the file has:

    kv_b[h] = [w_uk[h]; v_b[h]]          rows along the latent, (nope + v, kv_lora)
    k_b[h]  = w_uk[h]^T                  rows along nope,       (kv_lora, nope)

v_b is always a view. k_b is derived from kv_b, or w_uk from k_b, when a mode needs the one that
the file lacks: as Q8_0 when its source is quantised, else in the source's type (DESIGN section 2).
w_uk and v_b read the same rows, so w_uk takes after v_b: it is Q8_0 beside a v_b that meets 8-bit
activations, and a float beside one that meets f32: k_b's type, F16 if that is quantised (beside a
K-quant v_b it always is: k_b's rows are too short for K-quants).

With -rtr the matrices that have an integer dot are copied with their rows interleaved
(model/repack.py), those made at load as well.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from codegen.formats import BY_GGML_TYPE, F16, Q8_0, BlockFormat, interleave
from mlacli.gguf.problem import model_error
from mlacli.gguf.quants import dequantise, quantise
from mlacli.gguf.reader import GGUFFile
from mlacli.graph.matrix import Matrix
from mlacli.memory import Block
from mlacli.model.config import ModelConfig

EMBEDDING = "token_embd.weight"


class Weights:
    """The tensors of one open file. Raises ModelError for a type that kernels cannot read."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.file, self.config = file, config
        self._derived: dict[Matrix, Block] = {}

    def has(self, name: str) -> bool:
        return name in self.file.tensors

    def matrix(self, name: str) -> Matrix:
        """A whole tensor: 2-D, or 3-D as stacked matrices; a vector has one row."""
        shape = self.file.tensors[name].shape
        n_cols, n_rows = shape[0], shape[1] if len(shape) > 1 else 1
        n_mats = shape[2] if len(shape) > 2 else 1
        fmt = self._format(name)
        if n_cols % 32 and len(shape) > 1:
            problem = "rows must be a multiple of 32 values long"
            raise model_error(self.file.path, name, problem, got=n_cols, limit="32 n")
        pitch = n_rows * fmt.row_bytes(n_cols) if n_mats > 1 else 0
        return Matrix(name, fmt, n_cols, n_rows, n_mats, pitch=pitch)

    def gate_and_up(self, gate: str, up: str) -> tuple[Matrix, Matrix]:
        """Two matrices that read the same rows. Raises ModelError when one of them meets 8-bit
        activations and the other f32 ones; no quantiser makes such a pair by its own rules."""
        first, second = self.matrix(gate), self.matrix(up)
        if first.fmt.integer_dot != second.fmt.integer_dot:
            problem = f"its type does not go together with {second.fmt.name} of {up}"
            raise model_error(self.file.path, gate, problem, got=first.fmt.name)
        return first, second

    def _format(self, name: str) -> BlockFormat:
        tensor = self.file.tensors[name]
        fmt = BY_GGML_TYPE.get(tensor.ggml_type)
        if fmt is None:
            known = ", ".join(f.name for f in BY_GGML_TYPE.values())
            problem = "this tensor type is not supported"
            raise model_error(self.file.path, name, problem, got=tensor.type_name, limit=known)
        return fmt

    def k_b(self, layer: int) -> Matrix:
        """W_UK^T per head, (kv_lora, nope): q_latent = k_b q_nope."""
        c, name = self.config, f"blk.{layer}.attn_k_b.weight"
        derived = not self.has(name)
        fmt = self._format(f"blk.{layer}.attn_kv_b.weight" if derived else name)
        if derived and fmt.is_quantised:
            fmt = Q8_0
        pitch = c.kv_lora_rank * fmt.row_bytes(c.n_nope)
        return Matrix(name, fmt, c.n_nope, c.kv_lora_rank, c.n_head, pitch=pitch, derived=derived)

    def w_uk(self, layer: int) -> Matrix:
        """W_UK per head, (nope, kv_lora): k_nope = w_uk c_kv."""
        c, joint = self.config, f"blk.{layer}.attn_kv_b.weight"
        if self.has(joint):
            return self._part_of_joint(joint, 0, c.n_nope)
        fmt = self._format(f"blk.{layer}.attn_k_b.weight")
        if self._format(f"blk.{layer}.attn_v_b.weight").integer_dot:
            fmt = Q8_0
        elif fmt.is_quantised:
            fmt = F16
        pitch = c.n_nope * fmt.row_bytes(c.kv_lora_rank)
        name = f"blk.{layer}.attn_uk.weight"
        return Matrix(name, fmt, c.kv_lora_rank, c.n_nope, c.n_head, pitch=pitch, derived=True)

    def v_b(self, layer: int) -> Matrix:
        """W_UV per head, (v, kv_lora): v = v_b c_kv; also turns latent sums into outputs."""
        c, joint = self.config, f"blk.{layer}.attn_kv_b.weight"
        if self.has(joint):
            return self._part_of_joint(joint, c.n_nope, c.n_v)
        name = f"blk.{layer}.attn_v_b.weight"
        fmt = self._format(name)
        pitch = c.n_v * fmt.row_bytes(c.kv_lora_rank)
        return Matrix(name, fmt, c.kv_lora_rank, c.n_v, c.n_head, pitch=pitch)

    def _part_of_joint(self, joint: str, first: int, n_rows: int) -> Matrix:
        c, fmt = self.config, self._format(joint)
        row = fmt.row_bytes(c.kv_lora_rank)
        pitch = (c.n_nope + c.n_v) * row
        return Matrix(joint, fmt, c.kv_lora_rank, n_rows, c.n_head, first * row, pitch)

    def interleaved(self, matrix: Matrix, rows: int) -> Matrix:
        """What -rtr makes of a matrix: rows in groups of `rows`. It stays as it is where its type
        has no integer dot or the rows do not divide into groups, and so does the embedding table,
        of which single rows are read."""
        whole = rows > 0 and matrix.n_rows % rows == 0
        if not whole or not matrix.fmt.integer_dot or matrix.tensor == EMBEDDING:
            return matrix
        fmt = interleave(matrix.fmt, rows)
        pitch = matrix.n_rows * fmt.row_bytes(matrix.n_cols)
        return replace(matrix, fmt=fmt, offset=0, pitch=pitch, derived=True, source=matrix)

    # -- memory -----------------------------------------------------------------------------

    def address(self, matrix: Matrix) -> int:
        """Where the matrix lies; makes a derived one on first use. Raises LookupError for an
        interleaved one that `keep` has not been given."""
        if not matrix.derived:
            return self.file.address(matrix.tensor) + matrix.offset
        if matrix not in self._derived:
            self._derived[matrix] = self._derive(matrix)
        return int(self._derived[matrix].ctypes.data)

    def has_made(self, matrix: Matrix) -> bool:
        return matrix in self._derived

    def keep(self, matrix: Matrix, data: Block) -> None:
        """Bytes of a matrix made at load, for as long as this object lives."""
        self._derived[matrix] = data

    def data(self, matrix: Matrix) -> Block:
        """The bytes from the first matrix's start on: in the mapped file, or made anew."""
        if matrix.derived:
            return self._derive(matrix)
        return self.file.data(matrix.tensor)[matrix.offset :]

    def in_use(self) -> list[Block]:
        """Memory that kernels read: what was made at load, and the tensors it did not replace."""
        copied = {m.source.tensor for m in self._derived if m.source and m.is_copy}
        left = [self.file.data(name) for name in self.file.tensors if name not in copied]
        return [*self._derived.values(), *left]

    def _derive(self, matrix: Matrix) -> Block:
        """Transpose k_b into w_uk or the other way round, head by head."""
        if matrix.source:
            raise LookupError(f"{matrix.name} has not been interleaved")
        layer = int(matrix.tensor.split(".")[1])
        wants_k_b = "attn_k_b" in matrix.tensor
        source = self.w_uk(layer) if wants_k_b else self.k_b(layer)
        head_bytes = matrix.n_rows * matrix.fmt.row_bytes(matrix.n_cols)
        result = np.empty((matrix.n_mats, head_bytes), np.uint8)
        for head in range(matrix.n_mats):
            values = dequantise(self._rows(source, head), source.fmt, source.n_cols)
            turned = np.ascontiguousarray(values.T)
            result[head] = quantise(turned, matrix.fmt).reshape(-1)
        return result.reshape(-1)

    def _rows(self, matrix: Matrix, head: int) -> npt.NDArray[np.uint8]:
        data, row = self.file.data(matrix.tensor), matrix.fmt.row_bytes(matrix.n_cols)
        start = matrix.offset + head * matrix.pitch
        return data[start : start + matrix.n_rows * row].reshape(matrix.n_rows, row)
