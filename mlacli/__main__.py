"""Entry point: every way that a command can end becomes an exit code and at most one line."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence

from mlacli import errors

EXIT_CODES = {
    0: "Done.",
    1: "bench: some rows failed.",
    errors.EXIT_USAGE: "A flag, its value or the prompt cannot work.",
    errors.EXIT_MODEL: "The model file is missing, malformed or not supported.",
    errors.EXIT_SESSION: "A saved session cannot be used.",
    errors.EXIT_SPACE: "Not enough memory or disk space, or the output cannot be written.",
    errors.EXIT_INTERNAL: "A mistake in mlacli itself; --debug shows where.",
    errors.EXIT_FILE_CHANGED: "The model file changed or became shorter while it was in use.",
    errors.EXIT_SIGINT: "Stopped by Ctrl-C.",
    errors.EXIT_SIGPIPE: "The reader of the output left.",
    errors.EXIT_SIGTERM: "Stopped by SIGTERM.",
}
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    from mlacli.cli import app, console
    from mlacli.debug import ENV

    words = list(sys.argv[1:] if argv is None else argv)
    console.prepare_streams()
    try:
        code = _guarded(lambda: _flushed(app.run(words)), ENV.debug or "--debug" in words)
    finally:
        console.finish()
    if code in (errors.EXIT_SPACE, errors.EXIT_SIGPIPE):
        console.abandon(sys.stdout)
    return code


def _flushed(code: int) -> int:
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


def _guarded(action: Callable[[], int], debug: bool) -> int:
    """The one place where exceptions become exit codes."""
    import typer

    try:
        return action()
    except errors.Interrupted as ended:
        return ended.exit_code
    except errors.MlaError as problem:
        return _fail(str(problem), problem.exit_code)
    except typer.Exit as done:
        return done.exit_code
    except typer.TyperException as problem:
        return _fail(problem.format_message(), errors.EXIT_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return errors.EXIT_SIGINT
    except BrokenPipeError:
        return errors.EXIT_SIGPIPE
    except MemoryError:
        return _fail("out of memory", errors.EXIT_SPACE)
    except Exception as problem:
        if isinstance(problem, OSError) and problem.errno in _NO_SPACE:
            return _fail(f"{problem.filename or 'stdout'}: {problem.strerror}", errors.EXIT_SPACE)
        return _internal(problem, debug)


def _fail(message: str, code: int) -> int:
    from mlacli.cli import console

    console.error(message)
    return code


def _internal(problem: Exception, debug: bool) -> int:
    """A mistake of ours: say so, and where it happened only on request."""
    hint = "" if debug else " (--debug shows where)"
    if debug:
        import traceback

        from mlacli.cli import console

        console.tell("".join(traceback.format_exception(problem)).rstrip())
    what = f"{type(problem).__name__}: {problem}"
    return _fail(f"internal: {what}{hint}", errors.EXIT_INTERNAL)


if __name__ == "__main__":
    sys.exit(main())
