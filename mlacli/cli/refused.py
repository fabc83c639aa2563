"""Flags of llama.cpp and ik_llama.cpp for what mlacli does not do, each refused by name.

A command that has a flag of such a name takes it: this is only looked at for the others.
"""

from __future__ import annotations

_SPECULATIVE = (
    "-md --model-draft --draft --draft-max --draft-min --draft-n --draft-n-min --draft-p-min "
    "--draft-p-split -draft --draft-params -cd --ctx-size-draft -hfd -hfrd --hf-repo-draft "
    "--lookup-cache-static --lookup-cache-dynamic -lcs -lcd -td --threads-draft -tbd "
    "--threads-batch-draft -Cd --cpu-mask-draft -Crd --cpu-range-draft --cpu-strict-draft "
    "--prio-draft --poll-draft -Cbd --cpu-mask-batch-draft -Crbd --cpu-range-batch-draft "
    "--cpu-strict-batch-draft --prio-batch-draft --poll-batch-draft -ctkd --cache-type-k-draft "
    "-ctvd --cache-type-v-draft -otd --override-tensor-draft -cmoed --cpu-moe-draft -ncmoed "
    "--n-cpu-moe-draft -mtp --multi-token-prediction -mtprot --mtp-requantize-output-tensor -ps "
    "--p-split --spec-type --spec-default --spec-replace --spec-stage --spec-autotune "
    "--spec-ckpt-mode --recurrent-ckpt-mode --spec-synth-len --spec-synth-rates "
    "--spec-ngram-size-n --spec-ngram-size-m --spec-ngram-min-hits --suffix-pattern-len "
    "--suffix-max-depth --suffix-corpus --spec-draft-hf --spec-draft-threads "
    "--spec-draft-threads-batch --spec-draft-cpu-mask --spec-draft-cpu-range "
    "--spec-draft-cpu-strict --spec-draft-prio --spec-draft-poll --spec-draft-cpu-mask-batch "
    "--spec-draft-cpu-strict-batch --spec-draft-prio-batch --spec-draft-poll-batch "
    "--spec-draft-type-k --spec-draft-type-v --spec-draft-override-tensor --spec-draft-cpu-moe "
    "--spec-draft-n-cpu-moe --spec-draft-ncmoe --spec-draft-n-max --spec-draft-n-min "
    "--spec-draft-p-split --spec-draft-p-min --spec-draft-backend-sampling "
    "--no-spec-draft-backend-sampling --spec-draft-device --spec-draft-ngl --spec-draft-model "
    "--spec-ngram-mod-n-min --spec-ngram-mod-n-max --spec-ngram-mod-n-match "
    "--spec-ngram-simple-size-n --spec-ngram-simple-size-m --spec-ngram-simple-min-hits "
    "--spec-ngram-map-k-size-n --spec-ngram-map-k-size-m --spec-ngram-map-k-min-hits "
    "--spec-ngram-map-k4v-size-n --spec-ngram-map-k4v-size-m --spec-ngram-map-k4v-min-hits"
)
_REASONS = {
    "there is no GPU backend": (
        "-ngl --gpu-layers --n-gpu-layers -sm --split-mode -ts --tensor-split -mg --main-gpu -dev "
        "--device --list-devices -ot --override-tensor -cmoe --cpu-moe -ncmoe --n-cpu-moe -ncffn "
        "--n-cpu-ffn -nkvo --no-kv-offload -kvo --kv-offload -opo --op-offload -nopo "
        "--no-op-offload -ngld --gpu-layers-draft --n-gpu-layers-draft -devd --device-draft "
        "--max-gpu -cuda --cuda-params --no-host -bs --backend-sampling -mea --max-extra-alloc "
        "-gfm --gpu-fit-margin --fit-margin -op --offload-policy -no-ooae "
        "--no-offload-only-active-experts -smgs --split-mode-graph-scheduling -sas "
        "--scheduler-async -smf16 --split-mode-f16 -smf32 --split-mode-f32 -grt "
        "--graph-reduce-type -gap --graph-attn-precision --print-overrides"
    ),
    "there is no speculative decoding": _SPECULATIVE,
    "adapters are not supported": (
        "--lora --lora-base --lora-scaled --lora-init-without-apply --control-vector "
        "--control-vector-scaled --control-vector-layer-range"
    ),
    "this is a text tool": (
        "--mmproj --mmproj-url -mm -mmu --mmproj-auto --no-mmproj --no-mmproj-auto "
        "--mmproj-offload --no-mmproj-offload -mmdev --mmproj-device --mtmd-kq-type -tm "
        "--threads-mtmd --image --audio --video --vision -mv --model-vocoder --image-min-tokens "
        "--image-max-tokens --video-fps --video-timestamp-interval --video-ffmpeg-dir"
    ),
    "there is no server": (
        "--host --port --api-key --api-key-file --slots --no-slots --metrics --props --server-base "
        "-sps --slot-prompt-similarity --slot-save-path --webui --no-webui --webui-mcp-proxy "
        "--ui-mcp-proxy --path --ssl-key-file --ssl-cert-file -to --timeout --threads-http "
        "--send-done -a --alias -cb --cont-batching -nocb --no-cont-batching --sql-save-file "
        "--sqlite-zstd-ext-file --log-format --log-prompts-dir"
    ),
    "log lines are plain text": "--log-jsonl",
    "a thread whose priority was lowered may not raise it again: --prio holds for prompts, too": (
        "--prio-batch"
    ),
    "one text is generated at a time": (
        "-np --parallel -ns --sequences -pps -npp -ntg -npl --chunk-size --chunk-separator"
    ),
    "there are no embeddings": (
        "-embd --embedding --embeddings --rerank --reranking --pooling --attention "
        "--embd-normalize --embd-output-format --embd-separator --context-file"
    ),
    "there are no tool calls": "-ptcall --parallel-tool-calls",
    "there is no RPC backend": "-rpc --rpc",
    "there is no such test of a model": (
        "--perplexity --all-logits --ppl-stride --ppl-output-type --kl-divergence "
        "--kl-divergence-base --save-all-logits --hellaswag --hellaswag-tasks --winogrande "
        "--winogrande-tasks --multiple-choice --multiple-choice-tasks --chunks --junk --pos"
    ),
    "no importance matrix or control vector is made": (
        "--in-file --output-draft --draft-output --draft-output-file -ofreq --output-frequency "
        "--save-frequency --process-output --output-tensor-name --no-ppl --chunk --from-chunk "
        "--positive-file --negative-file --pca-batch --pca-iter --method"
    ),
    "mlacli report --fit prints the command line that fits": "-fitp --fit-print",
    "that is a flag of mlacli report": "-fitt --fit-target -fitc --fit-ctx",
    "that is a flag of mlacli sweep": (
        "-nrep --n-repetitions --sweep-stride --sweep-memory -wb --warmup-batch --output-format"
    ),
    "a conversation goes through the chat template (mlacli run has this flag)": (
        "-no-cnv --no-cnv --no-conversation"
    ),
    "cached rows are not transformed": "-khad --k-cache-hadamard -vhad --v-cache-hadamard",
    "all layers have the same cache type (-ctk, -ctv)": (
        "-ctk-first --cache-type-k-first -ctk-last --cache-type-k-last -ctv-first "
        "--cache-type-v-first -ctv-last --cache-type-v-last"
    ),
    "positions are not grouped": "-gan -gaw --grp-attn-n --grp-attn-w",
    "no model with MLA that runs here has such layers": (
        "-dsa --dsa -fidx --fused-indexer-topk -dsatk --dsa-top-k -ictk --indexer-cache-type-k "
        "--swa-compress --swa-full -fdn --fused-delta-net"
    ),
    "the system reads experts from the mapped file when they are needed": (
        "--defer-experts --prefetch-experts --prefetch-experts-threads"
    ),
    "there is no guidance by a second prompt": (
        "--cfg-negative-prompt --cfg-negative-prompt-file --cfg-scale"
    ),
    "only single tokens can be ruled out (-l ID-inf), or all but a grammar's text (--grammar)": (
        "--banned-string-file --banned-n --allowlist-unicode-rule --allowlist-pieces "
        "--allowlist-keyword --allowlist-keyword-delay --expiring-logit-bias-file"
    ),
    "there is no fill-in-the-middle": "--infill --spm-infill",
    "BOS stands where the chat template puts it": "--in-prefix-bos",
    "thoughts are what stands between <think> and </think>": "--reasoning-tokens",
    "mlacli report says what the cache takes": "-dkvc --dump-kv-cache",
    "the answer goes to standard output (in a conversation, /save keeps it)": (
        "-o --output --output-file"
    ),
    "a model is a file here: give -m FILE": (
        "-mu --model-url --docker-repo -cl --cache-list --gpt-oss-20b-default "
        "--gpt-oss-120b-default --vision-gemma-4b-default --vision-gemma-12b-default"
    ),
    "write mlacli --install-completion": "--completion-bash",
    "comes before the command: mlacli --version": "--version",
    "standard error can go to a file: 2> FILE": "-ld --logdir",
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}
