"""Switches of ik_llama.cpp's llama-bench for what mlacli has no switch for: accepted, and told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import Parameter
from typing import Any

from mlacli.cli.accepted import ACCEPTED
from mlacli.cli.options import flag, parameter
from mlacli.limits import Switch, parse_list

SECTION = "Accepted for llama-bench's sake, without effect"
# parameter: names
_TOGGLES = {
    "graph_reuse": "-gr --graph-reuse",
    "merge_qkv": "-mqkv --merge-qkv",
    "merge_up_gate": "-muge --merge-up-gate-experts",
    "grouped_routing": "-ger --grouped-expert-routing",
    "no_fused_up_gate": "-no-fug --no-fused-up-gate",
    "no_fused_multiply_add": "-no-mmad --no-fused-mul-multiadd",
    "rope_cache": "-rcache --rope-cache",
}


def toggles() -> Iterator[Parameter]:
    """A parameter for each."""
    for name, names in _TOGGLES.items():
        text = ACCEPTED[names.split()[0]]
        help_text = f"{text[0].upper()}{text[1:]}."
        yield parameter(name, flag(names, SECTION, "[1|0]", help_text), list[str] | None)


def toggle_notes(values: Mapping[str, Any]) -> Iterator[str]:
    """A line for each that was given. Raises UsageError for what is no 0 or 1."""
    for field, names in _TOGGLES.items():
        name = names.split()[0]
        for given in values[field] or ():
            parse_list(Switch(name), given)
        if values[field]:
            yield f"note: {name} has no effect: {ACCEPTED[name]}"
