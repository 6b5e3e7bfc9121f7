"""Linear layers on codes against f32, int8 and 4-bit products of others, on the machine at hand.

`python benchmarks/contractions_table.py [MARKDOWN]`: one process, all contestants of a row in turn, medians. With a
file name the section "Contractions" is written there (docs/performance.md).
"""

from __future__ import annotations

import copy
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import peers
import torch
from page import machine, table, write_section

import mxloom
from mxloom.backends.kernels.contraction.measurement import (
    GEMMS,
    GEMVS,
    ROWS,
    WIDTH,
    MeasuredLinear,
    Run,
    layer,
    measure_linear,
    medians,
)
from mxloom.dialects.accumulator import AccumulatorAttr

ACCUMULATORS = (("f32", "rne", 1), ("bf16", "rne", 1), ("e8m13", "rtz", 1), ("f32", "rne", 4))
"""Format, rounding and partial sums."""

MODELS = ((768, 4), (2048, 2))
"""Width and layers of the models."""

TOKENS = 256
"""Of a prefill."""

ROUNDS = 15

FOUR_BITS = ("mxfp4", "mxint8")
"""Weights and activations of the rows that stand for all."""

PEERS: dict[str, dict[tuple[str, str], str]] = {
    "onnxruntime": {("mxfp4", "mxint8"): "MatMulNBits"},
    "llama.cpp": {("mxfp4", "mxint8"): "Q4_0", ("mxint8", "mxint8"): "Q8_0", ("ternary", "int8_channel"): "TQ2_0"},
    "llama.cpp MXFP4": {("mxfp4", "mxint8"): "MXFP4"},
}
"""Which of its products each other library sets against a layer."""

SECTION = """`make bench` (or `python benchmarks/contractions_table.py docs/performance.md`) writes this section;
`mxloom bench --contractions` prints its first two tables on any machine.

{machine} Beside them: {installed}. Not measured, because not installed: {missing}.

Linear layers whose sums are exact in every block (`mode="exact"`), one thread, medians of CPU time with all
contestants of a row in turn. *kernel*: the layer on codes; *call*: the rounding of its f32 input into codes as well,
what a model pays. In the columns of others: how many times faster the kernel is, and in brackets the call.

Products of matrices, {rows} rows of activations, weights {width} x {width}. *of peak*: operations of the kernel as a
share of those of the same instruction in a loop that stays in registers.

{gemms}

Products of one row with weights {wide} x {wide}, many of them in turn so that they come from memory. *of bandwidth*:
bytes of weights and scales a second, as a share of reading alone.

{gemvs}

onnxruntime's MatMulNBits (4-bit weights in blocks of 32) and llama.cpp (Q4_0 weights, TQ2_0 for ternary ones) round
their f32 input to int8 inside, so the figure in brackets is the comparison; torch's and oneDNN's products are of f32
matrices, `_int_mm` of int8 codes without scales.

Accumulators ({weights} x {activations}, the same matrices): CPU time over that of f32.

{accumulators}

Whole models: a LlamaForCausalLM with random weights, vocabulary 2048, eager attention, no cache, every linear layer
{weights} x {activations}; CPU time of a forward as a share of torch's f32 forward (and of the same on oneDNN's f32
products, `torch.utils.mkldnn.to_mkldnn`). *prefill*: {tokens} tokens; *decode*: one.

{models}

Two threads against one (wall time, the best of {rounds} rounds, at a load average of {load:.1f} with this process, on
{cores} cores): {threads}.

What limits them: in products of matrices, the vector units: scaling a block of 32 takes a conversion, a product and a
fused multiply-add for eight dot instructions, so blocks reach less of the peak than one scale for each row. One row is
limited by memory, 2-bit weights by unpacking them as well.
"""


def main() -> None:
    warnings.simplefilter("ignore")  # of others, about their own future
    torch.set_num_threads(1)
    section = SECTION.format(
        machine=machine(),
        installed=", ".join(peers.installed()) or "no others",
        missing="; ".join(peers.missing()) or "none",
        rows=ROWS,
        rounds=ROUNDS,
        width=WIDTH,
        wide=2 * WIDTH,
        weights=FOUR_BITS[0],
        activations=FOUR_BITS[1],
        tokens=TOKENS,
        gemms=_gemms(),
        gemvs=_gemvs(),
        accumulators=_accumulators(),
        models=_models(),
        threads=_threads(),
        load=os.getloadavg()[0],
        cores=os.cpu_count(),
    )
    if len(sys.argv) > 1:
        write_section(Path(sys.argv[1]), "Contractions", section)
    print(section)


def _gemms() -> str:
    others = ["torch f32", "oneDNN f32", "torch._int_mm", *PEERS]
    heads = ["weights x activations", "kernel, ms", "call, ms", "TOP/s", "of peak", *others]
    rows: list[list[str]] = []
    for weights, activations in GEMMS:
        m = measure_linear(
            weights, activations, ROWS, WIDTH, WIDTH, ROUNDS, _peers(weights, activations, ROWS, WIDTH, 1)
        )
        rate = m.operations / m.seconds["kernel"] / 1e12
        figures = [*_times(m), f"{rate:.2f}", f"{m.of_peak:.2f}", *(_gains(m, other) for other in others)]
        rows.append([f"{weights} x {activations}", *figures])
    return table(heads, rows)


