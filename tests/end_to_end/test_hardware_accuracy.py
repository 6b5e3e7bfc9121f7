"""What the chip loses: a language model in integers against the same formats in float."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mxloom
from mxloom.backends.reference import Interpreter

MODEL = Path(__file__).parents[2] / "examples" / "models" / "kjv-2m"


@pytest.mark.slow
def test_a_language_model_in_integers_has_the_perplexity_of_its_formats(tmp_path: Path) -> None:
    rules = [{"weights": "mxint8", "activations": "mxint8"}]
    text = (MODEL / "held_out.txt").read_text()
    narrow = mxloom.compile(MODEL, {"version": 1, "quantize": rules})
    chip = mxloom.compile(MODEL, {"version": 1, "quantize": rules, "passes": ["legalize-hardware"]})
    expected = mxloom.evaluate(narrow, text, context=128, limit=4).perplexity
    got = mxloom.evaluate(chip, text, context=128, limit=4).perplexity
    assert abs(got / expected - 1) <= 0.01
    host = [name.data for name in chip.function.attributes["host"]]  # type: ignore[attr-defined]
    assert "model.embed_tokens" in host
    inside = {name.split(".self_attn.")[-1] for name in host if name.startswith("model.layers")}
    assert inside == {"unsqueeze", "unsqueeze.1"}  # of the rotary angles
    assert chip.function.attributes["host_macs"].value.data < 0.001  # type: ignore[attr-defined]
    loaded = mxloom.load(chip.save(tmp_path / "chip"))
    ids = torch.arange(3, 23)[None]
    assert torch.equal(loaded(input_ids=ids).logits, chip(input_ids=ids).logits)
    mask = torch.ones_like(ids)
    assert torch.equal(chip(input_ids=ids).logits, Interpreter(chip.module, chip.weights)(ids, mask)[0])
