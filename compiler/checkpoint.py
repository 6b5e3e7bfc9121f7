"""A Hugging Face folder: the architecture built without memory for its weights, which stay in their files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends.checkpoint_files import checkpoint_files, read_json
from ..backends.weight_store import WeightStore, wide_floats
from ..dialects.errors import MxloomError
from ._quiet import quiet_transformers
from .example_inputs import task_of
from .model_source import ModelSource, non_persistent_buffers

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

CONFIG_LIMIT = 4_000_000
"""Bytes of config.json that are read at most."""

CONSTANTS_LIMIT = 2 << 30
"""Bytes of non-persistent buffers; a causal mask over 32 768 positions takes half of it."""

_LAYER_COUNTS = re.compile(r"(num_|n_)?((hidden|encoder|decoder|transformer)_)?layers?|depths?|num_blocks")

_LISTED = 8

_SHOWN = 500
"""Characters of another library's error."""


def open_folder(folder: Path) -> ModelSource:
    """The model in `folder`: config.json and safetensors. Its parameters are on the meta device, its weights lazy."""
    files = checkpoint_files(folder)
    weights = WeightStore.from_safetensors(folder)
    check_config(folder, len(weights))
    with quiet_transformers() as notes:
        config = read_config(folder)
        model = build(config, folder, weights)
        mapping, made = _names(model, weights), list[str]()
        _check_dtypes(folder, model, weights, mapping)
        if mapping is not None:
            _check_shapes(folder, model, weights, mapping)
            weights, made = _take(folder, model, weights, mapping, notes)
        rebuild_constants(model, folder, made)
    if mapping is None:
        weights, notes = _load_in_memory(model, folder, notes)
    for name in made:
        weights.put(name, model.state_dict()[name])
    for name, buffer in non_persistent_buffers(model):
        weights.put(name, buffer)
    beside = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _BESIDE)
    beside = [path for path in beside if path not in files]
    return ModelSource(
        model, weights, folder.resolve().name, task_of(model, folder), config, (*beside, *sorted(files)), tuple(notes)
    )


_BESIDE = {".json", ".txt", ".model", ".jinja"}


def check_config(folder: Path, tensors: int) -> dict[str, Any]:
    """config.json as it stands; MxloomError where it is absent, broken, or asks for more layers than there are tensors.

    Done before anything is built: ten million layers would take minutes even without weights.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise MxloomError(f"{folder}: no config.json, so the architecture of its weights is unknown.")
    fields = read_json(path, CONFIG_LIMIT)
    if "quantization_config" in fields:
        method = fields["quantization_config"]
        method = method.get("quant_method", "?") if isinstance(method, dict) else "?"
        raise MxloomError(
            f"{path}: the checkpoint is already quantized (quantization_config, method {method!r}); "
            "mxloom starts from float weights. Use the original checkpoint."
        )
    for key, value in _numbers(fields):
        if _LAYER_COUNTS.fullmatch(key) and value > tensors:
            raise MxloomError(f"{path}: {key} is {value}, but the checkpoint holds only {tensors} tensors.")
    return fields


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every integer of the configuration and of the configurations inside it, with its key."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int):
                yield key, number


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration as transformers reads it; code in the folder is never run."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, attn_implementation="eager"
        )  # pyright: ignore[reportReturnType]
    except Exception as error:
        raise MxloomError(f"{folder / 'config.json'}: transformers cannot read it: {in_one_line(error)}") from error


def architecture(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that config.json names, else the one transformers has for the configuration."""
    import transformers

    named: Any = config.architectures
    for name in named if isinstance(named, list) else ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and _fits(found, config):
            return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        found: Any = auto._model_mapping.get(type(config), None)
        if isinstance(found, type):
            return found
    raise MxloomError(f"{type(config).__name__}: transformers has no model for {config.architectures}.")


