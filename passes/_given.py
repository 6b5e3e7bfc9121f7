"""Weights whose codes a pass has decided: parameters of a format, with the values they were rounded from kept aside.

A cast chooses scales by its rule whenever the weight is read. A pass that chooses them (or the codes) itself puts an
encoded parameter in place of the cast: the form in which artefacts hold weights, which every backend reads. The wide
values stay in the store as `NAME.wide` until the pipeline ends, so that a later pass can start from them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import Attribute, SSAValue, TypeAttribute
from xdsl.ir import Operation as XdslOperation
from xdsl.rewriter import InsertPoint, Rewriter

from ..backends.reference import results
from ..dialects.errors import UsageError
from ..dialects.formats import Encoded, Rounding, is_wide
from ..dialects.instances import name_of
from ..dialects.operations._operation import Operation
from ..dialects.operations._origin import stored_readers
from ..dialects.operations._shapes import element_of
from ..dialects.operations.cast import CastOp
from ..dialects.operations.parameter import ParameterOp
from ._sites import Site, sites

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ..backends.weight_store import WeightStore

WIDE = ".wide"
"""What the values that an encoded parameter was made from are called: its name with this behind it."""


UNDECIDED = "undecided"
"""Marks a parameter of a mixed format whose scales a pass has chosen, but not yet which of its blocks are high."""


def narrow_weights(module: ModuleOp) -> list[Site]:
    """The weights that have a format, one site for each value: several operations may read one."""
    found: dict[SSAValue, Site] = {}
    for site in sites(module):
        if site.role == "weight" and not is_wide(site.format):
            found.setdefault(site.value, site)
    return list(found.values())


def wide_weight(site: Site, weights: WeightStore) -> Tensor:
    """The values of a weight before it was rounded, as its operation reads them, f32.

    UsageError where they are gone: the weight came packed, as in an artefact, or `pack` has run.
    """
    owner = site.value.owner
    if isinstance(owner, CastOp):
        return laid_out(owner.input, weights)
    if isinstance(owner, ParameterOp) and is_wide(site.format):
        return weights.wide(owner.source.data)
    if isinstance(owner, ParameterOp) and owner.source.data + WIDE in weights:
        return weights.wide(owner.source.data + WIDE)
    raise UsageError(
        f"{site.name} is packed as {name_of(site.format)}, and the values that it was rounded from are gone: passes "
        "that choose scales or codes stand before `pack`, and work on models, not on artefacts"
    )


def rounding_of(site: Site) -> Rounding:
    """How the weight's cast rounds; the default where a pass has decided its codes."""
    owner = site.value.owner
    return owner.how() if isinstance(owner, CastOp) else Rounding()


def given_encoding(site: Site, weights: WeightStore) -> Encoded | None:
    """The codes and scales that a pass has decided; None where a cast still chooses them."""
    owner = site.value.owner
    if isinstance(owner, ParameterOp) and not is_wide(site.format):
        return weights.encoded(owner.source.data, cast(TypeAttribute, site.format), site.shape)
    return None


def set_given(site: Site, weights: WeightStore, encoded: Encoded) -> None:
    """Let the weight be these codes and scales from now on, for every operation that reads the same rounded value."""
    value = site.value
    owner = value.owner
    if isinstance(owner, ParameterOp):
        weights.put_encoded(owner.source.data, encoded)
        return
    assert isinstance(owner, CastOp)
    parameter = parameter_under(owner.input)
    name = _free_name(site, parameter, owner, weights)
    if isinstance(owner.input.owner, ParameterOp):
        weights.alias(name + WIDE, parameter.source.data)
    else:
        weights.put(name + WIDE, laid_out(owner.input, weights))
    weights.put_encoded(name, encoded)
    made = ParameterOp.build(result_types=[value.type], properties={"source": StringAttr(name)})
    made.result.name_hint = value.name_hint
    Rewriter.insert_op(made, InsertPoint.before(owner))
    value.replace_all_uses_with(made.result)
    erase_unused(owner)


def forget_wide(weights: WeightStore) -> None:
    """Drop the wide values that were kept aside."""
    for name in [name for name in weights if name.endswith(WIDE) and weights.parts(name.removesuffix(WIDE))]:
        weights.discard(name)


def laid_out(value: SSAValue, weights: WeightStore) -> Tensor:
    """A parameter's values, moved as the operations between it and `value` move them."""
    owner = cast(Operation, value.owner)
    if isinstance(owner, ParameterOp):
        return weights.wide(owner.source.data)
    below = owner.operands[0]
    return results(owner, owner.call(), {below: laid_out(below, weights)})[0]


def parameter_under(value: SSAValue) -> ParameterOp:
    """The parameter that a weight in some layout comes from."""
    owner = value.owner
    while isinstance(owner, XdslOperation) and not isinstance(owner, ParameterOp):
        owner = owner.operands[0].owner
    assert isinstance(owner, ParameterOp)
    return owner


def erase_unused(op: XdslOperation) -> None:
    """Erase an operation that nobody reads, and what only it read."""
    below = [operand.owner for operand in op.operands]
    Rewriter.erase_op(op)
    for owner in below:
        if isinstance(owner, XdslOperation) and not any(result.uses for result in owner.results):
            erase_unused(owner)


def readers_of(module: XdslOperation, source: str) -> Iterator[CastOp | None]:
    """Who reads a parameter of this name, through whichever operation that stands for it."""
    while module.parent_op() is not None:
        module = cast(XdslOperation, module.parent_op())
    for op in module.walk():
        if isinstance(op, ParameterOp) and op.source.data == source:
            yield from stored_readers(op) if is_wide(element_of(op.result)) else [None]


def _free_name(site: Site, parameter: ParameterOp, owner: CastOp, weights: WeightStore) -> str:
    """The parameter's own name where nothing but this cast reads it; else one behind it, named after the format."""
    source = parameter.source.data
    if all(reader is owner for reader in readers_of(owner, source)):
        return source
    base = f"{source}.as.{_word(site.format)}"
    name, count = base, 1
    while name in weights or weights.parts(name):
        name, count = f"{base}_{count}", count + 1
    return name


def _word(format: Attribute) -> str:
    name = name_of(format)
    return name if name.replace("_", "").isalnum() else "rounded"
