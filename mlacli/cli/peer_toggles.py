"""Switches of ik_llama.cpp's llama-bench for what mlacli has no switch for: accepted, and told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import Parameter
from typing import Any

from mlacli.cli.options import flag, parameter
from mlacli.limits import Switch, parse_list

SECTION = "Accepted for llama-bench's sake, without effect"
# parameter: (names, what mlacli does)
_TOGGLES = {
    "graph_reuse": ("-gr --graph-reuse", "graphs are built once and always reused"),
    "merge_qkv": (
        "-mqkv --merge-qkv",
        "MLA has no Q, K and V matrices to merge; q and kv_a read the same codes of their input",
    ),
    "merge_up_gate": (
        "-muge --merge-up-gate-experts",
        "up and gate stay as they lie in the file; one op multiplies with both (-fmoe)",
    ),
    "grouped_routing": (
        "-ger --grouped-expert-routing",
        "routing is one op, which looks at groups where the model has them",
    ),
    "no_fused_up_gate": (
        "-no-fug --no-fused-up-gate",
        "dense up and gate are always one op; -fmoe 0 keeps the experts' apart",
    ),
    "no_fused_multiply_add": (
        "-no-mmad --no-fused-mul-multiadd",
        "the experts' results are always weighted and added in one op",
    ),
    "rope_cache": ("-rcache --rope-cache", "rotations are always computed once per batch"),
}


def toggles() -> Iterator[Parameter]:
    """A parameter for each."""
    for name, (names, text) in _TOGGLES.items():
        help_text = f"{text[0].upper()}{text[1:]}."
        yield parameter(name, flag(names, SECTION, "[1|0]", help_text), list[str] | None)


def toggle_notes(values: Mapping[str, Any]) -> Iterator[str]:
    """A line for each that was given. Raises UsageError for what is no 0 or 1."""
    for field, (names, text) in _TOGGLES.items():
        name = names.split()[0]
        for given in values[field] or ():
            parse_list(Switch(name), given)
        if values[field]:
            yield f"note: {name} has no effect: {text}"
