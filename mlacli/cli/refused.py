"""Flags of llama.cpp and ik_llama.cpp for what mlacli does not do, each refused by name."""

from __future__ import annotations

_REASONS = {
    "there is no GPU backend": (
        "-ngl --gpu-layers --n-gpu-layers -sm --split-mode -ts --tensor-split -mg --main-gpu -dev "
        "--device --list-devices -ot --override-tensor -cmoe --cpu-moe -ncmoe --n-cpu-moe -nkvo "
        "--no-kv-offload -nopo --no-op-offload -ngld --gpu-layers-draft -devd --device-draft "
        "--max-gpu -cuda --cuda-params --no-host -no-ooae --no-offload-only-active-experts -sas "
        "--scheduler-async --print-overrides"
    ),
    "there is no speculative decoding": (
        "-md --model-draft --draft --draft-max --draft-min --draft-n --draft-p-min --draft-p-split "
        "-cd --ctx-size-draft --spec-type -hfd --lookup-cache-static --lookup-cache-dynamic "
        "-lcs -lcd"
    ),
    "adapters are not supported": (
        "--lora --lora-base --lora-scaled --control-vector --control-vector-scaled "
        "--control-vector-layer-range"
    ),
    "this is a text tool": "--mmproj --mmproj-url --image --audio --vision -mv --model-vocoder",
    "there is no server": (
        "--host --port --api-key --api-key-file --slots --metrics --props --embedding --embeddings "
        "--rerank --reranking -np --parallel --slot-save-path --webui --no-webui"
    ),
    "log lines are plain text": "--log-jsonl",
    "there is no RPC backend": "-rpc --rpc",
    "no embeddings are computed": "-embd",
    "cached rows are not transformed": "-khad --k-cache-hadamard -vhad --v-cache-hadamard",
    "a thread whose priority was lowered may not raise it again: --prio holds for prompts, too": (
        "--prio-batch"
    ),
    "positions are not grouped": "-gan -gaw --grp-attn-n --grp-attn-w",
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}
