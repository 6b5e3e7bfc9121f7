"""Hadamard matrices of any order that Sylvester's and Paley's constructions reach, and what they make of a tensor."""

from __future__ import annotations

from functools import cache
from itertools import product
from math import sqrt
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 2**20
"""The order above which no matrix is looked for."""

LARGEST_FACTOR = 1024
"""The largest matrix that is not made by doubling another; one of this order takes half a second."""

Matrix = tuple[tuple[int, ...], ...]


def factor(size: int) -> int | None:
    """The smallest k with size = k 2^m for which there is a matrix of order k; None where there is none.

    1 for powers of two (Sylvester 1867). Else Paley 1933, "On orthogonal matrices": k = q + 1 with a prime power
    q = 3 mod 4, or k = 2 (q + 1) with q = 1 mod 4.
    """
    if not 1 <= size <= LARGEST:
        return None
    odd = size
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1
    candidate = 4 * odd
    while candidate <= min(size, LARGEST_FACTOR):
        if size % candidate == 0 and _paley(candidate):
            return candidate
        candidate *= 2
    return None


def sizes(width: int) -> list[int]:
    """The orders above 1, ascending, of which `width` is a multiple."""
    return [size for size in range(2, width + 1) if width % size == 0 and factor(size)]


@cache
def core(order: int) -> Matrix:
    """The matrix of an order that is a `factor`: entries 1 and -1, rows orthogonal to each other."""
    if order == 1:
        return ((1,),)
    found = _paley(order)
    assert found is not None
    prime, degree, construction = found
    differences = _characters(prime, degree)
    count = len(differences)
    if construction == 1:  # I + S with S = [[0, 1], [-1, Q]], Q skew
        rows = [(-1, *(entry + (i == j) for j, entry in enumerate(row))) for i, row in enumerate(differences)]
        return ((1,) * (count + 1), *rows)
    conference = [(0, *(1,) * count), *((1, *row) for row in differences)]
    return tuple(
        tuple(entry * (-1) ** (a and b) if entry else (-1) ** (a or b) for entry in row for b in (0, 1))
        for row in conference
        for a in (0, 1)
    )


@cache
def signs(seed: int, size: int) -> tuple[int, ...]:
    """1 or -1 for each of `size` places, by Python's generator, whose numbers for a seed are promised not to change."""
    generator = Random(seed)
    return tuple(1 if generator.random() < 0.5 else -1 for _ in range(size))


def additions(size: int) -> int:
    """Additions and subtractions for each element: m by butterflies, k - 1 by the matrix of order k."""
    order = factor(size)
    assert order is not None
    return (size // order).bit_length() - 1 + order - 1


def hadamard(input: Tensor, size: int, dim: int = -1, seed: int | None = None) -> Tensor:
    """Each run of `size` elements along `dim` times the normalized matrix: (H_k x H_2^m) diag(signs) / sqrt(size).

    Sums are formed in one order on every machine: those with the matrix of order k column by column, then the m steps
    of the fast Walsh-Hadamard transform, then the factor.
    """
    import torch

    order = factor(size)
    assert order is not None
    values = input.movedim(dim, -1)
    shape = (*values.shape[:-1], values.shape[-1] // size)
    blocks = values.reshape(*shape, size)
    if seed is not None:
        blocks = blocks * torch.tensor(signs(seed, size), dtype=input.dtype, device=input.device)
    blocks = blocks.reshape(*shape, order, size // order)
    if order > 1:
        columns = torch.tensor(core(order), dtype=input.dtype, device=input.device).T[..., None]
        total = columns[0] * blocks[..., :1, :]
        for place in range(1, order):
            total = total + columns[place] * blocks[..., place : place + 1, :]
        blocks = total
    step = 1
    while step < size // order:
        pairs = blocks.reshape(*shape, size // (2 * step), 2, step)
        one, other = pairs[..., 0, :], pairs[..., 1, :]
        blocks = torch.stack((one + other, one - other), -2)
        step *= 2
    return (blocks.reshape(values.shape) * (1.0 / sqrt(size))).movedim(-1, dim)


@cache
def _paley(order: int) -> tuple[int, int, int] | None:
    """(p, n, construction) such that the prime power p^n gives a matrix of this order; None where none does."""
    for residue, construction, power in ((3, 1, order - 1), (1, 2, order // 2 - 1)):
        if order % 4 == 0 and power % 4 == residue and (base := _prime_power(power)):
            return (*base, construction)
    return None


def _prime_power(number: int) -> tuple[int, int] | None:
    """(p, n) with number = p^n; None where it is no power of a prime."""
    if number < 2:
        return None
    prime = next((d for d in range(2, int(sqrt(number)) + 1) if number % d == 0), number)
    degree, rest = 0, number
    while rest % prime == 0:
        rest, degree = rest // prime, degree + 1
    return (prime, degree) if rest == 1 else None


def _characters(prime: int, degree: int) -> list[tuple[int, ...]]:
    """For all a, b of the field of p^n elements: 0 if a = b, 1 if a - b is a square, else -1."""
    squares = _squares(prime, degree)
    elements = list(product(range(prime), repeat=degree))

    def character(a: tuple[int, ...], b: tuple[int, ...]) -> int:
        difference = tuple((x - y) % prime for x, y in zip(a, b, strict=True))
        return 0 if not any(difference) else 1 if difference in squares else -1

    return [tuple(character(a, b) for b in elements) for a in elements]


def _squares(prime: int, degree: int) -> set[tuple[int, ...]]:
    """The squares of the field without 0: the even powers of an element whose powers are all others.

    Elements are polynomials of x, lowest power first, modulo x^n = c_0 + c_1 x + ...; the c are tried until x itself
    is such an element.
    """
    one = tuple(int(place == 0) for place in range(degree))
    for modulus in product(range(prime), repeat=degree):
        powers, element = [one], _times_x(one, modulus, prime)
        while element != one and any(element) and len(powers) < prime**degree:
            powers.append(element)
            element = _times_x(element, modulus, prime)
        if element == one and len(powers) == prime**degree - 1:
            return set(powers[::2])
    raise AssertionError(f"no primitive polynomial of degree {degree} over {prime}")


def _times_x(element: tuple[int, ...], modulus: tuple[int, ...], prime: int) -> tuple[int, ...]:
    carried = element[-1]
    return tuple((e + carried * c) % prime for e, c in zip((0, *element[:-1]), modulus, strict=True))
