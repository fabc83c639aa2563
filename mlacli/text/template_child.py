"""The process that renders chat templates, which are programs from an untrusted file.

chat.py starts this file as a script of its own: nothing of mlacli is loaded here, no memory of the
program is shared, and the sandbox of Jinja is only the inner wall. The outer one is the operating
system's limits on processor time, address space, files and processes.

Both directions speak frames: 8 bytes of length, then the body. In: JSON. Out: one letter (`o` text,
`e` what is wrong with the template) and UTF-8.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from jinja2.ext import Extension

_Result = TypeVar("_Result")

CPU_SECONDS = 2.0
ADDRESS_SPACE = 512 << 20
OUTPUT_LIMIT = 8 << 20
OPEN_FILES = 8
OLDEST_JINJA = (3, 1, 6)  # the sandbox of earlier ones has known ways out


class TemplateProblem(Exception):
    """One line about what is wrong with the template."""


def main() -> None:
    sys.path += sys.argv[1:]  # where jinja2 and markupsafe are
    _limit_process()
    setup = _read()
    # compiled before the first request comes, so that this happens while the program loads a model
    template = _timed(lambda: _environment().from_string(setup["template"]))
    while (request := _read()) is not None:
        answer: str | bytes
        if isinstance(template, str):
            answer = template
        else:
            answer = _timed(partial(_render, template, setup["variables"] | request))
        if isinstance(answer, bytes):
            _write(b"o" + answer)
        else:
            _write(b"e" + answer.encode("utf-8", "replace"))


def _timed(work: Callable[[], _Result]) -> _Result | str:
    """The result of `work`, or what is wrong with the template. Its time limit ends the process."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        return work()
    except BaseException as error:
        return _describe(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_process() -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    limits = [
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ]
    if sys.platform != "darwin":  # it has the constant and refuses the call
        limits.append((resource.RLIMIT_AS, ADDRESS_SPACE))
    for limit, value in limits:
        resource.setrlimit(limit, (value, value))


def _read() -> Any:
    length = sys.stdin.buffer.read(8)
    if len(length) < 8:
        return None
    return json.loads(sys.stdin.buffer.read(int.from_bytes(length, "little")))


def _write(body: bytes) -> None:
    sys.stdout.buffer.write(len(body).to_bytes(8, "little") + body)
    sys.stdout.buffer.flush()


def _environment() -> Environment:
    """What transformers gives a chat template, less the globals that only cost time and memory."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3])
    if version < OLDEST_JINJA:
        raise TemplateProblem(f"jinja2 {jinja2.__version__} is too old (3.1.6 or later is needed)")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _generation_extension()],
    )
    for name in ("lipsum", "cycler", "joiner"):
        del environment.globals[name]  # `range` stays: the sandbox's own refuses over 100,000
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _to_json
    return environment


def _generation_extension() -> type[Extension]:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks answers for training: plain text here."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own way of declaring it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _raise_exception(message: str) -> NoReturn:
    raise TemplateProblem(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _render(template: Template, context: dict[str, Any]) -> bytes:
    parts: list[bytes] = []
    room = OUTPUT_LIMIT
    for text in template.generate(**context):
        parts.append(text.encode("utf-8", "surrogatepass"))
        room -= len(parts[-1])
        if room < 0:
            raise TemplateProblem(f"writes more than {OUTPUT_LIMIT >> 20} MiB")
    return b"".join(parts)


def _describe(error: BaseException) -> str:
    from jinja2.exceptions import TemplateSyntaxError

    if isinstance(error, TemplateProblem):
        return str(error)
    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    if isinstance(error, MemoryError):
        return f"needs more than {ADDRESS_SPACE >> 20} MiB of memory"
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
    os._exit(0)
