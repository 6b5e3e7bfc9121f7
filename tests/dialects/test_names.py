"""Names that may stand in Python code."""

import keyword

from hypothesis import given
from hypothesis import strategies as st

from mxloom.dialects.names import attribute, identifier, unique


@given(st.text() | st.sampled_from(keyword.kwlist))
def test_any_text_becomes_a_name_that_python_reads_back(text: str) -> None:
    name = identifier(text)
    held: dict[str, int] = {}
    exec(f"{name} = 1", {}, held)
    assert held == {name: 1}
    assert identifier(name) == name


def test_a_name_stays_as_it_is() -> None:
    assert [identifier(name) for name in ("weight", "a-b", "return", "2x", "ü", "")] == [
        "weight",
        "a_b",
        "return_",
        "_2x",
        "_",
        "_",
    ]
    assert [attribute(part) for part in ("0", "12", "١", "x1")] == ["0", "12", "_", "x1"]


def test_a_taken_name_gets_a_number() -> None:
    assert unique("a", {"b"}.__contains__) == "a"
    assert unique("a", {"a", "a_1"}.__contains__) == "a_2"
