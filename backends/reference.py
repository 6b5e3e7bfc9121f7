"""The reference interpreter: what a module means, one torch call for each operation, on any machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from xdsl.dialects.builtin import ModuleOp, TensorType
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Block, SSAValue

from ..dialects import formats
from ..dialects.contractions import Coded, coded, coded_tensor
from ..dialects.errors import MxloomError
from ..dialects.operations._operation import AsCodes, Call, Operation
from ..dialects.operations._shapes import element_of, fits, shape_of, text
from ..dialects.operations._values import torch_dtype
from ..dialects.operations.cast import CastOp
from ..dialects.operations.parameter import ParameterOp
from .kernels.fake_quantization import reference_only

if TYPE_CHECKING:
    from torch import Tensor

Observer = Callable[[SSAValue, Any], None]


class Weights(Protocol):
    """Where parameters come from, by their names in the checkpoint."""

    def wide(self, name: str) -> Tensor:
        """The tensor in f32, or as it is where it holds integers or booleans."""
        ...

    def encoded(self, name: str, format: Any, shape: Any) -> formats.Encoded:
        """The tensor in a format."""
        ...


class Interpreter:
    """Runs a module: prepared once, run often.

    Parameters, and casts of parameters, are computed when the interpreter is made and kept; other values live until
    their last use. A value of a format is held as an f32 tensor whose numbers lie on the format's grid.
    """

    def __init__(self, module: ModuleOp, weights: Weights) -> None:
        """Raises MxloomError where a parameter is missing, or has another shape than the module says."""
        self.block = body(module)
        self._wanted = wanted_codes(self.block)
        with reference_only():
            self.constants, self._folded = constants(self.block, weights)
        self._outputs: list[SSAValue] = []
        self._steps: list[tuple[Operation, Call, list[SSAValue]]] = []
        self._prepare()

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        return [argument.name_hint or "" for argument in self.block.args]

    def __call__(self, *inputs: Tensor, observe: Observer | None = None) -> list[Tensor]:
        """The outputs for the inputs; `observe` is told every value as it comes to be."""
        import torch

        if len(inputs) != len(self.block.args):
            raise MxloomError(f"the module takes {len(self.block.args)} inputs {self.inputs}, got {len(inputs)}")
        values: dict[SSAValue | AsCodes, Any] = dict(self.constants)
        with torch.no_grad(), reference_only():
            for argument, given in zip(self.block.args, inputs, strict=True):
                _check_input(argument, given)
                given = _on_its_grid(argument, given)
                values[argument] = given
                for codes in self._wanted.get(argument, ()):
                    values[codes] = codes_of(codes, values)
                if observe is not None:
                    observe(argument, given)
            for op, call, dead in self._steps:
                for result, value in zip(op.results, results(op, call, values), strict=True):
                    values[result] = value
                    if observe is not None:
                        observe(result, value)
                    for codes in self._wanted.get(result, ()):
                        values[codes] = codes_of(codes, values)
                for value in dead:
                    del values[value]
                    for codes in self._wanted.get(value, ()):
                        del values[codes]
        return [values[output] for output in self._outputs]

    def _prepare(self) -> None:
        last: dict[SSAValue, int] = {}
        for op in self.block.ops:
            if isinstance(op, ReturnOp):
                self._outputs = list(op.operands)
            elif not isinstance(op, Operation):
                raise MxloomError(f"{op.name} is not an operation of mx; the reference interpreter runs nothing else")
            elif op not in self._folded:
                for value in (*op.operands, *op.results):
                    last[value] = len(self._steps)
                self._steps.append((op, op.call(), []))
        for value, step in last.items():
            if value not in self._outputs and value not in self.constants:
                self._steps[step][2].append(value)


def body(module: ModuleOp) -> Block:
    """The one function's block. Raises MxloomError for a module of another form."""
    functions = [op for op in module.body.block.ops if isinstance(op, FuncOp)]
    if len(functions) != 1:
        raise MxloomError(f"an mx module holds one function, this one {len(functions)}")
    return functions[0].body.block


def wanted_codes(block: Block) -> dict[SSAValue, list[AsCodes]]:
    """The values that operations read as codes, and in which layout."""
    found: dict[SSAValue, list[AsCodes]] = {}
    operations = [op for op in block.ops if isinstance(op, Operation) and not isinstance(op, ParameterOp)]
    for op in operations:
        for argument in op.call().args:
            if isinstance(argument, AsCodes) and argument not in found.setdefault(argument.value, []):
                found[argument.value].append(argument)
    return found


