"""A pipeline string such as `quantize{weights=mxfp4},pack`: from text to passes, with errors for people."""

from xdsl.passes import ModulePass
from xdsl.utils.arg_spec import ArgSpec, parse_pipeline
from xdsl.utils.exceptions import ArgSpecParseError

from ..dialects.errors import UsageError, did_you_mean
from .universe import all_passes


def parse_passes(pipeline: str) -> tuple[ModulePass, ...]:
    """The passes that a pipeline string names, in order, with their options.

    Raises UsageError for text that is no pipeline, for an unknown pass, an unknown option, or a value of a wrong type.
    """
    try:
        specs = list(parse_pipeline(pipeline))
    except ArgSpecParseError as error:
        _, place, *_, problem = str(error).splitlines()
        column = place.rpartition(":")[2]
        raise UsageError(f"{pipeline!r} is no pipeline of passes: {problem.strip()} (character {column})") from error
    return tuple(_instance(spec) for spec in specs)


def _instance(spec: ArgSpec) -> ModulePass:
    known = all_passes()
    if spec.name not in known:
        raise UsageError(f'there is no pass "{spec.name}"{did_you_mean(spec.name, known)}')
    kind = known[spec.name]()
    options = [name for name in kind.__dataclass_fields__ if name != "name"]
    for option in spec.normalize_parameter_names().parameters:
        if option not in options:
            hint, listed = did_you_mean(option, options), ", ".join(options) or "none"
            raise UsageError(f'pass "{spec.name}" has no option "{option}"{hint}; its options: {listed}')
    try:
        return kind.from_spec(spec)
    except ValueError as error:
        raise UsageError(f'pass "{spec.name}": {error}') from error


def quoted(value: str | bool | int | float) -> str:
    """A value as a pipeline string spells it: a word stands bare, other text in quotes with `"` and `\\` escaped."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return str(value)
    if value.isidentifier() and value.isascii() and value not in ("true", "false"):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
