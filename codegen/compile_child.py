"""The helper process of codegen/compilers.py: IR texts in, object code out, until the pipe ends.

Its arguments are the folders to import from. The first frame is the machine to compile for, as
JSON. LLVM's errors end it: the parent compiles the text again and says why.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    sys.path[:0] = sys.argv[1:]
    from codegen.child import read_frame, write_frame
    from codegen.jit import machine_for, optimise

    source, sink = sys.stdin.buffer, sys.stdout.buffer
    machine = machine_for(**json.loads(read_frame(source) or b"{}"))
    while (text := read_frame(source)) is not None:
        write_frame(sink, machine.emit_object(optimise(text.decode(), machine)))


if __name__ == "__main__":
    main()
