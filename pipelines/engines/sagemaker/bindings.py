"""What an input is given: constants by their type, texts with values in them, the keys of a loop's item."""

import json
import re
from collections.abc import Mapping
from typing import Any

from assay.components.contracts.errors import AssayError, RecipeError
from assay.pipelines.ir import placeholders, values

from .values import Constant, Item, RunFact, Text, Value

_HOLE = re.compile(r"(\{\{\$.*?\}\})")
_CHANNEL = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")
_FACT = re.compile(r"\{\{\$\.(" + "|".join(placeholders.RUN) + r")\}\}")
STATUS = "final_status"
"""Stands for the final status of what an exit handler follows; no placeholder of KFP has the name."""


def keyed(value: Value | None, key: str | None, path: str) -> Value | None:
    """Return the entry of a loop item that is a mapping; the value itself when there is no key."""
    if key is None or value is None:
        return value
    if isinstance(value, Item):
        return Item(key)
    if not isinstance(value, Constant):
        raise RecipeError(f"the key {key!r} of a value that only the run knows", where=path, fix="pass it by itself")
    item = json.loads(value.value) if isinstance(value.value, str) else value.value
    if not isinstance(item, dict) or key not in item:
        raise RecipeError(f"the loop item {item!r} has no key {key!r}", where=path, fix="give every item the key")
    return Constant(item[key])


def listed(items: Any, path: str) -> list[Any]:
    """Return the items of a loop, which may stand as JSON text."""
    parsed = json.loads(items) if isinstance(items, str) else items
    if not isinstance(parsed, list):
        raise RecipeError(f"wanted a list to loop over, got {parsed!r}", where=path, fix="give it a list")
    return parsed


def typed(value: Any, kind: str, name: str) -> Any:
    """Return a constant as its declared type."""
    try:
        return values.cast(value, kind, name)
    except AssayError:
        if kind in ("LIST", "STRUCT") and isinstance(value, str):  # a loop's item arrives as JSON text
            return values.cast(json.loads(value), kind, name)
        raise


def filled(constant: Any, channels: Mapping[str, Value], where: str) -> Value:
    """Return a constant with the values that its text names filled in."""
    if not isinstance(constant, str):
        if "{{$" in json.dumps(constant):
            return _filled_json(constant, channels, where)
        return Constant(constant)
    parts = [_part(text, channels, where) for text in _HOLE.split(constant) if text]
    if all(isinstance(part, Constant) for part in parts):
        texts = (part.value for part in parts if isinstance(part, Constant))
        return Constant("".join(placeholders.text_of(text) for text in texts))
    return parts[0] if len(parts) == 1 else Text(tuple(parts))


def _filled_json(constant: Any, channels: Mapping[str, Value], where: str) -> Value:
    known = {name: value.value for name, value in channels.items() if isinstance(value, Constant)}
    filled = placeholders.resolve_constant(constant, known, {})
    if "{{$" in json.dumps(filled):
        raise RecipeError(
            "a list or mapping holds a value that only the run knows",
            where=where,
            fix="pass that value as a parameter of its own",
        )
    return Constant(filled)


def _part(text: str, channels: Mapping[str, Value], where: str) -> Value:
    if named := _CHANNEL.fullmatch(text):
        if named[1] not in channels:
            raise RecipeError(f"{named[1]!r} has no value", where=where, fix="give the input a default")
        return channels[named[1]]
    if fact := _FACT.fullmatch(text):
        return RunFact(fact[1])
    return Constant(text)
