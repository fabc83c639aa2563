"""One prompt answered: text in, streamed text out, with llama-cli's start-up lines and timings."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from codegen.jit import Jit
from codegen.pool import Pool
from mlacli.engine import Cancelled, Engine, Model, load_model
from mlacli.errors import EXIT_SIGINT, EXIT_SIGTERM, UsageError
from mlacli.fit import GIB, size_text
from mlacli.machine import machine_profile, make_jit, measure_peaks
from mlacli.memory import huge_bytes, lock
from mlacli.profile import Profiles
from mlacli.profile_table import profile_lines
from mlacli.report import buffer_lines, context_size, repack_notes
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


@dataclass(frozen=True)
class Answerer:
    """Everything one answer needs, ready to generate."""

    engine: Engine
    tokenizer: Tokenizer
    sampler: Sampler
    request: Request
    write: Callable[[str], None]
    timings: Timings
    profiles: Profiles | None = None

    def answer(self, tokens: Sequence[int]) -> None:
        """Evaluate the prompt, then sample until an end token, -n, the context's end or Ctrl-C."""
        timings, engine = self.timings, self.engine
        for token in tokens:
            self.sampler.accept(token)
        engine.profile = self.profiles.prompt if self.profiles else None
        start = time.perf_counter()
        logits = engine.eval(tokens, range(len(tokens)))
        timings.prompt, timings.n_prompt = time.perf_counter() - start, len(tokens)
        engine.profile = self.profiles.generation if self.profiles else None
        decoder = StreamDecoder(self.tokenizer)
        position = len(tokens)
        limit = engine.n_ctx - position + 1
        if self.request.n_predict >= 0:
            limit = min(limit, self.request.n_predict)
        for n in range(limit):
            start = time.perf_counter()
            token = self.sampler.sample(logits[-1])
            self.sampler.accept(token)
            timings.sample += time.perf_counter() - start
            timings.n_sample += 1
            if self.tokenizer.is_end_of_generation(token) and not self._goes_on:
                break
            self.write(decoder.feed(token))
            if n + 1 == limit:
                break
            start = time.perf_counter()
            logits = engine.eval([token], [position])
            timings.generate += time.perf_counter() - start
            timings.n_generate += 1
            position += 1
        self.write(decoder.flush())

    @property
    def _goes_on(self) -> bool:
        """-n -2 fills the context whatever the model says."""
        return self.request.n_predict == UNTIL_FULL


def run_prompt(
    settings: RunSettings,
    request: Request,
    *,
    write: Callable[[str], None],
    note: Callable[[str], None],
    profile: bool = False,
) -> int:
    """Answer one prompt; the exit code tells whether a signal ended it. Raises MlaError."""
    timings = Timings()
    model = load_model(settings.model, mmap=settings.mmap, huge=settings.thp)
    data = tokenizer_data(model.file.metadata, str(settings.model))
    tokenizer = Tokenizer(data, model.config.n_vocab)
    template = _template(tokenizer, request)  # its process starts up meanwhile
    for line in model.notes:
        note(f"note: {line}")
    n_ctx = context_size(model.config, settings, note=note)
    jit = make_jit()
    engine = start_engine(model, settings, jit, n_ctx)
    tokens = encode_prompt(tokenizer, template, request, note)
    if len(tokens) >= engine.n_ctx:
        raise UsageError(
            f"the prompt has {len(tokens)} tokens, more than -c {engine.n_ctx} leaves room for "
            f"(limit {engine.n_ctx - 1})"
        )
    for line in buffer_lines(engine.plan, settings):
        note(line)
    for line in repack_notes(engine.plan, settings):
        note(f"note: {line}")
    engine.repack(progress_lines(note))
    for line in memory_notes(model, settings):
        note(line)
    if settings.verbose:
        note(_path_line(engine))
    sampler = Sampler(request.sampling, model.config.n_vocab, tokenizer.end_ids)
    note(f"sampling seed: {sampler.seed}")
    note(
        f"generate: n_ctx = {engine.n_ctx}, n_batch = {settings.n_batch}, "
        f"n_predict = {request.n_predict}"
    )
    engine.prepare(engine.graph_name(min(len(tokens), settings.n_ubatch)), engine.graph_name(1))
    for line in jit.notes:
        note(f"note: {line}")
    timings.load = time.perf_counter() - timings.started
    profiles = Profiles() if profile else None
    answerer = Answerer(engine, tokenizer, sampler, request, write, timings, profiles)
    with stop_on_signals(engine) as received:
        with contextlib.suppress(Cancelled):
            answerer.answer(tokens)
    write("\n")
    for line in timings.lines():
        note(line)
    for line in _profiled(profiles, engine, jit) if profiles else ():
        note(line)
    return EXIT_OF_SIGNAL[received[0]] if received else 0


