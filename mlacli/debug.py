"""Environment variables: the only place that reads them."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLES = {  # for docs/cli.md
    "MLACLI_TARGET": "CPU target to generate code for (avx2, generic, ...), not the best one.",
    "MLACLI_CONFIG": "The configuration file (docs/config.md); empty: none.",
    "MLACLI_CACHE_DIR": "Folder for compiled code and machine measurements.",
    "NO_COLOR": "Set to anything: no colours.",
    "TERM": "dumb: no colours and no progress bars.",
    "MLACLI_DEBUG": "1: after an internal error, print where it happened (as --debug does).",
}


class Environment:
    """Each variable is read when it is asked for, and cannot be set here."""

    __slots__ = ()

    @property
    def target(self) -> str | None:
        """Name of the target to generate code for; None: the best that this CPU can run."""
        return os.environ.get("MLACLI_TARGET") or None

    @property
    def debug(self) -> bool:
        """Whether internal errors come with a traceback."""
        return os.environ.get("MLACLI_DEBUG", "0") not in ("", "0")

    @property
    def completes(self) -> bool:
        """Whether a shell asks for completions; the name and the protocol are typer's."""
        return bool(os.environ.get("_MLACLI_COMPLETE"))

    @property
    def colours(self) -> bool:
        """Whether a terminal may be sent colours: NO_COLOR and TERM=dumb say no."""
        return not os.environ.get("NO_COLOR") and not self.dumb_terminal

    @property
    def dumb_terminal(self) -> bool:
        """Whether a terminal can only be sent lines."""
        return os.environ.get("TERM", "dumb") == "dumb"

    @property
    def settings(self) -> dict[str, str]:
        """The variables that may stand for flags; empty ones count as not set."""
        prefixes = ("MLACLI_", "LLAMA_ARG_")
        return {n: v for n, v in os.environ.items() if v and n.startswith(prefixes)}

    @property
    def config_is_named(self) -> bool:
        """Whether the configuration file was named, so that it has to exist."""
        return bool(os.environ.get("MLACLI_CONFIG"))

    @property
    def config_file(self) -> Path | None:
        """The configuration file; None when there is to be none, or no absolute path is known."""
        chosen = os.environ.get("MLACLI_CONFIG")
        if chosen is not None:
            return Path(chosen) if chosen else None

        import platformdirs

        folder = Path(platformdirs.user_config_dir("mlacli", appauthor=False))
        return folder / "config.toml" if folder.is_absolute() else None

    @property
    def cache_dir(self) -> Path | None:
        """Folder for what may be thrown away; None when no absolute path can be found.

        XDG says that a relative path is to be ignored; without a home folder there is none.
        """
        chosen = os.environ.get("MLACLI_CACHE_DIR")
        if not chosen:
            import platformdirs

            chosen = platformdirs.user_cache_dir("mlacli", appauthor=False)
        folder = Path(chosen)
        return folder if folder.is_absolute() else None


ENV = Environment()
