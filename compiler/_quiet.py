"""Keeps off the screen what transformers and torch say of themselves; what concerns the user is kept or passed on."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNRELATED = ("torchao", "torch.utils._pytree")
"""Loggers that speak when transformers imports what a model does not need."""


@contextmanager
def quiet_transformers() -> Iterator[list[str]]:
    """No bars and no lines from transformers inside; the list yielded holds every warning it gave, each once."""
    from transformers.utils import logging as transformers_logging

    notes: list[str] = []
    root = logging.getLogger("transformers")
    keeper, handlers, propagate, level = _Keeper(notes), root.handlers, root.propagate, root.level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    root.handlers, root.propagate = [keeper], False
    root.setLevel(logging.WARNING)
    others = {name: logging.getLogger(name).level for name in _UNRELATED}
    for name in others:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield notes
    finally:
        root.handlers, root.propagate = handlers, propagate
        root.setLevel(level)
        for name, own in others.items():
            logging.getLogger(name).setLevel(own)
        if bars:
            transformers_logging.enable_progress_bar()
    _keep(notes, (str(warning.message) for warning in caught if not _foreign_noise(warning)))


@contextmanager
def quiet_torch() -> Iterator[None]:
    """No log lines of torch inside, and no warnings that come from its own code or from Python's library.

    Both speak of torch's inner workings, and what fails is an error anyway. Other warnings, those of the model's code,
    are given afterwards, each once, if nothing failed. Whoever sets TORCH_LOGS gets the log.
    """
    import torch.export  # its loggers are there once it is imported

    handlers = set[logging.Handler]() if os.environ.get("TORCH_LOGS") else _torch_handlers()
    for handler in handlers:
        handler.addFilter(_silent)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_silent)
    inside = Path(torch.__file__).parent, Path(os.__file__).parent
    others = (w for w in caught if not any(_lies_in(w.filename, folder) for folder in inside))
    for warning in {(str(w.message), w.category, w.filename, w.lineno): w for w in others}.values():
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _torch_handlers() -> set[logging.Handler]:
    """What writes the log of torch: its loggers have a stream each."""
    loggers = (logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("torch"))
    return {each for logger in loggers for each in logger.handlers if isinstance(each, logging.StreamHandler)}


def _silent(record: logging.LogRecord) -> bool:
    return False


def _lies_in(file: str, folder: Path) -> bool:
    """Whether a file belongs to the library in a folder; what is installed beside Python's library does not."""
    return Path(file).is_relative_to(folder) and "site-packages" not in Path(file).relative_to(folder).parts


class _Keeper(logging.Handler):
    """Appends each record's text to a list."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        _keep(self.notes, [record.getMessage()])


def _keep(notes: list[str], texts) -> None:
    for text in texts:
        text = " ".join(text.split())
        if text not in notes:
            notes.append(text)


def _foreign_noise(warning: warnings.WarningMessage) -> bool:
    """Deprecations inside other libraries concern their authors, not the user of a model."""
    return issubclass(warning.category, DeprecationWarning | PendingDeprecationWarning | FutureWarning)
