"""Logits of every mode, cache type and batch size against a float64 forward of the same weights.

A row of the table, for one length of prompt:

    any      NMSE over all tokens, and the per-token median
    flips    tokens for which a router chose other experts than in the float64 forward
    same     NMSE, per-token median and 99th percentile against a float64 forward that takes the
             experts that the engine took, so that flips do not count as errors
    kl       mean KL divergence of the predicted distributions from those of the float64 forward
    own      what storing the cache in its type costs by itself: the median of a float64 forward
             whose cache is rounded to the type

    python scripts/accuracy.py --preset tiny-v3 --length 1,33,700 [--type F32] [--mla 0,1,2,3]
        [--fa 1,0] [--cache f32,f16,...] [--ubatch 1,7,32,512] [--threads 2] [-rtr]
    python scripts/accuracy.py --model mlacli/data/demo.gguf --text README.md --length 500

The prompt is random tokens, or the start of a text.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small matrices: threads only wait

import numpy as np
import numpy.typing as npt

from codegen.formats import CACHE_FORMATS, LATENT_CACHE_TYPES, BlockFormat
from codegen.pool import Pool
from mlacli.engine import Engine, Model, load_model
from mlacli.errors import UsageError
from mlacli.gguf.quants import dequantise, quantise
from mlacli.machine import make_jit
from mlacli.model.choose import MachineProfile
from mlacli.settings import RunSettings, fitted
from mlacli.text.tokenizer import Tokenizer
from mlacli.text.vocabulary import tokenizer_data
from scripts.make_model import make_model
from tests import reference
from tests.engines import logits_and_experts, routing_names

Floats = npt.NDArray[np.float64]
Experts = list[npt.NDArray[np.int64]]
EVEN_PROFILE = MachineProfile(1e11, 1e11, 1e11, 1e11)
KEPT = 4  # logits of a long prompt take 160 MB
# Of the per-token median; F32 weights.
LIMITS = {"f32": 1e-10, "f16": 2e-5, "bf16": 2e-5, "q8_0": 1e-4, "q8_KV": 3e-4, "q6_0": 3e-3}


@dataclass(frozen=True)
class Row:
    """One line of the table; the errors as the module says."""

    length: int
    mla: int
    fa: str
    cache: str
    ubatch: int
    any_nmse: float
    any_median: float
    flips: int
    same_nmse: float
    same_median: float
    same_p99: float
    kl: float
    own: float | None
    over: str

    def __str__(self) -> str:
        return " ".join(f"{_text(getattr(self, f.name)):>{_width(f.name)}}" for f in fields(self))

    @staticmethod
    def head() -> str:
        return " ".join(f"{f.name:>{_width(f.name)}}" for f in fields(Row))


def _width(name: str) -> int:
    return max(6, len(name))


def _text(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) else "-" if value is None else str(value)


@dataclass
class Oracle:
    """float64 forwards of one prompt, each made once."""

    model: reference.ReferenceModel
    tokens: list[int]
    _same: dict[bytes, reference.Forward] = field(default_factory=dict)
    _own: dict[tuple[str, str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exact = self.model.run(self.tokens)
        self.experts = [np.asarray(routing.experts) for routing in self.exact.routing]
        self._same[_key(self.experts)] = self.exact

    def flips(self, experts: Experts) -> int:
        """Tokens that another set of experts saw, in any layer."""
        pairs = zip(experts, self.experts, strict=True)
        changed = [(np.sort(a, -1) != np.sort(b, -1)).any(-1) for a, b in pairs]
        return int(np.any(changed, axis=0).sum()) if changed else 0

    def same(self, experts: Experts) -> Floats:
        """Logits of a forward that takes these experts."""
        key = _key(experts)
        if key not in self._same:
            if len(self._same) > KEPT:
                del self._same[list(self._same)[1]]  # the oldest but the exact one
            self._same[key] = self.model.run(self.tokens, experts=experts)
        return self._same[key].logits

    def own(self, rows: Any, type_k: str, type_v: str) -> float:
        """Median error of a cache of these types in a forward that is exact otherwise."""
        key = (rows, type_k, type_v)
        if key not in self._own:
            c = self.model.config
            width = c.kv_lora + c.rope if rows == "latent" else c.nope + c.rope
            store = rounding(CACHE_FORMATS[type_k], CACHE_FORMATS[type_v], width)
            rounded = self.model.run(
                self.tokens, cache_round=store, cache_rows=rows, experts=self.experts
            )
            each = reference.per_token_nmse(rounded.logits, self.exact.logits)
            self._own[key] = float(np.median(each))
        return self._own[key]


def _key(experts: Sequence[npt.NDArray[Any]]) -> bytes:
    return b"".join(np.sort(e, axis=-1).astype(np.int16).tobytes() for e in experts)


def rounding(fmt_k: BlockFormat, fmt_v: BlockFormat, k_width: int) -> Callable[[Floats], Floats]:
    """Store and load rows: those of `k_width` values in one format, others in the other."""

    def store(values: Floats) -> Floats:
        n = values.shape[-1]
        fmt = fmt_k if n == k_width else fmt_v
        rows = values.reshape(-1, n).astype(np.float32)
        return dequantise(quantise(rows, fmt), fmt, n).astype(np.float64).reshape(values.shape)

    return store


def settings_grid(path: Path, given: argparse.Namespace, n_ctx: int) -> Iterator[RunSettings]:
    """Every combination that can work. V has the type of K where it can, else f16."""
    for mla, fa, cache, ubatch in itertools.product(given.mla, given.fa, given.cache, given.ubatch):
        v_can = mla == 0 and (fa or cache in ("f32", "f16"))
        try:
            yield fitted(
                model=path,
                n_ctx=n_ctx,
                mla=mla,
                flash_attn=bool(fa),
                type_k=cache,
                type_v=cache if v_can else "f16",
                n_ubatch=min(ubatch, n_ctx),
                n_threads=given.threads,
                rtr=given.rtr,
            )
        except UsageError as problem:
            print(f"skipped: {problem}", file=sys.stderr)


def compare(engine: Engine, oracle: Oracle, is_f32: bool) -> Row:
    """One row: the engine's logits of every token of the prompt against the oracle's."""
    s = engine.settings
    got, experts = logits_and_experts(engine, oracle.tokens)
    same = oracle.same(experts)
    free, each = (reference.per_token_nmse(got, e) for e in (oracle.exact.logits, same))
    own: float | None = None
    if s.mla == 0:
        own = oracle.own("heads", s.type_k, s.type_v)
    elif s.mla != 1 or s.flash_attn:  # else kv^T holds values that were never rounded to the type
        own = oracle.own("latent", s.type_k, s.type_k)
    median = float(np.median(each))
    return Row(
        length=len(got),
        mla=s.mla,
        fa="on" if s.flash_attn else "off",
        cache=s.type_k,
        ubatch=s.n_ubatch,
        any_nmse=reference.nmse(got, oracle.exact.logits),
        any_median=float(np.median(free)),
        flips=oracle.flips(experts),
        same_nmse=reference.nmse(got, same),
        same_median=median,
        same_p99=float(np.quantile(each, 0.99)),
        kl=float(np.mean(reference.kl_divergence(got, oracle.exact.logits))),
        own=own,
        over="OVER" if is_f32 and median > LIMITS.get(s.type_k, np.inf) else "",
    )


def measure(path: Path, given: argparse.Namespace) -> Iterator[Row]:
    """All rows of a model: an engine per setting, which evaluates every length."""
    model, jit = load_model(path), make_jit()
    pool = Pool(jit, given.threads)
    tokens = prompt(model, given)
    f64 = reference.load(path)
    oracles = [Oracle(f64, tokens[:n]) for n in given.length]
    for settings in settings_grid(path, given, max(given.length) + 1):
        engine = Engine(
            model,
            settings,
            jit,
            EVEN_PROFILE,
            n_ctx=settings.n_ctx or 1,
            n_out_max=settings.n_ubatch,
            pool=pool,
            keep=routing_names(model.config),
        )
        for oracle in oracles:
            yield compare(engine, oracle, given.model is None and given.type == "F32")
    pool.close()


def prompt(model: Model, given: argparse.Namespace) -> list[int]:
    """As many tokens as the longest length. Raises SystemExit when the text is shorter."""
    n, n_vocab = max(given.length), model.config.n_vocab
    if given.text is None:
        found: list[int] = np.random.default_rng(7).integers(0, n_vocab, n).tolist()
        return found
    tokenizer = Tokenizer(tokenizer_data(model.file.metadata, str(given.model)), n_vocab)
    tokens = list(tokenizer.encode_bytes(given.text.read_bytes()))
    if len(tokens) < n:
        raise SystemExit(f"{given.text}: {len(tokens)} tokens, fewer than --length {n}")
    return tokens[:n]


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="tiny-v3")
    parser.add_argument("--model", type=Path, help="instead of a preset")
    parser.add_argument("--text", type=Path, help="whose tokens are the prompt")
    parser.add_argument("--type", default="F32", help="of the preset's weights")
    parser.add_argument("--kv-b", default="joint")
    parser.add_argument("--length", type=numbers, default=[700])
    parser.add_argument("--mla", type=numbers, default=[0, 1, 2, 3])
    parser.add_argument("--fa", type=numbers, default=[1, 0])
    parser.add_argument("--cache", type=lambda s: s.split(","), default=list(LATENT_CACHE_TYPES))
    parser.add_argument("--ubatch", type=numbers, default=[1, 7, 32, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-rtr", action="store_true", help="interleaved weights")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.model or Path(folder) / "model.gguf"
        if given.model is None:
            make_model(path, preset=given.preset, type=given.type, kv_b=given.kv_b)
        print(given.model or f"{given.preset} {given.type}")
        print(Row.head(), flush=True)
        over = 0
        for row in measure(path, given):
            print(row, flush=True)
            over += bool(row.over)
        print(f"{over} rows with a median over the limit")


if __name__ == "__main__":
    main()
