"""What stages and designs cost: sums over units, energies of formats."""

import json

import pytest

from mxloom.backends.dataflow.cost.designs import (
    operand,
    quick_designs,
)
from mxloom.backends.dataflow.cost.energy import (
    SWITCHING,
    fgmp_energies,
    fgmp_saving,
    mac_energy,
)
from mxloom.backends.dataflow.cost.model import coefficients
from mxloom.backends.dataflow.cost.stages import StageCost, stage_cost, total
from mxloom.backends.dataflow.stages.contraction import Contraction

from .cost_designs import stage

MEASURED = json.loads(SWITCHING.read_text())
PAIRS = MEASURED["pairs"]


def test_a_contraction_is_its_units_and_its_control() -> None:
    line = "contraction a=int4 b=int4 lanes=8 segment=32 window=32 columns=32 size=64 result=16 copies="
    one, four = stage(line + "1"), stage(line + "4")
    assert isinstance(four, Contraction)
    each = coefficients().predict(four.unit, "nand2")[0]["NAND2"]
    cost = stage_cost(four)
    assert cost.nand2 == pytest.approx(coefficients().predict(four, "nand2")[0]["NAND2"] + 4 * each)
    assert cost.asap7_um2 == pytest.approx(cost.nand2 * 0.05832)
    assert cost.macs == stage_cost(one).macs == 16 * 32 * 64
    assert cost.energy_pj["macs"] == pytest.approx(16 * 32 * 64 * PAIRS["int4 int4"] / PAIRS["int8 int8"] * 0.23)
    # Codes of 4 bits, scales of 8 for every 32, and two rows of 8 beats of 8 codes and a scale.
    assert cost.memory_bits == {"weights": 32 * 64 * 4 + 32 * 2 * 8, "rows": 2 * 8 * (8 * 4 + 8)}
    assert cost.fpga["ecp5"]["DSP"] == 4 * 8


def test_totals_add_up() -> None:
    costs = [stage_cost(stage(line)) for line in quick_designs() if not line.startswith("dot")]
    whole = total(costs)
    assert whole.nand2 == pytest.approx(sum(cost.nand2 for cost in costs))
    assert whole.cycles == max(cost.cycles for cost in costs)
    assert whole.memory_bits["rows"] == sum(cost.memory_bits["rows"] for cost in costs)
    assert total([]) == StageCost()


def test_energies_of_formats() -> None:
    for name in ("int8", "e4m3", "e2m3", "e3m2", "e2m1", "int4"):
        found = mac_energy(operand(name), operand(name))
        assert found.relative == pytest.approx(PAIRS[f"{name} {name}"] / PAIRS["int8 int8"]) and not found.interpolated
    # Horowitz: an 8-bit multiplication and an 8-bit addition.
    assert mac_energy(operand("int8"), operand("int8")).picojoules == pytest.approx(0.2 + 0.03)
    assert mac_energy(operand("int8"), operand("int4")) == mac_energy(operand("int4"), operand("int8"))
    four, five, six = (mac_energy(operand(name), operand(name)) for name in ("int4", "int5", "int6"))
    assert five.interpolated and four.relative < five.relative < six.relative < 1


def test_fgmp_saving_is_the_mix_of_its_modes() -> None:
    modes, pure = MEASURED["fgmp"], PAIRS["e4m3 e4m3"]
    assert fgmp_energies() == pytest.approx({mode: value / pure for mode, value in modes.items()})
    expected = 0.49 * modes["44"] + 0.42 * (modes["48"] + modes["84"]) / 2 + 0.09 * modes["88"]
    assert fgmp_saving(0.7) == pytest.approx(1 - expected / pure)
    assert fgmp_saving(0.0) == pytest.approx(1 - modes["88"] / pure)
    # FP4 switches less than FP8 in the same unit, and a unit for both more than one for FP8 alone.
    assert modes["44"] < min(modes["48"], modes["84"]) < max(modes["48"], modes["84"]) < modes["88"]
    assert pure < modes["88"]