def codes_of(codes: AsCodes, values: Mapping[Any, Any]) -> Coded:
    """A value as codes: those that its cast makes, or those of numbers that lie on the format's grid already."""
    owner, fmt = codes.value.owner, element_of(codes.value)
    if isinstance(owner, CastOp):
        return coded(values[owner.input], fmt, owner.how(), transposed=codes.transposed)
    return coded(values[codes.value], fmt, formats.Rounding(), transposed=codes.transposed)


def results(op: Operation, call: Call, values: Mapping[Any, Any]) -> list[Any]:
    """The results of an operation for the values of its operands, each rounded once into its type.

    A cast has rounded already, in the way that it states.
    """
    found = call.target(*fill(call.args, values, call.dtype), **fill(call.kwargs, values, call.dtype))
    if isinstance(op, CastOp):
        return [found]  # it has rounded; NVFP4 and others would change once more
    several = list(found) if isinstance(found, tuple | list) else [found]
    return [_rounded(value, result.type) for value, result in zip(several, op.results, strict=True)]


def fill(template: Any, values: Mapping[Any, Any], dtype: Attribute | None = None) -> Any:
    """A call's arguments with values in place of SSA values, float tensors converted to `dtype` where it is given."""
    match template:
        case AsCodes():
            return values[template]
        case SSAValue():
            value = values[template]
            return value if dtype is None or not _is_float(value) else value.to(torch_dtype(dtype))
        case tuple() | list():
            return type(template)(fill(item, values, dtype) for item in template)
        case dict():
            return {name: fill(item, values, dtype) for name, item in template.items()}
    return template


def _is_float(value: Any) -> bool:
    return hasattr(value, "is_floating_point") and value.is_floating_point()


def _rounded(value: Any, type: Attribute) -> Any:
    """A computed value in the type of its result: into a format by its default rounding, else by conversion."""
    if not isinstance(type, TensorType) or not _is_float(value):
        return value
    element = type.element_type
    if formats.is_wide(element):
        return value.to(torch_dtype(element))
    has_data = getattr(value, "fake_mode", None) is None
    return _held(formats.quantize(value, element), element) if has_data else value


def _held(value: Tensor, element: Attribute) -> Tensor:
    """Fixed-point numbers, computed in f64, are held as f32 as other formats are: it has every code of 24 bits."""
    import torch

    return value.to(torch.float32) if isinstance(element, formats.FixedType) else value


def constants(block: Block, weights: Weights) -> tuple[dict[Any, Any], set[Operation]]:
    """Values of the parameters and of their casts, and these operations; what only casts read is not kept.

    A value that operations read as codes is there as `AsCodes` too.
    """
    import torch

    known: dict[Any, Any] = {}
    folded: set[Operation] = set()
    wanted = wanted_codes(block)
    with torch.no_grad():
        for op in block.ops:
            if isinstance(op, ParameterOp):
                known[op.result] = _parameter(op, weights)
                for codes in wanted.get(op.result, ()):
                    known[codes] = _parameter_codes(op, weights, codes)
                folded.add(op)
            elif isinstance(op, CastOp) and op.input in known:
                known[op.result] = results(op, op.call(), known)[0]
                for codes in wanted.get(op.result, ()):
                    known[codes] = codes_of(codes, known)
                folded.add(op)
                if all(use.operation in folded for use in op.input.uses):
                    del known[op.input]
    return known, folded


def _parameter(op: ParameterOp, weights: Weights) -> Tensor:
    name, type = op.source.data, op.result.type
    assert isinstance(type, TensorType)
    shape = shape_of(op.result)
    if formats.is_wide(type.element_type):
        tensor = weights.wide(name).to(torch_dtype(type.element_type))
    else:
        tensor = weights.encoded(name, type.element_type, shape).decode()
    if tuple(tensor.shape) != shape:
        raise MxloomError(f'parameter "{name}" has shape {text(tensor.shape)}, the module says {text(shape)}')
    return tensor


def _parameter_codes(op: ParameterOp, weights: Weights, codes: AsCodes) -> Coded:
    encoded = weights.encoded(op.source.data, element_of(op.result), shape_of(op.result))
    return coded_tensor(encoded, transposed=codes.transposed)


def _on_its_grid(argument: SSAValue, given: Tensor) -> Tensor:
    """An input of fixed-point format is rounded into it: numbers that lie on its grid stay what they are."""
    if isinstance(argument.type, TensorType) and isinstance(argument.type.element_type, formats.FixedType):
        return _rounded(given, argument.type)
    return given


def _check_input(argument: SSAValue, given: Tensor) -> None:
    expected = shape_of(argument)
    if not fits(expected, tuple(given.shape)):
        raise MxloomError(
            f'input "{argument.name_hint}" must have shape {text(expected)}, got {text(given.shape)}; '
            "a size without ? was fixed when the model was captured"
        )
