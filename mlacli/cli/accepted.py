"""Flags of llama.cpp and ik_llama.cpp that `run` and `chat` take and that change nothing here.

Each is told on standard error with what mlacli does in that respect, except those that ask for what
it does anyway.
"""

from __future__ import annotations

# What mlacli does: the flags. A flag with `=` behind it takes a value.
_REASONS = {
    "graphs are built once and always reused": "-gr --graph-reuse -no-gr --no-graph-reuse",
    "MLA has no Q, K and V matrices to merge": "-mqkv --merge-qkv",
    "up and gate stay as they lie in the file; one op multiplies with both (-fmoe)": (
        "-muge --merge-up-gate-experts"
    ),
    "routing is one op, which looks at groups where the model has them": (
        "-ger --grouped-expert-routing"
    ),
    "-no-fmoe is what keeps up and gate of the experts apart": "-no-fug --no-fused-up-gate",
    "the experts' results are always weighted and added in one op": (
        "-no-mmad --no-fused-mul-multiadd"
    ),
    "rotations are always computed once per batch": "-rcache --rope-cache",
    "the compute buffer is planned for -ub tokens": "-wgt= --worst-graph-tokens=",
    "an MLA cache can be cut at any token, without checkpoints": (
        "-ctxcp= --ctx-checkpoints= --swa-checkpoints= -ctx-ckpt= -ctx-ckpt-i= "
        "--ctx-checkpoints-interval= -ctx-ckpt-t= --ctx-checkpoints-tolerance= -ctx-ckpt-e= "
        "--ctx-checkpoints-eviction="
    ),
    "one conversation is kept, in the context itself (--prompt-cache FILE keeps it on disk)": (
        "-cram= --cache-ram= -crs= --cache-ram-similarity= -cram-n-min= --cache-ram-n-min="
    ),
    "the cache has no holes to close": "-dt= --defrag-thold=",
    "a mapped file is read when it is needed (-lm)": "-lzm= --lazy-mode=",
    "templates are always rendered as Jinja": "--no-jinja",
    "an answer always begins behind the template": "--no-prefill-assistant",
    "penalties are for newlines, too": "--penalize-nl",
    "probabilities behind the other samplers are what counts": "--adaptive-updt-w-cur",
    "only what matters is told anyway (-v says more)": "--minilog",
    # what is done anyway: nothing is said
    "": "--jinja --peg --no-skip-chat-parsing -no-mtp --no-multi-token-prediction -nr --no-repack "
    "--no-log-jsonl",
}
# flag: what is noted, or nothing
ACCEPTED = {
    name.rstrip("="): reason for reason, names in _REASONS.items() for name in names.split()
}
WITH_VALUE = frozenset(
    name.rstrip("=") for names in _REASONS.values() for name in names.split() if "=" in name
)
