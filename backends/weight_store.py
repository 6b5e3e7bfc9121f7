"""Weights by name: memory-mapped where they come from files, replaced without touching what shares them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ..dialects.errors import MxloomError, did_you_mean
from .checkpoint_files import checkpoint_files
from .safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype
    from xdsl.ir import TypeAttribute

    from ..dialects.formats import Encoded

PARTS = (
    *("codes", "scales", "global_scale", "zero_points"),
    *("high_codes", "high_scales", "high_global_scale", "high_zero_points", "choice", "offsets"),
)
"""What an encoded tensor `name` is stored as: `name.codes`, `name.scales` ..."""

ALIGNMENT = 64
"""Bytes; what torch aligns to on CPUs."""


@dataclass(frozen=True)
class _Stored:
    """A tensor that stays in its file until someone asks for it."""

    file: SafetensorsFile
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.entries[self.name].shape

    @property
    def dtype(self) -> Dtype:
        return self.file.entries[self.name].torch_dtype

    def load(self) -> Tensor:
        return self.file[self.name]


class WeightStore(Mapping[str, "Tensor"]):
    """Tensors by their name in the model.

    `store[name]` is the tensor as stored and must not be written to. An alias (a tied weight) is a second name of one
    tensor: stored once and counted once. `put` under either name leaves the other as it was.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor | _Stored] = {}
        self._aliases: dict[str, str] = {}
        self._formats: dict[str, tuple[TypeAttribute, tuple[int, ...]]] = {}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], *, copy: bool = True) -> WeightStore:
        """The tensors as they are now; two names of one tensor become a name and its alias.

        A copy, so that what is done to a live model later changes nothing here; without `copy` the tensors themselves,
        which nobody else may hold.
        """
        store, seen = cls(), {}
        for name, tensor in tensors.items():
            tensor = tensor.detach()
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            if tensor.numel() and place in seen:
                store._aliases[name] = seen[place]
            else:
                store._tensors[name] = tensor.clone() if copy else tensor
                seen[place] = name
        return store

    @classmethod
    def from_safetensors(cls, folder: str | Path) -> WeightStore:
        """Every tensor of a checkpoint folder, under the checkpoint's own names, memory-mapped.

        The folder holds `model.safetensors`, or `model.safetensors.index.json` and its shards, or exactly one other
        `.safetensors` file. Raises MxloomError for anything else, pickle checkpoints included.
        """
        store = cls()
        for path, names in checkpoint_files(Path(folder)).items():
            file = SafetensorsFile(path)
            for name in file if names is None else names:
                if name not in file:
                    raise MxloomError(f"{path}: tensor {name!r} is missing, though the shard index says it is here.")
                store._tensors[name] = _Stored(file, name)
        return store

    @classmethod
    def from_file(cls, path: Path) -> WeightStore:
        """Every tensor of one safetensors file, memory-mapped."""
        store, file = cls(), SafetensorsFile(path)
        store._tensors.update({name: _Stored(file, name) for name in file})
        return store

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entry(name)
        return entry.load() if isinstance(entry, _Stored) else entry

    def __iter__(self) -> Iterator[str]:
        yield from self._tensors
        yield from self._aliases

    def __len__(self) -> int:
        return len(self._tensors) + len(self._aliases)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or name in self._aliases

    @property
    def aliases(self) -> Mapping[str, str]:
        """Second names of tensors: alias to the name under which the tensor is stored."""
        return dict(self._aliases)

    def canonical(self, name: str) -> str:
        """The name under which `name` is stored: itself, or what it is an alias of."""
        return self._aliases.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes, without reading the tensor."""
        return tuple(self._entry(name).shape)

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Sizes of a tensor that is stored wide or declared as encoded; None where it is neither."""
        if name not in self:
            return self._formats[name][1] if name in self._formats else None
        return self.shape(name)

    def dtype(self, name: str) -> Dtype:
        """The dtype as stored, without reading the tensor."""
        return self._entry(name).dtype

    def stored_bits(self, name: str) -> int:
        """Bits that `name` takes as stored; for an encoded tensor the sum over its parts."""
        names = [name] if name in self else self.parts(name).values()
        if not names:
            raise self._unknown(name)
        return sum(8 * prod(self.shape(part)) * self.dtype(part).itemsize for part in names)

    def wide(self, name: str) -> Tensor:
        """The values in f32 (integers and booleans as they are): what a parameter of a wide type means.

        An encoded tensor is decoded. Values lie as torch would allocate them: a matrix product may sum in another
        order, and so end in another last bit, where its operands are not aligned, as in a memory-mapped file.
        """
        import torch

        if name not in self and name in self._formats:
            return self.encoded(name, *self._formats[name]).decode()
        tensor = self[name]
        tensor = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        return tensor if tensor.is_meta or tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()

    def parts(self, name: str) -> dict[str, str]:
        """The parts of an encoded tensor that are there: part to the name it is stored under."""
        if f"{name}.codes" not in self:
            return {}
        return {part: f"{name}.{part}" for part in PARTS if f"{name}.{part}" in self}

    def encoded(self, name: str, format: TypeAttribute, shape: tuple[int, ...]) -> Encoded:
        """The codes and scales of `name`, a tensor of `shape` in `format`. MxloomError if the parts do not fit it."""
        from ..dialects.formats import Encoded

        parts = self.parts(name)
        if not parts:
            raise MxloomError(f"{name}: no codes are stored for it, though the module types it {format}.")
        try:
            return Encoded.from_tensors(format, shape, {part: self[stored] for part, stored in parts.items()})
        except MxloomError as error:
            raise MxloomError(f"{name}: {error}") from error

    def put(self, name: str, tensor: Tensor) -> None:
        """Store `tensor` as `name` from now on; other names of what was there keep what was there."""
        self.discard(name)
        self._tensors[name] = tensor

    def put_encoded(self, name: str, encoded: Encoded) -> None:
        """Store codes and scales of `name` in place of its values; other names of these keep them."""
        for part in PARTS:
            self.discard(f"{name}.{part}")
        for part, tensor in encoded.tensors().items():
            self.put(f"{name}.{part}", tensor)
        self.discard(name)
        self.declare(name, encoded.format, encoded.shape)

    def declare(self, name: str, format: TypeAttribute, shape: tuple[int, ...]) -> None:
        """Say that the parts stored for `name` are a tensor of `shape` in `format`; MxloomError if they cannot be."""
        from ..dialects.formats._builtin import numbers_of

        numbers, parts = numbers_of(format), self.parts(name)
        if not parts:
            raise MxloomError(f"{name}: no codes are stored for it, though it is typed {format}.")
        if reason := numbers.why_not(shape):
            raise MxloomError(f"{name}: {reason}")
        tensors = {part: self[stored] for part, stored in parts.items()}
        with _named(name):
            layout = numbers.layout(shape, tensors)
        if parts.keys() != layout.keys():
            raise MxloomError(f"{name}: stored as {', '.join(parts)}; {format} has {', '.join(layout)}.")
        for part, (dtype, size) in layout.items():
            held = self.dtype(parts[part]), self.shape(parts[part])
            if held != (dtype, tuple(size)):
                raise MxloomError(
                    f"{parts[part]}: is {held[0]} of shape {list(held[1])}; "
                    f"{list(shape)} in {format} takes {dtype} of shape {list(size)}."
                )
        with _named(name):
            numbers.check(tensors, shape)
        self._formats[name] = (format, tuple(shape))

    def discard(self, name: str) -> None:
        """Forget `name`; other names of the same tensor keep it."""
        self._aliases.pop(name, None)
        entry = self._tensors.pop(name, None)
        followers = [alias for alias, target in self._aliases.items() if target == name]
        if entry is None or not followers:
            return
        heir, *others = followers
        del self._aliases[heir]
        self._tensors[heir] = entry
        self._aliases.update(dict.fromkeys(others, heir))

    def alias(self, name: str, target: str) -> None:
        """Make `name` a second name of `target`, whether that is stored wide or encoded."""
        if target not in self and (parts := self.parts(target)):
            self.discard(name)
            for part, stored in parts.items():
                self.alias(f"{name}.{part}", stored)
            self._formats[name] = self._formats[target]
            return
        self._entry(target)
        if self.canonical(target) != self.canonical(name):
            self.discard(name)
            self._aliases[name] = self.canonical(target)

    def release(self) -> None:
        """Let the system have back the memory of what was read from files; it is read again when asked for."""
        stored = (entry for entry in self._tensors.values() if isinstance(entry, _Stored))
        for file in {id(entry.file): entry.file for entry in stored}.values():
            file.release()

    def copy(self) -> WeightStore:
        """A store that may change on its own; the tensors are shared."""
        other = WeightStore()
        other._tensors, other._aliases = dict(self._tensors), dict(self._aliases)
        other._formats = dict(self._formats)
        return other

    def renamed(self, names: Mapping[str, str]) -> WeightStore:
        """A store whose `name` is this one's `names[name]`; two names of one tensor become a name and its alias."""
        other, seen = WeightStore(), {}
        for name, own in names.items():
            own = self.canonical(own)
            if own in seen:
                other._aliases[name] = seen[own]
            else:
                other._tensors[name] = self._tensors[own]
                seen[own] = name
        return other

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """Read the tensors one by one; MxloomError names the first with a NaN or an infinity, and how many it has."""
        for name in self._tensors if names is None else names:
            tensor = self[name]
            if not tensor.is_floating_point():
                continue
            bad = tensor.numel() - int(tensor.float().isfinite().sum())
            if bad:
                raise MxloomError(
                    f"{name}: {bad} of {tensor.numel()} values are NaN or infinite. "
                    "No format can carry them; mend the checkpoint first."
                )

    def check_scales(self) -> None:
        """MxloomError names the first encoded tensor with a scale that is NaN or infinite, which no reader survives."""
        for name in self._formats:
            for part in {part for part in self.parts(name) if part.endswith(("scales", "global_scale"))}:
                scales = self[f"{name}.{part}"]
                bad = scales.numel() - int(scales.float().isfinite().sum())
                if bad:
                    raise MxloomError(
                        f"{name}: {bad} of {scales.numel()} {part.replace('_', ' ')} values are NaN or infinite; "
                        "it is not written. Its values, or the pass that made its scales, are at fault."
                    )

    def check_encoded(self) -> None:
        """Decode what is encoded, tensor by tensor; MxloomError names the first whose values are not all finite."""
        seen: set[str] = set()
        for name, (format, shape) in self._formats.items():
            codes = self.canonical(f"{name}.codes")
            if codes in seen:
                continue
            seen.add(codes)
            values = self.encoded(name, format, shape).decode()
            bad = values.numel() - int(values.isfinite().sum())
            if bad:
                raise MxloomError(f"{name}: {bad} of {values.numel()} values, or their scales, are NaN or infinite.")

    def _entry(self, name: str) -> Tensor | _Stored:
        try:
            return self._tensors[self.canonical(name)]
        except KeyError:
            raise self._unknown(name) from None

    def _unknown(self, name: str) -> UnknownWeightError:
        return UnknownWeightError(f"no weight is named {name!r}{did_you_mean(name, self)}.")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors about a part of an encoded tensor, which begin with the part's name, begin with `name` and its name."""
    try:
        yield
    except MxloomError as error:
        raise MxloomError(f"{name}.{error}") from error


def wide_floats() -> tuple[Dtype, ...]:
    """The float dtypes in which a weight may be stored that is no encoded one."""
    import torch

    return torch.float64, torch.float32, torch.bfloat16, torch.float16


class UnknownWeightError(MxloomError, KeyError):
    """No such name in the store."""

    def __str__(self) -> str:
        return str(self.args[0])
