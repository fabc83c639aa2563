"""The oracle: a DeepSeek V2/V3 forward pass in numpy float64, straight from the papers.

It shares no code with the engine: metadata and weights are read and dequantised by the gguf
package, attention is the expanded form (K and V per head), and nothing is cached between tokens.
Sources: DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 (arXiv 2412.19437), YaRN (arXiv 2309.00071),
HF transformers' modeling_deepseek_v2/v3.py, against which scripts/make_golden.py checks it.

    model = load(path)
    logits = model.forward([1, 2, 3])                    # (3, n_vocab)
    result = model.run(tokens, rows=[-1])                # logits of the last token, and routing
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.reference_file import SIGMOID, Array, Config, Ids, Weights, Yarn, read_config

Rounding = Callable[[Array], Array]
Tap = Callable[[str, NDArray[Any]], None]

SMALLEST_WEIGHT_SUM = 6.103515625e-5  # llama.cpp's clamp: the smallest normal f16
SCORE_BYTES = 64 << 20  # K*Q of one block of queries, all heads


@dataclass(frozen=True)
class Routing:
    """What one MoE layer's router chose for each token.

    `margin` is how far the selection was from another one: the gap between the last chosen and the
    first unchosen expert (and group, where there are groups). A small one may flip by rounding.
    """

    layer: int
    experts: Ids  # (n_tokens, n_expert_used), best first
    weights: Array  # (n_tokens, n_expert_used)
    margin: Array  # (n_tokens,)


@dataclass(frozen=True)
class Forward:
    """`logits` (n_rows, n_vocab) of the wanted rows; `routing` of all tokens, a MoE layer each."""

    logits: Array
    routing: tuple[Routing, ...]

    def smallest_margin(self) -> Array:
        """(n_tokens,) the smallest router margin of each token over all layers (inf if dense)."""
        margins = [layer.margin for layer in self.routing]
        return np.min(margins, axis=0) if margins else np.array(np.inf)


def load(path: str | Path, *, keep: bool = True, prefer_split: bool = False) -> ReferenceModel:
    """The model in a GGUF file of architecture deepseek2, flavour A, B or C.

    `prefer_split` takes k_b and v_b, not kv_b, where the file has both (quantised apart, the two
    differ). Raises ValueError for metadata that this oracle does not implement.
    """
    reader = gguf.GGUFReader(path)
    fields = {str(name): field.contents() for name, field in reader.fields.items()}
    names = [str(tensor.name) for tensor in reader.tensors]
    config = read_config(fields, names)
    return ReferenceModel(config, Weights(reader.tensors, keep), prefer_split)


def correction_range(yarn: Yarn, rope: int, base: float) -> tuple[int, int]:
    """The pairs between which YaRN blends: before `low` untouched, from `high` on interpolated.

    A pair i turns original_context * base^(-2i/rope) / 2pi times over the original context; the
    ends are the pairs that turn beta_fast and beta_slow times, rounded outwards.
    """

    def pair_turning(times: float) -> float:
        turns = yarn.original_context / (times * 2 * math.pi)
        return rope * math.log(turns) / (2 * math.log(base))

    low, high = math.floor(pair_turning(yarn.beta_fast)), math.ceil(pair_turning(yarn.beta_slow))
    return max(low, 0), min(high, rope - 1)


def rope_frequencies(rope: int, base: float, yarn: Yarn | None) -> Array:
    """(rope / 2,) radians per position of each adjacent pair."""
    pair = np.arange(rope // 2, dtype=np.float64)
    frequencies: Array = base ** (-2 * pair / rope)
    if yarn is None:
        return frequencies
    low, high = correction_range(yarn, rope, base)
    interpolated = np.clip((pair - low) / max(high - low, 0.001), 0, 1)
    return frequencies * (1 - interpolated) + frequencies / yarn.factor * interpolated


def rotate(x: Array, positions: Ids, frequencies: Array) -> Array:
    """RoPE on `x` (n_tokens, ..., rope): the pairs (0, 1), (2, 3), ... turned by their angles."""
    angles = positions[:, None] * frequencies
    angles = angles.reshape(len(positions), *(1,) * (x.ndim - 2), -1)
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], np.cos(angles), np.sin(angles)
    turned = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape)


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis."""
    normed: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight
    return normed


def sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        return 1.0 / (1.0 + np.exp(-x))


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """down(silu(gate(x)) * up(x)), the weights as (out, in)."""
    gated = x @ gate.T
    return (gated * sigmoid(gated) * (x @ up.T)) @ down.T


