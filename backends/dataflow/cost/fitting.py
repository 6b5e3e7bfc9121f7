"""Least squares with coefficients that are not negative, on relative errors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .features import Features


def fitted(rows: Sequence[Features], measured: Sequence[float]) -> dict[str, float]:
    """Non-negative weights of the features whose sums come closest to what was measured, errors taken relatively.

    A measured 0 counts as 1, so that its error is an absolute one.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    scale = 1 / np.maximum(np.array(measured, float), 1.0)
    matrix = np.array([[row.get(name, 0.0) for name in names] for row in rows]) * scale[:, None]
    weights = non_negative(matrix, np.array(measured, float) * scale)
    return dict(zip(names, weights.tolist(), strict=True))


def non_negative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x >= 0 with the least |matrix x - target|, by active sets.

    C. L. Lawson, R. J. Hanson, Solving Least Squares Problems (1974), algorithm NNLS, chapter 23.
    """
    norms = np.linalg.norm(matrix, axis=0)
    norms[norms == 0] = 1.0
    scaled = matrix / norms
    x, free = np.zeros(scaled.shape[1]), np.zeros(scaled.shape[1], bool)
    for _ in range(3 * scaled.shape[1] + 10):
        gain = scaled.T @ (target - scaled @ x)
        gain[free] = -np.inf
        if gain.max() <= 1e-9:
            break
        free[int(gain.argmax())] = True
        while True:
            best = np.zeros_like(x)
            best[free] = np.linalg.lstsq(scaled[:, free], target, rcond=None)[0]
            if (best[free] > 0).all():
                x = best
                break
            # As far towards the best as all stay positive; what has become zero leaves.
            low = free & (best <= 0)
            step = (x[low] / (x[low] - best[low])).min()
            x = x + step * (best - x)
            free &= x > 1e-12
            x[~free] = 0.0
    return x / norms