def _profiled(profiles: Profiles, engine: Engine, jit: Jit) -> Iterator[str]:
    """Where the time went, beside what this machine can do now."""
    settings, layout = engine.settings, engine.plan.layout
    threads = {"prompt": settings.n_threads_batch, "generation": settings.n_threads}
    peaks = {n: measure_peaks(jit, engine.pool, n) for n in set(threads.values())}
    for part, n in threads.items():
        profile = getattr(profiles, part)
        yield from profile_lines(part, profile, layout, peaks[n], by_layer=settings.verbose)


EXIT_OF_SIGNAL: dict[int, int] = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}


def start_engine(
    model: Model, settings: RunSettings, jit: Jit, n_ctx: int, *, n_out_max: int = 1
) -> Engine:
    """An engine whose -mla 3 knows this machine."""
    pool = Pool(jit, max(settings.n_threads, settings.n_threads_batch))
    profile = machine_profile(jit, pool, settings)
    return Engine(model, settings, jit, profile, n_ctx=n_ctx, n_out_max=n_out_max, pool=pool)


def progress_lines(note: Callable[[str], None]) -> Callable[[int, int], None]:
    """A line per tenth of what -rtr copies; one alone if that is soon done."""
    shown = 0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        tenths = 10 * done // total
        if tenths > shown and (total >= GIB or tenths == 10):
            shown = tenths
            note(f"-rtr: {size_text(done)} of {size_text(total)} interleaved ({10 * tenths} %)")

    return progress


def memory_notes(model: Model, settings: RunSettings) -> Iterator[str]:
    """What came of --mlock and -thp."""
    if settings.mlock:
        files = [part.bytes for part in model.file.files]
        problem = lock(model.weights.in_use() if settings.rtr else files)
        yield f"note: --mlock: {problem}" if problem else "mlock: the weights stay in memory"
    if settings.thp:
        yield f"thp: {huge_bytes() / 2**20:.2f} MiB in huge pages so far"


def encode_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    request: Request,
    note: Callable[[str], None],
) -> list[int]:
    """The prompt's tokens: through the chat template, or as raw text after BOS."""
    if template is None:
        if not request.raw:
            without = " and -sys is not used" if request.system else ""
            note(
                "note: the file has no chat template: "
                f"the prompt is continued as it stands{without}"
            )
        return tokenizer.encode_prompt([Piece(request.prompt, special=request.raw)])
    messages = [{"role": "user", "content": request.prompt}]
    if request.system:
        messages.insert(0, {"role": "system", "content": request.system})
    with template:
        pieces = template.render(messages)
        for line in template.notes:
            note(f"note: {line}")
    return tokenizer.encode_prompt(pieces)


def _template(tokenizer: Tokenizer, request: Request) -> ChatTemplate | None:
    source = tokenizer.data.chat_template
    if request.raw or not source:
        return None
    return ChatTemplate(source, tokenizer.bos_text, tokenizer.eos_text, tokenizer.control_texts)


def _path_line(engine: Engine) -> str:
    at = engine.chooser.crossover
    return f"mla: mode {engine.chooser.mla}, prompt batches of {at} tokens and more are expanded"


@contextmanager
def stop_on_signals(engine: Engine) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the step under way within a tile; yields what was received.

    Python runs its handlers only between bytecodes, and a step is one native call: so the bytes
    that its C handler writes to the wakeup socket are read by a thread, which sets the cancel word.
    A second Ctrl-C leaves at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    received: list[int] = []
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while data := reader.recv(1):
            if data[0] not in EXIT_OF_SIGNAL:
                continue
            if received:
                os._exit(EXIT_SIGINT)
            received.append(signal.Signals(data[0]))
            engine.cancel()

    watcher = threading.Thread(target=watch, daemon=True)
    old = {number: signal.signal(number, lambda *_: None) for number in EXIT_OF_SIGNAL}
    old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher.start()
    try:
        yield received
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in old.items():
            signal.signal(number, handler)
        writer.close()
        watcher.join()
        reader.close()
