"""Weight passes beside torchao, llm-compressor and AutoRound: one model, calibration and evaluation for all of them.

Run: `peers_ptq.py [TEXT] --python /path/to/peers/bin/python`. Without TEXT the embedded model; with TEXT (WikiText-2's
validation text) SmolLM2-135M-Instruct. The peers are no dependencies of this project. Those that are missing are told;
to have them in an environment of their own (llm-compressor wants its own releases of transformers and AutoRound):

    python -m venv peers && peers/bin/pip install torch==2.13.0 torchao==0.18.0 llmcompressor==0.14.0.1 auto-round

A peer runs on the processor, in a process of its own, on the model in f32 and the same windows of tokens. What it
leaves are weights as they decode, in a safetensors file; those, and what mxloom's own passes leave, are evaluated by
the same code: perplexity over 16 windows of 512, KL in nats and top-1 over the first 4. `lm_head` stays wide. Where
activations have a format too, mxloom's emulation rounds them, in the same way for all (scales of tensors from the
tensor at hand); a peer's own emulation of them is only what it calibrates its weights with.

`--only PATTERN`: the rows in whose name it is found. `--work FOLDER` keeps the peers' weights and logs; weights that
lie there are not made again. Seconds are of one thread, loading not counted.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from published import Measured

GROUP = 64
"""Weights under one scale in int4: the largest power of two that divides every width of both models."""

FORMATS = {
    "int4": (f"!mx.block<{GROUP}xi4, bf16>", None),
    "nvfp4": ("nvfp4", "nvfp4"),
    "mxfp4": ("mxfp4", "mxfp4"),
}
"""Formats of weights and activations, by the name that both sides have."""

PACKAGES = {"torchao": "torchao", "llm-compressor": "llmcompressor", "AutoRound": "auto-round"}

PEERS = {
    "int4": (
        *[("torchao", method) for method in ("round to nearest", "HQQ")],
        *[("llm-compressor", m) for m in ("round to nearest", "MSE", "AWQ", "GPTQ", "GPTQ + MSE", "AWQ + GPTQ")],
        *[("AutoRound", method) for method in ("0 iterations", "signed gradients")],
    ),
    "nvfp4": (
        ("torchao", "round to nearest"),
        *[("llm-compressor", m) for m in ("round to nearest", "MSE", "AWQ", "GPTQ", "GPTQ + MSE", "AWQ + GPTQ")],
        *[("AutoRound", method) for method in ("0 iterations", "signed gradients")],
    ),
    "mxfp4": (
        *[("llm-compressor", method) for method in ("round to nearest", "GPTQ", "GPTQ + MSE")],
        *[("AutoRound", method) for method in ("0 iterations", "signed gradients")],
    ),
}
"""Tools and methods, by format; what of a tool does not run on a processor is left out."""

RECIPES: dict[str, dict[str, list[str]]] = {
    "int4": {
        "round to nearest": [],
        "clip": ["clip{metric=hessian}"],
        "AWQ": ["awq"],
        "GPTQ": ["gptq"],
        "GPTQ + scale search": ["gptq{search=hessian}"],
    },
    "nvfp4": {
        "round to nearest": [],
        "clip": ["clip{metric=hessian}"],
        "AWQ": ["awq"],
        "GPTQ": ["gptq"],
        "GPTQ + scale search": ["gptq{search=hessian}"],
        "rotation + GPTQ + scale search": ["rotate{size=16}", "gptq{search=hessian}"],
    },
    "mxfp4": {
        "round to nearest": [],
        "GPTQ": ["gptq"],
        "GPTQ + scale search": ["gptq{search=hessian}"],
        "rotation + GPTQ + scale search": ["rotate{size=32}", "gptq{search=hessian}"],
    },
}
"""Passes of mxloom, by format."""


@dataclass(frozen=True)
class Job:
    """What a peer is asked for: a format and a method, on the model and the windows that lie in a folder."""

    tool: str
    format: str
    method: str
    folder: str
    file: str
    iterations: int
    batch: int


# In the peer's process, where mxloom is not installed.


def serve(job: Job) -> None:
    """Quantize as the job says, and leave the decoded weights in its file, with the CPU seconds it took."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    folder = Path(job.folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    windows = load_file(folder / "calibration.safetensors")["input_ids"]
    start = time.process_time()
    SERVANTS[job.tool](model, windows, job)
    seconds = time.process_time() - start
    save_file(_decoded(model), job.file, {"seconds": f"{seconds:.1f}"})


