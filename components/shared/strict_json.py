"""JSON as a verifier reads it: no repeated keys, no NaN, nothing around it, and 1 is not true."""

import json
from typing import Any


def read_object(text: str) -> dict[str, Any] | None:
    """Return a JSON object read strictly, or None."""
    value = read_value(text)
    return value if isinstance(value, dict) else None


def read_value(text: str) -> Any:
    """Return a JSON value read strictly; None where it is none (or is null)."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def same(one: Any, other: Any) -> bool:
    """Tell whether two JSON values are equal in value and type: 1, 1.0 and true are three values."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return type(one) is type(other) and bool(one == other)


def equal_share(got: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Return the share of fields that are equal, of all fields in either: what is made up counts against."""
    equal = sum(name in got and same(got[name], value) for name, value in wanted.items())
    return equal / max(1, len(got.keys() | wanted.keys()))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key is repeated")
    return fields


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