def _gemvs() -> str:
    others = ["torch f32", *PEERS]
    heads = ["weights x activations", "kernel, ms", "call, ms", "of bandwidth", *others]
    rows: list[list[str]] = []
    for weights, activations in GEMVS:
        runs = _peers(weights, activations, 1, 2 * WIDTH, 24 if weights == "ternary" else 12)
        m = measure_linear(weights, activations, 1, 2 * WIDTH, 2 * WIDTH, ROUNDS, runs)
        figures = [*_times(m), f"{m.of_bandwidth:.2f}", *(_gains(m, other) for other in others)]
        rows.append([f"{weights} x {activations}", *figures])
    return table(heads, rows)


def _times(m: MeasuredLinear) -> list[str]:
    return [f"{1e3 * m.seconds[ours]:.3f}" for ours in ("kernel", "call")]


def _gains(m: MeasuredLinear, other: str) -> str:
    gains = m.gain(other), m.gain(other, "call")
    return f"{gains[0]:.2f} ({gains[1]:.2f})" if gains[0] else ""


def _peers(weights: str, activations: str, rows: int, width: int, copies: int) -> dict[str, list[Run]]:
    """The contestants of a layer that are installed, with a run for each copy of the weights."""
    found: dict[str, list[Run]] = {}
    for peer, types in PEERS.items():
        if (weights, activations) in types and peers.is_installed(peer):
            found[peer] = peers.PRODUCTS[peer](types[weights, activations], rows, width, width, copies)
    return found


def _accumulators() -> str:
    formats = [AccumulatorAttr.of(*each) for each in ACCUMULATORS]
    layers = {each.label: layer(*FOUR_BITS, ROWS, WIDTH, WIDTH, each) for each in formats}
    found = medians({label: [own.kernel] for label, own in layers.items()}, ROUNDS)
    base = found[formats[0].label]
    rows = [[label, f"{1e3 * seconds:.3f}", f"{100 * (seconds / base - 1):+.0f} %"] for label, seconds in found.items()]
    return table(["accumulator", "kernel, ms", "over f32"], rows)


def _models() -> str:
    heads = ["width", "layers", "forward", "torch f32, ms", "fast", "exact", "exact, of oneDNN"]
    rows: list[list[str]] = []
    for width, layers in MODELS:
        for tokens in (TOKENS, 1):
            found = medians(_forwards(width, layers, tokens), 9 if tokens > 1 else 41)
            shares = [found["fast"] / found["torch"], found["exact"] / found["torch"], found["exact"] / found["oneDNN"]]
            name = "prefill" if tokens > 1 else "decode"
            milliseconds = f"{1e3 * found['torch']:.2f}"
            rows.append([str(width), str(layers), name, milliseconds, *(f"{share:.2f}" for share in shares)])
    return table(heads, rows)


@cache
def _models_of(width: int, layers: int) -> dict[str, Callable[..., object]]:
    """A model: torch's, the same on oneDNN, and compiled in both modes."""
    from torch.utils.mkldnn import to_mkldnn
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=2048,
        max_position_embeddings=1024,
        use_cache=False,
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    example = {"input_ids": torch.randint(0, 2048, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.int64)}
    weights, activations = FOUR_BITS
    runs: dict[str, Callable[..., object]] = {"torch": model, "oneDNN": to_mkldnn(copy.deepcopy(model))}
    for mode in ("fast", "exact"):
        runs[mode] = mxloom.compile(model, example=example, weights=weights, activations=activations, mode=mode)
    return runs


def _forwards(width: int, layers: int, tokens: int) -> dict[str, list[Run]]:
    """One forward of so many tokens of every form of a model."""
    given = {"input_ids": torch.randint(0, 2048, (1, tokens))}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    return {name: [_forward(run, given)] for name, run in _models_of(width, layers).items()}


def _forward(run: Callable[..., object], given: dict[str, torch.Tensor]) -> Run:
    def forward() -> object:
        with torch.no_grad():
            return run(**given)

    return forward


def _threads() -> str:
    """How many times faster two threads are than one, by wall time, ours beside torch's f32."""
    own = layer(*FOUR_BITS, ROWS, WIDTH, WIDTH)
    weight = torch.randn(WIDTH, WIDTH)
    forwards = _forwards(*MODELS[0], TOKENS)
    runs: dict[str, Run] = {
        f"{FOUR_BITS[0]} product of matrices": own.kernel,
        "torch's f32 product": lambda: torch.nn.functional.linear(own.x, weight),
        f"prefill of width {MODELS[0][0]}, exact": forwards["exact"][0],
        "torch's f32 prefill": forwards["torch"][0],
    }
    before = torch.get_num_threads()
    timed = {(name, count): _with_threads(run, count) for name, run in runs.items() for count in (1, 2)}
    found = medians(
        {f"{name}/{count}": [run] for (name, count), run in timed.items()}, ROUNDS, time.perf_counter, typical=min
    )
    torch.set_num_threads(before)
    return ", ".join(f"{name} {found[f'{name}/1'] / found[f'{name}/2']:.2f}x" for name in runs)


def _with_threads(run: Run, count: int) -> Run:
    def counted() -> object:
        torch.set_num_threads(count)
        return run()

    return counted


if __name__ == "__main__":
    main()
