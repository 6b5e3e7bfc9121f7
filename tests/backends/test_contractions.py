"""Linear layers with an accumulator: the definition against rational arithmetic, kernels against the definition."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
import torch

from mxloom.backends.kernels import native
from mxloom.backends.kernels.contraction.datapath import BYTES, DOUBLES, PANEL, WORDS, Datapath, available
from mxloom.backends.kernels.contraction.linear_code import LinearNumbers, linear_code
from mxloom.backends.kernels.contraction.native_linear import PackedLinear, codes_for
from mxloom.backends.kernels.contraction.packing import code_form, pack, unpack
from mxloom.dialects import contractions
from mxloom.dialects.accumulator import AccumulatorAttr
from mxloom.dialects.contractions import Bounds, Coded, coded, in_segments, segment_length, why_no_codes
from mxloom.dialects.errors import UsageError
from mxloom.dialects.formats import Rounding
from mxloom.dialects.instances import INSTANCES, format_of

FORMATS = [name for name in INSTANCES if why_no_codes(format_of(name, rank=2)) is None]
ACCUMULATORS = [("f32", "rne", 1), ("bf16", "rne", 1), ("e8m13", "rtz", 1), ("f32", "rne", 3), ("e8m13", "rne", 4)]
CODES = {"i8": torch.int8, "i16": torch.int16, "f64": torch.float64}

needs_kernels = pytest.mark.skipif(
    native.why_not() is not None, reason=f"{native.why_not()}; run on x86-64 or 64-bit Arm with llvmlite"
)


def rounded(value: Fraction, mantissa: int = 23, toward_zero: bool = False) -> Fraction:
    """A number in f32's exponents and so many mantissa bits, by whole numbers alone."""
    if value == 0:
        return value
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, -126) - mantissa)
    units = abs(value) / step
    whole = int(units)
    rest = units - whole
    if not toward_zero and (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2)):
        whole += 1
    return whole * step * (1 if value > 0 else -1)


def by_fractions(x: Coded, w: Coded, accumulator: AccumulatorAttr, row: int, column: int) -> float:
    """One number of the result, as the accumulator's description says it."""
    length = segment_length(x.length, w.length, x.size)
    (cx, sx), (cw, sw) = in_segments(x, length), in_segments(w, length)
    totals: list[Fraction] = []
    for first in range(min(accumulator.partials.data, cx.shape[1])):
        own = Fraction(0)
        for b in range(first, cx.shape[1], accumulator.partials.data):
            pairs = zip(cx[row, b].tolist(), cw[column, b].tolist(), strict=True)
            dot = rounded(sum((Fraction(a) * Fraction(c) for a, c in pairs), Fraction(0)))
            scale = rounded(Fraction(float(sx[row, b])) * Fraction(float(sw[column, b])))
            own = narrow(rounded(dot * scale + own), accumulator)
        totals.append(own)
    total = totals[0]
    for own in totals[1:]:
        total = narrow(rounded(total + own), accumulator)
    if x.over is not None or w.over is not None:
        over = rounded(Fraction(float(x.over or 1.0)) * Fraction(float(w.over or 1.0)))
        total = rounded(total * over)
    return float(total)


def narrow(value: Fraction, accumulator: AccumulatorAttr) -> Fraction:
    return rounded(value, accumulator.mantissa.data, accumulator.rounding.data == "rtz")


def operands(input: str, weight: str, rows: int, size: int, columns: int, seed: int = 0) -> tuple[Coded, Coded]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-8, 8, (rows, 1), generator=generator).float())
    x = torch.randn(rows, size, generator=generator) * spread
    w = torch.randn(columns, size, generator=generator)
    return coded(x, format_of(input, rank=2), Rounding()), coded(w, format_of(weight, rank=2), Rounding())


@pytest.mark.parametrize("accumulator", ACCUMULATORS, ids=str)
@pytest.mark.parametrize(
    ("input", "weight"),
    [
        ("mxint8", "mxfp4"),
        ("nvfp4", "nvfp4"),
        ("mxfp8_e4m3", "mxfp6_e3m2"),
        ("mxfp8_e5m2", "mxfp8_e5m2"),
        ("int8_channel", "ternary"),
        ("int8_affine", "int4_g32_affine"),
        ("fixed<8,6>", "int4_channel"),
    ],
)
def test_the_definition_is_what_rational_numbers_give(
    input: str, weight: str, accumulator: tuple[str, str, int]
) -> None:
    acc = AccumulatorAttr.of(*accumulator)
    x, w = operands(input, weight, 3, 160, 4)
    found = contractions.linear(x, w, None, acc)
    expected = [[by_fractions(x, w, acc, row, column) for column in range(4)] for row in range(3)]
    assert found.tolist() == expected


