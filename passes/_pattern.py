"""Regular expressions of rules, matched in time linear in the name: a recipe of another cannot make matching hang."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from ..dialects.errors import UsageError


@cache
def search(expression: str) -> Callable[[str], bool]:
    """Tells whether a regular expression occurs in a name.

    The engine is the Rust crate `regex` (the one that pydantic checks strings with): what can be written has no
    exponential case, so it lacks look-around and back references. UsageError says what is wrong with an expression.
    """
    from pydantic_core import SchemaError, SchemaValidator, core_schema

    try:
        validator = SchemaValidator(core_schema.str_schema(pattern=expression, regex_engine="rust-regex"))
    except (SchemaError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip().removeprefix("error: ")
        raise UsageError(f"match {'re:' + expression!r} is no regular expression that can be used: {reason}") from error
    return validator.isinstance_python
