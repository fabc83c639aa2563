"""Chat messages to prompt text, through the Jinja template that came with the model.

Templates are programs written by whoever made the file, so they run in a process of their own
(template_child.py). It starts with the ChatTemplate and loads Jinja while the model is loading.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from codegen.child import start_child, write_frame
from mlacli.errors import ModelError, UsageError
from mlacli.text.tokenizer import Piece
from mlacli.text.vocabulary import MAX_TEMPLATE_BYTES, printable

MAX_MESSAGES = 8 << 20  # characters; the child may write as many bytes
_CHILD = Path(__file__).with_name("template_child.py")
_WALL_SECONDS = 20.0  # the child's own limit is 2 s of processor time
_BODY_LIMIT = (8 << 20) + 65536
_FIELD = "tokenizer.chat_template"


class ChatTemplate:
    """A file's chat template. `bos` and `eos` are the spellings that it may use as variables.

    `control_texts` are the spellings of all control tokens: where a message contains one, the
    prompt is cut within it, so that it is encoded as the text that it is. Use it as a context
    manager or call `close`. `extra` are variables besides those it always has. `flag` is where it
    comes from if not from the file `name`: then what is wrong with it is a UsageError.
    """

    def __init__(
        self,
        source: str,
        bos: str = "",
        eos: str = "",
        control_texts: Sequence[str] = (),
        name: str = "model",
        extra: Mapping[str, Any] | None = None,
        flag: str = "",
    ) -> None:
        self._name, self._extra, self._flag = name, dict(extra or {}), flag
        size = len(source.encode("utf-8", "surrogatepass"))
        if size > MAX_TEMPLATE_BYTES:
            raise self._problem(f"has {size} bytes (limit {MAX_TEMPLATE_BYTES})")
        self._source = source
        self._control_texts = tuple(text for text in control_texts if len(text) > 1)
        self._variables = {"bos_token": bos, "eos_token": eos}
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[[subprocess.Popen[bytes]], Any] | None = None
        self.notes: tuple[str, ...] = ()
        self._start()

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[Piece]:
        """The prompt, to be given to `Tokenizer.encode_prompt`; `notes` tells what to warn about.

        Raises ModelError when the template is broken, refuses the messages or exceeds a limit, and
        UsageError when the messages are too long for any template.
        """
        plain = json.dumps(messages, ensure_ascii=False)
        if len(plain) > MAX_MESSAGES:
            raise UsageError(
                f"prompt: too long for a chat template ({len(plain)} characters, "
                f"limit {MAX_MESSAGES})"
            )
        cut = self._unused_character(plain)
        request = {
            "messages": [_guard(message, self._control_texts, cut) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            **self._extra,
        }
        text = self._ask(json.dumps(request).encode())
        self.notes = _notes(messages, text.replace(cut, ""))
        return [Piece(part, special=True) for part in text.split(cut) if part]

    def close(self) -> None:
        """Ends the child. `render` would start a new one."""
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None

    def _start(self) -> None:
        folders = dict.fromkeys(_folder_of(name) for name in ("jinja2", "markupsafe"))
        try:
            self._process = start_child(_CHILD, folders)
        except OSError as error:
            raise self._problem(f"its process cannot be started ({error.strerror})") from error
        self._stop = weakref.finalize(self, _end, self._process)
        self._send(json.dumps({"template": self._source, "variables": self._variables}).encode())

    def _ask(self, body: bytes) -> str:
        if self._process is None:
            self._start()
        self._send(body)
        reply = self._receive(time.monotonic() + _WALL_SECONDS)
        text = reply[1:].decode("utf-8", "surrogatepass")
        if reply[:1] != b"o":
            raise self._problem(printable(text, 160))
        return text

    def _send(self, body: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            write_frame(self._process.stdin, body)
        except BrokenPipeError:
            raise self._death() from None

    def _receive(self, deadline: float) -> bytes:
        length = int.from_bytes(self._read(8, deadline), "little")
        if not 0 < length <= _BODY_LIMIT:
            raise self._death()
        return self._read(length, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout
        poll = select.poll()
        poll.register(pipe, select.POLLIN | select.POLLHUP)
        body = bytearray()
        while len(body) < size:
            wait = max(0, int(1000 * (deadline - time.monotonic())))
            if not poll.poll(wait):
                self.close()
                raise self._problem(f"no answer within {_WALL_SECONDS:.0f} s")
            part = os.read(pipe.fileno(), min(size - len(body), 1 << 20))
            if not part:
                raise self._death()
            body += part
        return bytes(body)

    def _death(self) -> ModelError | UsageError:
        """Why the child has ended; afterwards a new one can be started."""
        process = self._process
        assert process is not None
        try:
            code = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            code = 0
        self.close()
        if code == -signal.SIGPROF:
            return self._problem("takes more than 2 s of processor time")
        return self._problem(f"its process ended early (status {code})")

    def _problem(self, problem: str) -> ModelError | UsageError:
        if self._flag:
            return UsageError(f"{self._flag}: {problem}")
        return ModelError(f"{printable(self._name, 80)}: {_FIELD}: {problem}")

    def _unused_character(self, messages: str) -> str:
        """A private-use character that occurs nowhere in what the child is given."""
        given = (messages, self._source, *self._variables.values())
        candidates = map(chr, range(0xF0000, 0x10FFFE))
        return next(char for char in candidates if not any(char in text for text in given))


def _guard(value: Any, control_texts: Sequence[str], cut: str) -> Any:
    """`value` with `cut` inside every control token that one of its strings spells out.

    A character between two others survives trim, case changes, splits and slices, and `cut` is no
    part of any token: wherever the template puts the text, it cannot become a control token.
    """
    if isinstance(value, Mapping):
        return {key: _guard(item, control_texts, cut) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_guard(item, control_texts, cut) for item in value]
    if not isinstance(value, str):
        return value
    for text in control_texts:
        while text in value:  # again, as occurrences may overlap
            value = value.replace(text, text[0] + cut + text[1:])
    core = value.strip()
    start = value.index(core)
    before, after = value[:start], value[start + len(core) :]
    head = cut if _ends_control(core, control_texts) else ""
    tail = cut if _begins_control(core, control_texts) else ""
    return before + head + core + tail + after


def _begins_control(text: str, control_texts: Sequence[str]) -> bool:
    """Whether `text` ends as a control token begins: what follows might complete it."""
    first = {control[0] for control in control_texts}
    tail = text[-max(map(len, control_texts), default=1) :]
    starts = [tail[i:] for i, char in enumerate(tail) if char in first]
    return any(control.startswith(start) for start in starts for control in control_texts)


def _ends_control(text: str, control_texts: Sequence[str]) -> bool:
    """Whether `text` begins as a control token ends: what precedes might be the rest of it."""
    last = {control[-1] for control in control_texts}
    head = text[: max(map(len, control_texts), default=0)]
    ends = [head[: i + 1] for i, char in enumerate(head) if char in last]
    return any(control.endswith(end) for end in ends for control in control_texts)


def _notes(messages: Sequence[Mapping[str, Any]], prompt: str) -> tuple[str, ...]:
    said = [message.get("content") for message in messages if message.get("role") == "user"]
    if said and isinstance(said[-1], str) and said[-1].strip() not in prompt:
        return ("the chat template leaves out or changes the user's last message",)
    return ()


def _folder_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelError(f"{_FIELD}: needs the Python package {module}, which is not installed")
    return str(Path(spec.origin).parent.parent)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # a request that was still in the buffer
                pipe.close()
