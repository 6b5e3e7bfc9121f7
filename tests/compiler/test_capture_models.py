"""Small random models of sixteen architectures, captured, printed, parsed and run, equal eager torch bit for bit."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mxloom


def load_table() -> ModuleType:
    """The benchmark that prints the capture table: the same models, measured the same way."""
    path = Path(__file__).parents[2] / "benchmarks" / "capture_table.py"
    spec = importlib.util.spec_from_file_location("capture_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


table = load_table()


@pytest.mark.parametrize("name", table.MODELS)
def test_a_model_runs_bit_identically_from_its_text(name: str) -> None:
    """At 2 x 10 with left padding and at 3 x 17; the text is a fixed point; torch's own count of MACs is ours.

    T5 sorts relative positions into buckets, which are integers: those operators stay torch's.
    """
    row = table.measure(name)
    assert row.differences == (0.0, 0.0)
    assert row.round_trip
    assert row.structured_macs == pytest.approx(100.0)
    assert row.structured >= (85 if name == "t5" else 90)


@pytest.mark.slow
@pytest.mark.parametrize("name", table.MORE)
def test_models_beyond_those_are_bit_identical_too(name: str) -> None:
    """Experts, attention sinks, attention written inside the model."""
    row = table.measure(name)
    assert row.differences == (0.0, 0.0)
    assert row.round_trip
    assert row.structured_macs >= 95


def test_the_cache_of_transformers_changes_its_own_bits() -> None:
    """So what a module equals is the model called with use_cache=False: in a cache the keys lie otherwise in memory.

    The encoder keeps none: there both are one.
    """
    model, given = table.build("t5"), table.inputs("t5", 3, 17)
    with torch.no_grad():
        plain, cached = model(**given, use_cache=False), model(**given, use_cache=True)
    assert torch.equal(plain.encoder_last_hidden_state, cached.encoder_last_hidden_state)
    torch.testing.assert_close(plain.logits, cached.logits, rtol=1e-4, atol=1e-5)
    compiled = mxloom.compile(model, example=table.inputs("t5"))
    assert torch.equal(compiled(**given).logits, plain.logits)
