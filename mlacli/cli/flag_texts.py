"""The texts of the flags that commands share: section, names and meaning by settings field.

Names are llama.cpp's and ik_llama.cpp's.
"""

from __future__ import annotations

from codegen.formats import CACHE_FORMATS, LATENT_CACHE_TYPES
from mlacli.cli import answer_flags
from mlacli.cli.log_settings import LOG_TEXT
from mlacli.cli.model_flags import METADATA_DEFAULT, METADATA_TEXT
from mlacli.sampling_settings import SAMPLERS

MODEL, ATTENTION, SAMPLING, PROMPT = "Model and memory", "Attention", "Sampling", "Prompt"
THREADS = "Threads and CPUs"
OUTPUT = "Output"
PROFILE_HELP = "Show on stderr where the time goes, by op; with -v also by layer."
DEMO_MODEL = "a small model that comes with mlacli"
NO_FLASH_ATTENTION = {"-no-fa": "-fa off", "--no-flash-attn": "-fa off"}
_ONLY_MLA_0 = ", ".join(name for name in CACHE_FORMATS if name not in LATENT_CACHE_TYPES)

# field: (section, names, placeholder, help)
TEXT: dict[str, tuple[str, str, str, str]] = {
    "model": (MODEL, "-m --model", "FILE", "GGUF file; of a split model the first part."),
    "hf_repo": (
        MODEL,
        "-hf -hfr --hf-repo",
        "USER/REPO[:QUANT]",
        "A model of the Hugging Face hub, kept in its cache (extra: hub).",
    ),
    "hf_file": (MODEL, "-hff --hf-file", "FILE", "Which file of it."),
    "hf_token": (MODEL, "-hft --hf-token", "TOKEN", "Access token."),
    "offline": (MODEL, "--offline", "", "Take what the cache has and ask no one."),
    "n_ctx": (MODEL, "-c --ctx-size", "N", "Context in tokens; 0: all that was trained."),
    "n_batch": (MODEL, "-b --batch-size", "N", "Prompt tokens that are submitted at once."),
    "n_ubatch": (MODEL, "-ub --ubatch-size", "N", "Prompt tokens that are computed at once."),
    "n_threads": (THREADS, "-t --threads", "N", "Threads for generation."),
    "n_threads_batch": (THREADS, "-tb --threads-batch", "N", "Threads for prompts."),
    "numa": (
        THREADS,
        "--numa",
        "distribute|isolate|numactl|off",
        "Threads on all NUMA nodes in turn, on the node where the process started, or on the CPUs "
        "that numactl chose.",
    ),
    "cpu_mask": (THREADS, "-C --cpu-mask", "HEX", "CPUs that threads may run on: bit i for CPU i."),
    "cpu_range": (THREADS, "-Cr --cpu-range", "LO-HI", "The same as a range; adds to -C."),
    "cpu_strict": (THREADS, "--cpu-strict", "[1|0]", "Each thread on a CPU of its own."),
    "prio": (
        THREADS,
        "--prio",
        "-1..3",
        "Priority of the threads: low, normal, medium, high, real-time.",
    ),
    "poll": (
        THREADS,
        "--poll",
        "0..100",
        "How long threads look for work before they sleep: 0 not at all, 100 for ever.",
    ),
    "cpu_mask_batch": (THREADS, "-Cb --cpu-mask-batch", "HEX", "CPUs for prompts."),
    "cpu_range_batch": (THREADS, "-Crb --cpu-range-batch", "LO-HI", "The same; adds to -Cb."),
    "cpu_strict_batch": (THREADS, "--cpu-strict-batch", "[1|0]", "--cpu-strict for prompts."),
    "poll_batch": (THREADS, "--poll-batch", "0..100", "--poll for prompts."),
    "rtr": (MODEL, "-rtr --run-time-repack", "", "Interleave weights at load (copies them)."),
    "fmoe": (MODEL, "-fmoe/-no-fmoe --fused-moe/--no-fused-moe", "", "Fuse up, gate and SiLU."),
    "ser": (
        MODEL,
        "-ser --smart-expert-reduction",
        "K,T",
        "The top K experts always; others only above T times the best one.",
    ),
    "thp": (MODEL, "-thp --transparent-huge-pages", "", "Huge pages where the system has them."),
    "mlock": (MODEL, "--mlock", "", "Keep the weights from being paged out."),
    "mmap": (MODEL, "--mmap/--no-mmap", "", "Map the file, or read it into memory."),
    "fit": (
        MODEL,
        "-fit --fit",
        "[on|off]",
        "Without -c, take less context if memory is short; off: refuse to run then.",
    ),
    "check_tensors": (
        MODEL,
        "--check-tensors -vq --validate-quants",
        "",
        "Look for NaN and Inf in the weights before anything runs.",
    ),
    **METADATA_TEXT,
    "verbose": (MODEL, "-v --verbose", "", "Say more about what is chosen and why."),
    "mla": (
        ATTENTION,
        "-mla --mla-use",
        "0..3",
        "0: K and V; 1: latent cache; 2: latent, prompts expanded; 3: the cheaper of both.",
    ),
    "mla_threshold": (
        ATTENTION,
        "--mla-threshold",
        "N",
        "Batches of N tokens and more are expanded (-mla 2 and 3); 1: all.",
    ),
    "flash_attn": (ATTENTION, "-fa --flash-attn", "[on|off|auto]", "Flash attention."),
    "type_k": (
        ATTENTION,
        "-ctk --cache-type-k",
        "TYPE",
        f"Type of the K cache: {', '.join(LATENT_CACHE_TYPES)}; with -mla 0 also {_ONLY_MLA_0}.",
    ),
    "type_v": (ATTENTION, "-ctv --cache-type-v", "TYPE", "Type of the V cache (-mla 0)."),
    "amb_mib": (
        ATTENTION,
        "-amb --attention-max-batch",
        "MIB",
        "Most memory for K*Q; 0: no limit.",
    ),
    "n_predict": (
        PROMPT,
        "-n --predict --n-predict",
        "N",
        "Most tokens to generate; -1: until the model ends, -2: until the context is full.",
    ),
    "samplers": (SAMPLING, "--samplers", "A;B", "Samplers in order, divided by semicolons."),
    "sampling_seq": (
        SAMPLING,
        "--sampling-seq --sampler-seq",
        "LETTERS",
        "The same, a letter each: e penalties, d dry, s top_n_sigma, k top_k, f tfs_z, "
        "y typical_p, p top_p, m min_p, x xtc, t temperature, w adaptive_p.",
    ),
    "temp": (SAMPLING, "--temp --temperature", "T", "0 takes the likeliest token."),
    "dynatemp_range": (
        SAMPLING,
        "--dynatemp-range",
        "R",
        "Temperature between T - R and T + R, by how open the choice is.",
    ),
    "dynatemp_exp": (SAMPLING, "--dynatemp-exp", "E", "How it depends on that: entropy^E."),
    "top_k": (SAMPLING, "--top-k", "N", "Only the N likeliest tokens; 0: all."),
    "top_p": (SAMPLING, "--top-p", "P", "The likeliest tokens that make up P."),
    "min_p": (SAMPLING, "--min-p", "P", "Tokens at least P times as likely as the likeliest."),
    "top_n_sigma": (
        SAMPLING,
        "--top-n-sigma --top-nsigma",
        "N",
        "Logits within N standard deviations of the greatest; -1: all.",
    ),
    "tfs_z": (SAMPLING, "--tfs", "Z", "Tail-free sampling; 1: off."),
    "typical_p": (SAMPLING, "--typical --typical-p", "P", "Locally typical sampling; 1: off."),
    "xtc_probability": (SAMPLING, "--xtc-probability", "P", "Chance that XTC removes the top."),
    "xtc_threshold": (
        SAMPLING,
        "--xtc-threshold",
        "P",
        "Of the tokens of at least this probability XTC leaves the least likely one.",
    ),
    "repeat_penalty": (SAMPLING, "--repeat-penalty", "X", "Weakens tokens used before; 1: off."),
    "presence_penalty": (SAMPLING, "--presence-penalty", "X", "Taken from tokens used before."),
    "frequency_penalty": (SAMPLING, "--frequency-penalty", "X", "The same for each use."),
    "repeat_last_n": (
        SAMPLING,
        "--repeat-last-n",
        "N",
        "Tokens these penalties look at; -1: the context.",
    ),
    "dry_multiplier": (
        SAMPLING,
        "--dry-multiplier",
        "X",
        "DRY: weakens tokens that go on with a repetition; 0: off.",
    ),
    "dry_base": (SAMPLING, "--dry-base", "B", "Its penalty grows by this factor per token."),
    "dry_allowed_length": (SAMPLING, "--dry-allowed-length", "N", "Repetitions that are free."),
    "dry_penalty_last_n": (SAMPLING, "--dry-penalty-last-n", "N", "Tokens it looks at; -1: all."),
    "dry_sequence_breaker": (
        SAMPLING,
        "--dry-sequence-breaker",
        "TEXT",
        "Text that ends a repetition; may be repeated; none: no such text.",
    ),
    "mirostat": (SAMPLING, "--mirostat", "0|1|2", "Keep the surprise of the text steady; 0: off."),
    "mirostat_ent": (SAMPLING, "--mirostat-ent", "TAU", "That surprise, in bits per token."),
    "mirostat_lr": (SAMPLING, "--mirostat-lr", "ETA", "How fast it is corrected."),
    **{field: (SAMPLING, *words) for field, words in answer_flags.SAMPLING_TEXTS.items()},
    "logit_bias": (
        SAMPLING,
        "-l --logit-bias",
        "ID+X",
        "Added to a token's logit; may be repeated.",
    ),
    "seed": (SAMPLING, "-s --seed", "N", "-1 (or 4294967295): a new one each time."),
    "ignore_eos": (SAMPLING, "--ignore-eos", "", "Go on after the end token."),
    "context_shift": (
        PROMPT,
        "--context-shift",
        "[on|off|auto]",
        "When the context is full, drop the oldest half of it and go on.",
    ),
    "keep": (PROMPT, "--keep", "N", "Tokens of the prompt that it keeps; -1: all."),
    "single_turn": (PROMPT, "-st --single-turn", "", "Of a conversation only the first answer."),
    "reverse_prompt": (
        PROMPT,
        "-r --reverse-prompt",
        "TEXT",
        "Text that ends an answer; may be repeated.",
    ),
    "in_prefix": (PROMPT, "--in-prefix", "TEXT", "Put before every message typed."),
    "in_suffix": (PROMPT, "--in-suffix", "TEXT", "Put behind every message typed."),
    "multiline": (
        PROMPT,
        "-mli --multiline-input",
        "",
        r"A message ends with a line that ends with \, instead of going on after one.",
    ),
    "reasoning": (
        PROMPT,
        "-rea --reasoning",
        "auto|on|off",
        "Show what is thought before an answer: dim on a terminal, as it comes, not at all.",
    ),
    **answer_flags.TEXTS,
    "prompt_cache": (
        PROMPT,
        "--prompt-cache",
        "FILE",
        "Keep the evaluated prompt in a file; what it has of the next one is not evaluated again.",
    ),
    "prompt_cache_all": (PROMPT, "--prompt-cache-all", "", "Keep the answer in it, too."),
    "prompt_cache_ro": (PROMPT, "--prompt-cache-ro", "", "Read that file, but never write it."),
    "display_prompt": (
        OUTPUT,
        "--display-prompt/--no-display-prompt",
        "",
        "Write the prompt, as the model reads it, before the answer.",
    ),
    "verbose_prompt": (OUTPUT, "--verbose-prompt", "", "List the prompt's tokens on stderr."),
    "show_timings": (
        OUTPUT,
        "--show-timings/--no-show-timings --perf/--no-perf",
        "",
        "After an answer, say how long it took.",
    ),
    **LOG_TEXT,
}
SHOWN_DEFAULT = {
    **METADATA_DEFAULT,
    "model": DEMO_MODEL,
    "n_ctx": "what fits, at most 4096",
    "n_threads": "physical cores",
    "n_threads_batch": "-t",
    "numa": "off",
    "cpu_mask": "all",
    "cpu_range": "",
    "cpu_mask_batch": "-C",
    "cpu_range_batch": "",
    "cpu_strict_batch": "--cpu-strict",
    "poll_batch": "--poll",
    "mla_threshold": "128 with -mla 2, measured with -mla 3",
    "ser": "off",
    "samplers": ";".join(SAMPLERS),
    "sampling_seq": "",
    "dry_sequence_breaker": r'\n : " *',
    "logit_bias": "",
    "reverse_prompt": "",
    "hf_repo": "",
    "hf_file": "",
    "hf_token": "HF_TOKEN",
    "offline": "off",
}
