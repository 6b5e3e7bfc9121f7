"""A pipeline string such as `quantize{weights=mxfp4},pack`: from text to passes, with errors for people."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass
from xdsl.utils.arg_spec import ArgSpec, PipelineLexer, SpecTokenKind, parse_pipeline
from xdsl.utils.exceptions import ArgSpecParseError, DiagnosticException

from ..dialects.errors import MxloomError, UsageError, did_you_mean, shortened
from .universe import PassFactory, all_passes, own_passes

_FORESEEN = (DiagnosticException, ValueError, TypeError, NotImplementedError)
"""What one of our passes may raise where it does not fit the module."""

LARGEST = 2**63 - 1
"""What an integer of the IR holds."""


def parse_passes(pipeline: str, known: Mapping[str, PassFactory] | None = None) -> tuple[ModulePass, ...]:
    """The passes that a pipeline string names, in order, with their options; of `known`, by default `own_passes`.

    Raises UsageError for text that is no pipeline, for an unknown pass, an unknown option or one that comes twice, or
    a value of a wrong type.
    """
    try:
        specs = list(parse_pipeline(pipeline))
    except ArgSpecParseError as error:
        _, place, *_, problem = str(error).splitlines()
        column = place.rpartition(":")[2]
        raise UsageError(
            f"{shortened(repr(pipeline), 200)} is no pipeline of passes: {problem.strip()} (character {column})"
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise UsageError(
            f"{shortened(repr(pipeline), 200)} is no pipeline of passes: a number in it has thousands of digits"
        ) from error
    _check_text(pipeline)
    return tuple(_instance(spec, own_passes() if known is None else known) for spec in specs)


def apply_pass(step: ModulePass, ctx: Context, module: ModuleOp) -> None:
    """Run one pass over a module, in place, and verify what it left; a failure is one MxloomError (`failures_of`)."""
    with failures_of(step):
        step.apply(ctx, module)
        module.verify()


@contextmanager
def failures_of(step: ModulePass, passed_on: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns what a pass raises into an MxloomError that names the pass; MxloomError and `passed_on` stay as they are.

    Of our passes these are xDSL's errors and refused values, of a pass of others whatever it raises.
    """
    ours = type(step).__module__.startswith(f"{__name__.partition('.')[0]}.")
    try:
        yield
    except (MxloomError, *passed_on):
        raise
    except Exception as error:
        if ours and not isinstance(error, _FORESEEN):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise MxloomError(
            f'the pass "{step.name}" ({shortened(repr(str(step)), 200)}) failed: {"; ".join(lines[-2:])}'
        ) from error


def _check_text(pipeline: str) -> None:
    """What xDSL's parser lets pass: an option given twice, of which it takes the last, and a comma at the end."""
    lexer = PipelineLexer(pipeline)
    given: set[str] = set()
    before, token = None, lexer.lex()
    while token.kind is not SpecTokenKind.EOF:
        if token.kind is SpecTokenKind.L_BRACE:
            given = set()
        if token.kind is SpecTokenKind.IDENT and before in (SpecTokenKind.L_BRACE, SpecTokenKind.SPACE):
            option = token.text.replace("-", "_")
            if option in given:
                raise UsageError(f'{shortened(repr(pipeline), 200)}: the option "{option}" comes twice')
            given.add(option)
        before, token = token.kind, lexer.lex()
    if before is SpecTokenKind.COMMA:
        raise UsageError(
            f"{shortened(repr(pipeline), 200)} is no pipeline of passes: a pass is missing behind the last comma"
        )


def _instance(spec: ArgSpec, known: Mapping[str, PassFactory]) -> ModulePass:
    if spec.name not in known:
        raise UsageError(f'there is no pass "{spec.name}"{_elsewhere(spec.name) or did_you_mean(spec.name, known)}')
    kind = known[spec.name]()
    options = [name for name in kind.__dataclass_fields__ if name != "name"]
    for option, values in spec.normalize_parameter_names().parameters.items():
        if option not in options:
            hint, listed = did_you_mean(option, options), ", ".join(options) or "none"
            raise UsageError(f'pass "{spec.name}" has no option "{option:.60}"{hint}; its options: {listed}')
        if any(isinstance(value, int) and abs(value) > LARGEST for value in values):
            raise UsageError(f'pass "{spec.name}": {option} is beyond the integers of 64 bits')
    try:
        return kind.from_spec(spec)
    except ValueError as error:
        raise UsageError(f'pass "{spec.name}": {error}') from error


def _elsewhere(name: str) -> str:
    """Where a pass that is not known here can be run."""
    if name not in all_passes():
        return ""
    return " here: mxloom-opt has it, from an xDSL universe; this takes mxloom's passes and the group mxloom.passes"


def quoted(value: str | bool | int | float) -> str:
    """A value as a pipeline string spells it: a word stands bare, other text in quotes with `"` and `\\` escaped."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):  # a pipeline reads an exponent behind a point only: 1.0e-05, not 1e-05
        mantissa, letter, exponent = repr(value).partition("e")
        return f"{mantissa}{'.0' if letter and '.' not in mantissa else ''}{letter}{exponent}"
    if not isinstance(value, str):
        return str(value)
    if value.isidentifier() and value.isascii() and value not in ("true", "false"):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
