"""Weights packed once for the kernels: panels of 16 columns, codes interleaved along K, one factor for each segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....dialects.contractions import Coded, in_segments
from .datapath import PANEL, Datapath
from .linear_code import ScaleForm

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CodeForm:
    """How weight codes are packed: bits of one, the code of each packed number or None where `offset` is added."""

    bits: int
    table: tuple[int, ...] | None
    offset: int


def code_form(weight: Coded, path: Datapath, length: int) -> CodeForm:
    """The narrowest form in which a datapath reads these codes; segments of `length` are whole loads of it.

    A segment that is all of K is filled up to whole loads.
    """
    if path.codes == "f64":
        return CodeForm(32, None, 0)
    bound = int(weight.bounds.largest)
    if path.codes == "i16":
        return CodeForm(8 if bound <= 127 or (bound == 128 and _fits_byte(weight)) else 16, None, 0)
    found = sorted({0, *map(int, weight.codes.unique().tolist())})  # zeros fill up columns and segments
    low, high = found[0], found[-1]
    for bits in (2, 4):
        if length % (32 // bits) and length < weight.size:
            continue
        if path.unsigned and high - low < 1 << bits:
            return CodeForm(bits, None, -low)
        if len(found) <= 1 << bits:
            offset = -low if path.unsigned else 0
            return CodeForm(bits, tuple(code + offset for code in found), offset)
    return CodeForm(8, None, 128 if path.unsigned else 0)


def _fits_byte(weight: Coded) -> bool:
    return bool(((weight.codes >= -128) & (weight.codes <= 127)).all())


@dataclass(frozen=True)
class Packed:
    """Packed weights [panels, loads, 16 lanes, bytes] uint8, and their factors [panels, segments, 16]."""

    codes: Tensor
    factors: Tensor
    form: CodeForm
    scales: ScaleForm
    scale_step: float
    columns: int
    segments: int
    length: int


def pack(weight: Coded, path: Datapath, form: CodeForm, length: int) -> Packed:
    """The weights [N, K] in panels; columns behind N, and codes behind K, are zero.

    A segment of `length` is padded to whole loads where it is all of K.
    """
    import torch

    codes, factors = in_segments(weight, length)
    depth = path.depth * (8 // form.bits if path.codes == "i8" else 1)
    codes = torch.nn.functional.pad(codes, (0, -length % depth, 0, 0, 0, -codes.shape[0] % PANEL))
    factors = torch.nn.functional.pad(factors, (0, 0, 0, -factors.shape[0] % PANEL))
    panels, segments = codes.shape[0] // PANEL, codes.shape[1]
    lanes = codes.reshape(panels, PANEL, -1)
    packed = _packed(lanes, path, form).contiguous()
    kept, scales, step = _factors(factors.reshape(panels, PANEL, segments).permute(0, 2, 1).contiguous())
    return Packed(packed, kept, form, scales, step, weight.codes.shape[0], segments, codes.shape[-1])


def _packed(codes: Tensor, path: Datapath, form: CodeForm) -> Tensor:
    """[panels, 16, K] f64 codes as [panels, K / depth, 16, bytes] uint8."""
    import torch

    if path.codes == "f64":
        return codes.to(torch.float32).permute(0, 2, 1).contiguous().view(torch.uint8)
    if path.codes == "i16":
        kind = torch.int8 if form.bits == 8 else torch.int16
        return codes.to(kind).unflatten(-1, (-1, 2)).permute(0, 2, 1, 3).contiguous().view(torch.uint8)
    numbers = codes.to(torch.int16) + form.offset
    if form.table is not None:
        table = torch.tensor(form.table, dtype=torch.int16)
        numbers = torch.searchsorted(table, numbers.contiguous())
    if form.bits == 8 and not path.unsigned:
        numbers = numbers & 0xFF
    planes = 8 // form.bits
    split = numbers.to(torch.int32).unflatten(-1, (-1, planes, path.depth))
    joined = torch.zeros_like(split[..., 0, :])
    for plane in range(planes):
        joined |= split[..., plane, :] << (form.bits * plane)
    return joined.to(torch.uint8).permute(0, 2, 1, 3)


def _factors(factors: Tensor) -> tuple[Tensor, ScaleForm, float]:
    """Factors in the fewest bytes that hold them: exponents of f32, E4M3 times a power of two, or f32."""
    import torch

    bits = factors.view(torch.int32)
    exponents = bits >> 23
    if ((bits & 0x7FFFFF) == 0).all() and (exponents >= 0).all() and (exponents < 255).all():
        # A zero factor is exponent 0: a column behind N, whose codes are zero.
        return exponents.to(torch.uint8), "exponent", 1.0
    largest = factors.nan_to_num(nan=0.0).amax() if factors.numel() else factors.sum()
    if 0 < largest < torch.inf and not factors.isnan().any():
        step = 2.0 ** (torch.frexp(largest).exponent.item() - 9)
        small = (factors / step).to(torch.float8_e4m3fn)
        if torch.equal(small.to(torch.float32) * step, factors) and 2.0**-100 < step < 2.0**6:
            return small.view(torch.uint8), "e4m3", step
    return factors, "f32", 1.0


def unpack(packed: Packed, path: Datapath) -> tuple[Tensor, Tensor]:
    """The codes [N, S, length] f64 and factors [N, S] f32 that were packed, the filling of segments included."""
    import torch

    panels, segments = packed.codes.shape[0], packed.segments
    if path.codes == "f64":
        codes = packed.codes.view(torch.float32).permute(0, 2, 1)
    elif path.codes == "i16":
        kind = torch.int8 if packed.form.bits == 8 else torch.int16
        codes = packed.codes.view(kind).permute(0, 2, 1, 3).flatten(2)
    else:
        codes = _unpacked_bytes(packed, path)
    codes = codes.to(torch.float64).reshape(panels * PANEL, segments, packed.length)
    factors = packed.factors
    match packed.scales:
        case "exponent":
            factors = (factors.to(torch.int32) << 23).view(torch.float32)
        case "e4m3":
            factors = factors.view(torch.float8_e4m3fn).to(torch.float32) * packed.scale_step
    factors = factors.permute(0, 2, 1).reshape(panels * PANEL, segments)
    return codes[: packed.columns].contiguous(), factors[: packed.columns].contiguous()


def _unpacked_bytes(packed: Packed, path: Datapath) -> Tensor:
    import torch

    form = packed.form
    words = packed.codes.permute(0, 2, 1, 3).to(torch.int16)
    planes = [(words >> (form.bits * plane)) & ((1 << form.bits) - 1) for plane in range(8 // form.bits)]
    numbers = torch.stack(planes, 3).flatten(2)
    if form.table is not None:
        numbers = torch.tensor(form.table, dtype=torch.int16, device=numbers.device)[numbers.to(torch.int64)]
    if form.bits == 8 and not path.unsigned:
        numbers = numbers.to(torch.int8)
    return numbers - form.offset


def bytes_of(packed: Packed) -> int:
    """Bytes that packed weights and their factors take."""
    held: list[Any] = [packed.codes, packed.factors]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
