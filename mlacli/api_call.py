"""One call of the API's `generate` or `stream`: what it asks for, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlacli.engine import Cancelled
from mlacli.errors import UsageError
from mlacli.generation import Timings
from mlacli.keywords import SamplingOptions, checked, named, number
from mlacli.limits import Limit
from mlacli.prompts import NO_TEMPLATE, encode_prompt, rendered
from mlacli.reply import Finish, Reply
from mlacli.sampling_settings import MAX_INT, SamplingSettings
from mlacli.session import Session, reply_to
from mlacli.settings import Grammar, Request, notes
from mlacli.text.grammar import Constraint
from mlacli.text.sampling import Sampler
from mlacli.text.stops import Stops

Messages = Sequence[Mapping[str, str]]
Note = Callable[[str], None]
Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]
# keyword: kind of grammar
_GRAMMARS = {"grammar": "gbnf", "json_schema": "json", "regex": "regex"}
# The sampler has one list of names here; the letters are the command line's.
_SAMPLING = SamplingOptions.__annotations__


@dataclass(frozen=True)
class Answer:
    """What came of a prompt.

    `finish` says what ended it: `end` the model, `grammar` its end, `stop` a stop text, `length`
    max_tokens, `context` a full context, `cancelled` a cancel or an early close; None: nothing yet.
    `tokens` are the ones generated, without the end token. `timings` are seconds and counts.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish | Literal["cancelled"] | None
    n_prompt: int
    seed: int
    timings: Timings
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text


def request_of(
    prompt: str | None,
    *,
    raw: bool,
    system: str,
    max_tokens: int | None,
    context_shift: bool,
    keep: int,
    grammars: Mapping[str, str | Mapping[str, Any] | None],
    sampling: Mapping[str, Any],
) -> Request:
    """The request that keywords make. Raises UsageError."""
    n_predict = -1
    if max_tokens is not None:
        n_predict = number("max_tokens", max_tokens, int)
        Limit("max_tokens", 0, MAX_INT).check(n_predict)
    flags = {"raw": raw, "system": system, "context_shift": context_shift, "keep": keep}
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise UsageError(f"prompt: {str(prompt)[:40]!r} is not a text of one character or more")
    return Request(
        prompt or "",
        talks=prompt is None,
        n_predict=n_predict,
        grammar=_grammar(grammars),
        sampling=SamplingSettings(**checked(SamplingSettings, sampling, _SAMPLING)),
        **checked(Request, flags, flags),
    )


def _grammar(given: Mapping[str, str | Mapping[str, Any] | None]) -> Grammar | None:
    found = []
    for name, value in given.items():
        if isinstance(value, Mapping) and name == "json_schema":
            try:
                value = json.dumps(value)
            except (TypeError, ValueError, RecursionError) as problem:
                raise UsageError(f"{name}: is not JSON ({problem})") from problem
        if value is not None:
            if not isinstance(value, str):
                raise UsageError(f"{name}: {str(value)[:40]!r} is not a text")
            found.append(Grammar(_GRAMMARS[name], value, name))
    if len(found) > 1:
        raise UsageError(f"{found[0].flag} and {found[1].flag}: give one of them, not both")
    return found[0] if found else None


def check_kwargs(given: Mapping[str, Any] | None) -> None:
    """Raises UsageError for template variables that are no dict or not JSON."""
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(f"template_kwargs: {str(given)[:40]!r} is not a dict")
    try:
        json.dumps(dict(given or {}))
    except (TypeError, ValueError, RecursionError) as problem:
        raise UsageError(f"template_kwargs: is not JSON ({problem})") from problem


def stops_of(stop: str | Sequence[str]) -> Stops:
    """The texts that end an answer. Raises UsageError."""
    if not isinstance(stop, Sequence):
        raise UsageError(f"stop: {str(stop)[:40]!r} is neither a text nor a list of texts")
    texts = [stop] if isinstance(stop, str) else list(stop)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise UsageError(f"stop: {str(text)[:40]!r} is not a text of one character or more")
    return Stops(texts)


def tokens_of(
    session: Session, request: Request, messages: Messages | None, note: Note
) -> list[int]:
    """The prompt's tokens. Raises UsageError also when the context has no room for it."""
    if bool(request.prompt) == (messages is not None):
        raise UsageError("prompt and messages: give one of them")
    room = session.engine.n_ctx - 1  # a token at least is to follow
    if messages is not None:
        tokens = _chat_tokens(session, request, messages, note)
        return checked_tokens(session, tokens, "messages", room)
    template = None if request.raw or not session.has_template else session.template
    tokens = encode_prompt(session.tokenizer, template, request, note)
    return checked_tokens(session, tokens, "prompt", room)


