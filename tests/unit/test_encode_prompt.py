"""What of a request reaches the chat template, and what is said when there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import pytest

from mlacli.prompts import encode_prompt
from mlacli.settings import Request
from mlacli.text.chat import ChatTemplate
from mlacli.text.tokenizer import Piece, Tokenizer


class Codes:
    """Stands for a tokenizer: every character is a token, special ones are negative."""

    def encode_prompt(self, pieces: Sequence[Piece]) -> list[int]:
        return [-ord(c) if piece.special else ord(c) for piece in pieces for c in piece.text]


class Roles:
    """Stands for a template: each message after the first letter of its role."""

    notes = ("odd template",)

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[Piece]:
        return [
            piece
            for message in messages
            for piece in (
                Piece(message["role"][0], special=True),
                Piece(message["content"], special=False),
            )
        ]


def _encoded(request: Request, template: Roles | None) -> tuple[str, list[str]]:
    """Text of the tokens, with special ones in upper case, and the notes."""
    notes: list[str] = []
    tokenizer = cast(Tokenizer, Codes())
    codes = encode_prompt(tokenizer, cast(ChatTemplate | None, template), request, notes.append)
    return "".join(chr(c) if c > 0 else chr(-c).upper() for c in codes), notes


def test_prompt_goes_through_the_template() -> None:
    assert _encoded(Request("hi"), Roles()) == ("Uhi", ["note: odd template"])


def test_system_message_comes_first() -> None:
    assert _encoded(Request("hi", system="be brief"), Roles())[0] == "Sbe briefUhi"


@pytest.mark.parametrize(("system", "more"), [("", ""), ("be brief", " and -sys is not used")])
def test_no_template(system: str, more: str) -> None:
    note = f"note: the file has no chat template: the prompt is continued as it stands{more}"
    assert _encoded(Request("hi", system=system), None) == ("hi", [note])


def test_raw_text_may_hold_special_tokens() -> None:
    assert _encoded(Request("hi", raw=True, system="not used"), None) == ("HI", [])
