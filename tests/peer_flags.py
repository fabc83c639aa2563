"""The flags that the peers' programs for text read, as their parsers name them.

llama.cpp 0c1e57098 (common/arg.cpp: those of llama-cli, llama-completion, and of every program) and
ik_llama.cpp 8337e4cd3 (common/common.cpp: one parser for all programs).
"""

from __future__ import annotations

_LLAMA_CPP = """
-h --help --usage --version -cl --cache-list --completion-bash --server-base --verbose-prompt
--display-prompt --no-display-prompt -co --color -t --threads -tb --threads-batch -C --cpu-mask
-Cr --cpu-range --cpu-strict --prio --poll -Cb --cpu-mask-batch -Crb --cpu-range-batch
--cpu-strict-batch --prio-batch --poll-batch -c --ctx-size -n --predict --n-predict -b
--batch-size -ub --ubatch-size --keep --swa-full -ctxcp --ctx-checkpoints --swa-checkpoints -cram
--cache-ram --context-shift --no-context-shift -fa --flash-attn -p --prompt -sys --system-prompt
--perf --no-perf --show-timings --no-show-timings -f --file -sysf --system-prompt-file -bf
--binary-file -e --escape --no-escape -ptc --print-token-count --prompt-cache --prompt-cache-all
--prompt-cache-ro -r --reverse-prompt -sp --special -cnv --conversation -no-cnv --no-conversation
-st --single-turn -i --interactive -if --interactive-first -mli --multiline-input --in-prefix-bos
--in-prefix --in-suffix --warmup --no-warmup --samplers -s --seed --sampler-seq --sampling-seq
--ignore-eos --temp --temperature --top-k --top-p --min-p --top-nsigma --top-n-sigma
--xtc-probability --xtc-threshold --typical --typical-p --repeat-last-n --repeat-penalty
--presence-penalty --frequency-penalty --dry-multiplier --dry-base --dry-allowed-length
--dry-penalty-last-n --dry-sequence-breaker --adaptive-target --adaptive-decay --dynatemp-range
--dynatemp-exp --mirostat --mirostat-lr --mirostat-ent -l --logit-bias --grammar --grammar-file -j
--json-schema -jf --json-schema-file -bs --backend-sampling --rope-scaling --rope-scale
--rope-freq-base --rope-freq-scale --yarn-orig-ctx --yarn-ext-factor --yarn-attn-factor
--yarn-beta-slow --yarn-beta-fast -gan --grp-attn-n -gaw --grp-attn-w -kvo --kv-offload -nkvo
--no-kv-offload --repack -nr --no-repack --no-host -ctk --cache-type-k -ctv --cache-type-v -dt
--defrag-thold -np --parallel -mm --mmproj -mmu --mmproj-url --mmproj-auto --no-mmproj
--no-mmproj-auto --mmproj-offload --no-mmproj-offload -mmdev --mmproj-device --image --audio
--video --image-min-tokens --image-max-tokens --video-fps --video-timestamp-interval
--video-ffmpeg-dir --rpc -lm --load-mode -lzm --lazy-mode --numa -dev --device --list-devices -ot
--override-tensor -cmoe --cpu-moe -ncmoe --n-cpu-moe -ncffn --n-cpu-ffn -ngl --gpu-layers
--n-gpu-layers -sm --split-mode -ts --tensor-split -mg --main-gpu -fit --fit -fitt --fit-target
-fitc --fit-ctx --check-tensors --override-kv --op-offload --no-op-offload --lora --lora-scaled
--control-vector --control-vector-scaled --control-vector-layer-range -m --model -mu --model-url
-dr --docker-repo -hf -hfr --hf-repo -hff --hf-file -hft --hf-token -o --output --output-file
--chat-template-kwargs --jinja --no-jinja --reasoning-format -rea --reasoning --reasoning-effort
--reasoning-budget --reasoning-budget-message --reasoning-preserve --no-reasoning-preserve
--chat-template --chat-template-file --skip-chat-parsing --no-skip-chat-parsing --simple-io
--log-disable --log-file --log-jsonl --no-log-jsonl --log-prompts-dir --log-colors -v --verbose
--log-verbose --offline -lv --verbosity --log-verbosity --log-prefix --no-log-prefix
--log-timestamps --no-log-timestamps --spec-draft-hf -hfd -hfrd --hf-repo-draft
--spec-draft-threads -td --threads-draft --spec-draft-threads-batch -tbd --threads-batch-draft
--spec-draft-cpu-mask -Cd --cpu-mask-draft --spec-draft-cpu-range -Crd --cpu-range-draft
--spec-draft-cpu-strict --cpu-strict-draft --spec-draft-prio --prio-draft --spec-draft-poll
--poll-draft --spec-draft-cpu-mask-batch -Cbd --cpu-mask-batch-draft --spec-draft-cpu-strict-batch
--cpu-strict-batch-draft --spec-draft-prio-batch --prio-batch-draft --spec-draft-poll-batch
--poll-batch-draft --spec-draft-type-k -ctkd --cache-type-k-draft --spec-draft-type-v -ctvd
--cache-type-v-draft --spec-draft-override-tensor -otd --override-tensor-draft
--spec-draft-cpu-moe -cmoed --cpu-moe-draft --spec-draft-n-cpu-moe --spec-draft-ncmoe -ncmoed
--n-cpu-moe-draft --spec-draft-n-max --spec-draft-n-min --spec-synth-len --spec-synth-rates
--spec-draft-p-split --draft-p-split --spec-draft-p-min --draft-p-min
--spec-draft-backend-sampling --no-spec-draft-backend-sampling --spec-draft-device -devd
--device-draft --spec-draft-ngl -ngld --gpu-layers-draft --n-gpu-layers-draft --spec-draft-model
-md --model-draft --spec-type --spec-ngram-mod-n-min --spec-ngram-mod-n-max
--spec-ngram-mod-n-match --spec-ngram-simple-size-n --spec-ngram-simple-size-m
--spec-ngram-simple-min-hits --spec-ngram-map-k-size-n --spec-ngram-map-k-size-m
--spec-ngram-map-k-min-hits --spec-ngram-map-k4v-size-n --spec-ngram-map-k4v-size-m
--spec-ngram-map-k4v-min-hits --draft --draft-n --draft-max --draft-min --draft-n-min
--gpt-oss-20b-default --gpt-oss-120b-default --vision-gemma-4b-default --vision-gemma-12b-default
--spec-default
"""
_ONLY_IK = """
-tm --threads-mtmd --in-file -cd --ctx-size-draft --pooling --attention -mea --max-extra-alloc
-nrep --n-repetitions --sweep-stride --sweep-memory --tfs --adaptive-updt-w-cur --spec-replace
--cfg-negative-prompt --cfg-negative-prompt-file --cfg-scale --spec-ckpt-mode
--recurrent-ckpt-mode --spec-autotune --chunks -ns --sequences -ps --p-split --spec-stage
--spec-ngram-size-n --spec-ngram-size-m --spec-ngram-min-hits --suffix-pattern-len
--suffix-max-depth --suffix-corpus -a --alias --lora-init-without-apply --mtmd-kq-type --embedding
--embeddings --embd-normalize --embd-output-format --embd-separator --infill -dkvc --dump-kv-cache
-ictk --indexer-cache-type-k -ctk-first --cache-type-k-first -ctk-last --cache-type-k-last
-ctv-first --cache-type-v-first -ctv-last --cache-type-v-last -mtprot
--mtp-requantize-output-tensor -cb --cont-batching -nocb --no-cont-batching -no-fa --no-flash-attn
-mla --mla-use -dsa --dsa -fidx --fused-indexer-topk --swa-compress -dsatk --dsa-top-k -amb
--attention-max-batch -no-fmoe --no-fused-moe -ger --grouped-expert-routing -no-fug
--no-fused-up-gate -no-mmad --no-fused-mul-multiadd -rcache --rope-cache -gr --graph-reuse -no-gr
--no-graph-reuse -ser --smart-expert-reduction --mlock --max-gpu -okv -gfm --gpu-fit-margin -cuda
--cuda-params -mtp --multi-token-prediction -no-mtp --no-multi-token-prediction -draft
--draft-params --defer-experts --prefetch-experts --prefetch-experts-threads --fit-margin -wgt
--worst-graph-tokens --no-mmap -rtr --run-time-repack -thp --transparent-huge-pages -vq
--validate-quants -mqkv --merge-qkv -muge --merge-up-gate-experts -khad --k-cache-hadamard -vhad
--v-cache-hadamard -smgs --split-mode-graph-scheduling -sas --scheduler-async -fdn
--fused-delta-net -smf16 --split-mode-f16 -smf32 --split-mode-f32 -grt --graph-reduce-type -gap
--graph-attn-precision --banned-string-file --banned-n --allowlist-unicode-rule --allowlist-pieces
--allowlist-keyword --allowlist-keyword-delay --expiring-logit-bias-file -ld --logdir -lcs
--lookup-cache-static -lcd --lookup-cache-dynamic --save-all-logits --kl-divergence-base
--perplexity --all-logits --ppl-stride --ppl-output-type --hellaswag --hellaswag-tasks
--winogrande --winogrande-tasks --multiple-choice --multiple-choice-tasks --kl-divergence
--penalize-nl --dry-run --spm-infill -op --offload-policy -no-ooae
--no-offload-only-active-experts --host --port --send-done --path --webui --webui-mcp-proxy
--ui-mcp-proxy --api-key --api-key-file --ssl-key-file --ssl-cert-file -to --timeout
--threads-http -spf --log-format --no-slots --metrics --slot-save-path --reasoning-tokens
--sql-save-file --sqlite-zstd-ext-file --peg --no-prefill-assistant -ptcall --parallel-tool-calls
-sps --slot-prompt-similarity -pps -npp -ntg -npl --context-file --chunk-size --chunk-separator
--junk -ctx-ckpt -ctx-ckpt-i --ctx-checkpoints-interval -ctx-ckpt-t --ctx-checkpoints-tolerance
-ctx-ckpt-e --ctx-checkpoints-eviction -crs --cache-ram-similarity -cram-n-min --cache-ram-n-min
--pos --output-draft --draft-output --draft-output-file -ofreq --output-frequency --save-frequency
--process-output --output-tensor-name --no-ppl --chunk --from-chunk --positive-file
--negative-file --pca-batch --pca-iter --method -wb --warmup-batch --output-format --minilog
"""
LLAMA_CPP, IK_LLAMA_CPP = tuple(_LLAMA_CPP.split()), tuple(_ONLY_IK.split())