def attend(q: Array, k: Array, v: Array, scale: float, positions: Ids, sequences: Ids) -> Array:
    """Standard causal attention: q, k (n_tokens, n_head, nope + rope), v (n_tokens, n_head, v).

    Token t sees the tokens j <= t of its own sequence whose position is not past its own.
    """
    n_tokens, n_head = q.shape[:2]
    q, k, v = (np.ascontiguousarray(part.transpose(1, 0, 2)) for part in (q, k, v))
    out = np.empty((n_tokens, n_head, v.shape[-1]))
    block = max(1, SCORE_BYTES // (8 * n_head * n_tokens))
    for start in range(0, n_tokens, block):
        stop = min(start + block, n_tokens)
        of, to = slice(start, stop), slice(0, stop)
        hidden = np.arange(stop)[None] > np.arange(start, stop)[:, None]
        hidden |= sequences[None, to] != sequences[of, None]
        hidden |= positions[None, to] > positions[of, None]
        scores = q[:, of] @ k[:, to].transpose(0, 2, 1)
        scores *= scale
        np.copyto(scores, -np.inf, where=hidden)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        weighted = (scores @ v[:, to]) / scores.sum(axis=-1, keepdims=True)
        out[of] = weighted.transpose(1, 0, 2)
    return out


def gap(scores: Array, n_chosen: int) -> Array:
    """(n_tokens,) how far the n_chosen best of each row stand above the rest."""
    if n_chosen >= scores.shape[-1]:
        return np.full(len(scores), np.inf)
    ranked = -np.sort(-scores, axis=-1)
    return np.asarray(ranked[:, n_chosen - 1] - ranked[:, n_chosen])


def route(
    logits: Array, bias: Array | None, config: Config, experts: Ids | None = None
) -> tuple[Ids, Array, Array]:
    """(experts, weights, margin) for router `logits` (n_tokens, n_expert); see `Routing`.

    The bias (V3's exp_probs_b) and the groups take part in the selection only. A group counts by
    the sum of its two best experts with a sigmoid gate (V3), by its best with softmax (V2). Given
    `experts` are taken instead of the best ones.
    """
    if config.gating == SIGMOID:
        probs = sigmoid(logits)
    else:
        probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
        probs /= probs.sum(axis=-1, keepdims=True)
    scores = probs if bias is None else probs + bias
    margin = np.full(len(logits), np.inf)
    if config.n_group > 1:
        grouped = scores.reshape(len(scores), config.n_group, -1)
        n_best = 2 if config.gating == SIGMOID else 1
        group_scores = np.sort(grouped, axis=-1)[..., -n_best:].sum(axis=-1)
        best = np.argsort(-group_scores, axis=-1, kind="stable")[:, : config.n_group_used]
        kept = np.zeros(group_scores.shape, dtype=bool)
        np.put_along_axis(kept, best, True, axis=-1)
        scores = np.where(kept[..., None], grouped, -np.inf).reshape(scores.shape)
        margin = gap(group_scores, config.n_group_used)
    if experts is None:
        order = np.argsort(-scores, axis=-1, kind="stable").astype(np.int64)
        experts = order[:, : config.n_expert_used]
    weights = np.take_along_axis(probs, experts, axis=-1)
    if config.weights_norm:
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), SMALLEST_WEIGHT_SUM)
    margin = np.minimum(margin, gap(scores, config.n_expert_used))
    return experts, weights * config.weights_scale, margin


