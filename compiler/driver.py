"""`mxloom.compile`: capture, import, and run the pipeline that a recipe stands for."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import ArrayAttr, IntegerAttr, ModuleOp, StringAttr

from ..backends.reference import body
from ..backends.weight_store import WeightStore
from ..dialects.errors import MxloomError, UsageError
from ..dialects.operations._operation import Operation
from ..dialects.operations.contraction import Contraction
from ..dialects.operations.opaque import AtenOp
from ..dialects.operations.parameter import ParameterOp
from ..passes._context import Calibration, CompileContext
from ..passes._given import forget_wide
from ..passes._sites import sites
from ..passes.accumulate import Accumulate
from ..passes.mix import undecided
from ..passes.quantize import RuleError
from .calibration import CalibrationData
from .compiled import Compiled
from .model_source import ModelSource, open_model
from .pipeline import apply_pass, parse_passes
from .protocol import read_text
from .recipe import Recipe

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Report = Callable[[str, str], None]
"""Called with a step's name and a line about it as the compilation goes on."""


def compile(
    model: Any,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    weights: str | None = None,
    activations: str | None = None,
    example: Mapping[str, Any] | None = None,
    dynamic: bool | Mapping[str, Collection[int]] | None = None,
    mode: str = "fast",
    calibration: Any = None,
    report: Report | None = None,
) -> Compiled:
    """Compile a model (a Hugging Face folder, a GGUF file, an nn.Module with `example` inputs, or an opened source).

    The formats come from a recipe (a file, a dictionary, or a `Recipe`), or from `weights` and `activations`, which
    then hold for every contraction. Without either, the module stays wide.
    `dynamic` says which sizes of the example may change later: True, which is the default, the batch (dimension 0) of
    every input and the length (dimension 1) of every input of integers or booleans; a mapping, the dimensions of each
    input, {"x": [0, 1], "mask": [0, 1]}; False, none.
    `mode` says how linear layers of quantized operands sum: `fast` as torch's f32 product does; `exact` inside a block
    exactly and then in f32, block after block, as hardware does (the pass `accumulate`, which offers more).
    `calibration` is what passes that need data run the model on, in place of the text in the recipe's `calibration`: a
    text or its file (.jsonl: a JSON object a line, with "text" or "input_ids"), or an iterable of texts, of lists of
    token numbers, of tensors (the model's main input), or of dictionaries of inputs by name; without it a language
    model speaks from a seed, and any other model gets its example.
    A recipe's `evaluate` is carried out: the result's `evaluation`.
    Raises MxloomError with what to do where the model cannot be read or captured or a rule has no effect.
    """
    tell = report or (lambda step, line: None)
    chosen = _recipe(recipe, weights, activations)
    pipeline = _in_mode(mode, chosen.pipeline() if chosen else "")
    if chosen and chosen.evaluate:
        read_text(_folder(chosen) / chosen.evaluate.text)  # what cannot be measured is told before the work
    source = open_model(model, example=example)
    if dynamic is not None:
        source.set_dynamic(dynamic)
    reference = _reference(source, chosen)
    module = import_source(source, tell).clone()
    inputs = _calibration(source, body(module).args, chosen, calibration)
    own = source.weights.copy()  # what passes do to weights is the compiled model's own
    notes = run_pipeline(module, own, pipeline, chosen, tell, inputs, task=source.task)
    _check_calibrated(chosen, inputs)
    forget_wide(own)
    compiled = Compiled(
        module=module,
        weights=own,
        source=source,
        pipeline=pipeline,
        recipe=chosen.to_json() if chosen else None,
        provenance=provenance(source, pipeline) | ({"notes": notes} if notes else {}),
    )
    if chosen and chosen.evaluate:
        compiled.evaluation = _evaluated(compiled, chosen, reference)
        tell("evaluate", str(compiled.evaluation).replace("\n", "; "))
    return compiled


MODES = ("fast", "exact")


def _in_mode(mode: str, pipeline: str) -> str:
    """The pipeline, with what the mode adds at its end."""
    if mode not in MODES:
        raise UsageError(f"mode is {' or '.join(MODES)}, got {mode!r}")
    if mode == "fast":
        return pipeline
    if not pipeline:
        raise UsageError("mode exact needs quantized operands: give weights and activations, or a recipe")
    if any(step.name == Accumulate.name for step in parse_passes(pipeline)):
        raise UsageError("the recipe's passes state an accumulator already: leave mode exact out")
    return f"{pipeline},{Accumulate.name}"


