"""Lines and tokens per line of every source file, so that nobody golfs to fit a limit.

    python scripts/size.py [FOLDER ...]

Lines are those with code: no blank lines, comments or docstrings. `!` marks files above 300.
"""

from __future__ import annotations

import io
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("mlacli", "codegen", "tests", "scripts")
LIMIT = 300
_LAYOUT = frozenset(
    {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
    | {tokenize.COMMENT, tokenize.ENDMARKER}
)


@dataclass(frozen=True)
class Size:
    """Lines with code, and tokens in them."""

    lines: int
    tokens: int

    @property
    def density(self) -> float:
        return self.tokens / max(self.lines, 1)

    def __add__(self, other: Size) -> Size:
        return Size(self.lines + other.lines, self.tokens + other.tokens)


def measure(source: str) -> Size:
    """Size of a module's source text."""
    lines: set[int] = set()
    count = 0
    starts_statement = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _LAYOUT:
            starts_statement |= token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            continue
        is_docstring = starts_statement and token.type == tokenize.STRING
        starts_statement = False
        if not is_docstring:
            count += 1
            lines.update(range(token.start[0], token.end[0] + 1))
    return Size(len(lines), count)


def table(root: Path, folders: tuple[str, ...] = FOLDERS) -> str:
    """One line per file and one per folder."""
    rows = [f"{'lines':>6} {'tokens/line':>12}"]
    for folder in folders:
        total = Size(0, 0)
        for path in sorted((root / folder).rglob("*.py")):
            size = measure(path.read_text(encoding="utf-8"))
            total += size
            if size.lines:
                mark = " !" if size.lines > LIMIT else ""
                rows.append(_row(size, str(path.relative_to(root)) + mark))
        rows += [_row(total, f"{folder}/ in all"), ""]
    return "\n".join(rows)


def _row(size: Size, name: str) -> str:
    return f"{size.lines:>6} {size.density:>12.1f}  {name}"


if __name__ == "__main__":
    print(table(Path(__file__).resolve().parent.parent, tuple(sys.argv[1:]) or FOLDERS))
