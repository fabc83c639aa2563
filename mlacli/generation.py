"""Tokens in, tokens out: a context that knows what it holds and evaluates only what is new."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlacli.engine import Engine, Logits
from mlacli.profile import Profiles
from mlacli.progress import Progress
from mlacli.settings import Request
from mlacli.text.grammar import Constraint
from mlacli.text.reasoning import END, Budget
from mlacli.text.sampling import Sampler
from mlacli.text.tokenizer import Piece, Tokenizer


@dataclass
class Timings:
    """Seconds and counts of one answer."""

    load: float = 0.0
    sample: float = 0.0
    n_sample: int = 0
    prompt: float = 0.0
    n_prompt: int = 0
    n_shifts: int = 0  # times that the context was full
    n_reused: int = 0  # tokens of the prompt that the cache held already
    generate: float = 0.0
    n_generate: int = 0
    started: float = field(default_factory=time.perf_counter)

    def lines(self) -> list[str]:
        """llama-cli's closing lines."""
        total = time.perf_counter() - self.started
        found = [
            f"llama_print_timings:        load time = {1e3 * self.load:10.2f} ms",
            _line("sample time", self.sample, self.n_sample, "runs  "),
            _line("prompt eval time", self.prompt, self.n_prompt, "tokens"),
            _line("eval time", self.generate, self.n_generate, "runs  "),
            f"llama_print_timings:       total time = {1e3 * total:10.2f} ms / "
            f"{self.n_prompt + self.n_generate:5d} tokens",
        ]
        if self.n_reused:
            found.append(f"llama_print_timings:    reused tokens = {self.n_reused}")
        if self.n_shifts:
            found.append(f"llama_print_timings:   context shifts = {self.n_shifts}")
        return found

    def short(self) -> str:
        """llama-cli's line after an answer, and how much of the conversation was reused."""
        reused = f" ({self.n_reused} reused)" if self.n_reused else ""
        return (
            f"[ Prompt: {self.n_prompt} tokens{reused}, {_rate(self.n_prompt, self.prompt)} | "
            f"Generation: {self.n_generate} tokens, {_rate(self.n_generate, self.generate)} ]"
        )


def _rate(n: int, seconds: float) -> str:
    return f"{n / seconds:.1f} t/s" if seconds > 0 else "-"


def _line(what: str, seconds: float, n: int, unit: str) -> str:
    ms = 1e3 * seconds
    each, rate = (ms / n, n / seconds) if n and seconds else (0.0, 0.0)
    return (
        f"llama_print_timings: {what:>16} = {ms:10.2f} ms / {n:5d} {unit} "
        f"({each:8.2f} ms per token, {rate:8.2f} tokens per second)"
    )


# Why a stream ends by itself: its limit, a full context, the constraint.
Reason = Literal["length", "context", "grammar"]