def _torchao(model: Any, windows: torch.Tensor, job: Job) -> None:
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    scales = {"HQQ": IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY}.get(job.method, IntxChooseQParamsAlgorithm.AFFINE)
    integers = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # pyright: ignore[reportAttributeAccessIssue]
        granularity=PerGroup(GROUP),
        mapping_type=MappingType.SYMMETRIC,
        scale_dtype=torch.bfloat16,
        intx_choose_qparams_algorithm=scales,
    )
    config = NVFP4WeightOnlyConfig() if job.format == "nvfp4" else integers
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head")


def _llm_compressor(model: Any, windows: torch.Tensor, job: Job) -> None:
    from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports]
        QuantizationArgs,
        QuantizationScheme,
        preset_name_to_scheme,
    )
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.gptq import GPTQModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.quantization import QuantizationModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.transform.awq import AWQModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.pipelines.cache import IntermediatesCache  # pyright: ignore[reportMissingImports]

    IntermediatesCache.pin_memory = lambda *arguments: None  # AWQ pins memory for a GPU that is not there, and fails
    if job.format == "int4":
        integers = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=True)
        scheme = QuantizationScheme(targets=["Linear"], weights=integers)
    else:
        scheme = preset_name_to_scheme(job.format.upper(), ["Linear"])
    if "MSE" in job.method:
        scheme.weights.observer = "nvfp4_expanded_mse" if job.format == "nvfp4" else "memoryless_mse"
    modifier = GPTQModifier if "GPTQ" in job.method else QuantizationModifier
    recipe = [modifier(config_groups={"all": scheme}, ignore=["lm_head"])]
    ones = torch.ones_like(windows)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": ones.tolist()}),
        recipe=[AWQModifier(), *recipe] if "AWQ" in job.method else recipe,
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )


def _auto_round(model: Any, windows: torch.Tensor, job: Job) -> None:
    from auto_round import AutoRound  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer

    samples: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
    scheme = {"scheme": "W4A16", "group_size": GROUP} if job.format == "int4" else {"scheme": job.format.upper()}
    AutoRound(
        model,
        AutoTokenizer.from_pretrained(Path(job.folder) / "model"),
        iters=job.iterations if job.method == "signed gradients" else 0,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=job.batch,
        dataset=torch.utils.data.DataLoader(samples, batch_size=job.batch),
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
        **scheme,
    ).quantize()


SERVANTS = {"torchao": _torchao, "llm-compressor": _llm_compressor, "AutoRound": _auto_round}


@torch.no_grad()
def _decoded(model: Any) -> dict[str, torch.Tensor]:
    """All weights but the tied ones at both ends, as the formats that they are in mean them, in f32."""
    found = {}
    for name, module in model.named_modules():
        for part in ("weight", "bias"):
            own = module._parameters.get(part)
            if own is not None and name != "lm_head" and not isinstance(module, torch.nn.Embedding):
                found[f"{name}.{part}"] = _wide(module, part, own).float().contiguous().clone()
    return {name.replace(".orig_layer.", "."): weight for name, weight in found.items()}  # AutoRound's wrapping


def _wide(module: Any, part: str, own: torch.Tensor) -> torch.Tensor:
    scheme = getattr(module, "quantization_scheme", None)  # of compressed-tensors
    if part == "weight" and scheme is not None:
        from compressed_tensors.quantization import forward_quantize  # pyright: ignore[reportMissingImports]

        return forward_quantize(module, own, "weight", scheme.weights)
    return own.dequantize() if hasattr(own, "qdata") else own  # torchao's


# In this process.


