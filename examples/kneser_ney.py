"""Interpolated modified Kneser-Ney: the n-gram model that the demo model is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import exp, log

Gram = tuple[int, ...]
Discounts = tuple[float, float, float]  # of n-grams counted once, twice, three times or more


class KneserNey:
    """Probabilities of the next token from at most `order` - 1 tokens before it.

    S. F. Chen and J. Goodman, "An empirical study of smoothing techniques for language modeling",
    Computer Speech and Language 13 (1999), section 3: for a history h and its tail h' (h without its first token)

        p(w | h) = max(c(h w) - D(c(h w)), 0) / c(h) + g(h) p(w | h'),    c(h) = sum of c(h w) over w,
        g(h)     = (D1 N1(h) + D2 N2(h) + D3 N3+(h)) / c(h),

    where c counts occurrences at the highest order and distinct tokens to the left at every lower one, Ni(h) is the
    number of tokens that follow h with c = i, and below the single tokens stands the uniform distribution.
    A history without followers has g = 1. One `discounts` for all orders replaces the estimated ones.
    """

    def __init__(
        self, tokens: Sequence[int], vocabulary: int, order: int = 5, discounts: Discounts | None = None
    ) -> None:
        self.vocabulary = vocabulary
        self.order = order
        counts = Counter(zip(*(tokens[start:] for start in range(order)), strict=False))
        levels = []
        for _ in range(order):
            levels.append(Level(counts, discounts or estimated_discounts(counts)))
            counts = Counter(gram[1:] for gram in counts)
        self.levels = levels[::-1]

    def probability(self, history: Sequence[int], token: int) -> float:
        """Of `token` after `history`, of which the last `order` - 1 tokens count."""
        probability = 1 / self.vocabulary
        for length, level in zip(range(len(history) + 1), self.levels, strict=False):
            seen, share = level.of(tuple(history[len(history) - length :]), token)
            probability = seen + share * probability
        return probability

    def perplexity(self, tokens: Sequence[int], positions: Iterable[int]) -> float:
        """Of the tokens at `positions`, each after the tokens that stand before it in `tokens`."""
        surprise = [
            -log(self.probability(tokens[max(0, position - self.order + 1) : position], tokens[position]))
            for position in positions
        ]
        return exp(sum(surprise) / len(surprise))


class Level:
    """The n-grams of one length: their counts, and what each history gives to the level below."""

    def __init__(self, counts: Counter[Gram], discounts: Discounts) -> None:
        self.counts = counts
        self.discounts = discounts
        self.totals: Counter[Gram] = Counter()
        self.freed: dict[Gram, float] = {}
        for gram, count in counts.items():
            history = gram[:-1]
            self.totals[history] += count
            self.freed[history] = self.freed.get(history, 0.0) + self.discount(count)

    def of(self, history: Gram, token: int) -> tuple[float, float]:
        """The discounted relative frequency of `token`, and the weight of the level below."""
        total = self.totals.get(history)
        if total is None:
            return 0.0, 1.0
        count = self.counts.get((*history, token), 0)
        return (count - self.discount(count)) / total, self.freed[history] / total

    def discount(self, count: int) -> float:
        return self.discounts[min(count, 3) - 1] if count else 0.0


def estimated_discounts(counts: Counter[Gram]) -> Discounts:
    """D_i = i - (i + 1) Y n_(i+1) / n_i with Y = n_1 / (n_1 + 2 n_2), n_i the number of n-grams counted i times.

    Where the counts are too few to say (no n-gram counted i times, or D_i outside 0 to i): i / 2.
    """
    of_count = Counter(counts.values())
    once, twice = of_count[1], of_count[2]
    slope = once / (once + 2 * twice) if once else 0.0

    def estimate(i: int) -> float:
        discount = i - (i + 1) * slope * of_count[i + 1] / of_count[i] if of_count[i] else -1.0
        return discount if 0 < discount < i else i / 2

    return estimate(1), estimate(2), estimate(3)