@dataclass
class Generator:
    """One sequence. `tokens` are those that the cache holds."""

    engine: Engine
    sampler: Sampler
    timings: Timings = field(default_factory=Timings)
    profiles: Profiles | None = None
    tokens: list[int] = field(default_factory=list)
    constraint: Constraint | None = None
    keep: int | None = None  # tokens that a context shift keeps in front; None: no shift
    ended: Reason = "length"  # why the last stream ended by itself
    budget: Budget | None = None  # of thoughts
    counted: Callable[[int], None] | None = None  # is told how many tokens the context holds

    def prompt(self, tokens: Sequence[int], progress: Progress | None = None) -> Logits:
        """Logits behind these tokens, of which there is at least one; `progress` is told tokens.

        What the cache holds of them is reused, and the rest of it forgotten; the last token is
        evaluated in any case. Raises SpaceError, Cancelled: then `tokens` are those that came in.
        """
        n = min(common_length(self.tokens, tokens), len(tokens) - 1)
        last: Logits = self._evaluated(tokens, n, [len(tokens) - n - 1], progress)[-1]
        return last

    def every(self, tokens: Sequence[int], first: int = 0) -> Logits:
        """Logits behind each of these tokens from number `first` on, all evaluated anew.

        As many at a time as the engine has planned outputs for. Raises as `prompt` does.
        """
        return self._evaluated(tokens, 0, range(first, len(tokens)))

    def forget(self) -> None:
        """Empty the cache."""
        self.engine.cache.clear()
        self.tokens = []

    def _evaluated(
        self,
        tokens: Sequence[int],
        n: int,
        wanted: Sequence[int],
        progress: Progress | None = None,
    ) -> Logits:
        """Logits of the tokens `wanted`, counted behind the first n, which the cache holds."""
        engine, timings = self.engine, self.timings
        self.tokens = list(tokens[:n])
        engine.cache.truncate(0, n)
        self.sampler.rewind(n)
        for token in tokens[self.sampler.position :]:
            self.sampler.accept(token)
        engine.profile = self.profiles.prompt if self.profiles else None
        timings.n_reused += n
        start = time.perf_counter()
        try:
            logits = engine.eval(
                tokens[n:], range(n, len(tokens)), wanted=wanted, progress=progress
            )
        finally:
            self.tokens = list(tokens[: engine.cache.n_used])
            timings.prompt += time.perf_counter() - start
            timings.n_prompt += len(self.tokens) - n
        if self.budget:
            self.budget.begin(tokens)
        return logits

    def stream(self, logits: Logits, limit: int) -> Iterator[int]:
        """Up to `limit` tokens, drawn one after another; each but the last is evaluated when the
        next one is asked for. Raises Cancelled."""
        engine, timings = self.engine, self.timings
        engine.profile = self.profiles.generation if self.profiles else None
        room = engine.n_ctx - len(self.tokens) + 1
        self.ended = "length"
        if self.keep is None and room < limit:
            self.ended, limit = "context", room
        for left in reversed(range(limit)):
            start = time.perf_counter()
            allowed = self.constraint.allowed() if self.constraint else None
            forced = self.budget.forced if self.budget else None
            token = self.sampler.sample(logits, allowed) if forced is None else forced
            self.sampler.accept(token)
            if self.budget:
                self.budget.accept(token)
            goes_on = self.constraint is None or self.constraint.accept(token)
            timings.sample += time.perf_counter() - start
            timings.n_sample += 1
            yield token
            if not goes_on:
                self.ended = "grammar"
                return
            if left:
                start = time.perf_counter()
                if len(self.tokens) == engine.n_ctx:
                    self._shift(token)
                logits = engine.eval([token], [len(self.tokens)])[-1]
                timings.generate += time.perf_counter() - start
                timings.n_generate += 1
                self.tokens.append(token)
                if self.counted:
                    self.counted(len(self.tokens))

    def _shift(self, next_token: int) -> None:
        """Make room: half of what may go goes, the oldest first."""
        assert self.keep is not None
        first = min(self.keep, len(self.tokens) - 2)
        n = max(1, (len(self.tokens) - first) // 2)
        tokens, self.tokens = self.tokens, []
        self.engine.shift(first, n)
        self.tokens = tokens[:first] + tokens[first + n :]
        self.timings.n_shifts += 1
        self.sampler.rewind(first)
        for token in (*self.tokens[first:], next_token):
            self.sampler.accept(token)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists begin with alike."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def thought_budget(request: Request, tokenizer: Tokenizer) -> Budget | None:
    """What ends thoughts, with --reasoning-budget."""
    if request.reasoning_budget < 0:
        return None
    closing = [Piece(request.reasoning_message, special=False), Piece(END, special=True)]
    return Budget(request.reasoning_budget, tokenizer.encode_pieces(closing), tokenizer.piece)


def token_counter(
    every: int, n_ctx: int, note: Callable[[str], None]
) -> Callable[[int], None] | None:
    """With -ptc, says now and then how many tokens the context holds."""
    if every <= 0:
        return None

    def counted(n: int) -> None:
        if n % every == 0:
            note(f"tokens consumed so far = {n} / {n_ctx}")

    return counted
