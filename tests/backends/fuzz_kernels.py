"""Random tensors through every kind of kernel, their memory ending or beginning at a page that nobody may touch.

Run: python tests/backends/fuzz_kernels.py SEED CASES. A kernel that reads or writes outside a tensor ends the process;
one that writes its input does too. Wrong bits are an AssertionError that names the case.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch

import mxloom
from mxloom.backends.kernels.clip_errors import candidate_errors
from mxloom.backends.kernels.codes import prepare_codes
from mxloom.backends.kernels.contraction.datapath import PANEL
from mxloom.backends.kernels.contraction.exact_linear import ExactLinear
from mxloom.backends.kernels.fake_quantization import reference_only
from mxloom.backends.kernels.statistics import block_statistics, by_torch
from mxloom.dialects import contractions, formats
from mxloom.dialects.accumulator import AccumulatorAttr
from mxloom.dialects.contractions import coded, why_no_codes
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.formats import BlockType, Rounding
from mxloom.dialects.instances import INSTANCES, format_of

FORMATS = [*INSTANCES, "f8E5M2", "!mx.float<5, 2>", "!mx.block<17xi5, f32>", "!mx.block<40xi4, f16>", "f6E3M2FN"]
FORMATS += ["!mx.block<4x8xf4E2M1FN>", "!mx.block<256xi8>", "!mx.block<8xi4, f16, zero i4>", "!mx.block<1xi4>"]
FORMATS += ["!mx.block<?x!mx.ternary, f32>", "!mx.block<2xf6E2M3FN, f8E5M2, f32>", "!mx.block<100x!mx.ternary, f16>"]
BYTES = 1 << 22
MARK = 0xA5


class Guarded:
    """Memory between two pages that may not be touched."""

    def __init__(self) -> None:
        page = mmap.PAGESIZE
        self.memory = mmap.mmap(-1, BYTES + 2 * page)
        self.start = page
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._protect(0, page, 0)
        self._protect(page + BYTES, page, 0)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, *, at_end: bool) -> torch.Tensor:
        """A contiguous tensor that begins or ends where the memory does, marks all around it."""
        count = prod(shape)
        size = count * dtype.itemsize
        assert size <= BYTES, f"{dtype} {list(shape)} takes more than {BYTES} bytes"
        offset = self.start + (BYTES - size if at_end else 0)
        around = min(4096, BYTES - size)
        self.marks = (self.start, around) if at_end else (offset + size, around)
        if at_end:
            self.marks = (offset - around, around)
        self.memory[self.marks[0] : sum(self.marks)] = bytes([MARK]) * around
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=offset).view(shape)

    def writable(self, yes: bool) -> None:
        self._protect(self.start, BYTES, mmap.PROT_READ | (mmap.PROT_WRITE if yes else 0))

    def check(self) -> None:
        assert self.memory[self.marks[0] : sum(self.marks)] == bytes([MARK]) * self.marks[1], "written beside a tensor"

    def _protect(self, offset: int, size: int, rights: int) -> None:
        failed = _libc().mprotect(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(size), rights)
        assert not failed, "mprotect failed"


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all()) and torch.equal(
        (found.signbit() & ~found.isnan()), (expected.signbit() & ~expected.isnan())
    )


class Case:
    """One random tensor in guarded memory."""

    def __init__(self, draw: random.Random, places: list[Guarded]) -> None:
        self.draw, self.places = draw, places
        most = draw.choice([1, 20, 20, 70, 70, 70, 300, 600])
        dims = draw.choice([1, 1, 2, 2, 2, 3])
        shape = [draw.randint(0 if draw.random() < 0.05 else 1, most) for _ in range(dims)]
        while (prod(shape) + prod(shape[1:])) * 8 > BYTES:  # as it lies in memory when strided or shifted
            shape[0] //= 2
        self.format = draw.choice(FORMATS)
        self.rounding = draw.choice(["rne", "rne", "rne", "rna", "rtz", "stochastic"])
        self.dtype = draw.choice([torch.float32] * 3 + [torch.bfloat16, torch.float16])
        self.order = draw.choice(["plain"] * 3 + ["transposed", "strided", "offset"])
        self.clip = draw.choice([None, None, 0.7])
        self.x = self._tensor(tuple(shape))

    def __str__(self) -> str:
        return f"{self.format} {self.rounding} {self.dtype} {list(self.x.shape)} {self.order} clip {self.clip}"

    def _tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        held = list(shape)
        if self.order == "strided":
            held[-1] *= 2
        if self.order == "offset":
            held[0] += 1
        if self.order == "transposed":
            held.reverse()
        place = self.places[0]
        place.writable(True)
        memory = place.tensor(tuple(held), self.dtype, at_end=self.draw.random() < 0.5)
        generator = torch.Generator().manual_seed(self.draw.randint(0, 1 << 30))
        bits = torch.randint(-(2**31), 2**31, held, generator=generator).to(torch.int32).view(torch.float32)
        values = bits if self.draw.random() < 0.3 else torch.randn(held, generator=generator)
        memory.copy_(values.to(self.dtype))
        place.writable(False)
        x = memory[..., ::2] if self.order == "strided" else memory[1:] if self.order == "offset" else memory
        return x.permute(*reversed(range(x.dim()))) if self.order == "transposed" else x

    def out(self, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.places[index].tensor(shape, dtype, at_end=self.draw.random() < 0.5)

    def check(self, used: int) -> None:
        for place in self.places[1 : 1 + used]:
            place.check()


def round_tensor(case: Case) -> None:
    x, how = case.x, Rounding(rounding=case.rounding, clip=case.clip, seed=7)
    fmt = format_of(case.format, rank=x.dim())
    expected = formats.quantize(x, fmt, how)
    out = case.out(1, tuple(x.shape), x.dtype)
    found = mxloom.fake_quantize(x, fmt, rounding=case.rounding, clip=case.clip, seed=7, out=out)
    assert found is out
    case.check(1)
    assert same(found, expected), str(case)
    assert same(mxloom.fake_quantize(x, fmt, rounding=case.rounding, clip=case.clip, seed=7), expected), str(case)


def code_tensor(case: Case) -> None:
    x, how = case.x, Rounding(rounding=case.rounding, clip=case.clip)
    prepared = prepare_codes(format_of(case.format, rank=x.dim()), how, tuple(x.shape), x.dtype)
    if isinstance(prepared, str):
        return
    plain = prepared(x)
    if plain.codes.nbytes > BYTES:  # codes of 64 bits, or of long blocks that hardly hold a value
        return
    codes, scales, sums = (case.out(i + 1, tuple(part.shape), part.dtype) for i, part in enumerate(plain[:3]))
    prepared(x, codes, scales, sums)
    case.check(3)
    pairs = zip((codes, scales, sums), plain[:3], strict=True)
    assert all(same(a.float(), b.float()) for a, b in pairs), str(case)
    if plain.codes.is_floating_point():  # no whole numbers, which have sums
        return
    split = plain.codes.unflatten(-1, (plain.scales.shape[-1], -1))
    assert torch.equal(split.sum(-1, dtype=torch.int32), plain.sums), str(case)


def measure_tensor(case: Case) -> None:
    x = case.x
    if not x.numel():
        return
    size = min(case.draw.choice([1, 8, 16, 31, 64, 1000]), x.shape[-1])
    # Widened as a whole: torch gives a NaN in f16 one sign in its vectors and another in what is left over.
    parts = [by_torch(part[..., None, :]) for part in x.float().split(size, -1)]
    found = block_statistics(x, size)
    for one, own in zip(found, zip(*parts, strict=True), strict=True):
        assert same(one, torch.cat(own, -1)), f"statistics of {size}: {case}"


def lose_tensor(case: Case) -> None:
    x, fmt = case.x, format_of(case.format, rank=case.x.dim())
    if not isinstance(fmt, BlockType) or case.rounding == "stochastic" or x.numel() > 2000:
        return
    clips = torch.rand(case.draw.choice([1, 8, 9, 20]), generator=torch.Generator().manual_seed(1)) * 0.9 + 0.1
    found = candidate_errors(x, fmt, clips, how=Rounding(rounding=case.rounding))
    again = candidate_errors(x.contiguous(), fmt, clips.flip(0), how=Rounding(rounding=case.rounding))
    assert same(found, again.flip(-1)), f"errors: {case}"


def multiply_tensor(case: Case) -> None:
    """A linear layer whose codes, weights, factors, sums and result lie beside forbidden pages, one after the other."""
    fmt = format_of(case.format, rank=2)
    if not case.x.numel() or why_no_codes(fmt) is not None or case.rounding == "stochastic":
        return
    draw, x = case.draw, case.x.float().reshape(-1, case.x.shape[-1])[:40]
    weight = coded(torch.randn(draw.randint(1, 70), x.shape[1]), format_of(draw.choice(WEIGHTS), rank=2), Rounding())
    accumulator = draw.choice([AccumulatorAttr.of(), AccumulatorAttr.of("e8m13", "rtz", 3)])
    layer = ExactLinear(weight, None, accumulator, fmt)
    input = coded(x, fmt, Rounding(rounding=case.rounding))
    expected = contractions.linear(input, weight, None, accumulator)
    packed = layer._packed
    if packed is None or layer._native(input) is None:
        return
    assert same(layer(input), expected), f"layer: {case}"
    codes, factors = contractions.in_segments(input, packed.length)
    filled = torch.nn.functional.pad(codes, (0, packed.packed.length - packed.length))
    kind = {"i8": torch.int8, "i16": torch.int16, "f64": torch.float64}[packed.path.codes]
    held = [filled.flatten(1).to(kind).contiguous(), factors.contiguous(), filled.sum(-1).to(torch.int32)]
    held += [packed.packed.codes, packed.packed.factors]
    result = case.out(3, (x.shape[0], packed.panels * PANEL), torch.float32)
    for number, tensor in enumerate(held):
        place = case.places[1]
        guarded = place.tensor(tuple(tensor.shape), tensor.dtype, at_end=draw.random() < 0.5)
        guarded.copy_(tensor)
        parts = [guarded if other == number else each for other, each in enumerate(held)]
        packed.packed = replace(packed.packed, codes=parts[3], factors=parts[4])
        packed._plans.clear()
        over = None if input.over is None and weight.over is None else 1.0 if input.over is None else float(input.over)
        product = ctypes.c_float(0.0 if over is None else over * packed.over)
        for part in packed._planned(x.shape[0], over is not None, 1):
            codes_at, factors_at, sums_at = (each.data_ptr() for each in parts[:3])
            part(codes_at, factors_at, sums_at, result.data_ptr(), ctypes.addressof(product))
        place.check()
        case.places[3].check()
        assert same(result[:, : packed.columns], expected), f"layer with part {number} guarded: {case}"


WEIGHTS = ["mxint8", "mxfp4", "mxfp6_e3m2", "nvfp4", "ternary", "int4_channel", "mxfp8_e4m3", "int8_affine"]
KINDS: tuple[Callable[[Case], None], ...] = (
    round_tensor,
    round_tensor,
    code_tensor,
    measure_tensor,
    lose_tensor,
    multiply_tensor,
)


def main(seed: int, cases: int) -> None:
    draw = random.Random(seed)
    places = [Guarded() for _ in range(4)]
    for number in range(cases):
        torch.set_num_threads(draw.choice([1, 2]))
        case, kind = Case(draw, places), draw.choice(KINDS)
        print(number, kind.__name__, case, file=sys.stderr, flush=True)  # the last line names what ended the process
        try:
            with reference_only():
                formats.quantize(case.x, format_of(case.format, rank=case.x.dim()), Rounding(clip=case.clip))
        except MxloomError:  # blocks of more dimensions than the tensor has, a clip without a scale
            continue
        try:
            kind(case)
        except MxloomError:  # clips of a format that has none
            assert kind is lose_tensor, str(case)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
