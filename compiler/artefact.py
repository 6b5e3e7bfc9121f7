"""An artefact is one folder: module.mlir, weights.safetensors, config.json, tokenizer, report.json, provenance.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..backends.checkpoint_files import read_json
from ..backends.safetensors_file import write_safetensors
from ..backends.stored_tensors import second_names
from ..backends.weight_store import WeightStore, wide_floats
from ..dialects.errors import MxloomError
from ._atomic import new_folder
from ._quiet import quiet_transformers
from ._target import check_target
from .artefact_files import (
    CONFIG,
    FORMAT_VERSION,
    MODULE,
    PROVENANCE,
    REPORT,
    TEXT_LIMIT,
    WEIGHTS,
    check_version,
    checked_provenance,
    sha256,
)
from .artefact_files import is_artefact as is_artefact
from .checkpoint import build, check_config, listed, read_config, rebuild_constants
from .example_inputs import task_of
from .model_source import TASKS, ModelSource, non_persistent_buffers
from .module_text import check_module, read_module
from .tokenizer_files import save_companions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from xdsl.dialects.builtin import ModuleOp, TensorType
    from xdsl.ir import TypeAttribute

    from ..dialects.operations.parameter import ParameterOp
    from .compiled import Compiled

SECOND_NAME = ".as."
"""What `pack` puts between a weight's name and a number where one weight is stored in two formats."""


def save(compiled: Compiled, directory: str | Path) -> Path:
    """Write `compiled` as the folder `directory`, whole or not at all, and return its path.

    Weights lie packed in their formats; wide ones as the checkpoint had them, tied ones once. An artefact that is
    there is replaced; UsageError for any other folder that is not empty, and for a place that cannot be written.
    MxloomError where a scale is not finite.
    """
    target = check_target(directory)
    module, weights = compiled.packed()
    weights.check_scales()
    tensors, tied = _stored(compiled.source, module, weights)
    with new_folder(target) as folder:
        (folder / MODULE).write_text(_text(module), encoding="utf-8")
        write_safetensors(folder / WEIGHTS, tensors)
        save_companions(compiled.source.files, folder)
        _write_json(folder / CONFIG, _config(compiled.source, module, tied))
        _write_json(folder / REPORT, _report(compiled, module, weights))
        provenance = {
            "format_version": FORMAT_VERSION,
            "pipeline": compiled.pipeline,
            "recipe": compiled.recipe,
            **compiled.provenance,
            "files": {path.relative_to(folder).as_posix(): sha256(path) for path in _files(folder)},
        }
        _write_json(folder / PROVENANCE, provenance)
    return target


def load(directory: str | Path) -> Compiled:
    """The artefact in `directory`: runs bit for bit as what was saved.

    Nothing in it is believed: hashes, names, types, shapes and values are checked, and no code in it is run. Raises
    MxloomError that names the file (and the line of module.mlir) that is at fault.
    """
    from .compiled import Compiled

    if not str(directory) or "\0" in str(directory):
        raise MxloomError(f"{str(directory)!r}: no such folder.")
    folder = Path(directory)
    provenance = checked_provenance(folder)
    module = read_module(folder / MODULE, TEXT_LIMIT)
    weights = WeightStore.from_file(folder / WEIGHTS)
    settings = _settings(folder)
    _check_parameters(folder, module, weights, settings["tied"])
    source = _source(folder, module, weights, settings, sorted(provenance["files"]))
    return Compiled(
        module=module,
        weights=weights,
        source=source,
        pipeline=provenance.get("pipeline", ""),
        recipe=provenance.get("recipe"),
        provenance={key: value for key, value in provenance.items() if key not in _OWN_FIELDS},
    )


_OWN_FIELDS = {"format_version", "files", "recipe"}


def _report(compiled: Compiled, module: ModuleOp, weights: WeightStore) -> dict[str, Any]:
    """The report, its sizes those of the tensors as they are stored: packing decides how large mixed blocks are."""
    notes = [note for note in compiled.notes() if note not in compiled.undecided()]
    return replace(compiled, module=module, weights=weights).report() | {"notes": notes}


