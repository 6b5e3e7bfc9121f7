"""Image classifiers beside a reference: how often both say the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..dialects.errors import UsageError
from .evaluated import evaluated

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClassifierEvaluation:
    """Share of images for which model and reference choose the same class."""

    reference: str
    images: int
    top1_agreement: float
    protocol: str

    def summary(self) -> str:
        """Two lines: the figure and how it came about."""
        return f"top-1 as {self.reference} {100 * self.top1_agreement:.1f} %\nprotocol: {self.protocol}"

    def __str__(self) -> str:
        return self.summary()

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)


def evaluate_classifier(model: Any, images: Iterable[Tensor], against: Any) -> ClassifierEvaluation:
    """Run both models on each image [channels, height, width] alone.

    UsageError without images, or where a model is for something else.
    """
    candidate, reference = evaluated(model), evaluated(against)
    for each in (candidate, reference):
        if each.task not in ("image-classification", "module"):
            raise UsageError(f"{each.name} is a {each.kind}, a model for {each.task}, not for image-classification.")
    agreements = [
        bool((_logits(candidate, image).argmax(-1) == _logits(reference, image).argmax(-1)).all()) for image in images
    ]
    if not agreements:
        raise UsageError("no images to classify.")
    count = len(agreements)
    protocol = f"{count} images, each alone, {candidate.dtype}"
    return ClassifierEvaluation(reference.name, count, sum(agreements) / count, protocol)


def _logits(model: Any, image: Tensor) -> Tensor:
    return model.output("logits", pixel_values=image[None])[0]
