"""People's grades of answers, by which a judge is measured and its numbers are corrected."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from pydantic import ValidationError

from ..contracts.errors import DataError
from ..contracts.rows import Label, Result
from ..shared.agreement import krippendorff_alpha
from ..shared.strict_json import read_object

Known = Mapping[tuple[str, str], float]
"""Mean grade by example and answer."""


def read_labels(path: str | Path) -> list[Label]:
    """Return the labels of a JSONL file.

    Raises:
        DataError: There is no such file, a line is no label, or a rater graded an answer twice.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), fix="give a file of JSON lines") from error
    labels: dict[tuple[str, str, str], Label] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, fix = f"{path}:{number}", "each line is {example_id, response, grade: 1 to 5, rater}"
        try:
            label = Label.model_validate(read_object(line))
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(map(str, problem["loc"])) or "the line"
            raise DataError(f"{name}: {problem['msg']}", where=where, fix=fix) from error
        key = (label.example_id, label.response, label.rater)
        if key in labels:
            raise DataError("this rater graded this answer before", where=where, fix="keep one of the two")
        labels[key] = label
    return list(labels.values())


def by_answer(labels: Sequence[Label]) -> Known:
    """Return the mean grade of each answer."""
    found: dict[tuple[str, str], list[float]] = {}
    for label in labels:
        found.setdefault((label.example_id, label.response), []).append(label.grade)
    return {answer: mean(grades) for answer, grades in found.items()}


def card(labels: Sequence[Label], results: Sequence[Result]) -> dict[str, float | None]:
    """Return how many labels there are, how many are of answers of this run, and how far the raters agree."""
    answers = {(result.example_id, result.response) for result in results}
    raters = sorted({label.rater for label in labels})
    said = {(label.rater, label.example_id, label.response): label.grade for label in labels}
    keys = sorted({(label.example_id, label.response) for label in labels})
    return {
        "given": len(labels),
        "used": sum((label.example_id, label.response) in answers for label in labels),
        "raters": len(raters),
        "alpha": krippendorff_alpha([[said.get((rater, *key)) for key in keys] for rater in raters]),
    }
