"""Operations that are kept as they are: torch operators nobody treats specially, and arithmetic on sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xdsl.dialects.builtin import DictionaryAttr, StringAttr
from xdsl.ir import SSAValue
from xdsl.irdl import irdl_op_definition, prop_def, var_operand_def, var_result_def

from ..errors import MxloomError
from ._operation import Call, Operation
from ._signature import fault_of_arguments, fault_of_results, fault_of_sizes
from ._values import decode


class Opaque(Operation):
    """`target` applied to `arguments`, whose `unit` entries are the operands in the order of the target's arguments."""

    def argument_values(self, order: list[str]) -> dict[str, Any]:
        """Arguments by name, SSA values in their places; `order` is that of the target's own declaration."""
        named = self.properties["arguments"]
        assert isinstance(named, DictionaryAttr)
        unknown = [name for name in named.data if name not in order]
        if unknown:
            self.require(False, f"{self.properties['target']} has no argument {', '.join(unknown)}")
        operands = iter(self.operands)
        return {name: decode(named.data[name], operands) for name in order if name in named.data}

    def fault(self) -> str | None:
        """What is wrong with target, arguments or results; MxloomError for a target that nobody knows."""
        raise NotImplementedError(f"{self.name} does not say what its target takes")

    def check(self) -> None:
        try:
            fault = self.fault()
        except MxloomError as error:
            fault = str(error)
        if fault is not None:
            self.require(False, fault)


@irdl_op_definition
class AtenOp(Opaque):
    """Any torch operator, by its name; it runs as it is and is reported as opaque."""

    name = "mx.aten"

    target = prop_def(StringAttr)
    inputs = var_operand_def()
    arguments = prop_def(DictionaryAttr)
    outputs = var_result_def()

    assembly_format = "$target `(` $inputs `)` $arguments attr-dict `:` functional-type($inputs, $outputs)"

    def named_operands(self) -> Iterator[tuple[str, SSAValue]]:
        """Each operand under the name of the argument that holds it, alone or in a list."""
        from ..torch_operators import operator

        order = [argument.name for argument in operator(self.target.data)._schema.arguments]
        for name, value in self.argument_values(order).items():
            held = value if isinstance(value, list) else [value]
            yield from ((name, item) for item in held if isinstance(item, SSAValue))

    def fault(self) -> str | None:
        wrong = fault_of_arguments(self.target.data, self.arguments.data, iter(self.operands))
        return wrong or fault_of_results(self.target.data, [result.type for result in self.results])

    def call(self) -> Call:
        from ..torch_operators import operator

        target = operator(self.target.data)
        return Call(target, (), self.argument_values([argument.name for argument in target._schema.arguments]))


@irdl_op_definition
class SymOp(Opaque):
    """Arithmetic on sizes, by the name of the Python function; arguments are called a0, a1, ..."""

    name = "mx.sym"

    target = prop_def(StringAttr)
    inputs = var_operand_def()
    arguments = prop_def(DictionaryAttr)
    outputs = var_result_def()

    assembly_format = "$target `(` $inputs `)` $arguments attr-dict `:` functional-type($inputs, $outputs)"

    def fault(self) -> str | None:
        from ..torch_operators import size_function

        target = self.target.data
        return fault_of_sizes(target, size_function(target), self.arguments.data, iter(self.operands))

    def call(self) -> Call:
        from ..torch_operators import size_function

        names = [f"a{i}" for i in range(len(self.arguments.data))]
        return Call(size_function(self.target.data), tuple(self.argument_values(names).values()), {})