@dataclass(frozen=True)
class ReferenceModel:
    """A loaded model; `forward` is the whole of it, `run` also says what the routers chose."""

    config: Config
    weights: Weights
    prefer_split: bool = False

    def forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        *,
        rows: Sequence[int] | None = None,
        cache_round: Rounding | None = None,
        cache_rows: Literal["latent", "heads"] = "latent",
    ) -> Array:
        """(n_rows, n_vocab) logits of the tokens at `rows` (default: all); see `run`."""
        return self.run(
            tokens,
            positions,
            sequences,
            rows=rows,
            cache_round=cache_round,
            cache_rows=cache_rows,
        ).logits

    def run(
        self,
        tokens: Sequence[int],
        positions: Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        *,
        rows: Sequence[int] | None = None,
        cache_round: Rounding | None = None,
        cache_rows: Literal["latent", "heads"] = "latent",
        experts: Sequence[Ids] | None = None,
        tap: Tap | None = None,
    ) -> Forward:
        """One pass over `tokens`; positions default to 0, 1, ..., sequences to one.

        `cache_round` is applied to what an engine would store per token: with cache_rows "latent"
        the row c_kv | k_pe (n_tokens, kv_lora + rope), with "heads" K (n_tokens, n_head,
        nope + rope) and V (n_tokens, n_head, v). `experts`, one array (n_tokens, n_expert_used) per
        MoE layer, replaces what the routers would choose: an engine that resolved a near tie the
        other way can be compared on the experts that it took. `tap` is called with each layer's
        intermediates under llama.cpp's names (`l_out-3`), to find where an engine departs.
        """
        where = np.arange(len(tokens)) if positions is None else np.asarray(positions)
        whose = np.zeros(len(tokens)) if sequences is None else np.asarray(sequences)
        cache = _Cache(where.astype(np.int64), whose.astype(np.int64), cache_round, cache_rows)
        tap = tap or _ignore
        x = self.weights.get("token_embd.weight", np.asarray(tokens, dtype=np.int64))
        routing: list[Routing] = []
        forced = iter(experts or ())
        for layer in range(self.config.n_layer):
            h = self._norm(x, layer, "attn_norm")
            tap(f"attn_norm-{layer}", h)
            x = x + self._attention(layer, h, cache, tap)
            tap(f"ffn_inp-{layer}", x)
            h = self._norm(x, layer, "ffn_norm")
            tap(f"ffn_norm-{layer}", h)
            out = self._feed_forward(layer, h, routing, forced, tap)
            tap(f"ffn_out-{layer}", out)
            x = x + out
            tap(f"l_out-{layer}", x)
        x = x if rows is None else x[np.asarray(rows, dtype=np.int64)]
        x = rms_norm(x, self.weights.get("output_norm.weight"), self.config.epsilon)
        tap("result_norm", x)
        tied = "output.weight" not in self.weights
        output = self.weights.get("token_embd.weight" if tied else "output.weight")
        return Forward(x @ output.T, tuple(routing))

    def _norm(self, x: Array, layer: int, name: str) -> Array:
        return rms_norm(x, self.weights.get(f"blk.{layer}.{name}.weight"), self.config.epsilon)

    def _linear(self, x: Array, layer: int, name: str) -> Array:
        return x @ self.weights.get(f"blk.{layer}.{name}.weight").T

    def _attention(self, layer: int, x: Array, cache: _Cache, tap: Tap) -> Array:
        """MLA in its expanded form: every head's K and V are made from c_kv (V2 paper, eq. 9-19).

        Without q_lora (V2-Lite) q comes from x directly.
        """
        config, n_tokens = self.config, len(x)
        frequencies = rope_frequencies(config.rope, config.rope_base, config.yarn)
        if f"blk.{layer}.attn_q.weight" in self.weights:
            q = self._linear(x, layer, "attn_q")
        else:
            c_q = self._norm(self._linear(x, layer, "attn_q_a"), layer, "attn_q_a_norm")
            q = self._linear(c_q, layer, "attn_q_b")
        q = q.reshape(n_tokens, config.n_head, config.nope + config.rope)
        q_pe = rotate(q[..., config.nope :], cache.positions, frequencies)
        q = np.concatenate([q[..., : config.nope], q_pe], axis=-1)
        kv_a = self._linear(x, layer, "attn_kv_a_mqa")
        c_kv = self._norm(kv_a[:, : config.kv_lora], layer, "attn_kv_a_norm")
        k_pe = rotate(kv_a[:, config.kv_lora :], cache.positions, frequencies)
        row = cache.rounded("latent", np.concatenate([c_kv, k_pe], axis=-1))
        c_kv, k_pe = row[:, : config.kv_lora], row[:, config.kv_lora :]
        kv = np.einsum("tc,hdc->thd", c_kv, self._kv_b(layer), optimize=True)
        shared_k_pe = np.broadcast_to(k_pe[:, None], (n_tokens, config.n_head, config.rope))
        k = cache.rounded("heads", np.concatenate([kv[..., : config.nope], shared_k_pe], axis=-1))
        v = cache.rounded("heads", kv[..., config.nope :])
        heads = attend(q, k, v, config.kq_scale, cache.positions, cache.sequences)
        seen = {"kv_a": kv_a, "c_kv": c_kv, "k_pe": k_pe, "q": q, "k": k, "kv": kv}
        for name, value in (*seen.items(), ("kqv_out", heads)):
            tap(f"{name}-{layer}", value)
        return self._linear(heads.reshape(n_tokens, -1), layer, "attn_output")

    def _kv_b(self, layer: int) -> Array:
        """(n_head, nope + v, kv_lora), from attn_kv_b or from the split k_b (transposed) and v_b.

        Both a 2-D and a 3-D k_b hold, for each head, kv_lora rows of nope values.
        """
        config, block = self.config, f"blk.{layer}.attn_"
        joint = block + "kv_b.weight" in self.weights
        split = block + "k_b.weight" in self.weights
        if joint and not (split and self.prefer_split):
            kv_b = self.weights.get(block + "kv_b.weight")
            return kv_b.reshape(config.n_head, config.nope + config.v, config.kv_lora)
        k_b = self.weights.get(block + "k_b.weight")
        v_b = self.weights.get(block + "v_b.weight")
        k_b = k_b.reshape(config.n_head, config.kv_lora, config.nope).transpose(0, 2, 1)
        return np.concatenate([k_b, v_b.reshape(config.n_head, config.v, config.kv_lora)], axis=1)

    def _feed_forward(
        self, layer: int, x: Array, routing: list[Routing], forced: Iterator[Ids], tap: Tap
    ) -> Array:
        """A dense SwiGLU, or the chosen experts' weighted sum plus the shared experts."""
        block = f"blk.{layer}."
        if block + "ffn_gate_inp.weight" not in self.weights:
            return swiglu(x, *self._ffn(block, "weight"))
        logits = self._linear(x, layer, "ffn_gate_inp")
        biased = block + "exp_probs_b.bias" in self.weights
        bias = self.weights.get(block + "exp_probs_b.bias") if biased else None
        experts, weights, margin = route(logits, bias, self.config, next(forced, None))
        routing.append(Routing(layer, experts, weights, margin))
        out = np.zeros_like(x)
        for expert in np.unique(experts):
            token, slot = np.nonzero(experts == expert)
            chosen = self._ffn(block, "exps.weight", int(expert))
            out[token] += swiglu(x[token], *chosen) * weights[token, slot, None]
        tap(f"ffn_moe_logits-{layer}", logits)
        tap(f"ffn_moe_out-{layer}", out)
        if block + "ffn_gate_shexp.weight" in self.weights:
            shared = swiglu(x, *self._ffn(block, "shexp.weight"))
            tap(f"ffn_shexp-{layer}", shared)
            out = out + shared
        return out

    def _ffn(self, block: str, suffix: str, expert: int | None = None) -> tuple[Array, ...]:
        join = "." if suffix == "weight" else "_"
        parts = (f"{block}ffn_{part}{join}{suffix}" for part in ("gate", "up", "down"))
        return tuple(self.weights.get(part, expert) for part in parts)


