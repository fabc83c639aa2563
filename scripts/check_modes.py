"""Run a model in every mode and watch what it takes: does memory agree with the report?

For each -mla, with and without -fa: `mlacli report --json` beforehand, then `mlacli run` with the
same flags while /proc is polled. Anonymous memory may exceed the report's sum (cache, compute,
output, derived weights) by 5 % and 150 MiB. Needs Linux.

    python scripts/check_modes.py -m model.gguf [-c 4096] [--prompt-tokens 300] [-n 8] [-ctk q8_KV]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).parent.parent
MIB = 2**20
SLACK, SLACK_BYTES = 1.05, 150 * MIB
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Outcome:
    """One run: the text it gave, its exit code, memory told and seen, and its speeds."""

    code: int
    text: str
    told: int
    seen: int
    prompt_rate: float
    generation_rate: float

    @property
    def agrees(self) -> bool:
        return self.seen <= SLACK * self.told + SLACK_BYTES


def told_bytes(flags: list[str]) -> int:
    """What the report says will be taken, weights in the mapped file apart."""
    command = [sys.executable, "-m", "mlacli", "report", "--json", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout)["memory"]["needed_bytes"])


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process, 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return 1024 * int(found.group(1)) if found else 0


def watched_run(flags: list[str], prompt: Path, n_predict: int) -> Outcome:
    """Run to the end, keeping the largest anonymous memory seen."""
    told = told_bytes(flags)
    words = ["--no-cnv", "--temp", "0", "--ignore-eos", "-f", str(prompt), "-n", str(n_predict)]
    command = [sys.executable, "-m", "mlacli", "run", *flags, *words]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    seen = 0
    while process.poll() is None:
        seen = max(seen, anonymous_bytes(process.pid))
        time.sleep(_POLL_SECONDS)
    text, notes = process.communicate()
    prompt_rate, generation_rate = (_rate(notes, what) for what in ("prompt eval", "  eval"))
    return Outcome(process.returncode, text, told, seen, prompt_rate, generation_rate)


def _rate(notes: str, what: str) -> float:
    found = re.search(rf"{what} time.*?([\d.]+) tokens per second", notes)
    return float(found.group(1)) if found else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-c", "--ctx-size", default="4096")
    parser.add_argument("-f", "--file", type=Path, required=True, help="the prompt")
    parser.add_argument("-n", "--n-predict", type=int, default=8)
    parser.add_argument("-ctk", "--cache-type-k", default="f16")
    parser.add_argument("--mla", default="0,1,2,3")
    parser.add_argument("--fa", default="on,off")
    given = parser.parse_args()
    rows, failed = [], False
    for mla in given.mla.split(","):
        for flash in given.fa.split(","):
            flags = ["-m", given.model, "-c", given.ctx_size, "-ctk", given.cache_type_k]
            outcome = watched_run([*flags, "-mla", mla, "-fa", flash], given.file, given.n_predict)
            failed |= outcome.code != 0 or not outcome.agrees
            rows.append(
                [
                    mla,
                    flash,
                    outcome.code,
                    round(outcome.told / MIB, 2),
                    round(outcome.seen / MIB, 2),
                    "yes" if outcome.agrees else "NO",
                    outcome.prompt_rate,
                    outcome.generation_rate,
                    repr(outcome.text[-24:]),
                ]
            )
            print(f"-mla {mla} -fa {flash}: exit {outcome.code}", file=sys.stderr)
    head = ["mla", "fa", "exit", "told MiB", "seen MiB", "agrees", "pp t/s", "tg t/s", "text ends"]
    print(tabulate(rows, head))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
