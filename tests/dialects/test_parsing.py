"""What mxloom reads of module text beyond xDSL's parser."""

import pytest
from xdsl.dialects.builtin import StringAttr
from xdsl.utils.exceptions import ParseError

from mxloom.dialects.mx import context, parse_module
from mxloom.dialects.parsing import ModuleParser


@pytest.mark.parametrize("tail", ["", "\n", "\\q", "\\", "\\x4"])
def test_an_open_quote_is_refused_in_linear_time(tail):
    # ten thousand letters after an open quote: xDSL 0.74 would try 2^10000 ways to read them
    with pytest.raises(ParseError, match="closing string literal"):
        parse_module('builtin.module attributes {a = "' + "x" * 10_000 + tail)


@pytest.mark.parametrize("value", ["", "plain", 'a "quote" and a \\ backslash', "Straße 量化 🧮", "tab\tline\n"])
def test_a_printed_string_is_read_back(value):
    assert ModuleParser(context(), str(StringAttr(value))).parse_attribute() == StringAttr(value)


def test_bytes_that_are_no_utf8_are_refused():
    with pytest.raises(ParseError, match="UTF-8"):
        ModuleParser(context(), '"\\FF"').parse_attribute()
