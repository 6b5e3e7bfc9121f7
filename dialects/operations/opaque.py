"""Operations that are kept as they are: torch operators nobody treats specially, and arithmetic on sizes."""

from __future__ import annotations

from typing import Any

from xdsl.dialects.builtin import DictionaryAttr, StringAttr
from xdsl.irdl import irdl_op_definition, prop_def, var_operand_def, var_result_def

from ._operation import Call, Operation
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


@irdl_op_definition
class AtenOp(Opaque):
    """Any torch operator, by its name; it runs as it is and is reported as opaque."""

    name = "mx.aten"

    target = prop_def(StringAttr)
    inputs = var_operand_def()
    arguments = prop_def(DictionaryAttr)
    outputs = var_result_def()

    assembly_format = "$target `(` $inputs `)` $arguments attr-dict `:` functional-type($inputs, $outputs)"

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

    def call(self) -> Call:
        from ..torch_operators import size_function

        names = [f"a{i}" for i in range(len(self.arguments.data))]
        return Call(size_function(self.target.data), tuple(self.argument_values(names).values()), {})
