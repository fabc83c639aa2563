"""How `run` writes an answer: as text, as one JSON object, or as an object per token."""

from __future__ import annotations

import json
from typing import Any

from mlacli.answer import Output, Result
from mlacli.cli import console


class TextOutput:
    """The text as it is made."""

    def prompt(self, text: str) -> None:
        console.write(console.prompt(text))

    def piece(self, token: int | None, text: str) -> None:
        console.write(text)

    def end(self, result: Result) -> None:
        console.write("\n")


class JsonOutput:
    """--json: everything, when there is no more."""

    def prompt(self, text: str) -> None:
        pass

    def piece(self, token: int | None, text: str) -> None:
        pass

    def end(self, result: Result) -> None:
        _write_line(result)


class JsonLinesOutput(JsonOutput):
    """--jsonl: a line per token, then one with everything."""

    def piece(self, token: int | None, text: str) -> None:
        _write_line({"type": "token", "text": text, "id": token})

    def end(self, result: Result) -> None:
        _write_line({"type": "result", **result})


def _write_line(found: dict[str, Any] | Result) -> None:
    """ASCII alone, so that it is JSON whatever the locale is."""
    console.write(json.dumps(found, allow_nan=False) + "\n")


OUTPUTS: dict[str, type[Output]] = {
    "text": TextOutput,
    "json": JsonOutput,
    "jsonl": JsonLinesOutput,
}