@pytest.mark.parametrize("format", FORMATS)
def test_codes_times_factors_are_the_values(format: str) -> None:
    """A code times its factor (rounded with the tensor's own) is the value that the format holds."""
    from mxloom.dialects.formats import quantize

    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(1))
    fmt = format_of(format, rank=2)
    found = coded(x, fmt, Rounding())
    length = found.length or 70
    codes, factors = in_segments(found, length)
    if found.over is not None:
        factors = factors * found.over
    values = (codes.float() * factors[..., None]).flatten(1)[:, :70]
    assert torch.equal(values, quantize(x, fmt))
    assert (found.codes / found.bounds.step).frac().abs().max() == 0
    assert found.codes.abs().max() <= found.bounds.largest


@pytest.mark.parametrize("exponent", [0, 40, -60])
def test_a_fused_multiply_add_rounds_once(exponent: int) -> None:
    """Against `math.fma` of whole numbers by fractions: many sums lie at or next to the middle of two f32."""
    generator = torch.Generator().manual_seed(exponent + 100)
    a, b = (torch.randint(-(2**24), 2**24, (4000,), generator=generator).float() for _ in range(2))
    c = (a.double() * b.double()).float() * torch.exp2(torch.randint(-30, 30, (4000,), generator=generator).float())
    b, c = b * 2.0**exponent, c * 2.0**exponent
    found = contractions.fused_multiply_add(a, b, c)
    exact = [
        Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert found.tolist() == [float(rounded(value)) for value in exact]


def run(x: Coded, w: Coded, acc: AccumulatorAttr, bias: torch.Tensor | None, path: Datapath) -> torch.Tensor:
    """The layer by a datapath's kernel."""
    layer = PackedLinear(w, bias, acc, path, x.length)
    codes, factors = in_segments(x, layer.length)
    codes = torch.nn.functional.pad(codes, (0, layer.packed.length - layer.length))
    sums = codes.sum(-1).to(torch.int32)
    over = None if x.over is None and w.over is None else 1.0 if x.over is None else float(x.over)
    return layer(codes.flatten(1).to(CODES[path.codes]).contiguous(), factors.contiguous(), sums, over)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def widest(x: Coded, w: Coded) -> Datapath | None:
    length = segment_length(x.length, w.length, x.size)
    codes = codes_for(x.bounds, w.bounds, length, whole=length >= x.size)
    return None if codes is None else available(native.features(), codes)


@needs_kernels
@pytest.mark.parametrize("weight", FORMATS)
def test_kernels_give_the_bits_of_the_definition(weight: str) -> None:
    inputs = ("mxint8", "mxfp4", "nvfp4", "mxfp8_e4m3", "int8_channel", "mxfp6_e3m2")
    for place, (input, (rows, size, columns)) in enumerate(product(inputs, [(7, 96, 50), (1, 70, 16)])):
        acc = AccumulatorAttr.of(*ACCUMULATORS[place % len(ACCUMULATORS)])
        x, w = operands(input, weight, rows, size, columns, place)
        path = widest(x, w)
        if path is None:
            assert weight == "mxfp8_e5m2" or "e5m2" in weight
            continue
        bias = torch.randn(columns) if rows > 1 else None
        assert same(run(x, w, acc, bias, path), contractions.linear(x, w, bias, acc)), (input, weight, path.name)


@needs_kernels
@pytest.mark.parametrize("path", [*BYTES, *WORDS, *DOUBLES], ids=lambda path: path.name)
def test_every_datapath_gives_the_same_bits(path: Datapath) -> None:
    """Those that the processor has are run; of the others the code for a processor that has them is checked."""
    acc = AccumulatorAttr.of("e8m13", "rne", 2)
    for input, weight in [("mxint8", "mxint8"), ("mxint8", "mxfp4"), ("mxint4", "mxint2"), ("int8_channel", "ternary")]:
        x, w = operands(input, weight, 9, 128, 5 * PANEL + 3)
        if native.features() >= path.needs:
            bias = torch.randn(5 * PANEL + 3)
            assert same(run(x, w, acc, bias, path), contractions.linear(x, w, bias, acc)), (input, weight)
        form = code_form(w, path, 32)
        packed = pack(w, path, form, segment_length(x.length, w.length, 128))
        codes, factors = unpack(packed, path)
        expected = in_segments(w, packed.length if packed.segments > 1 else 128)
        assert torch.equal(codes[..., : expected[0].shape[-1]], expected[0])
        assert torch.equal(factors, expected[1])


@needs_kernels
@pytest.mark.parametrize(
    ("path", "processor", "features", "expected"),
    [
        (BYTES[0], ("x86_64-unknown-linux-gnu", "znver4"), "", "vpdpbusd"),
        (BYTES[1], ("x86_64-unknown-linux-gnu", "alderlake"), "", "vpdpbusd"),
        (BYTES[2], ("aarch64-unknown-linux-gnu", "neoverse-n1"), "+dotprod", "sdot"),
        (WORDS[0], ("x86_64-unknown-linux-gnu", "znver4"), "", "vpdpwssd"),
        (WORDS[2], ("x86_64-unknown-linux-gnu", "znver3"), "", "vpmaddwd"),
        (DOUBLES[0], ("x86_64-unknown-linux-gnu", "skylake-avx512"), "", "vfmadd"),
        (DOUBLES[2], ("aarch64-unknown-linux-gnu", "generic"), "", "fmla"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_code_for_other_processors(path: Datapath, processor: tuple[str, str], features: str, expected: str) -> None:
    """The instruction that a datapath is named after stands in the code for a processor that has it."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple, name = processor
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features, opt=2)
    for bits, table in ((8, None), (4, (0, 1, 2, 3, -4))) if path.codes == "i8" else ((32, None),):
        numbers = LinearNumbers(path, bits, table, 0, "exponent", 2, 1, bias=True)
        assembly = machine.emit_assembly(llvm.parse_assembly(native.llvm_text(linear_code(numbers))))
        assert expected in assembly


def test_the_datapath_follows_from_the_processors_features() -> None:
    """A processor without an instruction set is never given code for it: LLVM would end the process."""
    avx2 = frozenset({"avx2", "fma", "sse2"})
    found = [available(has, "i8") for has in (avx2, avx2 | {"avxvnni"}, frozenset({"neon", "dotprod"}), frozenset())]
    assert [path and path.name for path in found] == ["avx2", "avxvnni", "dotprod", None]


def test_codes_types_by_bounds() -> None:
    """|E2M1| <= 12 and INT8 <= 127 steps: bytes; E3M2 has 448 steps: 16 bits; E4M3 takes f64; E5M2 x E5M2 neither."""
    byte, word, wide = Bounds(127, 1), Bounds(448, 1), Bounds(448, 2.0**-9)
    assert codes_for(byte, Bounds(12, 1), 32, whole=False) == "i8"
    assert codes_for(byte, Bounds(12, 1), 17, whole=False) == "f64"
    assert codes_for(byte, word, 32, whole=False) == "i16"
    assert codes_for(word, wide, 32, whole=False) == "f64"
    assert codes_for(Bounds(57344, 2.0**-16), Bounds(57344, 2.0**-16), 32, whole=False) is None
    assert codes_for(byte, byte, 1 << 20, whole=True) == "f64"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("f16",), 'no accumulator is called "f16"'),
        (("e8m24",), "1 to 23 mantissa bits, got 24"),
        (("f32", "rtz"), "an f32 accumulator has rounding rne"),
        (("bf16", "rna"), '"rne" or "rtz", got "rna"'),
        (("f32", "rne", 0), "at least one partial sum, got 0"),
    ],
)
def test_accumulators_that_are_none(arguments: tuple[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AccumulatorAttr.of(*arguments)


def test_special_values() -> None:
    """A block with a NaN makes its row NaN; no rows, no columns and no K give what sums of nothing are."""
    acc = AccumulatorAttr.of()
    x = torch.ones(3, 64)
    x[1, 40] = torch.nan
    w = coded(torch.ones(2, 64), format_of("mxint8", rank=2), Rounding())
    found = contractions.linear(coded(x, format_of("mxint8", rank=2), Rounding()), w, None, acc)
    assert found.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert found[0].tolist() == [64.0, 64.0]
    empty = coded(torch.ones(0, 64), format_of("mxint8", rank=2), Rounding())
    assert contractions.linear(empty, w, None, acc).shape == (0, 2)
