"""Chat templates by the names that llama.cpp knows them by, for files that bring none."""

from __future__ import annotations

from mlacli.errors import UsageError

_TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}SYSTEM_END"
    "{% elif m.role == 'user' %}USER{{ m.content }}USER_END"
    "{% else %}ASSISTANT{{ m.content }}ANSWER_END{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}OPEN{% endif %}"
)


def _turns(**words: str) -> str:
    text = _TURNS
    for name in sorted(words, key=len, reverse=True):
        text = text.replace(name.upper(), words[name])
    return text


_KIMI = (
    "{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FALLBACK = "deepseek2"
NAMED = {
    "deepseek2": _turns(
        system_end="\n\n",
        user="User: ",
        user_end="\n\n",
        assistant="Assistant: ",
        answer_end="{{ eos_token }}",
        open="Assistant:",
    ),
    "deepseek3": _turns(
        system_end="",
        user="<｜User｜>",
        user_end="",
        assistant="<｜Assistant｜>",
        answer_end="{{ eos_token }}",
        open="<｜Assistant｜>",
    ),
    "kimi-k2": _KIMI,
    "chatml": _CHATML,
}


def template_source(given: str) -> str:
    """A template by name, or the Jinja text itself. Raises UsageError for an unknown name."""
    if given in NAMED:
        return NAMED[given]
    if "{%" in given or "{{" in given:
        return given
    known = ", ".join(NAMED)
    raise UsageError(f"--chat-template: {given[:60]!r} is neither a Jinja text nor one of {known}")
