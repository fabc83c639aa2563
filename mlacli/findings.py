"""What `mlacli doctor` finds: one line each, with what to do about it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

OK, NOTE, PROBLEM = "ok", "note", "problem"
_COLUMNS = (9, 12)  # of the status and of the title
_WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """`advice` says what would be gained and how; `values` are the numbers behind the text, sizes
    in bytes. A problem keeps mlacli from running, which would end with `exit_code`."""

    title: str
    text: str
    status: str = OK
    advice: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    exit_code: int = 0

    def record(self) -> dict[str, Any]:
        """For --json."""
        return {
            "check": self.title,
            "status": self.status,
            "found": self.text,
            "advice": self.advice,
            "values": dict(self.values),
        }


def lines_of(finding: Finding) -> list[str]:
    """The finding as text, in columns; advice stands below it, behind an arrow."""
    indent = " " * sum(_COLUMNS)
    head = f"{finding.status:<{_COLUMNS[0]}}{finding.title:<{_COLUMNS[1]}}"
    found = textwrap.wrap(
        finding.text, _WIDTH, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False
    )
    advice = textwrap.wrap(
        finding.advice,
        _WIDTH,
        initial_indent=f"{indent}-> ",
        subsequent_indent=f"{indent}   ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    return found + advice


def exit_code_of(findings: Iterable[Finding]) -> int:
    """That of the first problem, 0 without any."""
    return next((found.exit_code for found in findings if found.status == PROBLEM), 0)
