"""What the flags about RoPE put in the place of a file's metadata.

A flag does exactly what a file with that value in its metadata does: the two cannot differ.
"""

from __future__ import annotations

from mlacli.gguf.metadata import Metadata
from mlacli.model.keys import Keys
from mlacli.overrides import Override, RopeSettings

_SCALING = "rope.scaling."
_YARN_KEYS = {
    "yarn_ext_factor": _SCALING + "yarn_ext_factor",
    "yarn_attn_factor": _SCALING + "yarn_attn_factor",
    "yarn_beta_slow": _SCALING + "yarn_beta_slow",
    "yarn_beta_fast": _SCALING + "yarn_beta_fast",
}


def rope_overrides(rope: RopeSettings, metadata: Metadata) -> list[Override]:
    """The overrides that stand for these flags, in a file with this metadata.

    With YaRN and a scale of the user's the trained context becomes the original one times the
    scale, as in llama.cpp.
    """
    if not rope.is_given:
        return []
    arch = metadata.text("general.architecture")
    keys, found = Keys(metadata, arch), []

    def put(key: str, kind: str, value: float | str | None) -> None:
        if value is not None:
            found.append(Override(f"{arch}.{key}", kind, value))

    put("rope.freq_base", "float", rope.rope_freq_base)
    put(_SCALING + "type", "str", rope.rope_scaling)
    put(_SCALING + "factor", "float", rope.factor)
    for field, key in _YARN_KEYS.items():
        put(key, "float", getattr(rope, field))
    original = rope.yarn_orig_ctx
    kind = rope.rope_scaling or metadata.text(keys.prefix + _SCALING + "type", "linear")
    if kind == "yarn" and rope.factor is not None:
        trained = keys.integer("context_length", 1, 2**30)
        known = keys.integer(_SCALING + "original_context_length", 1, 2**30, trained)
        original = original or known
        put("context_length", "int", min(int(original * rope.factor), 2**30))
    put(_SCALING + "original_context_length", "int", original)
    return found


def rope_notes(rope: RopeSettings, metadata: Metadata) -> list[str]:
    """A line for every flag that changes nothing in such a file."""
    prefix = metadata.text("general.architecture") + "."
    kind = rope.rope_scaling or metadata.text(prefix + _SCALING + "type", "linear")
    mixed = rope.yarn_ext_factor or 0
    if kind == "yarn" or (kind == "linear" and mixed > 0):
        return []
    fields = ["yarn_orig_ctx", "yarn_beta_slow", "yarn_beta_fast"]
    if kind == "none":
        fields += ["yarn_ext_factor", "yarn_attn_factor"]
    flags = [f"--{field.replace('_', '-')}" for field in fields if getattr(rope, field) is not None]
    return [f"{flag} has no effect: RoPE scaling is {kind}" for flag in flags]
