"""torch's decomposition of an exported program, for weights of any name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..dialects.names import attribute, unique

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def decomposed(program: ExportedProgram, table: Mapping[Any, Any] | None = None) -> ExportedProgram:
    """The program in functional operators; those of `table` (torch's kind of table) are rewritten, no others.

    torch writes the names of weights into Python code on the way, which a module named `return` or `x"y` would break:
    such weights have another name meanwhile.
    """
    known = {**program.state_dict, **program.constants}
    renamed: dict[str, str] = {}
    taken = {name.split(".")[0] for name in known}
    for name in known:
        if any(attribute(part) != part for part in name.split(".")):
            renamed[name] = unique("weight", taken.__contains__)
            taken.add(renamed[name])
    if not renamed:
        return program.run_decompositions(dict(table or {}))
    _rename(program, renamed)
    result = program.run_decompositions(dict(table or {}))
    _rename(result, {new: old for old, new in renamed.items()})
    return result


def _rename(program: ExportedProgram, names: Mapping[str, str]) -> None:
    """Give weights and constants other names, in place."""

    def held(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): tensor for name, tensor in tensors.items()}

    program._state_dict, program._constants = held(program._state_dict), held(program._constants)
    for spec in (*program.graph_signature.input_specs, *program.graph_signature.output_specs):
        if spec.target is not None:
            spec.target = names.get(spec.target, spec.target)
