"""`mlacli tokenize`: the tokens of a text, as llama-tokenize prints them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from mlacli.cli import console
from mlacli.cli.flag_texts import DEMO_MODEL
from mlacli.cli.options import StrictCommand, flag, new_app, takes
from mlacli.cli.request import read_stdin, read_text, unescaped
from mlacli.errors import UsageError
from mlacli.settings import default_model

TEXT, OUTPUT = "Text", "Output"
app = new_app()


class TokenizeCommand(StrictCommand):
    rewrites: ClassVar[Mapping[str, str]] = {"--log-disable": ""}


_FILE = flag("-f --file", TEXT, "FILE", "A file with the text, all of which counts.")
_STDIN = flag("--stdin", TEXT, "", "Read the text from standard input.")
_BOS = flag("--no-bos", TEXT, "", "No token in front of the text, even if the model wants one.")
_SPECIAL = flag("--no-parse-special", TEXT, "", "Control tokens spelled out stay text.")
_ESCAPE = flag("--no-escape", TEXT, "", r"Take \n, \t, \x41 and the like in -p as typed.")
_IDS = flag("--ids", OUTPUT, "", "Only the ids, as a list: [1, 2, 3].")
_COUNT = flag("--show-count", OUTPUT, "", "Print the number of tokens, too.")


@app.command("tokenize", cls=TokenizeCommand)
@takes([], first=True)
def tokenize(
    model: Annotated[str | None, flag("-m --model", TEXT, "FILE", "GGUF file.", DEMO_MODEL)] = None,
    prompt: Annotated[str | None, flag("-p --prompt", TEXT, "TEXT", "The text.")] = None,
    file: Annotated[str | None, _FILE] = None,
    stdin: Annotated[bool, _STDIN] = False,
    no_bos: Annotated[bool, _BOS] = False,
    no_parse_special: Annotated[bool, _SPECIAL] = False,
    no_escape: Annotated[bool, _ESCAPE] = False,
    ids: Annotated[bool, _IDS] = False,
    show_count: Annotated[bool, _COUNT] = False,
    **values: Any,
) -> int:
    """Print the tokens of a text: a line for each with its id and its own text."""
    if (prompt is not None) + (file is not None) + stdin != 1:
        raise UsageError("tokenize: give one of -p TEXT, -f FILE and --stdin")
    if prompt is not None:
        text = prompt if no_escape else unescaped(prompt)
    elif file is not None:
        text = read_text(Path(file), f"-f: {file}", whole=True)
    else:
        text = read_stdin(whole=True)

    from mlacli.gguf.reader import open_gguf
    from mlacli.text.tokenizer import Tokenizer, tokenizer_data

    path = Path(model) if model is not None else default_model()
    tokenizer = Tokenizer(tokenizer_data(open_gguf(path).metadata, str(path)))
    data = tokenizer.data
    tokens = tokenizer.encode(text, special=not no_parse_special)
    if data.add_bos and data.bos is not None and not no_bos:
        end = [data.eos] if data.add_eos and data.eos is not None else []
        tokens = [data.bos, *tokens, *end]
    if ids:
        console.write(f"{tokens}\n")
    else:
        lines = (f"{token:6} -> '{_shown(tokenizer.piece(token))}'\n" for token in tokens)
        console.write("".join(lines))
    if show_count:
        console.write(f"Total number of tokens: {len(tokens)}\n")
    return 0


def _shown(piece: bytes) -> str:
    r"""A token's text; bytes that are no UTF-8 by themselves, and control characters other than
    newline and tab, as `\xe2`."""
    text = piece.decode("utf-8", "backslashreplace")
    plain = (c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return "".join(plain)
