"""Step names: the path in the graph, in the letters and the length that SageMaker allows."""

import hashlib
import re

LONGEST = 64


def step_name(path: str, *labels: str) -> str:
    """Return the name of a step; distinct for distinct arguments.

    Args:
        path: In the graph, for example `for-loop-2[0]/train`.
        labels: The branches that a copy of the step is in, for example `promote`.
    """
    whole = "/".join((path, *labels))
    plain = slug(whole)
    if len(plain) <= LONGEST:
        return plain
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{plain[: LONGEST - 9].rstrip('-')}-{digest}"


def slug(text: str) -> str:
    """Return a text in letters, digits and single hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "step"


def unique(name: str, taken: set[str]) -> str:
    """Return the name, or the name with a number if another step has it, and take it."""
    number, found = 2, name
    while found in taken:
        found = f"{name[: LONGEST - len(str(number)) - 1]}-{number}"
        number += 1
    taken.add(found)
    return found
