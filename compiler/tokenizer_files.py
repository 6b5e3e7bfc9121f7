"""The tokenizer beside a model: read from its files, written into an artefact."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..dialects.errors import MxloomError, shortened
from ._quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)
"""Files beside the weights that others need to use the model."""

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
"""Those of them that hold a tokenizer's vocabulary."""


def load_tokenizer(name: str, files: Sequence[Path]) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder of `files`, or inside the one GGUF file.

    MxloomError if there is none, if the files that hold its vocabulary are missing (transformers would make up an empty
    one), or if it cannot be read.
    """
    from transformers import AutoTokenizer

    if not files:
        raise MxloomError(f"{name}: no tokenizer belongs to a module in memory; give tokenizer=.")
    folder, inside = files[0].parent, files[0].suffix == ".gguf"
    options = {"gguf_file": files[0].name} if inside else {}
    try:
        with quiet_transformers():
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:
        raise MxloomError(_unreadable(files[0] if inside else folder, error)) from error
    absent = [] if inside else _absent(folder, getattr(type(loaded), "vocab_files_names", {}))
    if absent:
        raise MxloomError(_missing(folder, f"a {type(loaded).__name__} needs {' or '.join(absent)}"))
    return loaded


def _absent(folder: Path, names: Mapping[str, str]) -> list[str]:
    """What such a tokenizer could be read from, where it is not there: one file of all, or all files of its parts."""
    whole = names.get("tokenizer_file", "tokenizer.json")
    parts = [names[part] for part in ("vocab_file", "merges_file") if part in names]
    complete = bool(parts) and all((folder / part).is_file() for part in parts)
    if not names or complete or (folder / whole).is_file():
        return []
    return list(dict.fromkeys([whole, *([" with ".join(parts)] if parts else [])]))


def _unreadable(place: Path, error: Exception) -> str:
    """Why transformers gave no tokenizer: none of the files that hold one is there, or what is wrong with them."""
    present = [file for file in VOCABULARIES if place.is_file() or (place / file).is_file()]
    if not present:
        return _missing(place, f"none of {', '.join(VOCABULARIES)} is there")
    reason = shortened(" ".join(str(error).split()) or type(error).__name__, 300)
    what = "the tokenizer in it" if place.is_file() else f"the tokenizer in {', '.join(present)}"
    return f"{place}: {what} cannot be read: {reason}\n  do: {_advice(place)}"


def _missing(folder: Path, what: str) -> str:
    return f"{folder}: the model has no tokenizer there: {what}\n  do: {_advice(folder)}"


def _advice(place: Path) -> str:
    from .artefact_files import is_artefact

    if is_artefact(place):
        return "put the tokenizer's files beside the model that was compiled and compile again, or give tokenizer="
    return "copy the tokenizer's files from where the model came from into that folder, or give tokenizer= in Python"


def save_companions(files: Sequence[Path], folder: Path) -> None:
    """Put what belongs to a model beside its weights into `folder`: tokenizer, generation settings, pooling."""
    if files and files[0].suffix == ".gguf":
        with quiet_transformers():
            load_tokenizer(files[0].stem, files).save_pretrained(folder)
        return
    for path in files:
        if path.name in COMPANIONS:
            shutil.copyfile(path, folder / path.name)
    pooling = files[0].parent / "1_Pooling" / "config.json" if files else None
    if pooling is not None and pooling.is_file():
        (folder / "1_Pooling").mkdir()
        shutil.copyfile(pooling, folder / "1_Pooling" / "config.json")
