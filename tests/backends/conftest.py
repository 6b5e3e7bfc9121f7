"""Data that kernels and definitions are compared on."""

from __future__ import annotations

import pytest
import torch


def random_bits(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers of all magnitudes, subnormals, infinities and NaN: any bits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(torch.float32)


@pytest.fixture(scope="session")
def kinds_of_data() -> dict[str, torch.Tensor]:
    """f32 matrices [64, 96] of the kinds that rounding treats differently."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(64, 96, generator=generator)
    bits_without_nan = random_bits((64, 96), 2).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    spread = torch.exp2(torch.randint(-140, 127, (64, 96), generator=generator).float())
    blocks = normal.clone()
    blocks[0], blocks[1], blocks[2, :7], blocks[3, 5], blocks[4] = 0.0, -0.0, torch.inf, torch.nan, -torch.inf
    half_steps = torch.arange(-3072, 3072).reshape(64, 96) / 16.0
    return {
        "normal": normal,
        "ties": half_steps,
        "spread": normal * spread,
        "subnormal": normal * 1e-39,
        "huge": normal * 1e38,
        "special blocks": blocks,
        "any bits": random_bits((64, 96), 3),
        "any numbers": bits_without_nan,
    }
