"""One prompt answered: text in, streamed text out, with llama-cli's start-up lines and timings."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from codegen.jit import Jit
from mlacli.answer import Output, prompt_lines, result_of
from mlacli.engine import Cancelled, Engine, Logits, Model
from mlacli.errors import UsageError
from mlacli.generation import (
    Generator,
    Timings,
    common_length,
    thought_budget,
    token_counter,
)
from mlacli.graph.lower import Lowering
from mlacli.loading import memory_notes, progress_lines, start_engine, watched_load
from mlacli.machine import make_jit, measure_peaks
from mlacli.profile import Profiles
from mlacli.profile_table import profile_lines
from mlacli.progress import Watch, unwatched
from mlacli.prompts import encode_prompt, open_template
from mlacli.reply import Reply
from mlacli.report import buffer_lines, context_size, repack_notes
from mlacli.sampling_settings import sampling_lines
from mlacli.session_file import load_session, save_session
from mlacli.settings import Request, RunSettings
from mlacli.signals import EXIT_OF_SIGNAL, stop_on_signals
from mlacli.text.chat import ChatTemplate
from mlacli.text.grammar import Constraint
from mlacli.text.reasoning import Spoken, ends_in_a_thought
from mlacli.text.sampling import Sampler
from mlacli.text.stops import Stops
from mlacli.text.tokenizer import Tokenizer
from mlacli.text.vocabulary import tokenizer_data
from mlacli.units import size_text

UNTIL_FULL = -2


@dataclass
class Session:
    """A model ready to answer. Use it as a context manager or call `close`."""

    model: Model
    tokenizer: Tokenizer
    template: ChatTemplate | None
    generator: Generator
    jit: Jit
    request: Request
    watch: Watch = unwatched
    has_template: bool = True  # the file's or the request's, not the fallback

    @property
    def engine(self) -> Engine:
        return self.generator.engine

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the template's process."""
        if self.template is not None:
            self.template.close()

    def announce(self, note: Callable[[str], None]) -> None:
        """Interleave weights if wanted, and say what is about to run. Raises SpaceError."""
        engine, request, settings = self.engine, self.request, self.engine.settings
        for line in buffer_lines(engine.plan, settings):
            note(line)
        self.take_weights(note)
        if settings.verbose:
            note(_path_line(engine))
        for line in sampling_lines(request.sampling, self.generator.sampler.seed):
            note(line)
        note(
            f"generate: n_ctx = {engine.n_ctx}, n_batch = {settings.n_batch}, "
            f"n_predict = {request.n_predict}"
        )

    def take_weights(self, note: Callable[[str], None]) -> None:
        """Interleave and lock them if wanted. Raises SpaceError, Cancelled."""
        engine, settings, lines = self.engine, self.engine.settings, progress_lines(note)
        for line in repack_notes(engine.plan, settings):
            note(f"note: {line}")
        with self.watch("interleaving weights", "bytes") as bar:

            def progress(done: int, total: int) -> None:
                bar(done, total)
                lines(done, total)

            engine.repack(progress)
        for line in memory_notes(self.model, settings):
            note(line)

    def prepare(self, n_prompt: int = 1) -> list[str]:
        """Compile what evaluates a prompt of so many new tokens and what follows; notes on it."""
        engine, n = self.engine, max(1, min(n_prompt, self.engine.plan.n_tokens_max))
        with self.watch("compiling", "kernels") as progress:
            engine.prepare(engine.graph_name(n), engine.graph_name(1), progress=progress)
        return [*self.jit.notes, *engine.pool.notes]

    def evaluate(self, tokens: Sequence[int], note: Callable[[str], None]) -> Logits:
        """Logits behind a prompt, what is cached of it reused. Raises SpaceError, Cancelled."""
        if self.request.verbose_prompt:
            for line in prompt_lines(self.tokenizer, tokens):
                note(line)
        with self.watch("prompt", "tokens") as progress:
            return self.generator.prompt(tokens, progress)

    def warm_up(self) -> None:
        """With --warmup, evaluate one token and forget it. Raises Cancelled."""
        if self.request.warmup:
            self.engine.eval([self.tokenizer.bos or 0], [0])
            self.engine.cache.clear()

    def save(self) -> None:
        """Write --prompt-cache, unless it is only read or there is nothing to write. Raises
        SpaceError."""
        path = self.request.prompt_cache
        if path is not None and not self.request.prompt_cache_ro and self.generator.tokens:
            with self.watch("saving the session", "bytes") as progress:
                save_session(path, self.engine, self.generator.tokens, progress)

    def restore(self, tokens: Sequence[int], note: Callable[[str], None]) -> None:
        """Read --prompt-cache, for a prompt of these tokens. Raises SessionError."""
        path = self.request.prompt_cache
        if path is None:
            return
        with self.watch("reading the session", "bytes") as progress:
            found = load_session(path, self.engine, progress)
        if found is None:
            note(f"session file: {path} does not exist, it will be created")
            return
        self.generator.tokens = found
        n, size = common_length(found, tokens), size_text(path.stat().st_size)
        note(f"session file: {path} ({size}) holds {len(found)} tokens")
        if tokens and n == len(tokens):
            note("session file: exact match for the prompt")
        elif tokens:
            only = "only " if n < len(tokens) / 2 else ""
            note(f"session file: {only}{n} of the prompt's {len(tokens)} tokens can be reused")


