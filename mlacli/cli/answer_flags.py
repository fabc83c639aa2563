"""Flags about how an answer is made and shown, besides those of flags.py: their texts."""

from __future__ import annotations

SECTION = "Answer"

# field: (section, names, placeholder, help), as in flags.py
TEXTS = {
    "special": (SECTION, "-sp --special", "", "Show control tokens in the answer."),
    "reasoning_format": (
        SECTION,
        "--reasoning-format",
        "auto|none|deepseek|deepseek-legacy",
        "none: thoughts are text like any other, marks and all; deepseek (auto): shown as -rea "
        "says; deepseek-legacy: always shown, with their marks.",
    ),
    "reasoning_budget": (
        SECTION,
        "--reasoning-budget",
        "N",
        "Most tokens of a thought, which </think> then ends; 0: none; -1: no limit.",
    ),
    "reasoning_message": (
        SECTION,
        "--reasoning-budget-message",
        "TEXT",
        "Put before that </think>.",
    ),
    "token_count": (
        SECTION,
        "-ptc --print-token-count",
        "N",
        "Every N tokens, say on stderr how many the context holds; -1: never.",
    ),
    "waits": (
        SECTION,
        "-if --interactive-first",
        "",
        "Talk, and wait for a message first: a prompt goes before it.",
    ),
    "warmup": (
        SECTION,
        "--warmup/--no-warmup",
        "",
        "Run one token before the clock starts, so that no timing waits for the disk.",
    ),
}
SAMPLING_TEXTS = {
    "adaptive_target": (
        "--adaptive-target",
        "P",
        "Adaptive-p, always the last sampler: prefer tokens near this probability; -1: off.",
    ),
    "adaptive_decay": ("--adaptive-decay", "D", "It looks back over about 1 / (1 - D) tokens."),
}