@dataclass(frozen=True)
class _Cache:
    """Where the tokens stand, and how an engine's cache would round what it keeps of them."""

    positions: Ids
    sequences: Ids
    rounding: Rounding | None
    rows: str

    def rounded(self, rows: str, values: Array) -> Array:
        return values if self.rounding is None or rows != self.rows else self.rounding(values)


def _ignore(name: str, values: NDArray[Any]) -> None:
    """The tap of a pass that nobody watches."""


def nmse(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """sum((actual - expected)^2) / sum(expected^2), in float64."""
    wanted = np.asarray(expected, dtype=np.float64)
    error = np.asarray(actual, dtype=np.float64) - wanted
    return float(np.sum(error * error) / np.sum(wanted * wanted))


def kl_divergence(actual: NDArray[Any], expected: NDArray[Any]) -> Array:
    """(n_tokens,) sum over the vocabulary of p log(p / q), p = softmax(expected), q = of actual."""
    p, q = (_log_softmax(np.asarray(x, dtype=np.float64)) for x in (expected, actual))
    return np.asarray(np.sum(np.exp(p) * (p - q), axis=-1))


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def per_token_nmse(actual: NDArray[Any], expected: NDArray[Any]) -> Array:
    """(n_tokens,) `nmse` of each row, for the median and the percentiles."""
    wanted = np.asarray(expected, dtype=np.float64)
    error = np.asarray(actual, dtype=np.float64) - wanted
    return np.asarray(np.sum(error * error, axis=-1) / np.sum(wanted * wanted, axis=-1))
