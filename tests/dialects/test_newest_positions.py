"""Attention on a cache whose newest positions stay wide: which they are, and one pass is all positions in turn."""

from typing import Any

import pytest
import torch

from mxloom.dialects.torch_operators import attention, narrowed, register

register()


def kivi(length: int, residual: int) -> tuple[list[list[bool]], list[list[bool]]]:
    """For each query, which keys and values it finds rounded: KIVI's cache (arXiv 2402.02750), one token at a time.

    Keys gather until there are `residual` of them and are then rounded at once; values leave a queue of `residual`.
    """
    rounded_keys, rounded_values = 0, 0
    waiting_keys: list[int] = []
    waiting_values: list[int] = []
    keys, values = [], []
    for token in range(length):
        waiting_keys.append(token)
        waiting_values.append(token)
        if len(waiting_keys) == residual:
            rounded_keys += residual
            waiting_keys = []
        if len(waiting_values) > residual:
            rounded_values += 1
            waiting_values.pop(0)
        keys.append([token < rounded_keys for token in range(length)])
        values.append([token < rounded_values for token in range(length)])
    return keys, values


@pytest.mark.parametrize(("length", "residual"), [(1, 1), (7, 1), (9, 4), (40, 8), (5, 8), (16, 16)])
def test_a_residual_is_kivis(length: int, residual: int):
    keys, values = kivi(length, residual)
    assert narrowed(length, length, 0, residual, "cpu").tolist() == keys
    assert narrowed(length, length, residual, 1, "cpu").tolist() == values


@pytest.mark.parametrize(("wide", "step"), [(0, 1), (0, 4), (3, 1), (3, 4), (6, 4), (50, 4), (1, 16)])
def test_the_newest_are_wide_and_whole_steps_are_rounded(wide: int, step: int):
    """A position is rounded when its step is complete and none of it is among the newest."""
    length = 23
    found = narrowed(length, length, wide, step, "cpu")
    for query in range(length):
        newest = set(range(query + 1 - wide, query + 1))
        for position in range(length):
            together = range(position - position % step, position - position % step + step)
            complete = together[-1] <= query
            assert bool(found[query, position]) == (complete and not newest & set(together))


def test_a_position_stays_rounded_as_the_cache_grows():
    found = narrowed(30, 30, 5, 4, "cpu")
    assert bool((found[1:] >= found[:-1]).all())


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_the_last_queries_see_what_they_see_among_all(rows: int):
    assert torch.equal(narrowed(rows, 20, 3, 4, "cpu"), narrowed(20, 20, 3, 4, "cpu")[-rows:])


def operands(positions: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "query": (2, 4, positions, 8),
        **dict.fromkeys(("key", "wide_key", "value", "wide_value"), (2, 2, positions, 8)),
    }
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


NUMBERS: dict[str, Any] = {"key_wide": 2, "key_step": 4, "value_wide": 5, "value_step": 1}


