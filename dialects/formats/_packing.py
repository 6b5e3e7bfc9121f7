"""Dense streams: codes of b bits one after the other, lowest bit first; trits five to a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import MxloomError

if TYPE_CHECKING:
    from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (one dimension, only their low `bits` bits) as ceil(n * bits / 8) bytes, the first code in the low bits."""
    import torch

    if bits == 8:
        return codes.to(torch.uint8)
    if bits in (1, 2, 4):
        return _pack_whole(codes.to(torch.uint8) & ((1 << bits) - 1), bits)
    if bits in (16, 32):
        return codes.to(torch.int16 if bits == 16 else torch.int32).view(torch.uint8)
    if bits < 8:
        return _pack_eights(codes, bits)
    stream = (codes.to(torch.int64)[:, None] >> torch.arange(bits, device=codes.device)).to(torch.uint8) & 1
    return _pack_whole(stream.reshape(-1), 1)


def unpack_bits(packed: Tensor, bits: int, count: int, *, signed: bool) -> Tensor:
    """The first `count` codes of a dense stream of `bits` each, as int32; two's complement if signed."""
    import torch

    if 8 % bits == 0:
        each = (packed[:, None] >> torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)) & (
            (1 << bits) - 1
        )
        codes = each.reshape(-1)[:count].to(torch.int64)
    elif bits < 8:
        codes = _unpack_eights(packed, bits)[:count]
    else:
        stream = (packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
        places = torch.arange(bits, device=packed.device)
        codes = (stream.reshape(-1)[: count * bits].reshape(count, bits).to(torch.int64) << places).sum(-1)
    if signed:
        codes = (codes ^ (1 << (bits - 1))) - (1 << (bits - 1))
    return codes.to(torch.int32)


def _pack_eights(codes: Tensor, bits: int) -> Tensor:
    """Codes of fewer than 8 bits: eight of them are a word of `bits` bytes."""
    import torch

    eights = torch.nn.functional.pad(codes.to(torch.int64) & ((1 << bits) - 1), (0, -len(codes) % 8)).reshape(-1, 8)
    words = eights.new_zeros(len(eights))
    for place in range(8):
        words |= eights[:, place] << (bits * place)
    return words.view(torch.uint8).reshape(-1, 8)[:, :bits].reshape(-1)[: -(-len(codes) * bits // 8)]


def _unpack_eights(packed: Tensor, bits: int) -> Tensor:
    import torch

    groups = torch.nn.functional.pad(packed, (0, -len(packed) % bits)).reshape(-1, bits)
    words = torch.nn.functional.pad(groups, (0, 8 - bits)).reshape(-1).view(torch.int64)
    places = bits * torch.arange(8, device=packed.device)
    return (words[:, None] >> places & ((1 << bits) - 1)).reshape(-1)


def trit_bytes(count: int) -> int:
    """Bytes that `count` trits take."""
    return -(-count // 5)


def pack_trits(codes: Tensor) -> Tensor:
    """Trits -1, 0, 1 (one dimension) as base-3 numbers of five digits (trit + 1), the first the most significant."""
    import torch

    padded = torch.nn.functional.pad(codes.to(torch.int16), (0, -len(codes) % 5))
    return ((padded.reshape(-1, 5) + 1) * _place_values(codes)).sum(-1).to(torch.uint8)


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """The first `count` trits, as int8."""
    import torch

    if packed.numel() and int(packed.max()) > 242:
        raise MxloomError(f"a byte of five trits is at most 242 (3^5 - 1), got {int(packed.max())}")
    digits = packed.to(torch.int16)[:, None] // _place_values(packed) % 3
    return (digits.reshape(-1)[:count] - 1).to(torch.int8)


def _place_values(like: Tensor) -> Tensor:
    import torch

    return torch.tensor([81, 27, 9, 3, 1], dtype=torch.int16, device=like.device)


def _pack_whole(codes: Tensor, bits: int) -> Tensor:
    """Codes of 1, 2 or 4 bits, 8 / bits of them to a byte."""
    import torch

    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % per_byte)).reshape(-1, per_byte)
    packed = padded[:, 0].clone()
    for place in range(1, per_byte):
        packed |= padded[:, place] << (bits * place)
    return packed
