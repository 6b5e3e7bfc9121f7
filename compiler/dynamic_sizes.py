"""Sizes that stay dynamic through capture, and the proof that none was made a constant in silence."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import FrameSummary
from typing import TYPE_CHECKING, Any

from ..dialects.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

Dims = Mapping[str, Collection[int]]


def dynamic_dims(example: Mapping[str, Tensor], dynamic: bool | Dims) -> dict[str, tuple[int, ...]]:
    """The dimensions of each input that are to stay dynamic.

    True: the batch (0) of every input, and the length (1) of every input of integers or booleans. False: none. Raises
    UsageError for a mapping that names an input or a dimension which is not there.
    """
    if isinstance(dynamic, Mapping):
        return _named(example, dynamic)
    if not dynamic:
        return dict.fromkeys(example, ())
    return {
        name: (0, 1) if tensor.ndim > 1 and not tensor.is_floating_point() else (0,) if tensor.ndim else ()
        for name, tensor in example.items()
    }


def _named(example: Mapping[str, Tensor], dynamic: Dims) -> dict[str, tuple[int, ...]]:
    unknown = [name for name in dynamic if name not in example]
    if unknown:
        raise UsageError(
            f"dynamic names {unknown[0]!r}, which is no input of the example{did_you_mean(str(unknown[0]), example)}; "
            f"these are: {', '.join(example)}"
        )
    for name, dims in dynamic.items():
        rank = example[name].ndim
        if isinstance(dims, str) or not isinstance(dims, Collection) or not all(isinstance(d, int) for d in dims):
            raise UsageError(f"dynamic[{name!r}] is {dims!r}; give the dimensions that may change, such as [0, 1]")
        if not all(-rank <= dim < rank for dim in dims):
            raise UsageError(f"dynamic[{name!r}] is {list(dims)}; the example's {name} has {rank} dimensions")
    return {name: tuple(dict.fromkeys(d % example[name].ndim for d in dynamic.get(name, ()))) for name in example}


@dataclass(frozen=True)
class Frozen:
    """What export has fixed: `rule` in the words of the inputs, and the frame of the model's code that asked for it.

    `input`, `dim` and `size` say which dimension became a constant, where it was one and no branch.
    """

    rule: str
    frame: FrameSummary | None
    input: str | None = None
    dim: int = 0
    size: int = 0


def advice(found: Frozen, example: Mapping[str, Tensor], wanted: Dims) -> str:
    """What to give as `dynamic`, so that the dimension stays fixed, or so that all that go with it may change."""
    if found.input is None:
        return "mxloom.compile(..., dynamic={input: dimensions}), or dynamic=False"
    fixed = {name: [d for d in dims if (name, d) != (found.input, found.dim)] for name, dims in wanted.items()}
    alike = {
        name: [d for d, size in enumerate(tensor.shape) if d in wanted[name] or (size == found.size and d == found.dim)]
        for name, tensor in example.items()
    }
    text = f"mxloom.compile(..., dynamic={fixed}) keeps this one as it is"
    if all(set(alike[name]) == set(wanted[name]) for name in example):
        return text
    return f"{text}; dynamic={alike} lets all change together that go with it"


def frozen(program: ExportedProgram, wanted: Dims, export_again: Callable[[], object]) -> Frozen | None:
    """The first dynamic size that became a constant, or the first branch of the model's own code that sizes decided.

    `Dim.AUTO` accepts both without a word. What torch itself asks of sizes (that they fit together) is no branch.
    `export_again` is run to listen where a constant comes from, in the case that there is one.
    """
    import torch

    inputs = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    for name, dims in wanted.items():
        for dim in dims if isinstance(inputs.get(name), torch.Tensor) else ():
            size = inputs[name].shape[dim]
            if not isinstance(size, torch.SymInt):
                return Frozen(f"dimension {dim} of input {name} became the constant {size}", None, name, dim, size)
            if size.node.expr.is_number:
                # torch logs that it replaces a symbol by a number as it does it
                frame = first_frame(export_again, rf"set_replacement {size.node._expr} = ")
                return Frozen(
                    f"dimension {dim} of input {name} became the constant {int(size)}", frame, name, dim, int(size)
                )
    return _branch(inputs)


def input_sizes(inputs: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Input and dimension of each symbol that export made of a size."""
    import torch

    return {
        str(size.node._expr): (name, dim)
        for name, tensor in inputs.items()
        if isinstance(tensor, torch.Tensor)
        for dim, size in enumerate(tensor.shape)
        if isinstance(size, torch.SymInt)
    }


def shape_environment(inputs: Mapping[str, Any]) -> Any:
    """Where torch keeps what it asked of the symbols; None where there are none."""
    return next((size.node.shape_env for t in inputs.values() for size in _symbolic(t)), None)


def _branch(inputs: Mapping[str, Any]) -> Frozen | None:
    sizes = {symbol: f"{name}.shape[{dim}]" for symbol, (name, dim) in input_sizes(inputs).items()}
    environment = shape_environment(inputs)
    for guard in environment.guards if environment is not None else ():
        frame = guard.sloc.framework_loc
        if isinstance(frame, FrameSummary) and not is_foreign(frame.filename):
            rule = re.sub(r"s\d+", lambda found: sizes.get(found[0], found[0]), str(guard.expr))
            return Frozen(f"the model takes another way where not {rule}", frame)
    return None


def _symbolic(value: Any) -> list[Any]:
    import torch

    return [size for size in getattr(value, "shape", ()) if isinstance(size, torch.SymInt)]


def is_foreign(filename: str) -> bool:
    """Whether a frame is torch's, Python's or our own, not the model's."""
    import torch

    folders = (Path(torch.__file__).parent, Path(__file__).parent, Path(traceback.__file__).parent)
    site = Path(torch.__file__).parent.parent
    path = Path(filename)
    own = any(folder in path.parents for folder in folders[:2])
    return own or filename.startswith("<") or (folders[2] in path.parents and site not in path.parents)


def model_frame(stack: traceback.StackSummary) -> FrameSummary | None:
    """The innermost frame of the model's own code."""
    frames = [frame for frame in stack if not is_foreign(frame.filename)]
    return frames[-1] if frames else None


def first_frame(export_again: Callable[[], object], pattern: str) -> FrameSummary | None:
    """Where the model's code was when torch first logged a line on symbolic shapes that matches."""
    with _listening(pattern) as heard:
        export_again()
    return heard[0] if heard else None


@contextmanager
def _listening(pattern: str) -> Iterator[list[FrameSummary]]:
    """Collects the model's frame at each line of torch's log of symbolic shapes that matches."""
    heard: list[FrameSummary] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if re.match(pattern, record.getMessage()) and (frame := model_frame(traceback.extract_stack())) is not None:
                heard.append(frame)

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    listener, level, propagate = Listener(logging.INFO), logger.level, logger.propagate
    logger.addHandler(listener)
    handlers, logger.handlers = logger.handlers, list[logging.Handler]([listener])
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.handlers = [handler for handler in handlers if handler is not listener]
        logger.setLevel(level)
        logger.propagate = propagate
