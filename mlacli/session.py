"""One prompt answered: text in, streamed text out, with llama-cli's start-up lines and timings."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import socket

from mlacli.engine import Cancelled, Engine, Model, load_model
from mlacli.errors import EXIT_SIGINT, EXIT_SIGTERM, UsageError
from mlacli.machine import machine_profile, make_jit
from mlacli.report import buffer_lines, context_size
from mlacli.settings import Request, RunSettings
from mlacli.text.chat import ChatTemplate
from mlacli.text.sampling import Sampler
from mlacli.text.tokenizer import Piece, StreamDecoder, Tokenizer
from mlacli.text.vocabulary import tokenizer_data

UNTIL_FULL = -2


@dataclass
class Timings:
    """Seconds and counts of one answer."""

    load: float = 0.0
    sample: float = 0.0
    n_sample: int = 0
    prompt: float = 0.0
    n_prompt: int = 0
    generate: float = 0.0
    n_generate: int = 0
    started: float = field(default_factory=time.perf_counter)

    def lines(self) -> list[str]:
        """llama-cli's closing lines."""
        total = time.perf_counter() - self.started
        return [
            f"llama_print_timings:        load time = {1e3 * self.load:10.2f} ms",
            _line("sample time", self.sample, self.n_sample, "runs  "),
            _line("prompt eval time", self.prompt, self.n_prompt, "tokens"),
            _line("eval time", self.generate, self.n_generate, "runs  "),
            f"llama_print_timings:       total time = {1e3 * total:10.2f} ms / "
            f"{self.n_prompt + self.n_generate:5d} tokens",
        ]


def _line(what: str, seconds: float, n: int, unit: str) -> str:
    ms = 1e3 * seconds
    each, rate = (ms / n, n / seconds) if n and seconds else (0.0, 0.0)
    return (
        f"llama_print_timings: {what:>16} = {ms:10.2f} ms / {n:5d} {unit} "
        f"({each:8.2f} ms per token, {rate:8.2f} tokens per second)"
    )


def run_prompt(
    settings: RunSettings,
    request: Request,
    *,
    write: Callable[[str], None],
    note: Callable[[str], None],
) -> int:
    """Answer one prompt; the exit code tells whether a signal ended it. Raises MlaError."""
    timings = Timings()
    model = load_model(settings.model)
    data = tokenizer_data(model.file.metadata, str(settings.model))
    template = _template(model, request, data.chat_template)  # its process starts up meanwhile
    for line in model.notes:
        note(f"note: {line}")
    tokenizer = Tokenizer(data, model.config.n_vocab)
    tokens = _encode(tokenizer, template, request, note)
    n_ctx = context_size(model.config, settings, note)
    if len(tokens) >= n_ctx:
        raise UsageError(
            f"the prompt has {len(tokens)} tokens, the context -c {n_ctx} holds at most {n_ctx - 1}"
        )
    jit = make_jit()
    engine = start_engine(model, settings, jit, n_ctx)
    for line in buffer_lines(engine.plan, settings):
        note(line)
    if settings.verbose:
        note(f"mla: {engine.chooser}")
    engine.program(engine.graph_name(min(len(tokens), settings.n_ubatch)))
    sampler = Sampler(request.sampling, model.config.n_vocab, tokenizer.end_ids)
    note(f"sampling seed: {sampler.seed}")
    note(
        f"generate: n_ctx = {engine.n_ctx}, n_batch = {settings.n_batch}, "
        f"n_predict = {request.n_predict}"
    )
    timings.load = time.perf_counter() - timings.started
    with stop_on_signals(engine) as stopped:
        _generate(engine, tokenizer, sampler, request, tokens, timings, write)
    write("\n")
    for line in timings.lines():
        note(line)
    return {0: 0, signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}[stopped()]


def start_engine(model: Model, settings: RunSettings, jit: Jit, n_ctx: int) -> Engine:
    """An engine whose -mla 3 knows this machine."""
    pool = Pool(jit, max(settings.n_threads, settings.n_threads_batch))
    profile = machine_profile(jit, pool, settings.n_threads_batch)
    return Engine(model, settings, jit, profile, n_ctx=n_ctx, pool=pool)


def _template(model: Model, request: Request, source: str | None) -> ChatTemplate | None:
    if request.raw or not source:
        return None
    del model
    return ChatTemplate(source)
