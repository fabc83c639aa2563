"""Writes docs/flags.md: the peers' flags one by one, and what mlacli makes of each.

python -m scripts.flag_table
"""

from __future__ import annotations

from dataclasses import dataclass

from scripts.make_cli_docs import ROOT, table

DONE, OTHERWISE, REFUSED = "done", "done differently", "refused"
RUN, BENCH, REPORT = "run", "bench", "report"
_INTRO = """\
# Flags of llama.cpp and ik_llama.cpp, one by one

<!-- Written by scripts/flag_table.py: change its rows, then run it. -->

What a flag of llama-cli, llama-completion, llama-bench or ik_llama.cpp does here. `ik` and `ml`
are the defaults of ik_llama.cpp and of llama.cpp. Flags that are not in these tables are refused by
name with a reason, or taken with a note that says what mlacli does in that respect: no flag of
these programs is unknown. All flags with their meanings: [cli.md](cli.md).
"""


@dataclass(frozen=True)
class Row:
    """Flags of the peers, their default there, and their state in a command of mlacli."""

    flags: str
    default: str
    state: str
    remark: str
    command: str = RUN


_RUN_ROWS = (
    Row("-m --model", "ml: none", DONE, "the default is a small model that comes with mlacli"),
    Row("-hf -hff -hft --offline", "Q4_K_M, else the first file", DONE, "extra `hub`"),
    Row("-p -f -bf", "empty", DONE, "or standard input; -f loses one newline at its end"),
    Row("-e --no-escape", "on", DONE, "also in -sys, -r, --in-prefix and the like"),
    Row("-sys -sysf", "none", DONE, "for the chat template"),
    Row("-n", "-1", DONE, "-1: until the model ends, -2: until the context is full"),
    Row("-c", "0: all trained", OTHERWISE, "what fits, at most 4096; any size becomes 256 n"),
    Row("-b -ub", "2048, 512", DONE, "-ub above -b is refused, not cut"),
    Row("-t -tb", "physical cores", OTHERWISE, "0 and below are refused, not all logical cores"),
    Row("-C -Cr --cpu-strict --prio --poll", "none", DONE, ""),
    Row("-mla", "ik: 3", DONE, "any file works in any mode"),
    Row("-fa -no-fa", "on; auto", DONE, "a value may follow or not"),
    Row("-ctk -ctv", "f16", DONE, "a type that has no effect is noted"),
    Row("-amb", "ik: 256", DONE, "0: no limit; small numbers are not raised"),
    Row("-rtr --repack", "off; ml: on", DONE, "--repack is -rtr"),
    Row("-fmoe -no-fmoe", "on", DONE, ""),
    Row(
        "-no-fug -no-mmad -gr -no-gr -mqkv -muge -ger -rcache",
        "on",
        OTHERWISE,
        "taken with a note: there is nothing to switch",
    ),
    Row("-ser", "off", DONE, ""),
    Row("-thp", "off", OTHERWISE, "madvise; what came of it is said"),
    Row("-lm --mlock --no-mmap", "mmap", DONE, "-lm dio is refused: there is no direct I/O"),
    Row("--numa", "off", DONE, ""),
    Row(
        "--check-tensors -vq",
        "off",
        DONE,
        "before anything runs; names the tensors and first blocks, exit 3",
    ),
    Row("-dr --dry-run", "off", DONE, "prints the report; exit code 5: does not fit"),
    Row("-fit -fitt -fitc", "ml: on", DONE, "run has -fit on|off, for its default -c", REPORT),
    Row("-fitp", "off", REFUSED, "report --fit prints the command line that fits", REPORT),
    Row(
        "-okv --override-kv",
        "none",
        DONE,
        "a value of another type than the file's is refused, a new key noted",
    ),
    Row(
        "--rope-scaling --rope-scale --rope-freq-base --rope-freq-scale",
        "from the file",
        DONE,
        "the same as a file with that metadata; sessions know of it",
    ),
    Row(
        "--yarn-orig-ctx --yarn-ext-factor --yarn-attn-factor --yarn-beta-slow --yarn-beta-fast",
        "from the file",
        OTHERWISE,
        "--yarn-attn-factor counts (as in ik; ml overrides it with YaRN)",
    ),
    Row("-khad -vhad", "off", REFUSED, "cached rows are not transformed"),
    Row(
        "--warmup --no-warmup",
        "on",
        OTHERWISE,
        "off: kernels are compiled and memory is taken before the clock starts in any case",
    ),
    Row("-v -lv --verbosity --log-file --log-disable --log-colors", "auto", DONE, ""),
    Row(
        "-co --simple-io --no-display-prompt --verbose-prompt --no-perf --show-timings",
        "auto",
        DONE,
        "",
    ),
    Row("--log-jsonl", "off", REFUSED, "run --json and --jsonl write results"),
    Row(
        "--defer-experts --prefetch-experts",
        "off",
        REFUSED,
        "the system reads experts when they are needed",
    ),
    Row("--spec-type -md", "none", REFUSED, "there is no speculative decoding"),
)
_TALK_ROWS = (
    Row("-cnv -no-cnv", "on", DONE, "one answer with -p or without a terminal"),
    Row("-st -i -mli", "off", DONE, ""),
    Row("-if", "off", DONE, "a prompt goes before the first message"),
    Row("--in-prefix --in-suffix", "none", OTHERWISE, "inside the chat template"),
    Row("--in-prefix-bos", "off", REFUSED, "BOS stands where the template puts it"),
    Row("-r", "none", DONE, "may be repeated"),
    Row("--keep", "0", DONE, "of a context shift; -1: the whole prompt"),
    Row("--chat-template --chat-template-file --chat-template-kwargs", "the file's", DONE, ""),
    Row("--jinja --no-jinja", "on", OTHERWISE, "always; --no-jinja is noted"),
    Row("-sp --special", "off", DONE, "also the end token; not part of what was said"),
    Row("-rea", "auto", OTHERWISE, "how thoughts are shown; the template is told by kwargs"),
    Row(
        "--reasoning-format",
        "auto",
        OTHERWISE,
        "how thoughts are shown: with their marks (none, deepseek-legacy) or as -rea says",
    ),
    Row(
        "--reasoning-budget --reasoning-budget-message",
        "-1",
        DONE,
        "</think> comes after N tokens, never within a character",
    ),
    Row("--reasoning-effort --reasoning-preserve", "default", DONE, "variables of the template"),
    Row(
        "--context-shift --no-context-shift",
        "ml: off; ik: on",
        DONE,
        "also with MLA; the peers abort",
    ),
    Row("--ctx-checkpoints", "32", OTHERWISE, "taken with a note: an MLA cache needs none"),
    Row("--ignore-eos", "off", DONE, ""),
    Row(
        "--prompt-cache --prompt-cache-all --prompt-cache-ro",
        "none",
        DONE,
        "the whole conversation with -i; another model, mode or metadata is refused",
    ),
    Row(
        "--temp --top-k --top-p --min-p --typical --tfs --top-n-sigma",
        "0.8, 40, 0.95, 0.05, 1",
        DONE,
        "",
    ),
    Row(
        "--repeat-last-n --repeat-penalty --presence-penalty --frequency-penalty",
        "64, 1, 0, 0",
        DONE,
        "",
    ),
    Row("--dynatemp-range --dynatemp-exp --mirostat --mirostat-lr --mirostat-ent", "off", DONE, ""),
    Row("--xtc-probability --xtc-threshold", "0; 0.1, ik: 1.0", DONE, "0.1"),
    Row(
        "--dry-multiplier --dry-base --dry-allowed-length --dry-penalty-last-n "
        "--dry-sequence-breaker",
        "0, 1.75, 2, -1",
        DONE,
        "",
    ),
    Row(
        "--adaptive-target --adaptive-decay",
        "-1, 0.9",
        DONE,
        "probabilities behind the other samplers, as in ml",
    ),
    Row("-s --samplers --sampling-seq", "random", DONE, "an unknown name is refused"),
    Row("--grammar --grammar-file -j -jf", "none", DONE, "llguidance"),
    Row("-l --logit-bias", "none", DONE, ""),
    Row("-ptc", "-1", DONE, "on stderr"),
)
_BENCH_ROWS = (
    Row("-m -p -n -pg -gp -d", "512, 128, 0", DONE, "lists, ranges and repetition", BENCH),
    Row("-b -ub -ctk -ctv -t -fa", "2048, 512, f16", DONE, "", BENCH),
    Row("-mmp -lm --numa", "1", DONE, "", BENCH),
    Row("-embd", "0", REFUSED, "there are no embeddings", BENCH),
    Row("-tgb", "none", DONE, "", BENCH),
    Row(
        "-mla -amb -ser -rtr -fmoe -thp -w",
        "3, 0, off, 0, 1, 0, 1",
        OTHERWISE,
        "-amb 256, as in run",
        BENCH,
    ),
    Row("-gr -mqkv -muge -ger -rcache -no-fug -no-mmad", "", OTHERWISE, "taken with a note", BENCH),
    Row("-ot --list-devices", "none", REFUSED, "there is no GPU backend", BENCH),
    Row("-C --cpu-strict --poll --prio", "none", DONE, "", BENCH),
    Row("--delay --progress --no-warmup --repack", "0", DONE, "", BENCH),
    Row("-r -o -oe -v", "5, md", DONE, "", BENCH),
)
SECTIONS = {
    "Running and talking": _RUN_ROWS,
    "Conversations, sessions, sampling": _TALK_ROWS,
    "llama-bench": _BENCH_ROWS,
}


def flags_page() -> str:
    """docs/flags.md."""
    parts = [_INTRO]
    for title, rows in SECTIONS.items():
        cells = (
            (
                " ".join(f"`{f}`" for f in row.flags.split()),
                row.default,
                row.state,
                f"`{row.command}`",
                row.remark,
            )
            for row in rows
        )
        header = ("flag", "peers' default", "mlacli", "command", "remark")
        parts.append(f"## {title}\n\n{table(header, cells)}")
    return "\n".join(parts)


def main() -> None:
    (ROOT / "docs" / "flags.md").write_text(flags_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
