"""`correct-bias`: the mean error that rounding a weight makes, taken back by the bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import SSAValue
from xdsl.passes import ModulePass

from ..dialects.errors import UsageError
from ..dialects.formats import is_wide, quantize
from ..dialects.operations._shapes import UNKNOWN, shape_of
from ..dialects.operations.contraction import Contraction, ConvOp, ExpertLinearOp, LinearOp, window_positions
from ..dialects.operations.movement import Movement
from ..dialects.operations.parameter import ParameterOp
from ..dialects.operations.pointwise import ConvertOp
from ._columns import matrix
from ._context import note, weights_of
from ._folding import activation_of
from ._given import given_encoding, laid_out, parameter_under, rounding_of, wide_weight
from ._scaled_parameters import Parameters
from ._sites import Site, sites
from ._statistics import forget, statistics_of
from .quantize import matches, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.weight_store import WeightStore


@dataclass(frozen=True)
class CorrectBias(ModulePass):
    """Add E[(W - What) x] to the bias of every linear layer and convolution whose weight is rounded.

    Nagel et al. 2019, Data-Free Quantization, arXiv 1906.04721, section 4.2, with E[x] measured on calibration inputs:
    over these, where nothing rounds activations, the mean of a layer's output is then that of the float model. What is
    the mean value of an input channel, a convolution's kernel position sees wherever it stands inside the image, and 0
    where it stands on padding; that mean is taken to be the same all over the image. A layer without a bias gets one,
    `NAME.bias` after its weight. What takes no bias (experts, whose inputs have no mean of their own, products of more
    than two dimensions with a transposed weight) stays as it is, and the report says so. `match` names modules as in
    `quantize`. It stands behind all passes that choose scales or codes. Raises UsageError where no weight is rounded,
    MxloomError where a layer saw no data.
    """

    name = "correct-bias"

    match: str = "*"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        weights = weights_of(ctx, self.name)
        chosen = self._chosen(op)
        refused = [(site, why) for site in chosen if (why := _why_not(site))]
        if len(refused) == len(chosen):
            listed = "\n".join(f"  {site.name}: {why}" for site, why in refused)
            raise UsageError(f"{self.name}: none of {len(chosen)} rounded weights has a bias to correct:\n{listed}")
        statistics = statistics_of(ctx, op, self.name, "ranges")
        parameters, left, made = Parameters(op, weights, "corrected"), {site for site, _ in refused}, 0
        for site in (site for site in chosen if site not in left):
            mean = statistics.inputs(activation_of(site.operation)).mean
            made += _correct(site, mean_error(site, weights, mean), parameters)
        forget(ctx)
        note(ctx, f"{self.name}: {len(chosen) - len(refused)} biases corrected, {made} of them new")
        for site, why in refused:
            note(ctx, f"{self.name}: left {site.name}: {why}")

    def _chosen(self, module: ModuleOp) -> list[Site]:
        """The rounded weights of matched contractions. UsageError where there is none."""
        narrow = [
            site
            for site in sites(module)
            if site.role == "weight" and isinstance(site.operation, Contraction) and not is_wide(site.format)
        ]
        found = [site for site in narrow if matches(self.match, site.module)]
        if not narrow:
            raise UsageError(f"{self.name}: no weight has a format yet: it stands after `quantize`")
        if not found:
            known = dict.fromkeys(site.module for site in narrow)
            raise UsageError(f"{self.name}: {self.match!r} matches no rounded weight{nearest(self.match, known)}")
        return found


def _why_not(site: Site) -> str | None:
    """Why a layer takes no correction; None where it does."""
    op = site.operation
    if isinstance(op, ExpertLinearOp):
        return "which tokens reach an expert is not told by the mean over all"
    if not isinstance(op, LinearOp | ConvOp):
        return f"{op.name} takes no bias"
    if op.bias is not None:
        return None if _is_stored(op.bias) else "its bias is computed in the model"
    if isinstance(op, LinearOp) and op.transposed is not None and len(shape_of(op.input)) != 2:
        return "a transposed product takes a bias for matrices alone, and it has none"
    return None


def _is_stored(value: SSAValue) -> bool:
    """Whether a value is a parameter, laid out in some way."""
    while isinstance(value.owner, ConvertOp | Movement):
        value = value.owner.operands[0]
    return isinstance(value.owner, ParameterOp)


def mean_error(site: Site, weights: WeightStore, mean: Tensor) -> Tensor:
    """E[(W - What) x] of each output, f64 [N], for the mean of each input channel, [C]."""
    import torch

    lost = matrix(site, wide_weight(site, weights).double() - _rounded(site, weights).double())
    op = site.operation
    if not isinstance(op, ConvOp):
        return lost @ mean.double()
    groups = op.groups.value.data if op.groups is not None else 1
    seen = mean.double().reshape(groups, -1, 1) * _inside(op)
    rows = lost.reshape(groups, -1, lost.shape[1])
    return torch.einsum("gnk,gk->gn", rows, seen.reshape(groups, -1)).reshape(-1)


def _rounded(site: Site, weights: WeightStore) -> Tensor:
    given = given_encoding(site, weights)
    if given is not None:
        return given.decode()
    return quantize(wide_weight(site, weights), site.format, rounding_of(site))


def _inside(op: ConvOp) -> Tensor:
    """The part of a kernel position's places that lies inside the image, f64, flat; 1 where sizes are not known."""
    import torch

    found = torch.ones(1, dtype=torch.float64)
    numbers = zip(*map(op.per_dimension, ("stride", "padding", "dilation")), strict=True)
    for size, kernel, (stride, padding, dilation) in zip(
        shape_of(op.input)[2:], shape_of(op.weight)[2:], numbers, strict=True
    ):
        part = torch.ones(kernel, dtype=torch.float64)
        if size != UNKNOWN:
            starts = torch.arange(window_positions(size, kernel, stride, padding, dilation)) * stride - padding
            places = starts[None] + dilation * torch.arange(kernel)[:, None]
            part = ((places >= 0) & (places < size)).double().mean(1)
        found = (found[:, None] * part).flatten()
    return found


def _correct(site: Site, shift: Tensor, parameters: Parameters) -> bool:
    """Add to the layer's bias; whether that is a new one."""
    op = site.operation
    assert isinstance(op, LinearOp | ConvOp)
    if op.bias is not None:
        values = laid_out(op.bias, parameters.weights).double() + shift
        parameters.replace((op, list(op.operands).index(op.bias)), values.float())
        return False
    under = parameter_under(site.value)
    made = parameters.make(under.source.data, "bias", shift.float(), under)
    op.operands = [*op.operands, made.result]
    return True