def _stored(source: ModelSource, module: ModuleOp, weights: WeightStore) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What the file holds, each tensor once, and the second names of what it holds.

    That is what the module reads, and what else belongs to the model's state; a name that was tied to one that the
    module reads stays tied to it, in whatever format that is now.
    """
    read = dict.fromkeys(op.source.data for op in _parameters(module))
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, twin in {**{name: name for name in read}, **second_names(read, source.weights, source.state)}.items():
        if twin != name:
            tied[name] = twin
            continue
        for own in _names(name, weights):
            kept = weights.canonical(own)
            tensors[kept] = weights[kept]
            if kept != own:
                tied[own] = kept
    return tensors, tied


def _names(name: str, weights: WeightStore) -> list[str]:
    names = [name] if name in weights else [*weights.parts(name).values()]
    if not names:
        raise MxloomError(f"{name}: the module reads it, but there is no such weight.")
    return names


def _parameters(module: ModuleOp) -> Iterator[ParameterOp]:
    from ..dialects.operations.parameter import ParameterOp

    return (op for op in module.walk() if isinstance(op, ParameterOp))


def _text(module: ModuleOp) -> str:
    """The module's text, read back once: what cannot be loaded must not be written."""
    from ..dialects.mx import parse_module

    check_module(module)
    text = f"{module!s}\n"
    if f"{parse_module(text)!s}\n" != text:
        raise MxloomError("the module's text reads back as another module; this is a fault of mxloom.")
    return text


def _config(source: ModelSource, module: ModuleOp, tied: dict[str, str]) -> dict[str, Any]:
    """The model's own configuration, and ours beside it."""
    fields = source.config.to_diff_dict() if source.config is not None else {}
    if source.config is not None:
        fields["architectures"] = [type(source.model).__name__]
        if _untied(source, module):
            fields["tie_word_embeddings"] = False
    fields["mxloom"] = {"format_version": FORMAT_VERSION, "name": source.name, "task": source.task, "tied": tied}
    return fields


def _untied(source: ModelSource, module: ModuleOp) -> bool:
    """Whether weights that the model ties are now two tensors, since their uses have different formats."""
    weights = source.weights
    tied = {weights.canonical(name) for name in weights.aliases}
    roots = [weights.canonical(op.source.data.split(SECOND_NAME)[0]) for op in _parameters(module)]
    return any(roots.count(root) > 1 for root in tied)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def _check_parameters(folder: Path, module: ModuleOp, weights: WeightStore, tied: dict[str, str]) -> None:
    """Every parameter of the module is there as its type says: in its shape, its dtype, its bits, and finite."""
    from ..dialects.formats import is_wide

    path = folder / WEIGHTS
    try:
        own = {name: other for name, other in tied.items() if other in weights}
        for name, other in tied.items():
            _check_second_name(weights, name, other)
        for name, other in own.items():
            weights.alias(name, other)
        for op in _parameters(module):
            type = cast("TensorType", op.result.type)
            name, format, shape = op.source.data, cast("TypeAttribute", type.element_type), type.get_shape()
            if is_wide(format):
                _check_wide(weights, name, format, shape)
            else:
                weights.declare(name, format, shape)
        for name in tied.keys() - own.keys():
            weights.alias(name, tied[name])
        weights.check_finite()
        weights.check_encoded()
    except MxloomError as error:
        raise MxloomError(f"{path}: {error}") from error


def _check_second_name(weights: WeightStore, name: str, other: str) -> None:
    if name in weights or weights.parts(name):
        raise MxloomError(f"{name}: stored, though {CONFIG} calls it a second name of {other}.")


def _check_wide(weights: WeightStore, name: str, format: TypeAttribute, shape: tuple[int, ...]) -> None:
    """A float may be stored in any wide float dtype, for what is computed is f32; all else as its type says."""
    from ..dialects.operations._values import torch_dtype

    stored, typed = weights.dtype(name), torch_dtype(format)
    if weights.shape(name) != shape:
        raise MxloomError(f"{name}: is {list(weights.shape(name))}, {MODULE} says {list(shape)}.")
    if not (stored in wide_floats() if typed.is_floating_point else stored == typed):
        raise MxloomError(f"{name}: is stored as {stored}, {MODULE} types it {format}.")


