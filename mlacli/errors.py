"""The errors a user can cause, each with the exit code that scripts may rely on.

Every one of them becomes exactly one line on stderr, `error: ...`; see docs/cli.md for the codes.
"""

EXIT_USAGE = 2
EXIT_MODEL = 3
EXIT_SESSION = 4
EXIT_SPACE = 5
EXIT_INTERNAL = 70
EXIT_FILE_CHANGED = 74
EXIT_SIGINT = 130
EXIT_SIGPIPE = 141
EXIT_SIGTERM = 143


class MlaError(Exception):
    """A problem that the user can mend; `exit_code` is the process's exit code."""

    exit_code = EXIT_INTERNAL


class Interrupted(Exception):
    """A signal ended the command; there is nothing to explain, only an exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class UsageError(MlaError):
    """A flag has a value that cannot work (exit 2)."""

    exit_code = EXIT_USAGE


class ModelError(MlaError):
    """The model file is missing, malformed or not supported (exit 3)."""

    exit_code = EXIT_MODEL


class SessionError(MlaError):
    """A saved session cannot be used (exit 4)."""

    exit_code = EXIT_SESSION


class SpaceError(MlaError):
    """Not enough memory or disk space (exit 5)."""

    exit_code = EXIT_SPACE
