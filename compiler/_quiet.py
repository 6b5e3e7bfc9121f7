"""Keeps transformers' progress bars off the screen while it loads, and what it warns of on record."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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
