"""The fit of the cost model: its algorithm, its data, its errors."""

import numpy as np
import pytest
from scipy.optimize import nnls

from mxloom.backends.dataflow.cost.calibration import fit_all
from mxloom.backends.dataflow.cost.designs import (
    blind_designs,
    design_of,
    fit_designs,
    held_out_designs,
)
from mxloom.backends.dataflow.cost.fitting import non_negative
from mxloom.backends.dataflow.cost.measurements import own_measurements, read_measurements
from mxloom.backends.dataflow.cost.model import COUNTS, Coefficients, Errors, coefficients
from mxloom.backends.dataflow.cost.stages import stage_cost
from mxloom.dialects.errors import MxloomError

from .cost_designs import stage

KINDS = {"dot", "contraction", "quantize", "quantizemixed", "normalize", "softmax", "activation"} | {
    "rope",
    "binary",
    "convert",
    "fork",
    "fifo",
    "reorder",
    "select",
    "patches",
    "pool",
    "quantizescaled",
}


def test_non_negative_least_squares() -> None:
    generator = np.random.default_rng(0)
    matrix = generator.random((40, 6))
    exact = np.array([3.0, 0.0, 2.0, 0.0, 5.0, 1.0])
    assert np.allclose(non_negative(matrix, matrix @ exact), exact)
    target = generator.normal(size=40)
    x = non_negative(matrix, target)
    gain = matrix.T @ (target - matrix @ x)
    # The conditions of Karush, Kuhn and Tucker.
    assert (x >= 0).all()
    assert np.allclose(gain[x > 0], 0, atol=1e-8) and (gain[x == 0] <= 1e-8).all()
    assert np.allclose(x, nnls(matrix, target)[0])


def test_errors_of_no_design_are_none() -> None:
    assert Errors().told() == ("none", "", "")
    assert Errors(3, 0.0345, 0.12).told() == ("3", "3.5", "12.0")


def test_coefficients_are_complete_and_state_their_errors() -> None:
    own = coefficients()
    for target, counts in COUNTS.items():
        for count in counts:
            fits = own.fits[target][count]
            assert set(fits) == KINDS
            # Large stages without DSP blocks take Yosys minutes on xc7: fewer of them are measured there.
            least = 2 if target.startswith("xc7") else 6
            for fit in fits.values():
                assert fit.fitted.designs >= least and (fit.held_out.designs >= 1 or target.startswith("xc7"))
                assert all(weight >= 0 for weight in fit.weights.values())
                assert set(fit.range) == set(fit.weights)
    units = own.fits["nand2"]["NAND2"]["dot"]
    assert units.held_out.designs == 23
    assert units.held_out.mean <= 0.06 and units.held_out.largest <= 0.13


def test_areas_of_units_that_nobody_had_seen() -> None:
    known, lines = read_measurements(own_measurements()), blind_designs()
    measured = np.array([known[line, "nand2"]["NAND2"] for line in lines])
    predicted = np.array([coefficients().predict(design_of(line), "nand2")[0]["NAND2"] for line in lines])
    errors = abs(predicted / measured - 1)
    assert len(errors) == 20
    assert errors.mean() <= 0.06 and errors.max() <= 0.13


def test_coefficients_are_those_of_the_measurements() -> None:
    again = fit_all(fit_designs(), held_out_designs(), read_measurements(own_measurements()))
    for target, counts in coefficients().fits.items():
        for count, kinds in counts.items():
            for kind, fit in kinds.items():
                found = again.fits[target][count][kind]
                assert found.weights == pytest.approx(fit.weights, abs=1e-2)
                assert found.held_out.mean == pytest.approx(fit.held_out.mean, abs=1e-3)


def test_a_kind_that_was_not_fitted() -> None:
    with pytest.raises(MxloomError, match="have no fork for nand2"):
        Coefficients({"nand2": {"NAND2": {}}}).predict(stage("fork width=8 ways=2"), "nand2")


def test_what_lies_outside_the_fit_is_told() -> None:
    inside = stage_cost(stage("contraction a=int8 b=int8 lanes=8 segment=32 window=32 columns=32 size=64 result=16"))
    assert inside.outside == ()
    wide = stage_cost(
        stage("contraction a=int8:none b=int8:none lanes=256 segment=256 window=32 columns=32 size=512 result=16")
    )
    assert any(text.startswith("dot: multiplier") for text in wide.outside)
