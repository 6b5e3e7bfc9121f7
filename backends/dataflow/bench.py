"""The test bench of an emitted design: it fills the memories, sends the vectors, and checks every beat itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .graph import CONFIG, Graph

VECTORS = "vectors"
"""The folder of the vectors, in the design's folder."""

_HEAD = """// Checks {top} against golden vectors: every beat of every output, and that a beat that waits stays.
// STALL is how many of 256 cycles each stream waits at random; 0 never.
`timescale 1ns / 1ps
module bench
`ifdef VERILATOR
  (input clk)
`endif
  ;
  parameter integer STALL = 64;
  parameter integer LIMIT = {limit};
`ifndef VERILATOR
  reg clk = 0;
  always #5 clk = ~clk;
`endif
  reg rst = 1;
  integer cycle = 0;
  integer mismatches = 0;
  integer violations = 0;
  integer tail = 0;
  integer seed = 1;
  always @(posedge clk) if (cycle == 4) rst <= 0;
"""

CLOCK = """// The clock of the test bench under Verilator, without which no C++ of ours is needed.
#include "Vbench.h"
#include "verilated.h"
int main(int argc, char **argv) {
  VerilatedContext context;
  context.commandArgs(argc, argv);
  Vbench bench{&context};
  while (!context.gotFinish()) {
    bench.clk = 0;
    bench.eval();
    bench.clk = 1;
    bench.eval();
  }
  bench.final();
  return 0;
}
"""
"""The C++ program that gives a verilated test bench its clock."""

_INPUT = """
  reg [{top}:0] {name}_words [0:{last}];
  integer {name}_place = 0;
  reg {name}_valid = 0;
  wire {name}_ready;
  wire [{top}:0] {name} = {name}_words[{index}];
  wire {name}_takes = {name}_valid && {name}_ready;
{reads}
  always @(posedge clk) begin
    if (rst) begin
      {name}_valid <= 0;
      {name}_place <= 0;
    end else begin
      if ({name}_takes) {name}_place <= {name}_place + 1;
      if ({name}_takes || !{name}_valid)
        {name}_valid <= ({name}_place + ({name}_takes ? 1 : 0) < {until}) && (($random(seed) & 255) >= STALL);
    end
  end
"""

_OUTPUT = """
  reg [{top}:0] {name}_words [0:{last}];
  integer {name}_place = 0;
  reg {name}_ready = 0;
  wire {name}_valid;
  wire [{top}:0] {name};
  reg {name}_waits = 0;
  reg [{top}:0] {name}_before = 0;
{reads}
  always @(posedge clk) begin
    {name}_ready <= (($random(seed) & 255) >= STALL);
    if (!rst) begin
      if ({name}_waits && (!{name}_valid || {name} !== {name}_before)) violations = violations + 1;
      {name}_waits <= {name}_valid && !{name}_ready;
      {name}_before <= {name};
      if ({name}_valid && {name}_ready) begin
        if ({name}_place >= {count} || {name} !== {name}_words[{name}_place < {count} ? {name}_place : 0]) begin
          if (mismatches < 10)
            $display("beat %0d of {name}: %h, expected %h", {name}_place, {name},
                     {name}_words[{name}_place < {count} ? {name}_place : 0]);
          mismatches = mismatches + 1;
        end
        {name}_place <= {name}_place + 1;
      end
    end
  end
"""

_ROUNDS = """
  // A round: the memories are loaded, every input passes, and what comes out is the next round's input.
  integer rounds = 0;
  always @(posedge clk) begin
    if (!rst && rounds < {last} && {out}_place >= (rounds + 1) * {count}) rounds <= rounds + 1;
    if (!rst && {out}_valid && {out}_ready && {out}_place < {last} * {count})
      {given}_words[{count} + {out}_place] <= {out};
  end
"""

_TAIL = """
  {design} dut (
    .clk(clk),
    .rst(rst),
{connections}
  );
  always @(posedge clk) begin
    cycle = cycle + 1;
    if ({done}) tail = tail + 1;
    if (tail == 64) begin
      $display("{beats} beats, %0d mismatches, %0d violations of the protocol, %0d cycles", mismatches, violations,
               cycle - 64);
      if (mismatches != 0 || violations != 0) $fatal(1, "FAIL");
      $display("PASS");
      $finish;
    end
    if (cycle == LIMIT) $fatal(1, "FAIL: not done after %0d cycles", LIMIT);
  end
endmodule
"""


def test_bench(
    graph: Graph, design: str, counts: Mapping[str, int], limit: int, folders: Sequence[str] = (VECTORS,)
) -> str:
    """The Verilog text; `counts` gives the beats of each stream's vectors, `limit` the cycles before it gives up.

    A weight that comes from outside is sent again for each input.

    With several `folders` the design is loaded and works once for each, with as many beats, and reads what came out
    before. The words of its first input alone come from a file.
    """
    parts, rounds = [_HEAD.format(top=design, limit=limit)], len(folders)
    loads = CONFIG in graph.input_streams
    weights = {each.name: len(each.words) for each in graph.streamed}
    for name, width in graph.input_streams.items():
        until = str(counts[name])
        if rounds > 1:
            begun = f"rounds + 1 : rounds) * {until}"
            until = f"(rounds + 1) * {until}"
            if name != CONFIG:
                until = f"({CONFIG}_place >= (rounds + 1) * {counts[CONFIG]} ? {begun}"
        elif name != CONFIG and loads:
            until = f"({CONFIG}_place == {counts[CONFIG]} ? {until} : 0)"
        files = folders if name == CONFIG else folders[:1]
        total = rounds * counts[name]
        kept = weights.get(name, total)
        index = f"{name}_place < {total} ? {name}_place : {max(total - 1, 0)}"
        if kept < total:
            index = f"{name}_place % {kept}"
        parts.append(_stream(_INPUT, name, width, kept // rounds, rounds, files, until=until, index=index))
    for name, width in graph.output_streams.items():
        parts.append(_stream(_OUTPUT, name, width, counts[name], rounds, folders))
    if rounds > 1:
        (given,), (out,) = graph.inputs, graph.outputs
        parts.append(_ROUNDS.format(out=out.name, given=given.name, count=counts[out.name], last=rounds - 1))
    names = [*graph.input_streams, *graph.output_streams]
    ports = [f"    .{name}{part}({name}{part})" for name in names for part in ("", "_valid", "_ready")]
    done = " && ".join(f"{name}_place >= {rounds * counts[name]}" for name in graph.output_streams)
    beats = rounds * sum(counts[name] for name in graph.output_streams)
    parts.append(_TAIL.format(design=design, connections=",\n".join(ports), done=done, beats=beats))
    return "".join(parts)


def _stream(template: str, name: str, width: int, count: int, rounds: int, folders: Sequence[str], **more: str) -> str:
    """A stream's part of the bench; the beats of each folder stand one behind the other."""
    reads = [f'  initial $readmemh("{folder}/{name}.mem", {name}_words);' for folder in folders]
    if rounds > 1:
        places = [f"{place * count}, {(place + 1) * count - 1}" for place in range(len(folders))]
        reads = [line.replace("_words)", f"_words, {place})") for line, place in zip(reads, places, strict=True)]
    total = rounds * count
    return template.format(
        name=name, top=width - 1, count=total, last=max(total - 1, 0), reads="\n".join(reads), **more
    )
