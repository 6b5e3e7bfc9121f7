"""From Yosys runs to coefficients: measures designs, fits them, and states the errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .designs import design_of, fit_designs, held_out_designs, quick_designs
from .features import features_on
from .fitting import fitted
from .measurements import Measurements, append_measurements, check_appendable, read_measurements
from .model import COUNTS, NAND2_UM2, Coefficients, Errors, Fit, coefficients
from .synthesis import TARGETS, measured, nand_area, verilog, yosys


def calibrate(
    *,
    quick: bool = False,
    liberty: Path | None = None,
    jobs: int = 1,
    measurements: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Coefficients:
    """Measure what is not measured yet, and fit.

    `quick` takes two small designs of each kind and tests on none. A `liberty` file's cells replace Yosys's gates; the
    FPGA fits are then those that exist. `measurements` is a file of raw results that is read, and gets the new ones.
    Raises UsageError, before the first run, for a file of results that is malformed or takes none.
    """
    learnt, tested = (quick_designs(), list[str]()) if quick else (fit_designs(), held_out_designs())
    targets = ("nand2",) if liberty else TARGETS
    known: Measurements = {}
    if measurements is not None:
        known = read_measurements(measurements, tell) if measurements.exists() else {}
        check_appendable(measurements)
    for new in _measure([*learnt, *tested], targets, known, liberty, jobs, tell):
        known.update(new)
        if measurements is not None:
            append_measurements(measurements, new)
    found = fit_all(learnt, tested, known)
    if liberty is None:
        return found
    return Coefficients({**coefficients().fits, **found.fits}, nand_area(liberty), liberty.stem)


def _measure(
    designs: Sequence[str],
    targets: Sequence[str],
    known: Measurements,
    liberty: Path | None,
    jobs: int,
    tell: Callable[[str], None],
) -> Iterable[Measurements]:
    missing = [
        [target for target in targets if (design, "xc7_dsp" if target == "xc7" else target) not in known]
        for design in designs
    ]
    work = [(design, wanted) for design, wanted in zip(designs, missing, strict=True) if wanted]
    if work:
        yosys()

    def one(task: tuple[str, list[str]]) -> Measurements:
        design, wanted = task
        text, found = verilog(design_of(design)), dict[tuple[str, str], dict[str, float]]()
        for target in wanted:
            for name, counts in measured(text, target, liberty).items():
                found[design, name] = counts
        return found

    with ThreadPoolExecutor(jobs) as pool:
        for number, ((design, _), found) in enumerate(zip(work, pool.map(one, work), strict=True), 1):
            tell(f"{number}/{len(work)} {design}")
            yield found


def fit_all(learnt: Sequence[str], tested: Sequence[str], known: Measurements) -> Coefficients:
    """Weights of every kind, count and target from the learnt designs, with the errors on both lists."""
    fits: dict[str, dict[str, dict[str, Fit]]] = {}
    for target, counts in COUNTS.items():
        for count in counts:
            by_kind = _by_kind(learnt, target, known), _by_kind(tested, target, known)
            for kind, designs in by_kind[0].items():
                found = _fit(designs, by_kind[1].get(kind, []), target, count, known)
                fits.setdefault(target, {}).setdefault(count, {})[kind] = found
    return Coefficients(fits, NAND2_UM2)


def _by_kind(designs: Sequence[str], target: str, known: Measurements) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for design in designs:
        if (design, target) in known:
            found.setdefault(design.split()[0], []).append(design)
    return found


def _fit(learnt: Sequence[str], tested: Sequence[str], target: str, count: str, known: Measurements) -> Fit:
    rows = [features_on(design_of(design), target) for design in learnt]
    seen = [known[design, target][count] for design in learnt]
    weights = {name: round(weight, 4) for name, weight in fitted(rows, seen).items()}
    columns = {name: [row.get(name, 0.0) for row in rows] for name in weights}
    range = {name: (min(column), max(column)) for name, column in columns.items()}
    bare = Fit(weights, Errors())
    others = [(features_on(design_of(design), target), known[design, target][count]) for design in tested]
    return Fit(weights, _errors(bare, zip(rows, seen, strict=True)), _errors(bare, others), range)


def _errors(fit: Fit, pairs: Iterable[tuple[dict[str, float], float]]) -> Errors:
    found = [abs(fit(row) - value) / max(1.0, value) for row, value in pairs]
    return Errors(len(found), round(sum(found) / len(found), 4), round(max(found), 4)) if found else Errors()
