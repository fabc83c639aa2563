"""Command lines that are refused, each with its one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlacli.__main__ import main
from mlacli.cli.app import COMMANDS

CACHE_TYPES = "f32, f16, bf16, q8_0, q8_KV, q6_0, q4_0, iq4_nl, q5_0"

# command line -> the line after "error: "; exit code 2, before any model is looked for
REFUSED = {
    "run -t 0": "-t: 0 is out of range (1 to 1024)",
    "run -t -1": "-t: -1 is out of range (1 to 1024)",
    "run -t abc": "-t: 'abc' is not a whole number (1 to 1024)",
    "run -t 1e3": "-t: '1e3' is not a whole number (1 to 1024)",
    "run -t 99999999999": "-t: 99999999999 is out of range (1 to 1024)",
    "run -t 4096": "-t: 4096 is out of range (1 to 1024)",
    "run -tb 0": "-tb: 0 is out of range (1 to 1024)",
    "run -c -5": "-c: -5 is out of range (0 to 2147483647)",
    "run -c 99999999999": "-c: 99999999999 is out of range (0 to 2147483647)",
    "run -b 0": "-b: 0 is out of range (1 to 1048576)",
    "run -ub -1": "-ub: -1 is out of range (1 to 65536)",
    "run -p x -ub 1024 -b 512": "-ub: 1024 is more than -b 512",
    "run -n abc": "-n: 'abc' is not a whole number (-2 to 2147483647)",
    "run -n -3": "-n: -3 is out of range (-2 to 2147483647)",
    "run -ctk foo": f"-ctk: 'foo' is not one of {CACHE_TYPES}",
    "run -p x -ctk q4_0 -mla 1": "-ctk: q4_0 cannot hold the latent rows of -mla 1 "
    "(one of f32, f16, bf16, q8_0, q8_KV, q6_0, or -mla 0)",
    "run -p x -ctv q8_0 -no-fa": "-ctv: q8_0 needs flash attention (-fa on): "
    "without it V is kept transposed, which blocks of values do not allow",
    "run -mla 7": "-mla: 7 is out of range (0 to 3)",
    "run -mla -1": "-mla: -1 is out of range (0 to 3)",
    "run -amb -5": "-amb: -5 is out of range (0 to 1048576)",
    "run -fa maybe": "-fa: 'maybe' is not one of on, auto, 1, off, 0",
    "run -ser 4": "-ser: '4' is not a pair Kmin,t such as 4,0.3 (-1,0 is off)",
    "run --temp nan": "--temp: 'nan' is not a number (0 to 1000)",
    "run --temp inf": "--temp: 'inf' is not a number (0 to 1000)",
    "run --temp -1": "--temp: -1.0 is out of range (0 to 1000)",
    "run --top-p 7": "--top-p: 7.0 is out of range (0 to 1)",
    "run --top-k -5": "--top-k: -5 is out of range (0 to 2147483647)",
    "run --min-p 2": "--min-p: 2.0 is out of range (0 to 1)",
    "run --repeat-penalty 0": "--repeat-penalty: 0.0 is out of range (0.01 to 100)",
    "run -s abc": "-s: 'abc' is not a whole number (-1 to 4294967295)",
    "run -s 18446744073709551616": "-s: 18446744073709551616 is out of range (-1 to 4294967295)",
    "run -p x -f y": "-p and -f: give one of them, not both",
    "run -p x -sys y -sysf z": "-sys and -sysf: give one of them, not both",
    "run -p x -sysf missing.txt": "-sysf: missing.txt: No such file or directory",
    "run -p=": "the prompt is empty (give -p TEXT, -f FILE or standard input)",
    "run -f .": "-f: .: Is a directory",
    "run -f missing.txt": "-f: missing.txt: No such file or directory",
    # spelling
    "run -ub256": "-ub256: write a space before the value: -ub 256",
    "run -mla3": "-mla3: write a space before the value: -mla 3",
    "run -m./x.gguf": "-m./x.gguf: write a space before the value: -m ./x.gguf",
    "run -ngl 99": "-ngl: there is no GPU backend",
    "run --n_gpu_layers 99": "--n-gpu-layers: there is no GPU backend",
    "run -ot exps=CPU": "-ot: there is no GPU backend",
    "run --model-draft x": "--model-draft: there is no speculative decoding",
    "run --mmproj x": "--mmproj: this is a text tool",
    "bench -ngl 0": "-ngl: there is no GPU backend",
    "run -mlaa 3": "-mlaa: no such flag; did you mean -mla?",
    "run --ubatch-sise 3": "--ubatch-sise: no such flag; did you mean --ubatch-size?",
    "run --temperatur 1": "--temperatur: no such flag; did you mean --temperature?",
    "run --zzz": "--zzz: no such flag",
    "run -m": "-m: needs a value",
    "run -ctk -fa": "-ctk: needs a value, but the flag -fa follows",
    "run -ctk --ubatch_size 3": "-ctk: needs a value, but the flag --ubatch_size follows",
    "run --mlock=1": "--mlock: takes no value (got '1')",
    "run model.gguf": "'model.gguf': belongs to no flag (a value with spaces needs quotes)",
    "run -rtr 1": "'1': belongs to no flag (a value with spaces needs quotes)",
    # commands
    "rnu": f"'rnu': no such command (one of {', '.join(COMMANDS)})",
    "-m x.gguf": "-m: comes after a command, as in: mlacli run -m ...",
    "report -mla 4": "-mla: 4 is out of range (0 to 3)",
    "report -p x": "-p: no such flag",
    # bench
    "bench -p abc": "-p: 'abc' is not a whole number (0 to 16777216)",
    "bench -p 0 -n 0": "-p, -n, -pg, -gp: all are 0, so there is nothing to run",
    "bench -r 0": "-r: 0 is out of range (1 to 10000)",
    "bench -o xml": "-o: 'xml' is not one of md, json, jsonl, csv, sql",
    "bench -p 8-1": "-p: '8-1' is not a range (as 1-8, 1-9+2 or 1-64*2)",
    "bench -pg 3": "-pg: '3' is not a pair such as 512,128",
    "bench -ctk f16,foo": f"-ctk: 'foo' is not one of {CACHE_TYPES}",
    "run -C xyz": "-C: 'xyz' is not a hexadecimal mask",
    "run -Cr 5": "-Cr: '5' is not a range of CPUs (as 0-7, 4- or -3)",
    "chat --numa mirror": "--numa: 'mirror' is not one of distribute, isolate, numactl, off",
    "sweep --prio 4": "--prio: 4 is out of range (-1 to 3)",
    "run --poll-batch 101": "--poll-batch: 101 is out of range (0 to 100)",
    "run --prio-batch 1": "--prio-batch: a thread whose priority was lowered may not raise it "
    "again: --prio holds for prompts, too",
    "bench -C 0x1,g": "-C: 'g' is not a hexadecimal mask",
    "bench --poll 0,x": "--poll: 'x' is not a whole number (0 to 100)",
    "doctor --threads 2": "--threads: no such flag",
    "bench -mla 0,4": "-mla: 4 is out of range (0 to 3)",
    "bench -embd 1": "-embd: there are no embeddings",
    "bench -no-ooae 1": "-no-ooae: there is no GPU backend",
    "bench -gr 2": "-gr: '2' is not one of on, auto, 1, off, 0",
    "bench -tgb 4": "-tgb: '4' is not a pair such as 512,128",
    "bench -tgb 0,4": "-tgb: 0 is out of range (1 to 1024)",
    "bench -lm dio": "-lm: dio: there is no direct I/O (none reads the file, mmap maps it)",
    "bench -lm fast": "-lm: 'fast' is not one of auto, none, mmap, mlock, mmap+mlock",
    "bench -lm mmap -mmp 1": "-mmp and -lm: give one of them, not both",
    "bench --delay -1": "--delay: -1.0 is out of range (0 to 86400)",
    "bench -oe xml": "-oe: 'xml' is not one of md, json, jsonl, csv, sql",
    "bench --db x -o csv": "--db: goes with -o sql, not -o csv (-oe csv shows it as well)",
    "bench --pivot fa": "--pivot: fa has one value only (1): give -fa two or more",
    "bench --pivot x -fa 0,1": "--pivot: 'x' is not one of fa, mla, ctk, ctv, rtr, fmoe, thp, mmp, "
    "amb, ser",
    "bench --pivot fa -fa 0,1 -o csv": "--pivot: makes a table for people (-o md), not -o csv",
    "bench --pivot fa -fa 0,1 --roof": "--pivot and --roof: give one of them, not both",
    "bench --plot -": "--plot: nothing varies that could go along it: "
    "give -d, -p, -n, -ub, -b or -t two values",
    "bench --plot x.bmp -d 0,1": "--plot: x.bmp: "
    "the name does not end with one of .png, .svg, .pdf",
    "sweep --plot no/x.png": "--plot: no/x.png: there is no such folder",
    "sweep --plot-with a=b": "--plot-with: needs --plot FILE",
    "sweep --plot - --plot-with a": "--plot-with: 'a' is not NAME=FILE.jsonl",
    "sweep --plot - --plot-with a=b": "--plot-with: b: No such file or directory",
    "bench -p 1-1000 -d 1-1000": "1001000 combinations of flags are too many (10000)",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {REFUSED[line]}\n"
    assert printed.out == ""
