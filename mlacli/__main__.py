"""Entry point: every way that a command can end becomes an exit code and at most one line."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence

from mlacli import errors

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    from mlacli.cli import app, console
    from mlacli.debug import ENV

    words = list(sys.argv[1:] if argv is None else argv)
    console.prepare_streams()
    code = _guarded(lambda: _flushed(app.run(words)), ENV.debug or "--debug" in words)
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

        console.note("".join(traceback.format_exception(problem)).rstrip())
    what = f"{type(problem).__name__}: {problem}"
    return _fail(f"internal: {what}{hint}", errors.EXIT_INTERNAL)


if __name__ == "__main__":
    sys.exit(main())
