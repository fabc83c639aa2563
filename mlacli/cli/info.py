"""`mlacli info`: what a GGUF file says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from mlacli.cli import console
from mlacli.cli.flag_texts import DEMO_MODEL
from mlacli.cli.options import StrictCommand, flag, new_app, parameter, takes
from mlacli.errors import UsageError
from mlacli.settings import default_model

app = new_app()


class InfoCommand(StrictCommand):
    operands = "model"


_MODEL = flag(
    "-m --model", "File", "FILE", "GGUF file; may also be given without the flag.", DEMO_MODEL
)
_KV = flag("--kv", "Output", "", "List all metadata as llama.cpp does, long values cut.")
_TENSORS = flag("--tensors", "Output", "", "List all tensors: type, shape, bytes.")
_JSON = flag("--json", "Output", "", "Print JSON.")


@app.command("info", cls=InfoCommand)
@takes([parameter("model", _MODEL, list[str] | None)], first=True)
def info(
    kv: Annotated[bool, _KV] = False,
    tensors: Annotated[bool, _TENSORS] = False,
    json: Annotated[bool, _JSON] = False,
    **values: Any,
) -> int:
    """Show what is in a file: architecture, sizes, quantisation, attention, tokenizer.

    Any GGUF file will do; of one that mlacli cannot run it says why.
    """
    files = values["model"] or [str(default_model())]
    if len(files) > 1:
        raise UsageError(f"info: takes one file (got {len(files)})")

    from mlacli.info import read_info
    from mlacli.info_format import info_json, info_text, kv_lines, tensor_table

    found = read_info(Path(files[0]))
    if json:
        console.write(info_json(found, kv=kv, tensors=tensors))
        return 0
    parts = [info_text(found)]
    if kv:
        parts.append("".join(f"{line}\n" for line in kv_lines(found.file.metadata)))
    if tensors:
        parts.append(tensor_table(found))
    console.write("\n".join(parts))
    return 0