@dataclass
class Table:
    """Prints a row as soon as it is known."""

    model: Measured
    only: str

    def wants(self, *names: str) -> bool:
        """Whether a row is asked for."""
        return bool(re.search(self.only, " ".join(names)))

    def row(self, names: tuple[str, str, str], compiled: Any, bits: float, seconds: float) -> None:
        """Evaluate a compiled model."""
        import mxloom

        quantized = mxloom.remembered(compiled)
        model = self.model
        whole = mxloom.evaluate(quantized, model.text, limit=16, characters=model.characters)
        part = model.evaluate(quantized, 4).against
        figures = (f"{bits:.2f}", f"{whole.perplexity:.3f}", f"{part.kl_mean:.4f}", f"{part.top1_agreement:.3f}")
        print("| " + " | ".join([*names, *figures, f"{seconds:.0f}"]) + " |", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("text", type=Path, nargs="?")
    arguments.add_argument("--python", default=sys.executable, help="the interpreter that has the peers")
    arguments.add_argument("--formats", nargs="+", choices=FORMATS, default=["int4", "nvfp4"])
    arguments.add_argument("--only", default="")
    arguments.add_argument("--calibration", type=int, default=32, help="windows of 512 tokens")
    arguments.add_argument("--iterations", type=int, default=200, help="of AutoRound, for each block of layers")
    arguments.add_argument("--batch", type=int, default=8, help="windows in one of AutoRound's iterations")
    arguments.add_argument("--work", type=Path)
    arguments.add_argument("--job", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.job:
        serve(Job(**json.loads(options.job)))
        return
    with tempfile.TemporaryDirectory() as folder:
        _compare(options, options.work or Path(folder))


def _compare(options: argparse.Namespace, work: Path) -> None:
    from published import embedded, smollm2

    torch.set_num_threads(1)
    model = smollm2(options.text, options.calibration) if options.text else embedded(options.calibration)
    work = (work / model.name).resolve()
    _prepare(model, work)
    table, trouble = Table(model, options.only), _missing(options.python)
    print("| format | tool and method | | bits | perplexity | KL | top-1 | CPU s |\n|---|---|---|" + "---:|" * 5)
    for format in options.formats:
        for tool, method in PEERS[format]:
            if tool not in trouble and table.wants(format, tool, method):
                file = work / re.sub(r"\W+", "_", f"{format}_{tool}_{method}.{options.iterations}")
                job = Job(tool, format, method, str(work), f"{file}.safetensors", options.iterations, options.batch)
                problem = _peer(table, job, options.python)
                trouble |= {f"{tool}, {method}, {format}": problem} if problem else {}
        for method, passes in RECIPES[format].items():
            if table.wants(format, "mxloom", method):
                _own(table, format, method, passes)
    for name, problem in trouble.items():
        print(f"\n{name}: {problem}")


def _prepare(model: Measured, work: Path) -> None:
    """The model and the windows, where the peers find them."""
    if not (work / "calibration.safetensors").exists():
        model.source.loaded().save_pretrained(work / "model")  # pyright: ignore[reportCallIssue]
        model.source.tokenizer().save_pretrained(work / "model")
        windows = torch.cat([window["input_ids"] for window in model.calibration])
        save_file({"input_ids": windows}, work / "calibration.safetensors")


def _missing(python: str) -> dict[str, str]:
    """The peers that an interpreter does not have, each with how to install it."""
    script = "import sys, importlib.util as u; print([n for n in sys.argv[1:] if u.find_spec(n.replace('-', '_'))])"
    found = subprocess.run([python, "-c", script, *PACKAGES.values()], capture_output=True, text=True, check=True)
    return {
        tool: f"not installed for {python}: pip install {package}"
        for tool, package in PACKAGES.items()
        if f"'{package}'" not in found.stdout
    }


def _peer(table: Table, job: Job, python: str) -> str | None:
    """The row of a peer; what it said last where it failed."""
    import mxloom

    file = Path(job.file)
    if not file.exists():
        command = [python, __file__, "--job", json.dumps(vars(job))]
        with file.with_suffix(".log").open("w", encoding="utf-8") as log:
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
                return file.with_suffix(".log").read_text(encoding="utf-8").strip().rpartition("\n")[2]
    with safe_open(file, "pt") as opened:
        seconds = float(opened.metadata()["seconds"])
    source = table.model.source
    weights, found = source.weights.copy(), load_file(file)
    wide = [name for name in weights if ".layers." in name and name.endswith("proj.weight")]
    kept = [name for name in wide if name not in found or torch.equal(found[name], weights.wide(name))]
    if kept or not found.keys() <= set(weights):
        return f"{len(kept)} of {len(wide)} weights are as they were, {len(found.keys() - set(weights))} are unknown"
    for name, tensor in found.items():
        weights.put(name, tensor)
    activations = FORMATS[job.format][1]
    rule = {"kind": "linear", "activations": activations, "match": "*layers*"}
    recipe = {"version": 1, "quantize": [rule]} if activations else None
    compiled = mxloom.compile(replace(source, weights=weights), recipe)
    method = job.method.replace("signed gradients", f"{job.iterations} iterations of {job.batch} windows")
    table.row((job.format, job.tool, method), compiled, _bits(job), seconds)
    return None


def _bits(job: Job) -> float:
    """Of a weight: llm-compressor keeps scales as wide as the model, f32 here; torchao and AutoRound in 16 bits."""
    return {"int4": 4 + (32 if job.tool == "llm-compressor" else 16) / GROUP, "nvfp4": 4.5, "mxfp4": 4.25}[job.format]


def _own(table: Table, format: str, method: str, passes: list[str]) -> None:
    """The row of a recipe."""
    from published import recipe

    import mxloom

    start = time.process_time()
    weights, activations = FORMATS[format]
    wanted = recipe(weights, activations, passes)
    compiled = mxloom.compile(table.model.source, wanted, calibration=table.model.calibration)
    seconds = time.process_time() - start
    table.row((format, "mxloom", method), compiled, compiled.cost().quantized_weight_bits, seconds)


if __name__ == "__main__":
    main()
