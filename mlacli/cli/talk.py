"""The conversation at the terminal: reading messages, showing answers and what they cost."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from mlacli.chat import Conversation
from mlacli.cli import console
from mlacli.cli.chat_commands import COMMANDS, RAW, Commands, Leave
from mlacli.cli.progress import bar
from mlacli.engine import Cancelled
from mlacli.errors import Interrupted, MlaError
from mlacli.generation import Timings
from mlacli.prompts import NO_TEMPLATE
from mlacli.session import Session, open_session
from mlacli.settings import Request, RunSettings
from mlacli.signals import EXIT_OF_SIGNAL, stop_on_signals
from mlacli.text.reasoning import END, START, Reasoning

QUOTES = '"""'


def talk(settings: RunSettings, request: Request) -> int:
    """A conversation until /exit, the end of input or Ctrl-C at the prompt."""
    with open_session(settings, request, console.note, watch=bar) as session:
        session.announce(console.note)
        session.warm_up()
        for line in session.prepare():
            console.note(f"note: {line}")
        if not session.has_template:
            console.note(NO_TEMPLATE)
        session.restore([], console.note)
        try:
            Talk(session, request).run()
        finally:
            session.save()
    return 0


class Talk:
    """Messages in, answers out."""

    def __init__(self, session: Session, request: Request) -> None:
        self.session, self.request = session, request
        self.conversation = Conversation(session, console.note)
        self.conversation.set_system(request.system)
        self.commands = Commands(self.conversation, request)

    def run(self) -> None:
        """Returns when there is nothing more to say."""
        if self.request.prompt and not self.request.waits:
            self._reply(self.conversation.ask(self.request.prompt))
            if self.request.single_turn:
                return
        elif console.is_talking():
            console.tell("/help shows what can be typed, Ctrl-D ends the conversation")
        with console.line_editing(COMMANDS):
            while (text := self._read()) is not None:
                try:
                    answer = self._handled(text)
                    if answer is not None:
                        self._reply(answer)
                except Leave:
                    return
                except MlaError as problem:  # what was typed cannot work: the talk goes on
                    console.error(str(problem))
                    continue
                if answer is not None and self.request.single_turn:
                    return

    def _handled(self, text: str) -> Iterator[str] | None:
        """The answer that what was typed asks for, if any."""
        if text.startswith("/"):
            return self.commands.handle(text)
        text = self.commands.taken() + text
        if not text.strip():
            return None
        return self.conversation.ask(self.request.in_prefix + text + self.request.in_suffix)

    def _read(self) -> str | None:
        """A message: a line, lines that end with a backslash and one more, or a quoted block."""
        line = console.ask("> ")
        if line is None:
            return None
        if line.startswith(QUOTES):
            return self._block(line[len(QUOTES) :])
        lines = [line]
        while lines[-1].endswith("\\") != self.request.multiline:
            following = console.ask(". ")
            if following is None:
                break
            lines.append(following)
        return "\n".join(part.removesuffix("\\") for part in lines).rstrip("\n")

    def _block(self, line: str) -> str:
        lines = []
        while not line.rstrip().endswith(QUOTES):
            lines.append(line)
            following = console.ask(". ")
            if following is None:
                return "\n".join(lines)
            line = following
        return "\n".join([*lines, line.rstrip().removesuffix(QUOTES)])

    def _reply(self, answer: Iterator[str]) -> None:
        """Show an answer until it ends or is stopped. Raises Interrupted after SIGTERM."""
        timings = self.session.generator.timings = Timings()
        shown = Shown(self.commands.reasoning, inside=self.conversation.in_thought)
        with stop_on_signals(self.session.engine) as received:
            with contextlib.suppress(Cancelled):
                for text in answer:
                    shown.add(text)
        shown.end()
        if received and received[0] != signal.SIGINT:
            raise Interrupted(EXIT_OF_SIGNAL[received[0]])
        self.commands.timings = timings
        if not self.request.show_timings:
            return
        if self.commands.verbose:
            for line in timings.lines():
                console.note(line)
        else:
            console.note(timings.short())


class Shown:
    """An answer on its way to the screen, its thoughts shown as -rea wants."""

    def __init__(self, how: str, *, inside: bool) -> None:
        self._how, self._reasoning = how, Reasoning(inside)
        self._was_thought = inside
        if inside and how == "on":
            console.write(START)

    def add(self, text: str) -> None:
        if self._how == RAW:
            console.write(text)
            return
        for thought, part in self._reasoning.feed(text):
            self._show(thought, part)

    def end(self) -> None:
        for thought, part in self._reasoning.flush():
            self._show(thought, part)
        console.write("\n")

    def _show(self, thought: bool, text: str) -> None:
        if self._how == "on" and thought != self._was_thought:
            console.write(START if thought else END)
        self._was_thought = thought
        if not thought or self._how == "on":
            console.write(text)
        elif self._how == "auto":
            console.write(console.dim(text))
