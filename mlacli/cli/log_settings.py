"""What is shown on stderr besides errors, how, and in which colours: flags of every model command.

Names and levels are llama.cpp's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mlacli.limits import Choice, limited, ruled

ERRORS, NOTES, INFO, DEBUG = 1, 2, 3, 4
_WHEN = ("on", "off", "auto")
LOG = "Log and terminal"


@dataclass(frozen=True)
class LogSettings:
    """Raises UsageError."""

    verbosity: int = field(default=INFO, metadata=limited("-lv", 0, 2**31 - 1))
    log_disable: bool = False
    log_file: str | None = None
    log_colors: str = field(default="auto", metadata=ruled(Choice("--log-colors", _WHEN)))
    log_prefix: bool = False
    log_timestamps: bool = False
    color: str = field(default="auto", metadata=ruled(Choice("--color", _WHEN)))
    simple_io: bool = False
    progress: bool = True

    @property
    def shown(self) -> int:
        """The greatest level that stderr gets."""
        return ERRORS if self.log_disable else self.verbosity

    @property
    def path(self) -> Path | None:
        return Path(self.log_file) if self.log_file else None


# field: (section, names, placeholder, help), as in flags.py
LOG_TEXT: dict[str, tuple[str, str, str, str]] = {
    "verbosity": (
        LOG,
        "-lv --verbosity --log-verbosity",
        "N",
        "What stderr is told: 0 and 1 errors, 2 also notes, 3 also sizes, settings and timings, "
        "4 and more as -v.",
    ),
    "log_disable": (LOG, "--log-disable", "", "Only errors and what was asked for on stderr."),
    "log_file": (LOG, "--log-file", "FILE", "Write these lines to a file, too."),
    "log_colors": (LOG, "--log-colors", "[on|off|auto]", "Notes and errors on stderr in colour."),
    "log_prefix": (
        LOG,
        "--log-prefix/--no-log-prefix",
        "",
        "Put I, W or E before each line: information, note or error.",
    ),
    "log_timestamps": (
        LOG,
        "--log-timestamps/--no-log-timestamps",
        "",
        "Put minutes, seconds, milli- and microseconds since the start before each line.",
    ),
    "color": (
        LOG,
        "-co --color",
        "[on|off|auto]",
        "Colour what you type, the prompt and thoughts; auto: on a terminal.",
    ),
    "simple_io": (LOG, "--simple-io", "", "No line editing, colours or progress bars."),
    "progress": (LOG, "--progress/--no-progress", "", "Progress bars on a terminal."),
}