def _chat_tokens(session: Session, request: Request, messages: Messages, note: Note) -> list[int]:
    if request.raw:
        raise UsageError("messages: need the chat template, which raw leaves out")
    for i, message in enumerate(messages):
        texts = isinstance(message, Mapping) and all(
            isinstance(message.get(name), str) for name in ("role", "content")
        )
        if not texts:
            raise UsageError(f"messages: number {i} is not a dict with texts as role and content")
    if not messages:
        raise UsageError("messages: there are none")
    given = list(messages)
    if request.system:
        if given[0]["role"] == "system":
            raise UsageError("system: messages begin with a system message already")
        given.insert(0, {"role": "system", "content": request.system})
    if not session.has_template:
        note(NO_TEMPLATE)
    assert session.template is not None
    return session.tokenizer.encode_prompt(rendered(session.template, given, note))


def checked_tokens(session: Session, tokens: Tokens, name: str, most: int) -> list[int]:
    """As Python's own numbers. Raises UsageError for none, too many, or one that is not known."""
    n_vocab, found = session.model.config.n_vocab, np.asarray(tokens)
    if not found.size:
        raise UsageError(f"{name}: there are no tokens")
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise UsageError(f"{name}: these are not whole numbers in a row")
    if len(found) > most:
        n_ctx = session.engine.n_ctx
        raise UsageError(f"{name}: {len(found)} tokens do not fit n_ctx {n_ctx} (limit {most})")
    wrong = found[(found < 0) | (found >= n_vocab)]
    if wrong.size:
        raise UsageError(f"{name}: {wrong[0]} is outside the vocabulary (0 to {n_vocab - 1})")
    listed: list[int] = found.tolist()
    return listed


@dataclass
class Asked:
    """A call under way; nothing is evaluated before the first `piece`."""

    session: Session
    request: Request
    tokens: list[int]
    stops: Stops
    sampler: Sampler
    constraint: Constraint | None
    note: Note
    notes: Sequence[str]
    timings: Timings = field(default_factory=Timings)
    cancelled: bool = False
    _reply: Reply | None = None
    _pieces: Iterator[tuple[int | None, str]] | None = None

    @property
    def begun(self) -> bool:
        return self._pieces is not None

    def piece(self) -> str | None:
        """What the answer goes on with; None at its end, also after `Engine.cancel`."""
        try:
            if self._pieces is None:
                self._pieces = self._begin()
            return next((text for _, text in self._pieces if text), None)
        except Cancelled:
            self.cancelled = True
            return None

    def _begin(self) -> Iterator[tuple[int | None, str]]:
        session, generator = self.session, self.session.generator
        session.request, generator.timings = self.request, self.timings
        generator.sampler, generator.constraint = self.sampler, self.constraint
        logits = generator.prompt(self.tokens)
        self._reply = reply_to(session, self.tokens, self.stops)
        return self._reply.pieces(logits)

    @property
    def answer(self) -> Answer:
        """What has come so far."""
        finish = self._reply.finish if self._reply else None
        return Answer(
            text=self._reply.text if self._reply else "",
            tokens=tuple(self._reply.tokens) if self._reply else (),
            finish=finish or ("cancelled" if self.cancelled else None),
            n_prompt=len(self.tokens),
            seed=self.sampler.seed,
            timings=self.timings,
            notes=tuple(self.notes),
        )


def asked(
    session: Session,
    request: Request,
    tokens: list[int],
    stops: Stops,
    note: Note,
    said: Sequence[str],
) -> Asked:
    """A call, all of it checked; `note` adds to what was `said`. Raises UsageError."""
    before = notes(session.engine.settings)
    for line in notes(session.engine.settings, request):
        if line not in before:
            note(line)
    tokenizer, config = session.tokenizer, session.model.config
    constraint = Constraint(request.grammar, tokenizer) if request.grammar else None
    end_ids = () if constraint else tokenizer.end_ids
    with named("logit_bias", "-l"):
        sampler = Sampler(request.sampling, config.n_vocab, end_ids, tokenizer.piece)
    return Asked(session, request, tokens, stops, sampler, constraint, note, said)
