"""Flags about a file's metadata, its RoPE and how it is loaded: texts, and what words mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlacli.errors import UsageError
from mlacli.limits import Choice
from mlacli.overrides import divided

METADATA = "Metadata and RoPE"

# field: (section, names, placeholder, help), as in flags.py
METADATA_TEXT = {
    "overrides": (
        METADATA,
        "-okv --override-kv",
        "KEY=TYPE:VALUE",
        "A value in the place of the file's; TYPE: int, float, bool, str; may be repeated.",
    ),
    "rope_scaling": (METADATA, "--rope-scaling", "none|linear|yarn", "How a context is extended."),
    "rope_scale": (METADATA, "--rope-scale", "N", "Context N times as long; 0: from the file."),
    "rope_freq_base": (METADATA, "--rope-freq-base", "N", "Base of the frequencies."),
    "rope_freq_scale": (METADATA, "--rope-freq-scale", "N", "1 / N times as long a context."),
    "yarn_orig_ctx": (METADATA, "--yarn-orig-ctx", "N", "YaRN: context trained before it."),
    "yarn_ext_factor": (
        METADATA,
        "--yarn-ext-factor",
        "X",
        "YaRN: 1 leaves fast pairs as trained, 0 divides every pair's frequency.",
    ),
    "yarn_attn_factor": (METADATA, "--yarn-attn-factor", "X", "YaRN: sharpens attention by X^2."),
    "yarn_beta_slow": (METADATA, "--yarn-beta-slow", "N", "YaRN: pairs of N turns are divided."),
    "yarn_beta_fast": (METADATA, "--yarn-beta-fast", "N", "YaRN: those of N turns are not."),
}
METADATA_DEFAULT = {
    "overrides": "",
    "rope_scaling": "from the file",
    **dict.fromkeys(("rope_scale", "rope_freq_base", "rope_freq_scale", "yarn_orig_ctx"), "0"),
    **dict.fromkeys(
        ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_slow", "yarn_beta_fast"), "-1"
    ),
}
# -lm: (mmap, mlock)
_LOAD_MODES = {
    "auto": (True, False),
    "none": (False, False),
    "mmap": (True, False),
    "mlock": (False, True),
    "mmap+mlock": (True, True),
}
LOAD_MODES = "|".join(_LOAD_MODES)


def load_mode(word: str, given: Mapping[str, Any]) -> dict[str, bool]:
    """The fields that -lm sets. Raises UsageError, also when one of them was given besides."""
    if word == "dio":
        raise UsageError("-lm: dio: there is no direct I/O (none reads the file, mmap maps it)")
    Choice("-lm", tuple(_LOAD_MODES)).check(word)
    mmap, mlock = _LOAD_MODES[word]
    for field, names in (("mmap", "--mmap or --no-mmap"), ("mlock", "--mlock")):
        if field in given:
            raise UsageError(f"-lm and {names}: give one of them, not both")
    return {"mmap": mmap, "mlock": mlock}


def each_override(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with one override in each text."""
    texts = values.get("overrides")
    if texts is None:
        return dict(values)
    return {**values, "overrides": [part for text in texts for part in divided(text)]}
