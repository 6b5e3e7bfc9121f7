"""`low-rank`: what rounding takes from a weight, given back by two thin layers in a wider format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, TensorType, f32
from xdsl.ir import SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import InsertPoint, Rewriter
from xdsl.utils.exceptions import VerifyException

from ..dialects.errors import UsageError
from ..dialects.formats import is_wide, verify_tensor
from ..dialects.instances import format_of
from ..dialects.operations._shapes import shape_of
from ..dialects.operations._values import hint_of, torch_dtype
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import LinearOp
from ..dialects.operations.pointwise import AddOp
from ._context import note, weights_of
from ._given import laid_out, parameter_under, wide_weight
from ._new_weights import NewWeights, check_undecided, free_name, parameter, plain_weight
from ._sites import Site, module_name, root, sites_of
from ._statistics import Statistics, forget, statistics_of
from .quantize import matches, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.weight_store import WeightStore


@dataclass(frozen=True)
class LowRank(ModulePass):
    """y = Q(W) x + A (B x): an error, or the weight itself, is held to `rank` singular vectors in `format`.

    `order` after: A B is nearest to the error W - Q(W) of the weight as it is rounded now, whatever chose its codes
    (LQER, arXiv 2402.02446). `order` before: A B is nearest to W, and W - A B is what is rounded from now on (SVDQuant,
    arXiv 2411.05007). Near is by the squares of what the layer's outputs miss: column c of the weight counts times the
    root of E[x_c^2], which `scaled=false` leaves away; that needs no data. x, B x and both matrices are rounded into
    `format`, where the layers' own rounding does not reach.
    `match` chooses linear layers, of those whose weight has a format. A layer is left as it is, and told, where the
    error that is left would not be smaller than that of rounding alone, or where it has no more than `rank` inputs or
    outputs. UsageError where none is changed.
    """

    name = "low-rank"

    match: str = "*"
    rank: int = 32
    format: str = "bf16"
    order: str = "after"
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"low-rank: rank is 1 or more, got {self.rank}")
        if self.order not in ("after", "before"):
            raise UsageError(f"low-rank: order is after or before, got {self.order!r}")
        format_of(self.format)  # a wrong one is told before anything runs

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        weights = weights_of(ctx, self.name)
        layers = [layer for layer in op.walk() if isinstance(layer, LinearOp)]
        matched = [layer for layer in layers if matches(self.match, module_name(layer))]
        if not matched:
            near = nearest(self.match, [module_name(layer) for layer in layers])
            raise UsageError(f"low-rank: {self.match!r} matches 0 of {len(layers)} linear layers{near}")
        statistics = statistics_of(ctx, op, self.name, "ranges") if self.scaled else None
        new, reasons = NewWeights("residual"), dict[str, str]()
        for layer in matched:
            if reason := self._change(layer, weights, statistics, new):
                reasons[module_name(layer)] = reason
        if len(reasons) == len(matched):
            name, reason = next(iter(reasons.items()))
            raise UsageError(f"low-rank has no effect: {name} {reason}")
        new.apply(op, weights)
        forget(ctx)
        for name, reason in reasons.items():
            note(ctx, f"low-rank leaves {name} as it is: it {reason}")

    def _change(self, layer: LinearOp, weights: WeightStore, statistics: Statistics | None, new: NewWeights) -> str:
        """Give a layer its two thin ones; else why not."""
        site = next((site for site in sites_of(layer) if site.role == "weight"), None)
        if site is None or is_wide(site.format):
            return "has a weight in no narrow format: low-rank stands behind the rules that give formats"
        if self.order == "before":
            check_undecided(layer, "weight", f"{self.name}{{order=before}}")
            if plain_weight(layer, "weight") is None:
                return "has a weight that the model computes from others"
        wide, rounded = _matrix(layer, wide_weight(site, weights)), _matrix(layer, laid_out(site.value, weights))
        if min(wide.shape) <= self.rank:
            return f"has {wide.shape[1]} inputs and {wide.shape[0]} outputs, and a rank of {self.rank} is no less"
        energy = None if statistics is None else statistics.inputs(site).mean_square.double()
        factors = self._factors(wide if self.order == "before" else wide - rounded, energy)
        first, second = (self._narrowed(factor) for factor in factors)
        rest = wide - first @ second
        kept = _rounded(layer, site, rest) if self.order == "before" else rounded
        if not _missed(rest - kept, energy) < _missed(wide - rounded, energy):
            return f"would miss no less with a rank of {self.rank} than by rounding alone"
        if self.order == "before":
            new.add(layer, "weight", _Residual(first, second, layer.transposed is not None))
        self._insert(layer, site, weights, *factors)
        return ""

    def _factors(self, matrix: Tensor, energy: Tensor | None) -> tuple[Tensor, Tensor]:
        """A [N, rank] and B [rank, K], A B nearest to a matrix [N, K]; f64.

        With U the first left singular vectors of M diag(s), the nearest matrix of that rank to it is U U^T M diag(s)
        (Eckart and Young 1936), so that A = U and B = U^T M.
        """
        import torch

        scaled = matrix if energy is None else matrix * energy.sqrt()
        if matrix.shape[0] <= matrix.shape[1]:
            left = torch.linalg.eigh(scaled @ scaled.T).eigenvectors[:, -self.rank :]
        else:
            right = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -self.rank :]
            left = torch.linalg.qr(scaled @ right).Q
        return left, left.T @ matrix

    def _narrowed(self, matrix: Tensor) -> Tensor:
        """A matrix as it is read."""
        from ..dialects import formats

        type = format_of(self.format)
        try:
            verify_tensor(TensorType(type, tuple(matrix.shape)))
        except VerifyException as error:
            raise UsageError(f"low-rank: format={self.format!r} does not fit {list(matrix.shape)}: {error}") from None
        if is_wide(type):
            return matrix.to(torch_dtype(type)).double()
        return formats.quantize(matrix.float(), type).double()

    def _insert(self, layer: LinearOp, site: Site, weights: WeightStore, first: Tensor, second: Tensor) -> None:
        """y + A (B x) behind a layer, x being what it reads before any cast."""
        source = parameter_under(root(site.value)).source.data
        thin = self._layer(layer, root(layer.input), f"{source}.low_rank_b", second, weights)
        broad = self._layer(thin, thin.result, f"{source}.low_rank_a", first, weights)
        broad.result.name_hint = hint_of(f"{module_name(layer)}.low_rank_a")
        thin.result.name_hint = hint_of(f"{module_name(layer)}.low_rank_b")
        total = AddOp.build(operands=[layer.result, broad.result], result_types=[layer.result.type])
        total.result.name_hint = hint_of(f"{module_name(layer)}.low_rank")
        Rewriter.insert_op(total, InsertPoint.after(broad))
        for use in list(layer.result.uses):
            if use.operation is not total:
                use.operation.operands[use.index] = total.result
        for own in (site for each in (thin, broad) for site in sites_of(each)):
            if own.layout(self.format) != f32:
                own.retype(self.format)

    def _layer(self, behind: LinearOp, value: SSAValue, name: str, matrix: Tensor, weights: WeightStore) -> LinearOp:
        """A linear layer without bias, its weight [N, K] held as the format has it where that is a wide one."""
        type = format_of(self.format)
        name = free_name(name, weights)
        weights.put(name, matrix.to(torch_dtype(type)).contiguous())
        held = parameter(name, matrix, before=behind)
        result = TensorType(f32, (*shape_of(value)[:-1], matrix.shape[0]))
        made = LinearOp.build(operands=[value, held, None], result_types=[result])
        Rewriter.insert_op(made, InsertPoint.after(behind))
        return made


@dataclass(frozen=True, eq=False)
class _Residual:
    """A weight less a product of two matrices."""

    first: Tensor
    second: Tensor
    transposed: bool

    def __call__(self, weight: Tensor, stored: WeightStore) -> Tensor:
        taken = self.first @ self.second
        return weight - (taken.T if self.transposed else taken)


def _matrix(layer: LinearOp, weight: Tensor) -> Tensor:
    """[N, K] in f64."""
    return (weight if layer.transposed is None else weight.T).double()


def _rounded(layer: LinearOp, site: Site, matrix: Tensor) -> Tensor:
    """A matrix [N, K] as the weight's cast rounds it."""
    from ..backends.reference import results

    cast = site.value.owner
    assert isinstance(cast, CastOp)
    given = matrix.float() if layer.transposed is None else matrix.float().T.contiguous()
    return _matrix(layer, results(cast, cast.call(), {cast.input: given})[0])


def _missed(error: Tensor, energy: Tensor | None) -> float:
    """The mean square that a layer's outputs miss by an error of its weight, channels of x taken as independent."""
    return float((error.square() if energy is None else error.square() * energy).sum())