def by_position(
    given: dict[str, torch.Tensor], key_wide: int, key_step: int, value_wide: int, value_step: int
) -> torch.Tensor:
    """Softmax attention in f64, each query with keys and values of its own."""
    result = torch.zeros_like(given["query"])
    heads, groups = given["query"].shape[1], given["key"].shape[1]
    for t in range(given["query"].shape[2]):

        def seen(name: str, wide: int, step: int, t: int = t) -> torch.Tensor:
            rounded = (t + 1 - wide) // step * step if t + 1 >= wide else 0
            both = torch.cat([given[name][:, :, :rounded], given[f"wide_{name}"][:, :, rounded : t + 1]], 2)
            return both.repeat_interleave(heads // groups, 1)

        key, value = seen("key", key_wide, key_step), seen("value", value_wide, value_step)
        scores = torch.einsum("bhd,bhkd->bhk", given["query"][:, :, t], key) * 0.3
        result[:, :, t] = torch.einsum("bhk,bhkd->bhd", scores.softmax(-1), value)
    return result


@pytest.mark.parametrize(
    "numbers", [NUMBERS, {**NUMBERS, "key_wide": 0}, {**NUMBERS, "value_step": 8, "value_wide": 0}]
)
def test_each_query_reads_its_own_cache(numbers: dict[str, Any]):
    """Softmax is taken in f32, so that the figures agree to that."""
    given = operands(21)
    found = run(**given, options={"scale": 0.3, "causal": True, **numbers})
    torch.testing.assert_close(found, by_position(given, **numbers), rtol=1e-6, atol=1e-6)


def test_with_a_cache_that_equals_its_newest_nothing_changes():
    given = operands(21)
    same = {**given, "wide_key": given["key"], "wide_value": given["value"]}
    plain = attention(given["query"], given["key"], given["value"], scale=0.3, causal=True)
    found = run(**same, options={"scale": 0.3, "causal": True, **NUMBERS})
    torch.testing.assert_close(found, plain, rtol=1e-14, atol=1e-14)


def test_one_of_both_may_be_rounded_at_once():
    given = operands(21)
    query, key, value, wide_key = (given[name] for name in ("query", "key", "value", "wide_key"))
    found = attention(query, key, value, wide_key=wide_key, scale=0.3, causal=True, key_wide=2, key_step=4)
    expected = by_position({**given, "wide_value": given["value"]}, **NUMBERS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def is_rounded(position: int, query: int, wide: int, step: int) -> bool:
    """Whether the step of a position is complete behind the newest."""
    return position - position % step + step <= query + 1 - wide


def test_all_at_once_is_one_by_one_to_the_bit():
    """Scores so far apart that each query takes one position with weight 1: what is read shows itself exactly.

    A rounded key answers in its own direction, a wide one in another; the query asks for both, or for the rounded.
    """
    length, generator = 24, torch.Generator().manual_seed(1)
    key, wide_key = torch.eye(2 * length).view(2, 1, 1, length, 2 * length)
    value, wide_value = torch.randn(2, 1, 1, length, 3, generator=generator)
    keys_and_values = {"key": key, "value": value, "wide_key": wide_key, "wide_value": wide_value}
    options: dict[str, Any] = {"scale": 400.0, "causal": True, **NUMBERS}
    for position in range(length):
        rounded = key[:, :, position : position + 1].expand(1, 1, length, 2 * length)
        both = rounded + wide_key[:, :, position : position + 1]
        for query in (both, rounded):
            whole = run(query, **keys_and_values, options=options)
            for t in range(position, length):
                parts = {name: each[:, :, : t + 1] for name, each in keys_and_values.items()}
                alone = run(query[:, :, t : t + 1], **parts, options=options)
                if query is rounded and not is_rounded(position, t, 2, 4):
                    assert not torch.equal(alone[0, 0, 0], value[0, 0, position])
                    continue
                expected = value if is_rounded(position, t, 5, 1) else wide_value
                assert torch.equal(alone[0, 0, 0], expected[0, 0, position])
                assert torch.equal(whole[0, 0, t], expected[0, 0, position])


def run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    wide_key: torch.Tensor,
    wide_value: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    return torch.ops.mxloom.attention(query, key, value, None, None, None, wide_key, wide_value, **options)


def test_what_stands_at_padding_decides_nothing():
    """Steps of 4 keys and 2 values behind 3 and 6 positions of padding: a step that padding is in stays wide."""
    given, generator = operands(21), torch.Generator().manual_seed(5)
    padding = torch.ones(2, 21, dtype=torch.bool)
    padding[0, :3] = padding[1, :6] = False
    options: dict[str, Any] = {"scale": 0.3, "causal": True, **NUMBERS, "value_step": 2}
    found = attention(**given, padding=padding, **options)
    changed = dict(given)
    for name, step in {"key": 4, "value": 2, "wide_key": 1, "wide_value": 1}.items():
        noise = torch.randn(given[name].shape, generator=generator, dtype=torch.float64)
        touched = torch.stack([torch.arange(21) // step * step < count for count in (3, 6)])[:, None, :, None]
        changed[name] = torch.where(touched, noise, given[name])
    again = attention(**changed, padding=padding, **options)
    for sequence, count in ((0, 3), (1, 6)):
        assert torch.equal(again[sequence, :, count:], found[sequence, :, count:])
    whole = attention(**given, padding=torch.ones_like(padding), **options)
    assert torch.equal(whole, attention(**given, **options))


def test_gradients_reach_what_each_query_reads():
    given = {name: tensor.requires_grad_() for name, tensor in operands(6).items()}
    options = {"scale": 0.3, "causal": True, "key_wide": 1, "key_step": 2, "value_wide": 2, "value_step": 1}
    run(**given, options=options).sum().backward()
    reached = {name: tensor.grad.abs().sum((0, 1, 3)) > 0 for name, tensor in given.items() if tensor.grad is not None}
    always = [True] * 6
    assert reached["query"].tolist() == [False, *always[1:]]  # the first sees itself alone
    assert reached["key"].tolist() == [True] * 4 + [False] * 2  # the last step of 2 is complete when no query follows
    assert reached["value"].tolist() == [True] * 4 + [False] * 2
    assert reached["wide_key"].tolist() == reached["wide_value"].tolist() == always
