"""`mlacli graph`: what is computed for a batch, node by node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from mlacli.cli import console
from mlacli.cli.flag_texts import NO_FLASH_ATTENTION
from mlacli.cli.flags import flags_of, run_settings
from mlacli.cli.options import StrictCommand, flag, new_app, takes
from mlacli.errors import UsageError
from mlacli.files import check_target
from mlacli.limits import Limit
from mlacli.settings import RunSettings, notes

OUTPUT = "Output"
_LAYER = Limit("--layer", 0, 2**16)
app = new_app()


class GraphCommand(StrictCommand):
    rewrites = NO_FLASH_ATTENTION


_GRAPH = flag(
    "--graph",
    OUTPUT,
    "NAME",
    "Only this one: few, standard, absorbed, expanded.",
    "all; the last one in pictures",
)
_ALL = flag("--all", OUTPUT, "", "Every layer, also those that are like the one before.")
_MODES = flag("--modes", OUTPUT, "", "Nodes per op in every mode, side by side.")
_JSON = flag("--json", OUTPUT, "", "Print JSON: every node and what it reads.")
_DOT = flag("--dot", OUTPUT, "FILE", "Write a graph for graphviz; -: to standard output.")
_SVG = flag("--svg", OUTPUT, "FILE", "Draw one layer; -: to standard output.")
_WHICH = flag("--layer", OUTPUT, "N", "The layer that is drawn.", "one of the most frequent kind")


@app.command("graph", cls=GraphCommand)
@takes(flags_of(RunSettings), first=True)
def graph(
    graph: Annotated[str | None, _GRAPH] = None,
    every: Annotated[bool, _ALL] = False,
    modes: Annotated[bool, _MODES] = False,
    json: Annotated[bool, _JSON] = False,
    dot: Annotated[str | None, _DOT] = None,
    svg: Annotated[str | None, _SVG] = None,
    layer: Annotated[str | None, _WHICH] = None,
    **values: Any,
) -> int:
    """Show the graphs of a context: nodes, shapes, bytes, places and kernels.

    Reads the file's headers only: no weight is touched and nothing is compiled.
    """
    settings = run_settings(values)
    wanted = {"--modes": modes, "--json": json, "--dot": dot, "--svg": svg}
    chosen = [name for name, value in wanted.items() if value]
    if len(chosen) > 1:
        raise UsageError(f"{chosen[0]} and {chosen[1]}: give one of them, not both")
    if layer is not None and not svg:
        raise UsageError("--layer: needs --svg FILE")
    number = None if layer is None else _LAYER.parse(layer)
    for name, file in (("--dot", dot), ("--svg", svg)):
        if file is not None and file != "-":
            check_target(name, Path(file), (name.replace("--", "."),))
    for line in notes(settings):
        console.note(f"note: {line}")

    from mlacli.inside import graph_text
    from mlacli.inside.graph_facts import graphs_of, named

    if modes:
        console.write(graph_text.modes_text(settings))
        return 0
    graphs = named(graphs_of(settings), graph)
    if json:
        console.write(graph_text.graph_json(graphs))
    elif dot is not None:
        from mlacli.inside.graph_dot import dot_text

        _put("--dot", dot, dot_text(graphs[-1], every=every))
    elif svg is not None:
        from mlacli.inside.graph_svg import svg_text

        _put("--svg", svg, svg_text(graphs[-1], number))
    else:
        console.write("\n".join(graph_text.graph_text(g, every=every) for g in graphs))
    return 0


def _put(name: str, file: str, text: str) -> None:
    """Write a picture. Raises SpaceError."""
    if file == "-":
        console.write(text)
        return

    from mlacli.files import write_text

    write_text(name, Path(file), text)
