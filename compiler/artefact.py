"""An artefact is one folder: module.mlir, weights.safetensors, config.json, tokenizer, report.json, provenance.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..backends.checkpoint_files import read_json
from ..backends.safetensors_file import write_safetensors
from ..backends.weight_store import WeightStore
from ..dialects.errors import MxloomError, UsageError
from ._atomic import new_folder
from .checkpoint import build, check_config, read_config
from .model_source import TASKS, ModelSource
from .tokenizer_files import save_companions

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.dialects.builtin import ModuleOp, TensorType
    from xdsl.ir import TypeAttribute

    from ..dialects.operations.parameter import ParameterOp
    from .compiled import Compiled

FORMAT_VERSION = 1

MODULE, WEIGHTS, CONFIG = "module.mlir", "weights.safetensors", "config.json"
REPORT, PROVENANCE = "report.json", "provenance.json"

SECOND_NAME = ".as."
"""What `pack` puts between a weight's name and a number where one weight is stored in two formats."""

_TEXT_LIMIT = 50_000_000
"""Bytes of module.mlir and of each JSON file that are read at most."""


def save(compiled: Compiled, directory: str | Path) -> Path:
    """Write `compiled` as the folder `directory`, whole or not at all, and return its path.

    Weights lie packed in their formats; wide ones as the checkpoint had them, tied ones once. An artefact that is
    there is replaced; UsageError for any other folder that is not empty. MxloomError where a scale is not finite.
    """
    target = Path(directory)
    _check_target(target)
    module, weights = compiled.packed()
    weights.check_scales()
    tensors, tied = _stored(compiled.source, module, weights)
    with new_folder(target) as folder:
        (folder / MODULE).write_text(_text(module), encoding="utf-8")
        write_safetensors(folder / WEIGHTS, tensors)
        save_companions(compiled.source.files, folder)
        _write_json(folder / CONFIG, _config(compiled.source, module, tied))
        _write_json(folder / REPORT, compiled.report())
        provenance = {
            "format_version": FORMAT_VERSION,
            "pipeline": compiled.pipeline,
            "recipe": compiled.recipe,
            **compiled.provenance,
            "files": {path.relative_to(folder).as_posix(): _sha256(path) for path in _files(folder)},
        }
        _write_json(folder / PROVENANCE, provenance)
    return target


def load(directory: str | Path) -> Compiled:
    """The artefact in `directory`: runs bit for bit as what was saved.

    Nothing in it is believed: hashes, shapes and sizes are checked, and no code in it is run. Raises MxloomError that
    names the file (and the line of module.mlir) that is at fault.
    """
    from .compiled import Compiled

    folder = Path(directory)
    provenance = _check_files(folder)
    module = _parse(folder / MODULE)
    weights = WeightStore.from_file(folder / WEIGHTS)
    settings = _settings(folder)
    _check_parameters(folder, module, weights, settings["tied"])
    source = _source(folder, weights, settings, sorted(provenance["files"]))
    return Compiled(
        module=module,
        weights=weights,
        source=source,
        pipeline=_text_field(folder, provenance, "pipeline"),
        recipe=provenance.get("recipe"),
        provenance={key: value for key, value in provenance.items() if key not in _OWN_FIELDS},
    )


_OWN_FIELDS = {"format_version", "files", "recipe"}


def _check_target(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target}: is there and is no folder; name another place.")
    if target.is_dir() and any(target.iterdir()) and not is_artefact(target):
        raise UsageError(
            f"{target}: holds files that are no mxloom artefact; nothing was overwritten. Name a new folder."
        )


def is_artefact(folder: Path) -> bool:
    """Whether the folder is one that `save` wrote: it has a module and a provenance."""
    return (folder / MODULE).is_file() and (folder / PROVENANCE).is_file()


