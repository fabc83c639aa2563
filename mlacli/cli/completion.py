"""What a shell is offered for a flag's value, and how a flag's meaning is told in a few words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_MAX_HELP = 60  # characters: longer ones would be broken into lines, which no shell expects


def completer(choices: Sequence[str], placeholder: str) -> Callable[[str], list[str]]:
    """The function that typer asks; of a LIST the last word is completed."""

    def complete(incomplete: str) -> list[str]:
        before, comma, word = "", "", incomplete
        if placeholder == "LIST":
            before, comma, word = incomplete.rpartition(",")
        return [before + comma + choice for choice in choices if choice.startswith(word)]

    return complete


def brief(text: str) -> str:
    """The start of a flag's meaning, on one line; brackets would be read as markup."""
    text = " ".join(text.split()).translate({ord("["): "(", ord("]"): ")"})
    return text if len(text) <= _MAX_HELP else text[: _MAX_HELP - 3].rsplit(" ", 1)[0] + "..."
