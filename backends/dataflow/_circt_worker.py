"""Runs CIRCT in a process of its own: `python -m mxloom.backends.dataflow._circt_worker KIND INPUT OUTPUT`.

The wheel is built with assertions, which end the process on input that it does not support. What was done last stands
on standard error, a line for each step.
"""

from __future__ import annotations

import io
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from ._circt_lint import name_unread, remove_unread

SIMPLIFY = (("simplify", "hw.module(hw-aggregate-to-comb),canonicalize,cse"),)
VERILOG = (
    (
        "lower",
        "lower-seq-firmem,lower-seq-to-sv,"
        "hw-memory-sim{disable-mem-randomization=true disable-reg-randomization=true},"
        "canonicalize,cse",
    ),
)
PRETTIFY = (("prettify", "hw.module(prettify-verilog)"),)
ARC = (
    ("flatten", "hw-flatten-modules"),
    (
        "memories",
        "lower-seq-firmem,arc-resolve-xmr,arc-lower-verif-simulations,arc-strip-sv,arc-infer-memories,cse,"
        "arc-canonicalizer",
    ),
    ("arcs", "convert-to-arcs,arc-dedup,cse,arc-canonicalizer"),
    (
        "loops",
        "arc-split-loops,arc-dedup,cse,arc-canonicalizer,arc-make-tables,cse,arc-canonicalizer",
    ),
    ("state", "arc-lower-state,arc-inline,arc-merge-ifs,cse,arc-canonicalizer"),
    (
        "storage",
        "arc-lower-arcs-to-funcs,arc.model(arc-allocate-state),arc-lower-clocks-to-funcs,cse,arc-canonicalizer",
    ),
)
LLVM = (("llvm", "hw-convert-bitcasts,lower-arc-to-llvm,cse,arc-canonicalizer"),)


def main(kind: str, source: str, target: str) -> int:
    circt: Any = import_module("pycde.circt")
    ir: Any = import_module("pycde.circt.ir")
    text = Path(source).read_text()
    with ir.Context() as context, ir.Location.unknown():
        circt.register_dialects(context)
        _say("parse")
        module = ir.Module.parse(text)
        if kind == "verilog":
            _run(module, SIMPLIFY)
            _say("unread")
            remove_unread(module)
            _run(module, VERILOG)
            _say("names")
            name_unread(module)
            _run(module, PRETTIFY)
            _say("export")
            printed = io.StringIO()
            circt.export_verilog(module, printed)
            Path(target).write_text(printed.getvalue())
        else:
            _run(module, ARC)
            model = _model(str(module))
            _run(module, LLVM)
            _say("export")
            printed = io.StringIO()
            circt.export_llvm_ir(module, printed)
            Path(target).write_text(json.dumps({**model, "llvm": printed.getvalue()}))
    return 0


def _run(module: Any, steps: tuple[tuple[str, str], ...]) -> None:
    passmanager: Any = import_module("pycde.circt.passmanager")
    for name, passes in steps:
        _say(name)
        passmanager.PassManager.parse(f"builtin.module({passes})").run(module.operation)


def _say(step: str) -> None:
    print(f"step: {step}", file=sys.stderr, flush=True)


def _model(text: str) -> dict[str, Any]:
    """The ports of the one model, where they stand in its storage, and how large that is."""
    found = re.search(r"arc\.model @(\S+) ", text)
    size = re.search(r"storageBytes (\d+)|!arc\.storage<(\d+)>", text)
    if found is None or size is None:
        raise RuntimeError("CIRCT made no model of it")
    pattern = r'arc\.root_(input|output) "([^"]+)", %\S+ \{offset = (\d+) : i32\}[^\n]*!arc\.state<(!seq\.clock|i\d+)>'
    ports = {
        name: [int(offset), 1 if type.startswith("!") else int(type[1:])]
        for _, name, offset, type in re.findall(pattern, text)
    }
    return {"top": found[1], "ports": ports, "bytes": int(size[1] or size[2])}


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
