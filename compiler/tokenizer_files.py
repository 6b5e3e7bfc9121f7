"""The tokenizer beside a model: read from its files, written into an artefact."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..dialects.errors import MxloomError
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


def load_tokenizer(name: str, files: Sequence[Path]) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder of `files`, or inside the one GGUF file. MxloomError if there is none."""
    from transformers import AutoTokenizer

    if not files:
        raise MxloomError(f"{name}: no tokenizer belongs to a module in memory; give tokenizer=.")
    folder = files[0].parent
    options = {"gguf_file": files[0].name} if files[0].suffix == ".gguf" else {}
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise MxloomError(f"{folder}: no tokenizer can be read there: {first}") from error


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
