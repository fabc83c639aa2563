"""Models from Python: `load` one, then generate, stream, look at logits, keep what was evaluated.

    from mlacli import load

    with load("model.gguf", n_ctx=8192, type_k="q8_KV") as model:
        print(model.generate("What does json.dumps do?", temp=0).text)

It is the engine that the command line uses. Nothing is printed: notes are in `notes` and go to the
logger `mlacli`. What a caller can mend is raised as an error of mlacli.errors. See docs/api.md.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from mlacli.api_call import (
    Answer,
    Asked,
    Messages,
    Tokens,
    asked,
    check_kwargs,
    checked_tokens,
    request_of,
    stops_of,
    tokens_of,
)
from mlacli.api_stream import Stream
from mlacli.errors import SessionError, UsageError
from mlacli.generation import Timings, common_length
from mlacli.graph.lower import Lowering
from mlacli.keywords import LoadSettings, SamplingOptions, checked, named, number
from mlacli.limits import Limit
from mlacli.report import buffer_lines
from mlacli.session import Session, open_session
from mlacli.session_file import load_session, save_session
from mlacli.settings import Request, RunSettings, fitted, notes
from mlacli.signals import Interrupts
from mlacli.text.templates import template_source
from mlacli.text.tokenizer import Piece

__all__ = ["Answer", "Model", "Stream", "load"]

LOGGER = logging.getLogger("mlacli")
N_OUT_MAX = 64
Given = str | PathLike[str]


def load(
    path: Given | None = None,
    *,
    n_out_max: int | None = None,
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    kernels: Mapping[str, Lowering] | None = None,
    **settings: Unpack[LoadSettings],
) -> Model:
    """Open a GGUF file (None: the small model that comes with mlacli), ready to answer.

    `settings` are named as the fields of RunSettings. `n_out_max` is how many tokens' logits one
    step can give (default: 64, or `n_ubatch`), which takes 4 bytes x vocabulary each.
    `chat_template` takes the place of the file's: a name or Jinja text, with `template_kwargs` for
    more variables. `kernels` take the place of built-in ones, by op. Raises MlaError.
    """
    model = {} if path is None else {"model": Path(fspath(path))}
    chosen = fitted(**checked(RunSettings, settings, LoadSettings.__annotations__), **model)
    n_out = min(N_OUT_MAX, chosen.n_ubatch)
    if n_out_max is not None:
        n_out = number("n_out_max", n_out_max, int)
        Limit("n_out_max", 1, chosen.n_ubatch).check(n_out)
    check_kwargs(template_kwargs)
    template = None
    if chat_template is not None:
        with named("chat_template", "--chat-template"):
            template = template_source(chat_template)
    request = Request("", talks=True, template=template, template_kwargs=template_kwargs or {})
    said = Notes()
    for line in notes(chosen):
        said.add(line)
    session = open_session(chosen, request, said.add, n_out_max=n_out, kernels=kernels)
    return Model(session, said)


class Notes(list[str]):
    """What may interest the caller, but is no error; the logger gets it, too."""

    def add(self, line: str) -> None:
        line = line.removeprefix("note: ")
        if line not in self:
            self.append(line)
            LOGGER.info(line)


class Model:
    """A model ready to answer; made by `load`. Use it as a context manager or call `close`.

    One call at a time: another one meanwhile, from another thread, raises UsageError. Ctrl-C during
    a call of the main thread ends it with KeyboardInterrupt, and the model can be used again.
    """

    def __init__(self, session: Session, said: Notes) -> None:
        engine = session.engine
        self.notes, self.n_ctx, self.n_vocab = said, engine.n_ctx, session.model.config.n_vocab
        self.path, self.settings = session.model.file.path, engine.settings
        data = session.tokenizer.data
        self.bos = data.bos if data.add_bos else None  # what the file asks texts to begin with
        self._session: Session | None = session
        self._interrupts = Interrupts(engine.pool)
        self._lock = threading.Lock()
        self._guard = threading.RLock()  # a signal handler may ask for a cancel within
        self._running = self._stopped = False
        self._call: Asked | None = None  # the last one that was begun
        self._release = weakref.finalize(self, _release, session, self._interrupts)
        try:
            with self._interrupts:
                session.take_weights(said.add)
        except BaseException:
            self._release()
            raise

    def __repr__(self) -> str:
        state = f"n_ctx={self.n_ctx}, mla={self.settings.mla}" if self._session else "closed"
        return f"<Model {self.path.name}: {state}>"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back threads, memory and the template's process. May be called again."""
        if self._session is not None:
            with self._used():
                self._session = self._call = None
            self._release()

    # -- text -----------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        system: str = "",
        raw: bool = False,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        grammar: str | None = None,
        json_schema: str | Mapping[str, Any] | None = None,
        regex: str | None = None,
        context_shift: bool = False,
        keep: int = 0,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """The answer to a prompt, or to a conversation (dicts with `role` and `content`).

        A prompt goes through the chat template, behind the message `system`; with `raw` it is
        continued as it stands. The answer ends where the model ends it, at a text of `stop` (which
        is left out), after `max_tokens` or with the context, unless `context_shift` drops the
        oldest half of it but for `keep` tokens. It keeps to a `grammar` (GBNF), a `json_schema`
        (text or dict) or a `regex`. `sampling` is named as the fields of SamplingSettings.

        What the cache holds of the prompt is not evaluated again. Raises MlaError.
        """
        with self._guard:
            self._stopped = False
        stream = self.stream(
            prompt, messages=messages, system=system, raw=raw, max_tokens=max_tokens, stop=stop,
            grammar=grammar, json_schema=json_schema, regex=regex, context_shift=context_shift,
            keep=keep, **sampling,
        )  # fmt: skip
        with self._guard:
            self._call = stream.call  # from here on `cancel` ends this one
            if self._stopped:
                stream.close()
        return stream.rest()

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        system: str = "",
        raw: bool = False,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        grammar: str | None = None,
        json_schema: str | Mapping[str, Any] | None = None,
        regex: str | None = None,
        context_shift: bool = False,
        keep: int = 0,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream:
        """The same piece by piece: an iterator of text, whose `answer` grows along.

        What is wrong with the arguments is raised at once; the prompt is evaluated when the first
        piece is asked for. It may be left or closed early.
        """
        request = request_of(
            prompt, raw=raw, system=system, max_tokens=max_tokens, context_shift=context_shift,
            keep=keep, sampling=sampling,
            grammars={"grammar": grammar, "json_schema": json_schema, "regex": regex},
        )  # fmt: skip
        stops, said = stops_of(stop), Notes()
        with self._used() as session:
            tokens = tokens_of(session, request, messages, said.add)
            return Stream(self, asked(session, request, tokens, stops, said.add, said))

    # -- tokens ---------------------------------------------------------------------------------

    def tokenize(self, text: str, *, special: bool = False, add_bos: bool = True) -> list[int]:
        """Token ids of a text, behind BOS if the file asks for one and `add_bos`.

        With `special`, control tokens spelled out in the text become these tokens. Raises
        UsageError for bytes (surrogate escapes) that the model has no token for.
        """
        tokenizer, pieces = self._open().tokenizer, [Piece(text, special)]
        return tokenizer.encode_prompt(pieces) if add_bos else tokenizer.encode_pieces(pieces)

    def detokenize(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Their text; control tokens are left out unless `special`. Bytes that are no UTF-8 become
        U+FFFD. Raises ModelError for a token outside the vocabulary."""
        ids = [number("tokens", token, int) for token in tokens]
        return self._open().tokenizer.decode(ids, special).decode("utf-8", "replace")

    def logits(
        self, tokens: Tokens, *, every: bool = False, first: int = 0
    ) -> npt.NDArray[np.float32]:
        """Logits behind the last of these tokens, (n_vocab,); a copy.

        With `every`, those behind each token from number `first` on, one row each: all are
        evaluated anew, `n_out_max` wanted ones at a time. Else what the cache holds of them is
        reused. Raises UsageError, and Cancelled after `cancel`.
        """
        with self._used() as session:
            found = checked_tokens(session, tokens, "tokens", self.n_ctx)
            Limit("first", 0, len(found) - 1).check(number("first", first, int))
            generator = session.generator
            generator.timings = Timings()  # those of an answer are its own
            reused = 0 if every else min(common_length(generator.tokens, found), len(found) - 1)
            self._call = None
            for line in session.prepare(len(found) - reused):
                self.notes.add(line)
            with self._interrupts:
                return (generator.every(found, first) if every else generator.prompt(found)).copy()

    # -- what the cache holds -------------------------------------------------------------------

    @property
    def tokens(self) -> list[int]:
        """The tokens that the cache holds: prompts that begin alike are evaluated from there on."""
        return list(self._open().generator.tokens)

    def clear(self) -> None:
        """Forget what was evaluated."""
        with self._used() as session:
            self._call = None
            session.generator.forget()

    def save_session(self, path: Given) -> int:
        """Write what the cache holds to a file, as --prompt-cache does; returns its bytes.

        Raises UsageError when it holds nothing, SpaceError when the file cannot be written.
        """
        with self._used() as session, named("save_session", "--prompt-cache"):
            tokens = session.generator.tokens
            if not tokens:
                raise UsageError("nothing has been evaluated yet")
            return save_session(Path(fspath(path)), session.engine, tokens)

    def load_session(self, path: Given) -> int:
        """Take from a file what the cache is to hold; returns the number of tokens.

        Raises SessionError when it is missing, damaged or belongs to another model or other
        settings: then the cache is empty.
        """
        with self._used() as session, named("load_session", "--prompt-cache"):
            self._call = None
            session.generator.forget()
            found = load_session(Path(fspath(path)), session.engine)
            if found is None:
                raise SessionError(f"{fspath(path)}: there is no such file")
            session.generator.tokens = found
            return len(found)

    # -- what it is made of ---------------------------------------------------------------------

    def report(self) -> str:
        """What it takes: the lines that the command line prints before it runs."""
        session = self._open()
        return "\n".join(buffer_lines(session.engine.plan, self.settings))

    def kernels(self, n_tokens: int = 1) -> dict[str, tuple[str, ...]]:
        """Names of the kernels that evaluate each node of a batch of so many tokens."""
        Limit("n_tokens", 1, self.settings.n_ubatch).check(number("n_tokens", n_tokens, int))
        with self._used() as session:
            program = session.engine.program(session.engine.graph_name(n_tokens))
            found: dict[str, tuple[str, ...]] = {}
            for node, symbol in zip(program.nodes, program.symbols, strict=True):
                found[node.name] = (*found.get(node.name, ()), symbol)
            return found

    def cancel(self) -> None:
        """End the call under way, from any thread: an answer then has what came so far, `logits`
        raises Cancelled. Nothing happens when there is none."""
        with self._guard:
            self._stopped = True
            if self._call is not None:
                self._call.cancelled = True
            if self._running and self._session is not None:
                self._session.engine.cancel()

    # -- one call at a time ---------------------------------------------------------------------

    def _open(self) -> Session:
        if self._session is None:
            raise UsageError("the model is closed")
        return self._session

    @contextmanager
    def _used(self) -> Iterator[Session]:
        """Nobody else uses the model within. Raises UsageError when somebody does."""
        if not self._lock.acquire(blocking=False):
            raise UsageError("the model is busy: another thread's call has not ended")
        try:
            session = self._open()
            with self._guard:
                self._running = True
            try:
                yield session
            finally:
                with self._guard:
                    self._running = False
                    session.engine.pool.clear_cancel()
        finally:
            self._lock.release()


def _release(session: Session, interrupts: Interrupts) -> None:
    session.close()
    interrupts.close()
    session.engine.pool.close()