def _stored(source: ModelSource, module: ModuleOp, weights: WeightStore) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What the file holds, each tensor once, and the second names of what it holds.

    That is what the module reads, and what else belongs to the model's state; a name that was tied to one that the
    module reads stays tied to it, in whatever format that is now.
    """
    read = dict.fromkeys(op.source.data for op in _parameters(module))
    first = {source.weights.canonical(name): name for name in reversed(read) if name in source.weights}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name in dict.fromkeys([*read, *source.model.state_dict()]):
        twin = name if name in read else first.get(source.weights.canonical(name), name)
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def _check_files(folder: Path) -> dict[str, Any]:
    """The provenance, after every file it lists was found to have the bytes that were written."""
    if not folder.is_dir():
        raise MxloomError(f"{folder}: no such folder.")
    if not is_artefact(folder):
        raise MxloomError(f"{folder}: no mxloom artefact ({MODULE} or {PROVENANCE} is missing).")
    provenance = read_json(folder / PROVENANCE, _TEXT_LIMIT)
    version = provenance.get("format_version")
    if version != FORMAT_VERSION:
        raise MxloomError(
            f"{folder}: format version {version!r}; this mxloom reads {FORMAT_VERSION}. Compile it again."
        )
    files = provenance.get("files")
    if not isinstance(files, dict) or not files.keys() >= {MODULE, WEIGHTS, CONFIG}:
        raise MxloomError(f'{folder / PROVENANCE}: "files" must map the names of the files to their SHA-256.')
    for name, digest in files.items():
        _check_file(folder, name, digest)
    return provenance


def _check_file(folder: Path, name: str, digest: Any) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise MxloomError(f"{folder / PROVENANCE}: {name!r} leads out of the folder.")
    if not path.is_file():
        raise MxloomError(f"{path}: missing, though {PROVENANCE} lists it.")
    if _sha256(path) != digest:
        raise MxloomError(f"{path}: changed since it was written (its SHA-256 differs from {PROVENANCE}).")


def _text_field(folder: Path, fields: dict[str, Any], name: str) -> str:
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise MxloomError(f"{folder / PROVENANCE}: {name!r} must be a string.")
    return value


def _parse(path: Path) -> ModuleOp:
    from xdsl.utils.exceptions import ParseError, VerifyException

    from ..dialects.mx import parse_module

    if path.stat().st_size > _TEXT_LIMIT:
        raise MxloomError(f"{path}: more than {_TEXT_LIMIT} bytes.")
    try:
        return parse_module(path.read_text(encoding="utf-8"), str(path))
    except ParseError as error:
        place = error.span.input
        line = place.content[: error.span.start].count("\n") + 1  # pyright: ignore[reportArgumentType, reportCallIssue]
        raise MxloomError(f"{path}:{line}: {error.msg}") from error
    except (VerifyException, UnicodeDecodeError, RecursionError) as error:
        raise MxloomError(f"{path}: {str(error).splitlines()[0]}") from error


def _check_parameters(folder: Path, module: ModuleOp, weights: WeightStore, tied: dict[str, str]) -> None:
    """Every parameter of the module is there, in its shape, and takes the bits that its format says."""
    from ..dialects.formats import is_wide

    path = folder / WEIGHTS
    own = {name: other for name, other in tied.items() if other in weights}
    for name, other in own.items():
        weights.alias(name, other)
    for op in _parameters(module):
        type = cast("TensorType", op.result.type)
        name, format, shape = op.source.data, cast("TypeAttribute", type.element_type), type.get_shape()
        try:
            if not is_wide(format):
                weights.declare(name, format, shape)
            elif weights.shape(name) != shape:
                raise MxloomError(f"{name}: is {list(weights.shape(name))}, {MODULE} says {list(shape)}.")
        except MxloomError as error:
            raise MxloomError(f"{path}: {error}") from error
    for name in tied.keys() - own.keys():
        weights.alias(name, tied[name])


def _settings(folder: Path) -> dict[str, Any]:
    """Our part of config.json: name, task, and second names of weights."""
    path = folder / CONFIG
    own = read_json(path, _TEXT_LIMIT).get("mxloom")
    if not isinstance(own, dict) or own.get("task") not in TASKS or not isinstance(own.get("name"), str):
        raise MxloomError(f'{path}: "mxloom" must give name and task (one of {", ".join(TASKS)}).')
    tied = own.get("tied")
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise MxloomError(f'{path}: "tied" in "mxloom" must map names of weights to names of weights.')
    return own


def _source(folder: Path, weights: WeightStore, own: dict[str, Any], names: list[str]) -> ModelSource:
    """The model's structure as config.json gives it, on the weights of the artefact."""
    files = tuple(folder / name for name in names if "/" not in name)
    if "model_type" not in read_json(folder / CONFIG, _TEXT_LIMIT):
        return ModelSource(_structureless(own["name"]), weights, own["name"], own["task"], files=files)
    check_config(folder, len(weights))
    config = read_config(folder)
    model = build(config, folder, weights)
    return ModelSource(model, weights, own["name"], own["task"], config, files)


def _structureless(name: str) -> Any:
    """Stands for a module whose Python code the artefact does not hold; its compiled form runs."""
    from torch import nn

    class Structureless(nn.Module):
        def forward(self, *inputs: Any, **named: Any) -> Any:
            raise MxloomError(f"{name}: the artefact holds the compiled module, not the Python code of the model.")

    return Structureless()
