"""What stages and designs cost: sums over units, energies of formats."""

import pytest

from mxloom.backends.dataflow.cost.designs import (
    operand,
    quick_designs,
)
from mxloom.backends.dataflow.cost.energy import (
    fgmp_energies,
    fgmp_saving,
    mac_energy,
)
from mxloom.backends.dataflow.cost.model import coefficients
from mxloom.backends.dataflow.cost.stages import StageCost, stage_cost, total
from mxloom.backends.dataflow.stages.contraction import Contraction

from .cost_designs import stage


def test_a_contraction_is_its_units_and_its_control() -> None:
    line = "contraction a=int4 b=int4 lanes=8 segment=32 window=32 columns=32 size=64 result=16 copies="
    one, four = stage(line + "1"), stage(line + "4")
    assert isinstance(four, Contraction)
    each = coefficients().predict(four.unit, "nand2")[0]["NAND2"]
    cost = stage_cost(four)
    assert cost.nand2 == pytest.approx(coefficients().predict(four, "nand2")[0]["NAND2"] + 4 * each)
    assert cost.asap7_um2 == pytest.approx(cost.nand2 * 0.05832)
    assert cost.macs == stage_cost(one).macs == 16 * 32 * 64
    assert cost.energy_pj["macs"] == pytest.approx(16 * 32 * 64 * 243.9 / 695.6 * 0.23)
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
    relative = {name: round(mac_energy(operand(name), operand(name)).relative, 2) for name in
                ("int8", "e4m3", "e2m3", "e3m2", "e2m1", "int4")}  # fmt: skip
    assert relative == {"int8": 1.0, "e4m3": 0.89, "e2m3": 0.67, "e3m2": 0.6, "e2m1": 0.36, "int4": 0.35}
    int8 = mac_energy(operand("int8"), operand("int8"))
    assert int8.picojoules == pytest.approx(0.2 + 0.03) and not int8.interpolated
    assert mac_energy(operand("int8"), operand("int4")) == mac_energy(operand("int4"), operand("int8"))
    between = mac_energy(operand("int5"), operand("int5"))
    assert between.interpolated and 243.9 / 695.6 < between.relative < 446.7 / 695.6


def test_fgmp_saving_is_the_mix_of_its_modes() -> None:
    energy = fgmp_energies()
    assert energy["44"] == pytest.approx(510.4 / 616.2)
    expected = 0.49 * 510.4 + 0.42 * (598.8 + 587.4) / 2 + 0.09 * 646.1
    assert fgmp_saving(0.7) == pytest.approx(1 - expected / 616.2)
    assert fgmp_saving(0.0) == pytest.approx(1 - 646.1 / 616.2)
