"""The n-gram model against probabilities computed by hand."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "kneser_ney.py"
spec = importlib.util.spec_from_file_location("kneser_ney", SCRIPT)
assert spec is not None and spec.loader is not None
kneser_ney = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kneser_ney)

A, B, C = range(3)
HALF = (0.5, 0.5, 0.5)


def test_bigrams_by_hand() -> None:
    """Of `a b a c a b`: pairs ab twice, ba, ac, ca once; to the left of a stand two tokens, of b and c one each."""
    model = kneser_ney.KneserNey([A, B, A, C, A, B], vocabulary=3, order=2, discounts=HALF)
    single = {token: model.probability([], token) for token in (A, B, C)}
    assert single == pytest.approx({A: 1.5 / 4 + 1.5 / 4 / 3, B: 0.5 / 4 + 1.5 / 4 / 3, C: 0.5 / 4 + 1.5 / 4 / 3})
    after_a = {token: model.probability([A], token) for token in (A, B, C)}
    assert after_a == pytest.approx({A: 2 / 12, B: 7 / 12, C: 3 / 12})
    assert model.probability([C], A) == pytest.approx(3 / 4)


def test_perplexity_by_hand() -> None:
    model = kneser_ney.KneserNey([A, B, A, C, A, B], vocabulary=3, order=2, discounts=HALF)
    # b after a, a after b: 7/12 and 1/2 + 1/2 * 1/2
    assert model.perplexity([A, B, A], [1, 2]) == pytest.approx((7 / 12 * 3 / 4) ** -0.5)


def test_a_token_of_one_context_is_rare_elsewhere() -> None:
    """Kneser-Ney's reason: C is as frequent as B, but follows only A."""
    model = kneser_ney.KneserNey([A, C, A, C, A, C, B, B, A, B], vocabulary=4, order=2)
    assert model.probability([3], C) < model.probability([3], B)


def test_discounts_by_hand() -> None:
    """n = 4, 2, 1, 1: Y = 4 / (4 + 2 * 2) = 1/2."""
    counts = Counter({(i,): count for i, count in enumerate([1, 1, 1, 1, 2, 2, 3, 4])})
    assert kneser_ney.estimated_discounts(counts) == pytest.approx((0.5, 1.25, 1.0))


def test_discounts_of_too_few_counts() -> None:
    assert kneser_ney.estimated_discounts(Counter({(0,): 5})) == (0.5, 1.0, 1.5)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "history", [[], [0], [1, 2], [3, 1, 4, 1], [10, 10, 10, 10], [3, 1, 10, 1], [9, 2, 6, 5, 3, 5]]
)
def test_probabilities_sum_to_one(order: int, history: list[int]) -> None:
    """After seen, unseen and partly seen histories; token 10 is in the vocabulary only."""
    digits = [int(digit) for digit in "31415926535897932384626433832795028841971693993751058209749445923"]
    model = kneser_ney.KneserNey(digits * 3 + digits[::2], vocabulary=11, order=order)
    probabilities = [model.probability(history, token) for token in range(11)]
    assert sum(probabilities) == pytest.approx(1, abs=1e-12)
    assert min(probabilities) > 0


def test_no_text_means_uniform() -> None:
    model = kneser_ney.KneserNey([], vocabulary=8, order=5)
    assert model.probability([1, 2, 3, 4], 5) == pytest.approx(1 / 8)
