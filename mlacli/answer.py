"""Where an answer goes, and all of it as one JSON object."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from mlacli import __version__
from mlacli.engine import Engine
from mlacli.generation import Timings
from mlacli.memory import peak_memory
from mlacli.reply import CANCELLED, Reply
from mlacli.report import model_facts
from mlacli.text.sampling import Sampler
from mlacli.text.tokenizer import Tokenizer

_CHAINS = ("samplers", "sampling_seq")  # `chain` says what came of them
Result = Mapping[str, Any]


class Output(Protocol):
    """Where an answer goes."""

    def prompt(self, text: str) -> None:
        """The prompt as the model reads it (--display-prompt)."""

    def piece(self, token: int | None, text: str) -> None:
        """A token and the text that it completes; None: what is left at the end."""

    def end(self, result: Result) -> None:
        """There is no more."""


def prompt_lines(tokenizer: Tokenizer, tokens: Sequence[int]) -> Iterator[str]:
    """A prompt's tokens, a line each, as llama-cli's --verbose-prompt lists them."""
    yield f"number of tokens in prompt = {len(tokens)}"
    for token in tokens:
        text = tokenizer.piece(token).decode(errors="replace")
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        yield f"{token:6d} -> '{shown}'"


def result_of(reply: Reply, prompt: Sequence[int], *, ready: float, ids: bool = False) -> Result:
    """The object of --json. `ready` is when the model was loaded (time.perf_counter())."""
    generator, timings = reply.generator, reply.generator.timings
    engine = generator.engine
    found: dict[str, Any] = {
        "text": reply.text,
        "finish_reason": reply.finish or CANCELLED,
        "tokens": {
            "prompt": len(prompt),
            "reused": timings.n_reused,
            "evaluated": timings.n_prompt,
            "generated": len(reply.tokens),
        },
        "context_shifts": timings.n_shifts,
    }
    if ids:
        found["token_ids"] = {"prompt": list(prompt), "generated": reply.tokens}
    return found | {
        "timings": _times(timings, reply.first_token, ready),
        "memory": dict(zip(("peak_rss_bytes", "anonymous_bytes"), peak_memory(), strict=True)),
        "model": _model(engine),
        "settings": _settings(engine),
        "sampling": _sampling(generator.sampler),
        "mlacli": __version__,
    }


def _times(timings: Timings, first: float | None, ready: float) -> dict[str, float | None]:
    return {
        "load_s": round(timings.load, 6),
        "first_token_s": None if first is None else round(first - ready, 6),
        "prompt_s": round(timings.prompt, 6),
        "prompt_tokens_per_s": _rate(timings.n_prompt, timings.prompt),
        "generation_s": round(timings.generate, 6),
        "generation_tokens_per_s": _rate(timings.n_generate, timings.generate),
        "sampling_s": round(timings.sample, 6),
        "total_s": round(time.perf_counter() - timings.started, 6),
    }


def _rate(n: int, seconds: float) -> float | None:
    return round(n / seconds, 3) if n and seconds > 0 else None


def _model(engine: Engine) -> dict[str, Any]:
    facts = model_facts(engine.model)
    return {
        "file": str(engine.model.file.path),
        "name": facts.name,
        "architecture": facts.arch,
        "type": facts.file_type,
        "parameters": facts.n_params,
        "bytes": facts.file_bytes,
    }


def _settings(engine: Engine) -> dict[str, Any]:
    """Those in force, under the names of bench's JSON."""
    s = engine.settings
    return {
        "n_ctx": engine.n_ctx,
        "n_batch": s.n_batch,
        "n_ubatch": s.n_ubatch,
        "n_threads": s.n_threads,
        "n_threads_batch": s.n_threads_batch,
        "mla": s.mla,
        "mla_threshold": engine.chooser.crossover if s.mla >= 2 else None,
        "flash_attn": s.flash_attn,
        "type_k": s.type_k,
        "type_v": s.type_v if s.mla == 0 else None,
        "amb": s.amb_mib,
        "rtr": s.rtr,
        "fmoe": s.fmoe,
        "ser": s.ser,
        "thp": s.thp,
        "mmap": s.mmap,
        "mlock": s.mlock,
    }


def _sampling(sampler: Sampler) -> dict[str, Any]:
    values = asdict(sampler.settings) | {"seed": sampler.seed}
    names = {name: values[name] for name in values if name not in _CHAINS}
    return {"samplers": sampler.settings.chain} | {n: _finite(v) for n, v in names.items()}


def _finite(value: Any) -> Any:
    """JSON has no infinity (`-l 5-inf`): a word stands for it."""
    if isinstance(value, tuple):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
