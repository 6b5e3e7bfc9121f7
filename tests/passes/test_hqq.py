"""`hqq`: never worse than the range in its own norm, the iteration against loops in f64, storage, refusals."""

# Operations are looked up by name, so their fields are not known to the type checker.
# pyright: reportAttributeAccessIssue=false

from itertools import product
from pathlib import Path

import pytest
import torch

from mxloom.backends.reference import Interpreter
from mxloom.compiler.artefact import load, save
from mxloom.compiler.compiled import Compiled
from mxloom.compiler.driver import compile
from mxloom.dialects.errors import UsageError
from mxloom.dialects.formats import encode_tensor
from mxloom.dialects.instances import format_of
from mxloom.passes.hqq import Hqq

FORMATS = {"int4_g32_affine": (4, 32), "int4_g128_affine": (4, 128), "int2_g64_affine": (2, 64)}
P = 0.7


def model(k: int = 128, n: int = 24, *, heavy: bool = True) -> torch.nn.Sequential:
    """Weights with the heavy tails that the norm is for."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(k, n))
    with torch.no_grad():
        if heavy:
            weight_of(net).copy_(torch.distributions.StudentT(3.0, 0.01, 0.05).sample((n, k)))
    return net.eval()


def weight_of(net: torch.nn.Sequential) -> torch.Tensor:
    return net[0].weight.detach()  # pyright: ignore[reportReturnType, reportCallIssue]


def fitted(net: torch.nn.Sequential, format: str, options: str = "") -> Compiled:
    recipe = {"quantize": [{"weights": format}], "passes": [f"hqq{{{options}}}"]}
    return compile(net, recipe, example={"input": torch.randn(3, weight_of(net).shape[1])})


def values(own: Compiled) -> torch.Tensor:
    return own.weights.wide("0.weight")


def missed(wide: torch.Tensor, found: torch.Tensor, group: int) -> torch.Tensor:
    """The sum of |error|^p of each group, f64; the last group of a row may be shorter."""
    sums = [part.double().abs().pow(P).sum(-1) for part in (wide - found).split(group, -1)]
    return torch.stack(sums, -1)


@pytest.mark.parametrize("k", [128, 200])
@pytest.mark.parametrize("format", FORMATS)
def test_no_group_is_worse_than_by_its_range(format: str, k: int) -> None:
    """200 leaves a ragged group in each row. Heavy tails are what it is for: in total it gains."""
    net, group = model(k), FORMATS[format][1]
    plain = encode_tensor(weight_of(net), format_of(format)).decode()
    before, after = (missed(weight_of(net), found, group) for found in (plain, values(fitted(net, format))))
    assert bool((after <= before).all())
    assert after.sum() < 0.98 * before.sum()


def half_quadratic(row: list[float], bits: int, scale: float, zero: int, beta: float, rounds: int, fits: bool):
    """Badri and Shaji's iteration on one group, in f64: every scale and (real) zero point that is met."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    s, z = scale, float(zero)
    for _ in range(rounds):
        codes = [min(max(float(torch.tensor(w / s + z, dtype=torch.float64).round()), low), high) for w in row]
        wanted = []
        for w, q in zip(row, codes, strict=True):
            error = w - s * (q - z)
            kept = max(abs(error) - abs(error) ** (P - 1) / beta, 0.0) if error else 0.0
            wanted.append(w - (kept if error > 0 else -kept))
        z = sum(q - w / s for q, w in zip(codes, wanted, strict=True)) / len(row)
        if fits:
            steps = [q - z for q in codes]
            along, norm = sum(w * d for w, d in zip(wanted, steps, strict=True)), sum(d * d for d in steps)
            s = along / norm if along > 0 and norm > 0 else s
        yield s, z
        beta *= 1.01


@pytest.mark.parametrize(("fits", "beta"), [(True, 10.0), (True, 300.0), (False, 300.0)])
def test_each_group_has_the_best_that_the_iteration_meets(fits: bool, beta: float) -> None:
    """All that is met, rounded as it is stored, by loops in f64; beta = 300 leaves errors that the shrinking keeps."""
    net = model(64, 4)
    weight = weight_of(net)
    options = f"beta={beta} iterations=8 scales={str(fits).lower()}"
    found = missed(weight, values(fitted(net, "int4_g32_affine", options)), 32)
    first = encode_tensor(weight, format_of("int4_g32_affine"))
    assert first.scales is not None
    assert first.zero_points is not None
    for row, group in product(range(4), range(2)):
        own = weight[row, 32 * group : 32 * (group + 1)].double().tolist()
        scale, zero = float(first.scales[row, group]), int(first.zero_points[row, group])
        met = [(scale, float(zero)), *half_quadratic(own, 4, scale, zero, beta, 8, fits)]
        errors = []
        for s, z in met:
            s, z = float(torch.tensor(s).bfloat16()), min(max(float(torch.tensor(z).round()), -8.0), 7.0)
            codes = [min(max(float(torch.tensor(w / s).round()), -8 - z), 7 - z) for w in own]
            errors.append(sum(abs(w - s * q) ** P for w, q in zip(own, codes, strict=True)))
        assert float(found[row, group]) == pytest.approx(min(errors), rel=1e-3)


def test_it_is_stored_and_runs_everywhere(tmp_path: Path) -> None:
    net, x = model(), torch.randn(3, 128)
    own = fitted(net, "int4_g32_affine")
    wanted = own(x)
    bias: torch.Tensor = net[0].bias.detach()  # pyright: ignore[reportCallIssue, reportAssignmentType]
    assert torch.equal(wanted, torch.nn.functional.linear(x, values(own), bias))
    assert torch.equal(Interpreter(own.module, own.weights)(x)[0], wanted)
    plain = compile(net, {"quantize": [{"weights": "int4_g32_affine"}]}, example={"input": x})
    assert own.cost().bytes == plain.cost().bytes
    assert torch.equal(load(save(own, tmp_path / "a"))(x), wanted)
    assert any("hqq: " in line for line in own.notes())


def test_a_group_of_zeros_and_one_of_equal_numbers() -> None:
    net = model(heavy=False)
    with torch.no_grad():
        weight_of(net)[0] = 0.0
        weight_of(net)[1] = 0.25
    found = values(fitted(net, "int4_g32_affine"))
    assert bool((found[0] == 0).all())
    assert torch.allclose(found[1], torch.full((128,), 0.25), rtol=2**-8)
    assert bool(found.isfinite().all())


REFUSED = {
    "p=0.0": "p lies above 0 and is 1 at most, got 0.0",
    "beta=-1.0": "beta is above 0",
    "iterations=0": "iterations 1 or more",
    "match=head": "'head' matches no weight with zero points",
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.items())
def test_refused(options: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        fitted(model(), "int4_g32_affine", options)


@pytest.mark.parametrize("format", ["int4_g32", "mxfp4"])
def test_formats_without_zero_points(format: str) -> None:
    with pytest.raises(UsageError, match="hqq has no effect: no weight has a format with zero points"):
        fitted(model(), format)


def test_weights_that_are_packed() -> None:
    own = fitted(model(), "int4_g32_affine")
    module, weights = own.packed()
    from mxloom.passes._context import CompileContext

    with pytest.raises(UsageError, match=r"0\.weight is packed as int4_g32_affine"):
        Hqq().apply(CompileContext(weights=weights), module)
