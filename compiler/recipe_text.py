"""Recipe text: plain YAML of bounded size and depth, with the line of every key; whatever may surprise is refused."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..dialects.errors import UsageError

SIZE_LIMIT = 1 << 20
"""Bytes of a recipe."""

DEPTH_LIMIT = 16
"""Lists and mappings inside each other."""

VALUES_LIMIT = 10_000
"""Values of a recipe, lists and mappings among them."""

Where = tuple[str | int, ...]
"""The way to a value: keys and list positions, from the outside."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SCALARS = yaml.SafeLoader("")
_PLAIN = {
    "tag:yaml.org,2002:null": _SCALARS.construct_yaml_null,
    "tag:yaml.org,2002:bool": _SCALARS.construct_yaml_bool,
    "tag:yaml.org,2002:int": _SCALARS.construct_yaml_int,
    "tag:yaml.org,2002:float": _SCALARS.construct_yaml_float,
}

_READ_ALIKE = {
    "tag:yaml.org,2002:null": r"(null|~|)",
    "tag:yaml.org,2002:bool": r"(true|false)",
    "tag:yaml.org,2002:int": r"-?(0|[1-9][0-9]*)",
    "tag:yaml.org,2002:float": r"-?(0|[1-9][0-9]*)\.[0-9]+([eE][-+]?[0-9]+)?",
}
"""What every YAML reader takes for the same value. `no`, `0x1`, `010`, `1_000` and `1:30` (90) are text to some."""


@dataclass
class Reader:
    """Reads YAML text into plain values and notes the line (from 1) of every key and list item in `lines`.

    Refused with UsageError, naming file and line: text that is no YAML, more than one document, a key twice in one
    mapping, anchors and aliases (they make a small file large), tags, keys that are not text, deep nesting, and too
    many values.
    """

    name: str
    lines: dict[Where, int] = field(default_factory=dict)

    def read(self, text: str) -> Any:
        if len(text.encode()) > SIZE_LIMIT:
            raise UsageError(f"{self.name}: a recipe has at most {SIZE_LIMIT} bytes; this one has {len(text.encode())}")
        try:
            return self._document(yaml.parse(text, Loader=_LOADER))
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise UsageError(f"{self.name}:{line}: this is not YAML: {error.problem or error.context}") from error
        except yaml.YAMLError as error:
            raise UsageError(f"{self.name}: this is not YAML: {error}") from error

    def _document(self, events: Iterator[Any]) -> Any:
        value: Any = None
        documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._error(event, "a recipe is one document; remove what follows the line ---")
                value = self._value(next(events), events, ())
        return value

    def _value(self, event: Any, events: Iterator[Any], where: Where) -> Any:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self._error(event, "anchors and aliases (& and *) are not allowed in a recipe")
        if event.tag is not None:
            raise self._error(event, f"tags ({event.tag}) are not allowed in a recipe")
        if len(where) > DEPTH_LIMIT:
            raise self._error(event, f"nested deeper than {DEPTH_LIMIT} levels")
        if len(self.lines) >= VALUES_LIMIT:
            raise self._error(event, f"a recipe has at most {VALUES_LIMIT} values")
        self.lines.setdefault(where, event.start_mark.line + 1)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(events, where)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(events, where)
        return self._scalar(event)

    def _mapping(self, events: Iterator[Any], where: Where) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise self._error(event, "a key must be text")
            key = event.value
            if key in values:
                raise self._error(event, f'the key "{key}" stands here a second time')
            self._value(event, events, (*where, key))
            values[key] = self._value(next(events), events, (*where, key))
        return values

    def _sequence(self, events: Iterator[Any], where: Where) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            values.append(self._value(event, events, (*where, len(values))))
        return values

    def _scalar(self, event: Any) -> Any:
        """Null, booleans and numbers as YAML's safe schema reads them; everything else, dates too, is text."""
        if not event.implicit[0]:
            return event.value
        tag = _SCALARS.resolve(yaml.ScalarNode, event.value, (True, False))
        if tag not in _PLAIN:
            return event.value
        if not re.fullmatch(_READ_ALIKE[tag], event.value):
            raise self._error(
                event,
                f"{event.value[:20]!r} is not the same to all YAML readers: write true, false or a plain number, "
                "or put it in quotes",
            )
        try:
            return _PLAIN[tag](yaml.ScalarNode(tag, event.value))
        except ValueError as error:
            raise self._error(event, f"{event.value[:20]!r} is no number that can be read") from error

    def _error(self, event: Any, message: str) -> UsageError:
        return UsageError(f"{self.name}:{event.start_mark.line + 1}: {message}")
