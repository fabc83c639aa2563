"""`mlacli kernels`: the generated code that a model runs on."""

from __future__ import annotations

from typing import Annotated, Any

from mlacli.cli import console
from mlacli.cli.flag_texts import NO_FLASH_ATTENTION
from mlacli.cli.flags import flags_of, run_settings
from mlacli.cli.options import StrictCommand, flag, new_app, takes
from mlacli.errors import UsageError
from mlacli.settings import RunSettings, notes

OUTPUT = "Output"
app = new_app()


class KernelsCommand(StrictCommand):
    rewrites = NO_FLASH_ATTENTION


_IR = flag("--ir", OUTPUT, "NAME", "Print a kernel's LLVM IR as it is generated.")
_IR_OPT = flag("--ir-opt", OUTPUT, "NAME", "Print it as LLVM optimises it.")
_ASM = flag("--asm", OUTPUT, "NAME", "Print its assembly.")
_BENCH = flag("--bench", OUTPUT, "NAME", "Time it alone, beside what the machine can do.")
_TARGET = flag(
    "--target",
    OUTPUT,
    "CPU",
    "Code for avx512vnni-bf16, avx512vnni, avx512, avx2vnni, avx2, neon or generic.",
    "this CPU",
)
_JSON = flag("--json", OUTPUT, "", "Print the list as JSON.")


@app.command("kernels", cls=KernelsCommand)
@takes(flags_of(RunSettings), first=True)
def kernels(
    ir: Annotated[str | None, _IR] = None,
    ir_opt: Annotated[str | None, _IR_OPT] = None,
    asm: Annotated[str | None, _ASM] = None,
    bench: Annotated[str | None, _BENCH] = None,
    target: Annotated[str | None, _TARGET] = None,
    json: Annotated[bool, _JSON] = False,
    **values: Any,
) -> int:
    """List the kernels that a model needs with these flags, or look at one of them.

    NAME is what the list shows, or as much of its beginning as tells it from the others. Reads the
    file's headers only: no weight is touched.
    """
    settings = run_settings(values)
    wanted = {"--ir": ir, "--ir-opt": ir_opt, "--asm": asm, "--bench": bench}
    chosen = [(name, value) for name, value in wanted.items() if value is not None]
    if len(chosen) + json > 1:
        names = [name for name, _ in chosen] + ["--json"] * json
        raise UsageError(f"{names[0]} and {names[1]}: give one of them, not both")
    for line in notes(settings):
        console.note(f"note: {line}")

    from mlacli.inside.kernel_look import bench_kernel, kernel_list, kernel_text

    if not chosen:
        console.write(kernel_list(settings, target, as_json=json))
    elif bench is not None:
        for line in bench_kernel(settings, target, bench, console.note):
            console.write(line + "\n")
    else:
        console.write(kernel_text(settings, target, *chosen[0]))
    return 0
