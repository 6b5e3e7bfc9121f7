"""xDSL's parser, with two faults of version 0.74 mended; whatever reads text of an mx module reads it with this one."""

from __future__ import annotations

import re

from xdsl.context import Context
from xdsl.parser import Parser
from xdsl.parser.generic_parser import ParserState
from xdsl.utils.lexer import Input
from xdsl.utils.mlir_lexer import MLIRLexer


class _Lexer(MLIRLexer):
    """A lexer whose time is linear in the text: xDSL's tries 2^n ways to read n characters after an open quote."""

    _unescaped_characters_regex = re.compile(r'"(?:[^"\\\n\v\f]++|\\(?:["nt\\]|[0-9A-Fa-f]{2}))*+"')


class ModuleParser(Parser):
    """Reads back what xDSL prints of letters beyond ASCII: bytes in UTF-8, which it would not take for a string."""

    def __init__(self, ctx: Context, input: str | bytes, name: str = "<unknown>") -> None:
        text = input.decode() if isinstance(input, bytes) else input
        super().__init__(ctx, "", name)
        self._parser_state = ParserState(_Lexer(Input(text, name)))

    def parse_optional_str_literal(self) -> str | None:
        if (text := super().parse_optional_str_literal()) is not None:
            return text
        if (encoded := self.parse_optional_bytes_literal()) is None:
            return None
        try:
            return encoded.decode()
        except UnicodeDecodeError:
            self.raise_error("a string is UTF-8")