def open_session(
    settings: RunSettings,
    request: Request,
    note: Callable[[str], None],
    *,
    profiles: Profiles | None = None,
    watch: Watch = unwatched,
    n_out_max: int = 1,
    kernels: Mapping[str, Lowering] | None = None,
) -> Session:
    """Load a model and get everything ready; `n_out_max` and `kernels` are the engine's.

    Raises MlaError.
    """
    timings = Timings()
    model = watched_load(settings, watch)
    data = tokenizer_data(model.file.metadata, str(settings.model))
    tokenizer = Tokenizer(data, model.config.n_vocab)
    constraint = Constraint(request.grammar, tokenizer) if request.grammar else None
    with contextlib.ExitStack() as undo:
        template = open_template(
            tokenizer, request, str(settings.model)
        )  # its process starts up meanwhile
        if template is not None:
            undo.callback(template.close)
        for line in model.notes:
            note(f"note: {line}")
        n_ctx = context_size(model.config, settings, note=note)
        jit = make_jit()
        engine = start_engine(model, settings, jit, n_ctx, n_out_max=n_out_max, kernels=kernels)
        undo.callback(engine.pool.close)
        end_ids = () if constraint else tokenizer.end_ids
        generator = Generator(
            engine,
            Sampler(request.sampling, model.config.n_vocab, end_ids, tokenizer.piece),
            timings,
            profiles,
            constraint=constraint,
            budget=None if constraint else thought_budget(request, tokenizer),
            counted=token_counter(request.token_count, n_ctx, note),
        )
        undo.pop_all()  # all went well
    known = bool(request.template or data.chat_template)
    return Session(model, tokenizer, template, generator, jit, request, watch, known)


def run_prompt(
    settings: RunSettings,
    request: Request,
    *,
    output: Output,
    note: Callable[[str], None],
    watch: Watch = unwatched,
    profile: bool = False,
) -> int:
    """Answer one prompt; the exit code tells whether a signal ended it. Raises MlaError."""
    profiles = Profiles() if profile else None
    with open_session(settings, request, note, profiles=profiles, watch=watch) as session:
        engine, timings = session.engine, session.generator.timings
        tokens = prompt_tokens(session, note)
        session.announce(note)
        session.warm_up()
        session.restore(tokens, note)
        n_new = len(tokens) - common_length(session.generator.tokens, tokens)
        for line in session.prepare(n_new):
            note(f"note: {line}")
        ready = time.perf_counter()
        reply = reply_to(session, tokens, Stops(request.reverse_prompt, shown=True))
        timings.load = ready - timings.started
        if request.display_prompt:
            prompt = session.tokenizer.decode(tokens, special=True)
            output.prompt(prompt.decode(errors="replace"))
        with stop_on_signals(engine) as received:
            with contextlib.suppress(Cancelled):
                _answer(session, tokens, reply, output, note)
        output.end(result_of(reply, tokens, ready=ready, ids=request.json_tokens))
        if request.prompt_cache_all:
            session.save()
    for line in timings.lines() if request.show_timings else ():
        note(line)
    for line in _profiled(profiles, engine, session.jit) if profiles else ():
        note(line)
    return EXIT_OF_SIGNAL[received[0]] if received else 0


