"""A conversation: messages, answers that reuse what the cache holds, chat logs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlacli.errors import SessionError, SpaceError, UsageError
from mlacli.files import write_whole
from mlacli.generation import common_length
from mlacli.prompts import rendered
from mlacli.session import Session, reply_to
from mlacli.text.reasoning import opens_a_thought
from mlacli.text.stops import Stops

ROLES = ("system", "user", "assistant")
_MAX_LOG = 64 << 20
_FORMAT = "mlacli chat 1"


@dataclass
class Conversation:
    """Messages so far; the last answer is there as soon as it ends, also when it was stopped."""

    session: Session
    note: Callable[[str], None]
    messages: list[dict[str, str]] = field(default_factory=list)
    in_thought: bool = False  # the template lets the answer begin within a thought

    def set_system(self, text: str) -> None:
        """Put another system message in front; none if it is empty."""
        if self.messages and self.messages[0]["role"] == "system":
            del self.messages[0]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def ask(self, text: str) -> Iterator[str]:
        """The answer to a message, piece by piece. Raises Cancelled, MlaError."""
        self.messages.append({"role": "user", "content": text})
        return self._answer(self._fitting())

    def ask_again(self) -> Iterator[str]:
        """Another answer to the last message. Raises UsageError if there is none."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            raise UsageError("there is no message to answer again")
        return self._answer(self._fitting())

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]

    def _answer(self, tokens: list[int]) -> Iterator[str]:
        session, request = self.session, self.session.request
        reply = reply_to(session, tokens, Stops(request.reverse_prompt, shown=True))
        try:
            session.prepare(len(tokens) - common_length(session.generator.tokens, tokens))
            for _, text in reply.pieces(session.evaluate(tokens, self.note)):
                yield text
        finally:
            if reply.text:
                self.messages.append({"role": "assistant", "content": reply.text})

    def _fitting(self) -> list[int]:
        """The conversation's tokens; its oldest turns are forgotten when it has become too long."""
        room, template = self.session.engine.n_ctx - 1, self.session.template
        assert template is not None
        while True:
            pieces = rendered(template, self.messages, self.note)
            tokens = self.session.tokenizer.encode_prompt(pieces)
            self.in_thought = opens_a_thought("".join(piece.text for piece in pieces))
            if len(tokens) <= room:
                return tokens
            first = int(self.messages[0]["role"] == "system")
            turns = [i for i, m in enumerate(self.messages) if m["role"] == "user" and i > first]
            if not turns:
                self.messages.pop()
                raise UsageError(
                    f"the message has {len(tokens)} tokens, more than -c "
                    f"{self.session.engine.n_ctx} leaves room for (limit {room})"
                )
            del self.messages[first : turns[0]]
            self.note("note: the context is full: the oldest turn is forgotten")


# -- logs -----------------------------------------------------------------------------------------


def save_log(path: Path, messages: list[dict[str, str]]) -> None:
    """Write a conversation as JSON, under another name until it is whole. Raises SpaceError."""
    text = json.dumps({"format": _FORMAT, "messages": messages}, ensure_ascii=False, indent=1)
    data = text.encode("utf-8", "surrogatepass")
    try:
        write_whole(path, [data])
    except OSError as problem:
        raise SpaceError(f"/save: {path}: {problem.strerror}") from problem


def load_log(path: Path) -> list[dict[str, str]]:
    """The messages of a saved conversation. Raises SessionError naming what is wrong."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_LOG + 1)
        if len(data) > _MAX_LOG:
            raise _problem(path, f"is longer than {_MAX_LOG >> 20} MiB")
        found = json.loads(data.decode("utf-8", "surrogatepass"))
    except OSError as problem:
        raise _problem(path, str(problem.strerror)) from problem
    except (ValueError, RecursionError) as problem:
        raise _problem(path, "is not JSON") from problem
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise _problem(path, "is not a conversation that mlacli saved")
    messages = found.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise _problem(path, "has messages that are none")
    return messages


def _is_message(given: Any) -> bool:
    return (
        isinstance(given, dict)
        and set(given) == {"role", "content"}
        and given["role"] in ROLES
        and isinstance(given["content"], str)
    )


def _problem(path: Path, problem: str) -> SessionError:
    return SessionError(f"/load: {path}: {problem}")