def _fits(model: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Whether the class is made for this kind of configuration: "architectures" and "model_type" may contradict."""
    return model.config_class is not None and isinstance(config, model.config_class)


def build(config: PreTrainedConfig, folder: Path, weights: WeightStore) -> PreTrainedModel:
    """The architecture in f32, whole on the meta device; `rebuild_constants` gives its constants their values.

    In between its names and shapes are compared with the weights, so that no size is believed before memory is taken.
    """
    import torch

    parameters = sum(1 for _ in weights)
    try:
        with _at_most(16 * parameters + 1024), torch.device("meta"):
            model = architecture(config)(config)
    except MxloomError:
        raise
    except Exception as error:
        raise _unbuildable(folder, config, error) from error
    return model.float().eval()


def _unbuildable(folder: Path, config: PreTrainedConfig, error: Exception) -> MxloomError:
    """What is wrong with the configuration; a word that transformers looked up in vain is named with its key."""
    path = folder / "config.json"
    if isinstance(error, KeyError) and error.args:
        keys = [key for key, value in _words(config.to_dict()) if value == error.args[0]]
        if keys:
            return MxloomError(f"{path}: {' or '.join(keys)} is {error.args[0]!r}, which transformers does not know.")
    return MxloomError(f"{path}: the model cannot be built: {in_one_line(error)}")


def _words(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text of the configuration and of the configurations inside it, with its key."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _words(value)
        elif isinstance(value, str):
            yield key, value


@contextmanager
def _at_most(limit: int) -> Iterator[None]:
    """Building a module with more than `limit` parameter tensors inside is an error."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    count = 0

    def counting(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise MxloomError(
                f"config.json describes a model of more than {limit} parameter tensors; the checkpoint holds far fewer."
            )

    hook = register_module_parameter_registration_hook(counting)
    try:
        yield
    finally:
        hook.remove()


def rebuild_constants(model: PreTrainedModel, folder: Path, made: Iterable[str] = ()) -> None:
    """Give what no file holds its value, computed in f32 by the architecture's own initialisation.

    That is every non-persistent buffer, every tensor that is a mere attribute of a module, and the parameters in
    `made`. Positions and frequencies are no weights: a checkpoint in bf16 must not round them. MxloomError where they
    would take more than `CONSTANTS_LIMIT` bytes, where the configuration in `folder` does not let them be computed, or
    where the initialisation draws one of `made` at random.
    """
    state = model.state_dict(keep_vars=True)
    unset = {**dict(non_persistent_buffers(model)), **{name: state[name] for name in made}}
    attributes = _meta_attributes(model)
    size = sum(tensor.nbytes for tensor in (*unset.values(), *attributes.values()))
    if size > CONSTANTS_LIMIT:
        raise MxloomError(f"{folder / 'config.json'}: its sizes ask for {size} bytes of constants, such as positions.")
    try:
        if unset or attributes:
            _rebuild(model, unset, attributes)
        random = _drawn(model, made)
    except Exception as error:
        raise _unbuildable(folder, model.config, error) from error
    if random:
        raise _missing(folder, random)


def _rebuild(model: PreTrainedModel, unset: Mapping[str, Tensor], attributes: Iterable[str]) -> None:
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    for name, tensor in unset.items():
        _set(model, name, _unset(tensor))
    _initialize(model)
    rest = [name for name in unset if _is_unset(_get(model, name))]
    if rest or attributes:
        _copy_constants(model, [*rest, *attributes])


def _initialize(model: PreTrainedModel) -> None:
    """Run the architecture's own initialisation over what is not marked as initialised."""
    import torch

    with torch.no_grad():
        for part in model.modules():
            part.__dict__.pop("_is_hf_initialized", None)
        model.initialize_weights()


def _drawn(model: PreTrainedModel, made: Iterable[str]) -> list[str]:
    """Which of the names the initialisation draws at random or, being parameters, leaves as they are: no constants."""
    from torch import nn

    first = {name: _get(model, name) for name in made}
    if not first:
        return []
    for name, tensor in first.items():
        _set(model, name, _unset(tensor))
    _initialize(model)
    again = {name: _get(model, name) for name in first}
    for name, tensor in first.items():
        _set(model, name, tensor)
    return [
        name
        for name, tensor in first.items()
        if (isinstance(tensor, nn.Parameter) if _is_unset(again[name]) else not tensor.equal(again[name]))
    ]


def _meta_attributes(model: nn.Module) -> dict[str, Tensor]:
    """Tensors on the meta device that modules hold as plain attributes, by full name."""
    import torch

    return {
        f"{path}.{name}" if path else name: value
        for path, part in model.named_modules()
        for name, value in part.__dict__.items()
        if isinstance(value, torch.Tensor) and value.is_meta
    }


def _get(model: nn.Module, name: str) -> Tensor:
    path, _, own = name.rpartition(".")
    return getattr(model.get_submodule(path), own)


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor where a parameter, a buffer or an attribute of that name is."""
    import torch

    path, _, own = name.rpartition(".")
    part = model.get_submodule(path)
    if own in part._parameters:
        part._parameters[own] = torch.nn.Parameter(value, value.is_floating_point())
    else:
        (part._buffers if own in part._buffers else part.__dict__)[own] = value


def _unset(buffer: Tensor) -> Tensor:
    """Memory of the buffer's shape, filled with what no initialisation leaves behind."""
    import torch

    mark = float("nan") if buffer.is_floating_point() else True if buffer.dtype == torch.bool else 77
    return torch.full(buffer.shape, mark, dtype=buffer.dtype, device="cpu")


def _is_unset(buffer: Tensor) -> bool:
    return buffer.numel() > 0 and bool((buffer == _unset(buffer)).all() or buffer.isnan().all())


def _copy_constants(model: PreTrainedModel, names: list[str]) -> None:
    """Constants that the initialisation does not set come from a model built with memory, once."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        real = type(model)(model.config)
    for name in names:
        _set(model, name, _get(real, name).detach().clone())


def _names(model: PreTrainedModel, weights: WeightStore) -> dict[str, str] | None:
    """Name in the model to name in the checkpoint, or None where transformers fuses or splits tensors on load.

    transformers' own renaming decides: old names, and the base model's prefix added or taken away.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: Any = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    state = model.state_dict()
    mapping: dict[str, str] = {}
    for own in weights:
        name, converted = rename_source_key(own, renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            return None
        mapping[name] = own
    return mapping


def _check_dtypes(folder: Path, model: nn.Module, weights: WeightStore, mapping: Mapping[str, str] | None) -> None:
    """A float of the model is a wide float in the file; what is computed from codes without their scales is wrong."""
    state = {name: tensor.is_floating_point() for name, tensor in model.state_dict().items()}
    if mapping is None:  # transformers fuses or splits: which name becomes which is its secret
        mapping, state = {own: own for own in weights}, dict.fromkeys(weights, all(state.values()))
    floats = wide_floats()
    wrong = [
        f"{mapping[name]} is {str(dtype).removeprefix('torch.')}"
        for name, is_float in state.items()
        if is_float and name in mapping and (dtype := weights.dtype(mapping[name])) not in floats
    ]
    wrong = [text for text in wrong if not _is_constant(text.split(" is ")[0], ())]
    if wrong:
        raise MxloomError(
            f"{folder}: weights that are no floats, though the model computes with floats: {listed(wrong)}. "
            "A checkpoint in 16 or 32 bits is needed."
        )


def _check_shapes(folder: Path, model: nn.Module, weights: WeightStore, mapping: Mapping[str, str]) -> None:
    wrong = [
        f"{name} is {list(weights.shape(mapping[name]))} in the file and {list(tensor.shape)} by config.json"
        for name, tensor in model.state_dict().items()
        if name in mapping and tuple(tensor.shape) != weights.shape(mapping[name])
    ]
    if wrong:
        raise MxloomError(f"{folder}: shapes that disagree with config.json: {listed(wrong, '; ')}.")


def _take(
    folder: Path, model: PreTrainedModel, weights: WeightStore, mapping: dict[str, str], notes: list[str]
) -> tuple[WeightStore, list[str]]:
    """The store by the model's names: tied weights stored once, nothing missing, what is left over noted.

    Beside it the names that checkpoints of the architecture leave out, because its initialisation makes them.
    """
    state = model.state_dict()
    for alias, target in dict(getattr(model, "all_tied_weights_keys", {})).items():
        _tie(model, weights, mapping, alias, target, notes)
    absent = [name for name in state if name not in mapping]
    made = [name for name in absent if _is_left_out(model, name)]
    missing = [name for name in absent if name not in made]
    if missing:
        raise _missing(folder, missing)
    constants = {name for name, _ in non_persistent_buffers(model)}
    unexpected = sorted(name for name in mapping if name not in state and not _is_constant(name, constants))
    if unexpected:
        notes.append(_left_over(unexpected))
    return weights.renamed({name: mapping[name] for name in state if name in mapping}), made


def _is_left_out(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers lets a checkpoint of the model lack the tensor."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def _missing(folder: Path, names: list[str]) -> MxloomError:
    return MxloomError(
        f"{folder}: {len(names)} tensors that config.json asks for are missing: {listed(names)}. "
        "The checkpoint is incomplete or belongs to another architecture."
    )


def _is_constant(name: str, constants: Iterable[str]) -> bool:
    """Old checkpoints carry positions and frequencies, which the architecture computes."""
    return name in constants or name.endswith(("rotary_emb.inv_freq", "position_ids", ".attn.bias", ".masked_bias"))


def _tie(
    model: PreTrainedModel,
    weights: WeightStore,
    mapping: dict[str, str],
    alias: str,
    target: str,
    notes: list[str],
) -> None:
    """Let tied names share what the file has; where it has both and they differ, the tie is cut."""
    if alias not in mapping and target in mapping:
        mapping[alias] = mapping[target]
    elif target not in mapping and alias in mapping:
        mapping[target] = mapping[alias]
    elif alias in mapping and target in mapping and mapping[alias] != mapping[target]:
        one, other = weights[mapping[alias]], weights[mapping[target]]
        if one.dtype == other.dtype and one.equal(other):
            mapping[alias] = mapping[target]
            return
        _untie(model, alias)
        notes.append(f"{alias} and {target} are tied by config.json but differ in the checkpoint: both are kept")


def _untie(model: PreTrainedModel, alias: str) -> None:
    from torch import nn

    path, _, own = alias.rpartition(".")
    part = model.get_submodule(path)
    part._parameters[own] = nn.Parameter(model.get_parameter(alias).detach().clone())
    model.all_tied_weights_keys.pop(alias)
    model.config.tie_word_embeddings = False


def _load_in_memory(model: PreTrainedModel, folder: Path, notes: list[str]) -> tuple[WeightStore, list[str]]:
    """transformers fuses or splits what lies in the file: let it, in f32 and in memory, and say so."""
    import torch

    with quiet_transformers() as more:
        try:
            answer: Any = type(model).from_pretrained(
                folder,
                config=model.config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            loaded, report = answer
        except Exception as error:
            raise MxloomError(f"{folder}: transformers cannot load it: {in_one_line(error)}") from error
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(str(item) for item in report.get(problem) or ()):
            raise MxloomError(f"{folder}: {problem.replace('_', ' ')} on loading: {listed(found)}.")
    unexpected: list[str] = sorted(report.get("unexpected_keys") or [])
    if unexpected:
        more.append(_left_over(unexpected))
    more.append("names in the checkpoint are fused or split on load: the weights were converted into memory, in f32")
    return WeightStore.from_state_dict(loaded.state_dict(), copy=False), [*notes, *more]


def _left_over(names: list[str]) -> str:
    return f"{len(names)} tensors of the checkpoint belong to no part of the model: {listed(names)}"


def listed(items: list[str], separator: str = ", ") -> str:
    """The first few of `items`, and how many more there are."""
    rest = f"{separator}and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return separator.join(items[:_LISTED]) + rest


def in_one_line(error: Exception) -> str:
    """Kind of error and its text in one line, for transformers' validation says what is wrong in the second; capped."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}"
