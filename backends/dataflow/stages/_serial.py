"""Root and quotient, one bit a cycle: what a row needs once."""

from __future__ import annotations

from ..rtl import Signal, join
from ._stream import StreamModule


def square_root(module: StreamModule, start: Signal, value: Signal) -> tuple[Signal, Signal]:
    """(done for one cycle, root rounded down): `value` of 2B bits is taken as `start` is 1, done B + 1 cycles later."""
    size = value.width // 2
    assert value.width == 2 * size
    active = module.register(1, "root_active")
    count = module.register(size.bit_length(), initial=None)
    rest = module.register(size + 2, initial=None)
    root = module.register(size, "root", initial=None)
    left = module.register(value.width, initial=None)
    remainder = join(rest.q.low(size), left.q.top(2))
    trial = join(root.q, module.constant(1, 2))
    fits = remainder.at_least(trial)
    reduced = fits.then(remainder - trial, remainder)
    left.set(start.then(value, join(left.q.low(value.width - 2), module.constant(0, 2))))
    rest.set(start.then(0, active.q.then(reduced, rest.q)))
    root.set(start.then(0, active.q.then(join(root.q.low(size - 1), fits), root.q)))
    last = active.q & count.q.equals(size - 1)
    active.set(start | (active.q & ~last))
    count.set(start.then(0, count.q + 1))
    return module.delayed(last, initial=0), root.q


def quotient(module: StreamModule, start: Signal, numerator: Signal, divisor: Signal) -> tuple[Signal, Signal]:
    """(done for one cycle, quotient rounded down) of unsigned numbers, as many cycles later as the numerator has bits.

    A divisor of 0 gives all ones.
    """
    active = module.register(1, "divide_active")
    count = module.register(numerator.width.bit_length(), initial=None)
    found = module.register(numerator.width, "quotient", initial=None)
    held = module.register(divisor.width, initial=None)
    rest = module.register(divisor.width + 1, initial=None)
    remainder = join(rest.q.low(divisor.width), found.q.sign)
    wide = held.q.unsigned(divisor.width + 1)
    fits = remainder.at_least(wide)
    rest.set(start.then(0, active.q.then(fits.then(remainder - wide, remainder), rest.q)))
    moved = join(found.q.low(numerator.width - 1), fits) if numerator.width > 1 else fits
    found.set(start.then(numerator, active.q.then(moved, found.q)))
    held.set(start.then(divisor, held.q))
    last = active.q & count.q.equals(numerator.width - 1)
    active.set(start | (active.q & ~last))
    count.set(start.then(0, count.q + 1))
    return module.delayed(last, initial=0), found.q
