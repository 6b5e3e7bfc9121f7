"""The functions of `integer` on tensors of values: from values on the grid to codes, and from codes to f64 values.

A fixed-point format is a pair here, its width and its fraction in bits, so that a graph can hold the calls. What meets
a NaN is NaN: hardware has none, and it is to be seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import integer
from .errors import MxloomError
from .integer import LONGEST, Point, Table

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple[int, int]


def codes_on(x: Tensor, fraction: int) -> Tensor:
    """The codes of values that lie on the grid of 2^-fraction; a NaN has code 0."""
    import torch

    return (x.to(torch.float64) * 2.0**fraction).nan_to_num(0.0).round().to(torch.int64)


def _values(codes: Tensor, fraction: int, broken: Tensor) -> Tensor:
    import torch

    return (codes.to(torch.float64) * 2.0**-fraction).masked_fill(broken, torch.nan)


def _broken_rows(x: Tensor) -> Tensor:
    return x.isnan().any(-1, keepdim=True)


def _check_length(size: int, what: str) -> None:
    if size > LONGEST:
        raise MxloomError(f"{what} in integers takes rows of {LONGEST} numbers at most, got {size}")


def rms_norm(x: Tensor, weight: Tensor | None, given: Pair, weights: Pair | None, result: Pair, eps: float) -> Tensor:
    """`integer.rms_norm` of values: x [..., D], weight [D] -> [..., D]."""
    _check_length(x.shape[-1], "a normalization")
    found = integer.rms_norm(
        codes_on(x, given[1]),
        None if weight is None or weights is None else codes_on(weight, weights[1]),
        Point(*given),
        None if weights is None else Point(*weights),
        Point(*result),
        eps,
    )
    return _values(found, result[1], _broken_rows(x))


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    given: Pair,
    weights: Pair | None,
    biases: Pair | None,
    result: Pair,
    eps: float,
) -> Tensor:
    """`integer.layer_norm` of values: x [..., D], weight and bias [D] -> [..., D]; without a weight it is 1."""
    _check_length(x.shape[-1], "a normalization")
    codes = codes_on(x, given[1])
    own = codes.new_ones(()) if weight is None or weights is None else codes_on(weight, weights[1])
    found = integer.layer_norm(
        codes,
        own,
        None if bias is None or biases is None else codes_on(bias, biases[1]),
        Point(*given),
        Point(*(weights or (2, 0))),
        None if biases is None else Point(*biases),
        Point(*result),
        eps,
    )
    return _values(found, result[1], _broken_rows(x))


def softmax(x: Tensor, given: Pair, result: Pair, bits: int) -> Tensor:
    """`integer.softmax` of values along the last dimension."""
    _check_length(x.shape[-1], "a softmax")
    found = integer.softmax(codes_on(x, given[1]), Point(*given), Point(*result), bits)
    return _values(found, result[1], _broken_rows(x))


def exponential(x: Tensor, given: Pair, result: Pair, bits: int) -> Tensor:
    """`integer.exponential` of values."""
    found = integer.exponential(codes_on(x, given[1]), Point(*given), Point(*result), bits)
    return _values(found, result[1], x.isnan())


def curve(x: Tensor, name: str, given: Pair, result: Pair, bits: int) -> Tensor:
    """A curve of `integer.CURVES` by its table."""
    found = Table(name, Point(*given), Point(*result), bits)(codes_on(x, given[1]))
    return _values(found, result[1], x.isnan())


def mean(x: Tensor, dims: tuple[int, ...], keepdim: bool, given: Pair, result: Pair) -> Tensor:
    """`integer.mean` of values over some dimensions."""
    total = codes_on(x, given[1]).sum(dims, keepdim=keepdim)
    count = x.numel() // max(total.numel(), 1)
    found = integer.mean(total, count, Point(*given), Point(*result))
    return _values(found, result[1], x.isnan().sum(dims, keepdim=keepdim) > 0)


def window_mean(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], given: Pair, result: Pair) -> Tensor:
    """`integer.mean` of each window without padding: x [..., H, W]."""
    import torch

    pooled = torch.nn.functional.avg_pool2d
    x = x.to(torch.float64)
    totals = pooled(x.nan_to_num(0.0) * 2.0 ** given[1], kernel, stride, divisor_override=1).round().to(torch.int64)
    found = integer.mean(totals, kernel[0] * kernel[1], Point(*given), Point(*result))
    return _values(found, result[1], pooled(x.isnan().to(torch.float64), kernel, stride, divisor_override=1) > 0)
