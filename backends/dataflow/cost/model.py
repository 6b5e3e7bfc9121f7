"""The coefficients of the cost model: weights of features, with the errors and the ranges of their fit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

from ....dialects.errors import MxloomError, UsageError
from ..dot_product import DotProduct
from ..stages._stream import Stage
from .features import Features, features_on, kind_of

COUNTS = {"nand2": ("NAND2",), "xc7": ("LUT", "FF"), "xc7_dsp": ("LUT", "FF"), "ecp5": ("LUT", "FF")}
"""What each target's cost is counted in; DSP blocks and memories are counted from the design's numbers alone."""
NAND2_UM2 = 0.05832
"""Area of a NAND gate with two inputs in ASAP7, in square micrometres (its 7.5-track library's smallest)."""
VARIABLE = "MXLOOM_HARDWARE_COST"
"""The environment variable that names a coefficients file of one's own."""


@dataclass(frozen=True)
class Errors:
    """Relative errors over `designs` designs; a count below 1 counts as 1."""

    designs: int = 0
    mean: float = 0.0
    largest: float = 0.0

    def told(self) -> tuple[str, str, str]:
        """Designs, mean and largest error in per cent, for a table; `none` where there was no design."""
        if not self.designs:
            return "none", "", ""
        return str(self.designs), f"{100 * self.mean:.1f}", f"{100 * self.largest:.1f}"


@dataclass(frozen=True)
class Fit:
    """One kind of design's weights for one count of one target."""

    weights: dict[str, float]
    fitted: Errors
    held_out: Errors = field(default_factory=Errors)
    range: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, found: Features) -> float:
        return sum(self.weights.get(name, 0.0) * value for name, value in found.items())

    def outside(self, found: Features) -> list[str]:
        """Features with a weight that lie outside what was fitted, and those that no fitted design had."""
        unknown = [f"no design with {name} was fitted" for name, value in found.items()
                   if value and name not in self.weights]  # fmt: skip
        return unknown + [
            f"{name} {value:g} is outside {low:g} to {high:g}"
            for name, value in found.items()
            if self.weights.get(name)
            for low, high in (self.range.get(name, (0.0, 0.0)),)
            if not low <= value <= high
        ]


@dataclass(frozen=True)
class Coefficients:
    """Fits by target, count and kind of design; `nand2_um2` turns NAND gates into square micrometres."""

    fits: Mapping[str, Mapping[str, Mapping[str, Fit]]]
    nand2_um2: float = NAND2_UM2
    library: str = "ASAP7"

    def predict(self, design: DotProduct | Stage, target: str) -> tuple[dict[str, float], list[str]]:
        """(counts of a target, what is outside the fitted range). Raises MxloomError for a kind that was not fitted."""
        kind, found = kind_of(design), features_on(design, target)
        counts, beyond = dict[str, float](), list[str]()
        for count, fits in self.fits.get(target, {}).items():
            if kind not in fits:
                raise MxloomError(f"the cost coefficients have no {kind} for {target}: run mxloom calibrate-cost")
            counts[count] = fits[kind](found)
            beyond += [f"{kind}: {text}" for text in fits[kind].outside(found)]
        return counts, list(dict.fromkeys(beyond))

    def text(self) -> str:
        """The file that `read` reads."""
        about = "Weights of features (see features.py) fitted on Yosys runs; errors are relative, 0.05 is 5 %."
        fits = {
            target: {c: {kind: asdict(fit) for kind, fit in kinds.items()} for c, kinds in counts.items()}
            for target, counts in self.fits.items()
        }
        head = {"about": about, "library": self.library, "nand2_um2": self.nand2_um2}
        return json.dumps({**head, "fits": fits}, indent=1) + "\n"


def read(file: Path) -> Coefficients:
    """Coefficients from a file. Raises UsageError for one that is missing or something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        fits = {
            target: {
                count: {
                    kind: Fit(
                        {name: float(weight) for name, weight in fit["weights"].items()},
                        Errors(**fit["fitted"]),
                        Errors(**fit["held_out"]),
                        {name: (float(low), float(high)) for name, (low, high) in fit["range"].items()},
                    )
                    for kind, fit in kinds.items()
                }
                for count, kinds in counts.items()
            }
            for target, counts in found["fits"].items()
        }
        return Coefficients(fits, float(found["nand2_um2"]), str(found["library"]))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{file} is no file of cost coefficients: {type(error).__name__}: {error}") from None


def coefficients(file: Path | None = None) -> Coefficients:
    """Those of a file, of the one that MXLOOM_HARDWARE_COST names, or those that came with mxloom."""
    named = os.environ.get(VARIABLE)
    if file is None and named:
        file = Path(named)
    return _own() if file is None else _kept(file, file.stat().st_mtime_ns if file.exists() else 0)


@lru_cache(maxsize=1)
def _own() -> Coefficients:
    return read(Path(__file__).with_name("coefficients.json"))


@lru_cache(maxsize=8)
def _kept(file: Path, _written: int) -> Coefficients:
    return read(file)
