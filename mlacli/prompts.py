"""A request's prompt: messages through the chat template, text to tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlacli.settings import Request
from mlacli.text.chat import ChatTemplate
from mlacli.text.templates import FALLBACK, NAMED
from mlacli.text.tokenizer import Piece, Tokenizer

NO_TEMPLATE = "note: the file has no chat template: User: ... Assistant: ... is used"
Messages = Sequence[Mapping[str, Any]]


def encode_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    request: Request,
    note: Callable[[str], None],
) -> list[int]:
    """The prompt's tokens: through the chat template, or as raw text after BOS."""
    if template is None:
        if not request.raw:
            without = " and -sys is not used" if request.system else ""
            note(
                "note: the file has no chat template: "
                f"the prompt is continued as it stands{without}"
            )
        return tokenizer.encode_prompt([Piece(request.prompt, special=request.raw)])
    messages = [{"role": "user", "content": request.prompt}]
    if request.system:
        messages.insert(0, {"role": "system", "content": request.system})
    return tokenizer.encode_prompt(rendered(template, messages, note))


def rendered(
    template: ChatTemplate, messages: Messages, note: Callable[[str], None]
) -> list[Piece]:
    """The prompt that a template makes of messages. Raises ModelError, UsageError."""
    pieces = template.render(messages)
    for line in template.notes:
        note(f"note: {line}")
    return pieces


def open_template(tokenizer: Tokenizer, request: Request, name: str) -> ChatTemplate | None:
    """The request's template or the file's, if either is to be used; a conversation always has
    one. `name` is the file's."""
    source = request.template or tokenizer.data.chat_template
    if not source and request.talks:
        source = NAMED[FALLBACK]
    if request.raw or not source:
        return None
    return ChatTemplate(
        source,
        tokenizer.bos_text,
        tokenizer.eos_text,
        tokenizer.control_texts,
        name,
        flag="--chat-template" if request.template else "",
        extra=request.template_kwargs,
    )
