"""Draws tokens per second from files that `mlacli bench -o jsonl`, `mlacli sweep`, a llama-bench
(-o jsonl or json) or a llama-sweep-bench (--output-format jsonl) wrote, without measuring.

    python scripts/plot_bench.py out.svg --x depth 'mlacli -mla 3=a.jsonl' 'ik=b.jsonl'

The lines are those of `mlacli bench --plot` (mlacli/plot_results.py). `--x` is what goes along, by
default what varies; `--kind` leaves the other kinds of test out. Needs the extra `plot`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlacli.errors import MlaError
from mlacli.pictures import check_picture
from mlacli.plot_results import KINDS, X_LABELS, draw, no_x, picture_of, what_varies
from mlacli.results import Row, rows_of


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help=".svg, .png or .pdf")
    parser.add_argument("files", nargs="+", metavar="name=file.jsonl")
    parser.add_argument("--x", choices=X_LABELS)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--title", default="")
    given = parser.parse_args(argv)
    files: dict[str, list[Row]] = {}
    for text in given.files:
        name, equals, path = text.rpartition("=")
        if not equals:
            parser.error(f"{text!r}: 'name=file.jsonl' is wanted")
        try:
            files[name] = rows_of(Path(path))
        except (OSError, ValueError) as problem:
            parser.error(str(problem))
    try:
        check_picture("out", given.out)
        x = given.x or what_varies(files.values())
        if x is None:
            raise no_x("out")
        kinds = (given.kind,) if given.kind else KINDS
        draw(picture_of(files, x, given.title, kinds), given.out, "out")
    except MlaError as problem:
        parser.error(str(problem))
    return 0


if __name__ == "__main__":
    sys.exit(main())
