"""The loss whose squared gradients are Fisher information: its gradient with respect to one output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import ArrayAttr, IntegerAttr, ModuleOp, StringAttr, TensorType
from xdsl.dialects.func import FuncOp, ReturnOp

from ..backends.reference import body
from ..dialects.errors import MxloomError, UsageError
from ..dialects.formats import is_wide
from ..dialects.operations._shapes import shape_of
from ..dialects.operations._values import torch_dtype
from ._samples import Sample

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class Loss:
    """What is differentiated: `outputs` are places among the module's, `labels` that of the tokens among the inputs.

    `loss`: next-token cross entropy with the data as labels, summed over the sequence's predicted tokens.
    `kl`: labels are drawn from the model's own distribution at each data position, so that the expected squares are
    the diagonal of the Hessian of KL(model || changed model) (Martens, arXiv 1412.1193, section 5); outputs that are no
    logits are projected on random signs: the diagonal of the Hessian of half their squared distance.
    """

    kind: str
    outputs: tuple[int, ...]
    is_logits: bool
    labels: int | None
    seed: int = 0

    def gradient(self, place: int, output: Tensor, sample: Sample, number: int) -> Tensor:
        """d loss / d output. `number` is the sample's in the whole calibration: it seeds what is drawn."""
        import torch

        if self.kind == "loss":
            assert self.labels is not None
            return _next_token(output, sample, sample.inputs[self.labels])
        generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + number) * 64 + place) % 2**63)
        if self.is_logits:
            return _drawn(output, sample, generator)
        return _signs(output, sample, generator)


def loss_of(module: ModuleOp, kind: str | None, task: str | None, seed: int = 0) -> Loss:
    """The loss of a module: `loss` for a causal language model, `kl` for any other, where `kind` does not say.

    `task` is the model's where it is known; a module of tokens whose output is logits of each is taken for causal where
    not. Raises UsageError for `loss` of a module without tokens or logits, MxloomError for one without a float output.
    """
    block = body(module)
    returned = block.last_op
    assert isinstance(returned, ReturnOp)
    names = _output_names(module)
    floats = tuple(place for place, value in enumerate(returned.operands) if _is_float(value.type))
    if not floats:
        raise MxloomError("the model yields no float tensor: there is no loss to take gradients of")
    inputs = [argument.name_hint for argument in block.args]
    logits = names.index("logits") if "logits" in names else None
    rank = len(shape_of(returned.operands[logits])) if logits is not None else 0
    has_labels = rank == 3 and "input_ids" in inputs
    if kind == "loss" and not has_labels:
        raise UsageError(
            "fisher=loss needs labels, and only a causal language model finds them in its data: its input input_ids, "
            "its output logits [batch, tokens, vocabulary]; this module is none: take fisher=kl"
        )
    chosen = kind or ("loss" if has_labels and task in (None, "causal-lm") else "kl")
    is_logits = logits is not None and rank in (2, 3)  # of more, nobody knows which dimension counts classes
    outputs = (logits,) if logits is not None and is_logits else floats
    return Loss(chosen, outputs, is_logits, inputs.index("input_ids") if has_labels else None, seed)


def _output_names(module: ModuleOp) -> list[str]:
    """The names of the outputs that are there."""
    function = next(op for op in module.body.block.ops if isinstance(op, FuncOp))
    names, absent = (function.attributes.get(name) for name in ("outputs", "absent"))
    listed = [name.data for name in names if isinstance(name, StringAttr)] if isinstance(names, ArrayAttr) else []
    gone = (
        [place.value.data for place in absent if isinstance(place, IntegerAttr)]
        if isinstance(absent, ArrayAttr)
        else []
    )
    return [name for place, name in enumerate(listed) if place not in gone]


def _is_float(type: object) -> bool:
    if not isinstance(type, TensorType):
        return False
    element = type.element_type
    return not is_wide(element) or torch_dtype(element).is_floating_point


def _next_token(logits: Tensor, sample: Sample, tokens: Tensor) -> Tensor:
    """Of the summed cross entropy of each token after the first, where it and the one before it are data."""
    batch, length, _ = logits.shape
    counted = sample.mask[:, 1:] & sample.mask[:, :-1] if sample.mask is not None else None
    if length < 2 or (counted is not None and not bool(counted.any())):
        raise MxloomError("a calibration sequence of one token predicts nothing: give longer ones")
    gradient = logits.softmax(-1)
    rows = gradient[:, :-1]
    rows.scatter_add_(-1, tokens[:, 1:, None], -rows.new_ones(batch, length - 1, 1))
    gradient[:, -1] = 0
    if counted is not None:
        rows[~counted] = 0
    return gradient


def _drawn(logits: Tensor, sample: Sample, generator: Generator) -> Tensor:
    """Of the cross entropy with labels that the model draws, summed over the rows that are data."""
    import torch

    gradient = logits.softmax(-1)
    flat = gradient.reshape(-1, gradient.shape[-1])
    labels = torch.multinomial(flat, 1, generator=generator)
    flat.scatter_add_(-1, labels, -flat.new_ones(labels.shape))
    return _only_data(flat.reshape(logits.shape), sample)


def _signs(output: Tensor, sample: Sample, generator: Generator) -> Tensor:
    import torch

    signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
    return _only_data(signs.to(output.dtype), sample)


def _only_data(gradient: Tensor, sample: Sample) -> Tensor:
    shape: Sequence[int] = gradient.shape
    valid = sample.rows(shape[:-1], "the model's output")
    if valid is not None:
        gradient.reshape(-1, shape[-1])[~valid] = 0
    return gradient