def _settings(folder: Path) -> dict[str, Any]:
    """Our part of config.json: name, task, and second names of weights."""
    path = folder / CONFIG
    own = read_json(path, TEXT_LIMIT).get("mxloom")
    if not isinstance(own, dict) or own.get("task") not in TASKS or not isinstance(own.get("name"), str):
        raise MxloomError(f'{path}: "mxloom" must give name and task (one of {", ".join(TASKS)}).')
    check_version(path, own)
    if own["name"] in (".", "..") or any(mark in own["name"] for mark in "/\0"):
        raise MxloomError(f'{path}: the name {own["name"]!a:.80} in "mxloom" is no plain name.')
    tied = own.get("tied")
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise MxloomError(f'{path}: "tied" in "mxloom" must map names of weights to names of weights.')
    return own


def _source(folder: Path, module: ModuleOp, weights: WeightStore, own: dict[str, Any], names: list[str]) -> ModelSource:
    """The model's structure as config.json gives it, on the weights of the artefact."""
    files = tuple(folder / name for name in names if "/" not in name)
    if "model_type" not in read_json(folder / CONFIG, TEXT_LIMIT):
        encoded = {part for op in _parameters(module) for part in weights.parts(op.source.data).values()}
        held = tuple(name for name in weights if name not in encoded)
        return ModelSource(_structureless(own["name"]), weights, own["name"], own["task"], files=files, held=held)
    check_config(folder, len(weights))
    with quiet_transformers() as notes:
        config = read_config(folder)
        model = build(config, folder, weights)
        _check_structure(folder, model, module, weights)
        rebuild_constants(model, folder)
    _check_task(folder, model, own["task"])
    return ModelSource(model, weights, own["name"], own["task"], config, files, tuple(notes))


def _check_structure(folder: Path, model: PreTrainedModel, module: ModuleOp, weights: WeightStore) -> None:
    """config.json describes the model that the weights belong to, name by name, and every one of them is read by it."""
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [
        f"{name} is {list(held)} in {WEIGHTS} and {list(shape)} by {CONFIG}"
        for name, shape in state.items()
        if (held := weights.shape_of(name)) is not None and held != shape
    ]
    missing = [f"{name} is not in {WEIGHTS}" for name in state if weights.shape_of(name) is None]
    known = {*state, *(name for name, _ in non_persistent_buffers(model))}
    parts = {part.rpartition(".")[0] for part in known}
    left = [
        f"{name} belongs to no part of the model"
        for name in dict.fromkeys(op.source.data for op in _parameters(module))
        if SECOND_NAME not in name and name not in known and "." in name and not _in_part(name, {*parts, *known})
    ]
    if wrong or missing or left:
        what = listed([*wrong, *missing, *left], "; ")
        raise MxloomError(f"{folder / CONFIG}: describes another model than the artefact holds: {what}.")


def _in_part(name: str, parts: set[str]) -> bool:
    """Whether a module of the model has the constant `name` (one that torch has lifted out of its code), or a pass has
    made it from a weight of the model (`weight.plus_one`)."""
    return name.rpartition(".")[0] in parts


def _check_task(folder: Path, model: PreTrainedModel, task: str) -> None:
    """The task is the one that the model's class is for, or one that a user can have given to such a class."""
    usual = task_of(model, None)
    text = getattr(model, "main_input_name", "") == "input_ids"
    if task not in (usual, "module") and not (task == "embedding" and text):
        raise MxloomError(f'{folder / CONFIG}: a {type(model).__name__} is a model for {usual}, not for "{task}".')


def _structureless(name: str) -> Any:
    """Stands for a module whose Python code the artefact does not hold; its compiled form runs."""
    from torch import nn

    class Structureless(nn.Module):
        def forward(self, *inputs: Any, **named: Any) -> Any:
            raise MxloomError(f"{name}: the artefact holds the compiled module, not the Python code of the model.")

    return Structureless()
