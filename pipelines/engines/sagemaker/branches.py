"""The branches of a condition: which of them exclude each other, and what is left to decide of each."""

import re
from collections.abc import Mapping
from typing import Any

from assay.components.contracts.errors import RecipeError
from assay.pipelines.ir import cel
from assay.pipelines.ir.model import Component, Task

from .values import Constant, Value


def is_choice(component: Component) -> bool:
    """Return whether a DAG is KFP's wrapper around the branches of one if/elif/else."""
    assert component.dag is not None
    tasks = component.dag.tasks.values()
    return len(tasks) > 1 and all(task.trigger_policy.condition for task in tasks) and _alternate([*tasks])


def _alternate(tasks: list[Task]) -> bool:
    """Return whether every condition but one begins with the opposite of another's: they exclude each other."""
    trees = [task.trigger_policy.expression.tree for task in tasks if task.trigger_policy.expression]
    firsts = [tree for tree in trees if not any(isinstance(term, cel.Not) for term in _terms(tree)[:1])]
    return len(firsts) == 1 and all(cel.Not(firsts[0]) in _terms(tree) for tree in trees if tree != firsts[0])


def _terms(tree: cel.Node) -> list[cel.Node]:
    return [term for part in tree.terms for term in _terms(part)] if isinstance(tree, cel.Every) else [tree]


def names(tree: cel.Node | None) -> set[str]:
    """Return the inputs that a condition reads."""
    match tree:
        case cel.Input(name):
            return {name}
        case cel.Not(term) | cel.Minus(term) | cel.Convert(_, term):
            return names(term)
        case cel.Compare(_, left, right):
            return names(left) | names(right)
        case cel.Every(terms) | cel.Some(terms):
            return set().union(*map(names, terms))
        case _:
            return set()


def undecided(
    expression: cel.Expression, given: Mapping[str, Value], path: str, before: list[cel.Node | None]
) -> cel.Node | bool:
    """Return what is still to be decided of a condition.

    Args:
        expression: The condition.
        given: Where its inputs come from.
        path: Names it in an error.
        before: The conditions of the branches before it, none of which held.

    Raises:
        RecipeError: Its constants do not go together.
    """
    known = {name: value.value for name, value in given.items() if isinstance(value, Constant)}
    left = []
    for term in _terms(expression.tree):
        if isinstance(term, cel.Not) and term.term in before:
            continue
        if not names(term) <= known.keys():
            left.append(term)
        elif not _holds(term, known, path):
            return False
    if not left:
        return True
    return left[0] if len(left) == 1 else cel.Every(tuple(left))


def _holds(tree: cel.Node, known: Mapping[str, Any], path: str) -> bool:
    try:
        return cel.Expression(f"of {path}", frozenset(), tree).evaluate(known)
    except ValueError as error:
        raise RecipeError(str(error), where=path, fix="compare values of one type") from error


def number_of(name: str) -> tuple[int, str]:
    """Return what puts `condition-2` before `condition-10`."""
    found = re.search(r"(\d+)$", name)
    return int(found[1]) if found else 0, name
