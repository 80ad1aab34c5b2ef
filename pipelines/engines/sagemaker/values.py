"""Where the value of an input comes from, once the graph is flat.

Parameters: `Constant`, `Parameter`, `Written`, `Text`, `RunFact`, `Item`. Artifacts: `Stored`, `Imported`. Of either
kind: `OneOf` (which branch was taken decides) and `Several` (the rounds of a loop).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Guard = tuple[tuple[str, int], ...]
"""The branches inside which something runs: (path of the choice, number of the case), outermost first."""


@dataclass(frozen=True)
class Constant:
    """Known while translating."""

    value: Any


@dataclass(frozen=True)
class Parameter:
    """A parameter of the pipeline."""

    name: str
    kind: str
    """KFP's parameter type."""


@dataclass(frozen=True)
class Written:
    """An output parameter of a task."""

    task: str
    output: str
    kind: str


@dataclass(frozen=True)
class RunFact:
    """Which run this is: the name of a KFP placeholder, for example `pipeline_job_name`."""

    name: str


@dataclass(frozen=True)
class Item:
    """The item of a loop whose list is known at run time only, or one of its keys."""

    key: str = ""


@dataclass(frozen=True)
class Text:
    """A text with values in it."""

    parts: tuple["Value", ...]


@dataclass(frozen=True)
class Stored:
    """An output artifact of a task."""

    task: str
    output: str


@dataclass(frozen=True)
class Imported:
    """An artifact that exists already."""

    uri: "Value"


@dataclass(frozen=True)
class OneOf:
    """The value of the branch that was taken."""

    options: tuple[tuple[Guard, "Value"], ...]


@dataclass(frozen=True)
class Several:
    """The values of a loop's rounds, in order."""

    values: tuple["Value", ...]


Value = Constant | Parameter | Written | RunFact | Item | Text | Stored | Imported | OneOf | Several


def leaves(value: Value) -> Iterator[Value]:
    """Yield the values that a value is made of, itself when it is made of nothing else."""
    match value:
        case Text(parts) | Several(parts):
            for part in parts:
                yield from leaves(part)
        case Imported(uri):
            yield from leaves(uri)
        case OneOf(options):
            for _, option in options:
                yield from leaves(option)
        case _:
            yield value


def tasks_of(value: Value) -> Iterator[str]:
    """Yield the paths of the tasks that write a value."""
    return (leaf.task for leaf in leaves(value) if isinstance(leaf, Written | Stored))


def choices_of(value: Value) -> Iterator[str]:
    """Yield the paths of the choices that decide which value it is."""
    match value:
        case OneOf(options):
            for guard, option in options:
                yield from (choice for choice, _ in guard)
                yield from choices_of(option)
        case Text(parts) | Several(parts):
            for part in parts:
                yield from choices_of(part)
        case Imported(uri):
            yield from choices_of(uri)


def settle(value: Value, taken: Mapping[str, int]) -> Value:
    """Return a value with every `OneOf` replaced by the option of the branches taken.

    Args:
        value: Any value.
        taken: Number of the case by path of the choice.

    Raises:
        LookupError: No option belongs to these branches.
    """
    match value:
        case OneOf(options):
            fitting = (option for guard, option in options if all(taken.get(choice) == case for choice, case in guard))
            option = next(fitting, None)
            if option is None:
                raise LookupError("none of the branches gives the value")
            return settle(option, taken)
        case Text(parts):
            return Text(tuple(settle(part, taken) for part in parts))
        case Several(parts):
            return Several(tuple(settle(part, taken) for part in parts))
        case Imported(uri):
            return Imported(settle(uri, taken))
        case _:
            return value