def _reference(source: ModelSource, recipe: Recipe | None) -> Any:
    """What the recipe's `evaluate` compares with, opened; what cannot be measured so is told before the work."""
    from .evaluated import evaluated
    from .evaluation import check_measurable

    if recipe is None or recipe.evaluate is None:
        return None
    wanted, reference = recipe.evaluate, None
    if wanted.against is not None:
        reference = evaluated(source if wanted.against == "float" else _folder(recipe) / wanted.against)
    check_measurable(evaluated(source), reference, wanted.context)
    return reference


def _evaluated(compiled: Compiled, recipe: Recipe, reference: Any) -> Any:
    """What the recipe's `evaluate` asks for; its paths are found from the recipe's folder."""
    from .evaluation import evaluate

    wanted = recipe.evaluate
    assert wanted is not None
    text = _folder(recipe) / wanted.text
    return evaluate(compiled, text, context=wanted.context, limit=wanted.limit, against=reference)


def _folder(recipe: Recipe) -> Path:
    """Where the paths in a recipe begin: the folder of its file, or the working directory."""
    return recipe.path.parent if recipe.path else Path()


def import_source(source: ModelSource, report: Report | None = None) -> ModuleOp:
    """The source's module, all wide; captured once and kept with the source."""
    if source.imported is None:
        from .capture import capture
        from .import_graph import constants, import_program
        from .simplify import simplify

        program = simplify(capture(source.model, source.example(), dynamic=source.dynamic))
        outputs = output_names(program)
        module = import_program(program)
        module.verify()
        for name, value in constants(program).items():
            if name not in source.weights:
                source.weights.put(name, value)
        name_outputs(module, *outputs)
        parameters = [op for op in module.walk() if isinstance(op, ParameterOp)]
        for op in parameters:  # export names a tied weight by its last use, checkpoints by its first
            op.source = StringAttr(source.weights.canonical(op.source.data))
        source.weights.check_finite(dict.fromkeys(op.source.data for op in parameters))
        source.imported = module
        if report:
            report("capture", _captured(module))
    return source.imported


def _captured(module: ModuleOp) -> str:
    operations = [op for op in module.walk() if isinstance(op, Operation) and not isinstance(op, ParameterOp)]
    opaque = [op for op in operations if isinstance(op, AtenOp)]
    contractions = sum(isinstance(op, Contraction) for op in operations)
    kept = f"{len(opaque)} of them torch operators kept as they are" if opaque else "none of them opaque"
    return f"{len(operations)} operations, {kept}, {contractions} contractions"


def _typed(module: ModuleOp) -> str:
    """How many operands a pipeline has made narrow, in how many groups of one decision."""
    narrow = [site for site in sites(module) if not site.is_wide]
    weights = sum(site.role == "weight" for site in narrow)
    groups = len({site.group for site in narrow})
    return f"{weights} weights, {len(narrow) - weights} other operands in {groups} groups"


def run_pipeline(
    module: ModuleOp,
    weights: WeightStore | None,
    pipeline: str,
    recipe: Recipe | None = None,
    report: Report | None = None,
    calibration: Calibration | None = None,
    *,
    task: str | None = None,
) -> list[str]:
    """Run a pipeline string over a module, in place, and verify after each pass; an error names the pass.

    Answers with the notes that the passes left.
    """
    ctx = CompileContext(weights=weights, calibration=calibration, task=task)
    if recipe is not None and recipe.calibration is not None:
        ctx.samples = recipe.calibration.samples
    for step in parse_passes(pipeline):
        try:
            apply_pass(step, ctx, module)
        except RuleError as error:
            raise _at_line(error, recipe) from None
        if report:
            report(step.name, str(step))
    _check_decided(module)
    if report and pipeline:
        report("formats", _typed(module))
    return ctx.notes


def _calibration(source: ModelSource, arguments: Any, recipe: Recipe | None, given: Any) -> CalibrationData:
    """What passes calibrate with: `given`, else what the recipe says."""
    from .evaluated import positions

    wanted = recipe.calibration if recipe is not None else None
    if wanted is None:
        return CalibrationData(source, arguments, given)
    assert recipe is not None
    if given is None and wanted.text is not None:
        given = _folder(recipe) / wanted.text
    most = positions(source.config) if "length" not in wanted.model_fields_set else None
    length = min(wanted.length, most or wanted.length)
    return CalibrationData(source, arguments, given, length=length, seed=wanted.seed)