def _answer(
    session: Session,
    tokens: Sequence[int],
    reply: Reply,
    output: Output,
    note: Callable[[str], None],
) -> None:
    """Evaluate the prompt, then sample until there is a reason to end. Raises Cancelled."""
    logits = session.evaluate(tokens, note)
    if not session.request.prompt_cache_all:
        session.save()
    for token, text in reply.pieces(logits):
        output.piece(token, text)


def reply_to(session: Session, tokens: Sequence[int], stops: Stops) -> Reply:
    """The answer that the request asks for, behind a prompt of these tokens."""
    generator, request = session.generator, session.request
    generator.keep = _kept(session, len(tokens))
    if generator.constraint:
        generator.constraint.restart()
    hides = request.reasoning == "off" and request.reasoning_format in ("auto", "deepseek")
    inside = hides and ends_in_a_thought(tokens, session.tokenizer.piece)
    return Reply(
        generator,
        session.tokenizer,
        request.limit,
        stops,
        ignores_end=request.n_predict == UNTIL_FULL,  # it fills the context
        special=request.special,
        says_special=not request.talks,
        # a conversation keeps its thoughts; they are hidden where it is shown
        spoken=Spoken(inside=inside) if hides and not request.talks else None,
    )


def _kept(session: Session, n_prompt: int) -> int | None:
    """What a context shift keeps in front, if there is to be one: --keep, and BOS in any case."""
    request = session.request
    if not request.context_shift or request.n_predict == UNTIL_FULL:
        return None
    n = n_prompt if request.keep < 0 else min(request.keep, n_prompt)
    return max(n, int(session.tokenizer.data.add_bos))


def prompt_tokens(session: Session, note: Callable[[str], None]) -> list[int]:
    """The request's prompt: through the chat template, or as raw text after BOS.

    Raises UsageError when the context has no room for it; at once when its length alone says so.
    """
    request, n_ctx = session.request, session.engine.n_ctx
    least = session.tokenizer.minimum_tokens(request.prompt)
    if least >= n_ctx:
        raise UsageError(_too_long(f"at least {least}", n_ctx))
    tokens = encode_prompt(session.tokenizer, session.template, request, note)
    if len(tokens) >= n_ctx:
        raise UsageError(_too_long(str(len(tokens)), n_ctx))
    return tokens


def _too_long(n: str, n_ctx: int) -> str:
    return f"the prompt has {n} tokens, more than -c {n_ctx} leaves room for (limit {n_ctx - 1})"


def _profiled(profiles: Profiles, engine: Engine, jit: Jit) -> Iterator[str]:
    """Where the time went, beside what this machine can do now."""
    settings, layout = engine.settings, engine.plan.layout
    threads = {"prompt": settings.n_threads_batch, "generation": settings.n_threads}
    peaks = {n: measure_peaks(jit, engine.pool, n) for n in set(threads.values())}
    for part, n in threads.items():
        profile = getattr(profiles, part)
        yield from profile_lines(part, profile, layout, peaks[n], by_layer=settings.verbose)


def _path_line(engine: Engine) -> str:
    at = engine.chooser.crossover
    return f"mla: mode {engine.chooser.mla}, prompt batches of {at} tokens and more are expanded"
