"""What can be typed in a conversation besides messages."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from mlacli.chat import Conversation, load_log, save_log
from mlacli.cli import console
from mlacli.cli.flags import given
from mlacli.cli.request import MAX_PROMPT_BYTES, read_text
from mlacli.errors import UsageError
from mlacli.generation import Timings
from mlacli.limits import Switch, rules
from mlacli.sampling_settings import SamplingSettings
from mlacli.settings import Request
from mlacli.suggest import suggestion

# command: (what follows it, what it does)
COMMANDS = {
    "/set": (
        "system TEXT | reasoning auto|on|off | verbose on|off | NAME VALUE",
        "Change something: NAME is a sampling flag, as temp.",
    ),
    "/show": ("[info|system|parameters|messages|timings]", "Show it."),
    "/save": ("FILE", "Save the conversation."),
    "/load": ("FILE", "Go on with a saved conversation."),
    "/read": ("FILE", "Put a file's text before the next message."),
    "/glob": ("PATTERN", "Put all text files that match before it; ** goes into folders."),
    "/regen": ("", "Answer the last message again."),
    "/clear": ("", "Forget the conversation."),
    "/exit": ("", "Leave; as /bye and Ctrl-D."),
    "/help": ("", "Show this."),
}
RAW = "raw"  # thoughts are text like any other
# --reasoning-format: how thoughts are shown
_FORMATS = {"none": RAW, "deepseek-legacy": "on"}
_MAX_FILES = 100
_SHORT = {"/bye": "/exit", "/quit": "/exit", "/?": "/help", "/regenerate": "/regen"}


class Leave(Exception):
    """The conversation is over."""


class Commands:
    """Commands for one conversation, and what they have set."""

    def __init__(self, conversation: Conversation, request: Request) -> None:
        self.conversation = conversation
        self.reasoning = _FORMATS.get(request.reasoning_format, request.reasoning)
        self.verbose, self.timings = False, Timings()
        self._before = f"{request.prompt}\n\n" if request.waits and request.prompt else ""

    def taken(self) -> str:
        """What /read has put before the next message."""
        text, self._before = self._before, ""
        return text

    def handle(self, text: str) -> Iterator[str] | None:
        """Do what a line that begins with / says; returns an answer if there is one to show.

        Raises Leave, UsageError for an unknown command, MlaError of what it does.
        """
        word, _, rest = text.partition(" ")
        if "\0" in text:
            raise UsageError(f"{word}: a NUL character has no place here")
        name = _SHORT.get(word, word)
        if name not in COMMANDS:
            raise UsageError(f"{word}: no such command{suggestion(word, COMMANDS)} (/help)")
        rest = rest.strip()
        wanted = COMMANDS[name][0]
        if rest and not wanted:
            raise UsageError(f"{name}: nothing follows it (got {rest[:40]!r})")
        if not rest and wanted and not wanted.startswith("["):
            raise UsageError(f"{name}: needs {wanted}")
        action: Callable[[str], Iterator[str] | None] = getattr(self, f"_{name[1:]}")
        return action(rest)

    def _help(self, _: str) -> None:
        for name, (words, text) in COMMANDS.items():
            console.tell(f"{f'{name} {words}'.strip()}\n    {text}")
        console.tell(
            'A line that ends with \\ goes on; """ begins and ends a message of many lines.'
        )
        console.tell("Ctrl-C stops an answer, or leaves.")

    def _exit(self, _: str) -> None:
        raise Leave

    def _clear(self, _: str) -> None:
        self.conversation.clear()
        self._before = ""

    def _regen(self, _: str) -> Iterator[str]:
        return self.conversation.ask_again()

    def _save(self, name: str) -> None:
        save_log(Path(name), self.conversation.messages)
        console.tell(f"saved: {name} ({len(self.conversation.messages)} messages)")

    def _load(self, name: str) -> None:
        self.conversation.messages = load_log(Path(name))
        console.tell(f"loaded: {name} ({len(self.conversation.messages)} messages)")

    def _read(self, name: str) -> None:
        text = read_text(Path(name), f"/read: {name}")
        self._before += text + "\n\n"
        console.tell(f"read: {name} ({len(text)} characters)")

    def _glob(self, pattern: str) -> None:
        found = sorted(glob.iglob(os.path.expanduser(pattern), recursive=True))
        files = [Path(name) for name in found if Path(name).is_file()]
        if not files:
            raise UsageError(f"/glob: {pattern[:80]!r} matches no file")
        if len(files) > _MAX_FILES:
            raise UsageError(f"/glob: {len(files)} files match (limit {_MAX_FILES})")
        texts = [(file, read_text(file, f"/glob: {file}")) for file in files]
        size = sum(len(text) for _, text in texts)
        if size > MAX_PROMPT_BYTES:
            raise UsageError(f"/glob: {size} characters (limit {MAX_PROMPT_BYTES})")
        for file, text in texts:
            self._before += f"--- File: {file} ---\n{text}\n\n"
            console.note(f"read: {file} ({len(text)} characters)")

    def _show(self, what: str) -> None:
        session = self.conversation.session
        engine, sampling = session.engine, session.generator.sampler.settings
        match what or "info":
            case "info":
                console.tell(f"model: {session.model.file.path}")
                console.tell(
                    f"context: {engine.cache.n_used} of {engine.n_ctx} tokens, "
                    f"{engine.plan.layout.bytes_per_token} bytes each"
                )
            case "system":
                first = next(iter(self.conversation.messages), {"role": ""})
                console.tell(first["content"] if first["role"] == "system" else "(none)")
            case "parameters":
                for name in rules(SamplingSettings):
                    console.tell(f"{name} = {getattr(sampling, name)}")
            case "messages":
                for message in self.conversation.messages:
                    console.tell(f"{message['role']}: {message['content']}")
            case "timings":
                for line in self.timings.lines():
                    console.tell(line)
            case _:
                raise UsageError(f"/show: {what!r} is not one of {COMMANDS['/show'][0][1:-1]}")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        value = value.strip()
        match name:
            case "system":
                self.conversation.set_system(value)
            case "verbose":
                self.verbose = Switch("/set verbose").parse(value)
            case "reasoning":
                self.reasoning = rules(Request)["reasoning"].parse(value)
            case _:
                self._set_parameter(name.replace("-", "_"), value)

    def _set_parameter(self, name: str, value: str) -> None:
        known = rules(SamplingSettings)
        if name not in known:
            raise UsageError(f"/set: no such setting: {name}{suggestion(name, list(known))}")
        generator = self.conversation.session.generator
        many = SamplingSettings.__dataclass_fields__[name].metadata["each"]
        if not value and not many:
            raise UsageError(f"/set {name}: needs a value")
        changed = given(SamplingSettings, {name: value.split() if many else value})
        if name in ("samplers", "sampling_seq"):  # two ways to say the same
            changed = {"samplers": None, "sampling_seq": None} | changed
        settings = replace(generator.sampler.settings, **changed)
        generator.sampler = generator.sampler.changed(settings)