def _check_calibrated(recipe: Recipe | None, inputs: CalibrationData) -> None:
    """Raise UsageError where the recipe says what to calibrate with, and no pass asked for it."""
    if recipe is None or recipe.calibration is None or inputs.was_read:
        return
    where = f"{recipe.path}:{recipe.calibration_line}" if recipe.path is not None else "recipe"
    raise UsageError(f"{where}: calibration has no effect: none of the passes needed data; remove the key")


def _check_decided(module: ModuleOp) -> None:
    """Raise UsageError where a mixed format is left without a word on which blocks are high."""
    if names := undecided(module):
        raise UsageError(
            f"{names[0]}{f' and {len(names) - 1} others' if names[1:] else ''}: a mixed format keeps each block in one "
            "of two formats, and nothing says which: put the pass mix{share=0.7} behind, or give weight_threshold and "
            "activation_threshold"
        )


def provenance(source: ModelSource, pipeline: str) -> dict[str, Any]:
    """What is needed to repeat a run: versions, the pipeline string, the source's hashes."""
    names = ("mxloom", "torch", "transformers", "xdsl", "safetensors", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in names},
        "pipeline": pipeline,
        "source": {"name": source.name, "fingerprint": source.fingerprint},
    }


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError

    from .. import __version__

    try:
        return version(package)
    except PackageNotFoundError:
        return __version__ if package == "mxloom" else "not installed"


def _recipe(recipe: Any, weights: str | None, activations: str | None) -> Recipe | None:
    if recipe is not None and (weights is not None or activations is not None):
        raise UsageError("a recipe and weights/activations exclude each other; put the formats into the recipe")
    if weights is not None or activations is not None:
        asked = {"weights": weights, "activations": activations}
        rule = {key: value for key, value in asked.items() if value is not None}
        return Recipe.from_dict({"version": 1, "quantize": [rule]})
    if recipe is None or isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(dict(recipe))
    if isinstance(recipe, str | Path):
        return Recipe.from_file(recipe)
    raise UsageError(
        f"a recipe is a {type(recipe).__name__}; give a file, a dictionary or a Recipe. Inputs to capture the model "
        "with go into example={'name of forward argument': tensor}"
    )


def _at_line(error: RuleError, recipe: Recipe | None) -> MxloomError:
    if recipe is None or recipe.path is None:
        return error
    return UsageError(f"{recipe.path}:{recipe.line_of(error.rule - 1)}: {error.message}")


def name_outputs(module: ModuleOp, names: tuple[str, ...], absent: tuple[int, ...] = ()) -> None:
    """Note the names of the model's outputs on the module's function, and the places of those that are always None."""
    function = next(iter(module.body.block.ops))
    if names:
        function.attributes["outputs"] = ArrayAttr([StringAttr(n) for n in names])
    if absent:
        function.attributes["absent"] = ArrayAttr([IntegerAttr(place, 64) for place in absent])


def output_names(program: ExportedProgram) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names of the model's outputs, flat, in order, and the places of those that are None.

    No names where the model yields a bare tensor. Raises MxloomError for an output that is neither a tensor, nor a
    number that follows from sizes, nor None.
    """
    from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

    spec = program.call_spec.out_spec
    leaves: Any = next(node for node in program.graph.nodes if node.op == "output").args[0]
    bare = spec is None or spec.is_leaf()
    paths: list[Any] = [()]
    if spec is not None and not bare:
        paths, _ = tree_flatten_with_path(tree_unflatten([0] * spec.num_leaves, spec))
    names = ["_".join(_key(k, first=i == 0) for i, k in enumerate(path[0] if path else ())) for path in paths]
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is not None and not hasattr(leaf, "meta"):
            place = f" as {name}" if name else ""
            raise MxloomError(
                f"the model yields {leaf!r}{place}, and a module yields tensors: leave it out of what forward returns, "
                "or make it a tensor; a size that is to change needs `dynamic`"
            )
    if all(leaf is None for leaf in leaves):
        raise MxloomError("the model yields no tensor: return what it computes from forward")
    return () if bare else tuple(names), tuple(place for place, leaf in enumerate(leaves) if leaf is None)


def _key(key: Any, *, first: bool) -> str:
    from torch.utils._pytree import SequenceKey

    if isinstance(key, SequenceKey):
        return f"output_{key.idx}" if first else str(key.idx)
    return str(getattr(key, "key", getattr(key, "name", key)))
