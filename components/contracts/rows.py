"""Rows that cross a wire, as frozen models and as Parquet.

The models say what a row is; bulk code works on columns. `SCHEMA` of each row is its Parquet schema, and
`read_table`/`write_table` are the only readers and writers of an artifact's Parquet files.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from .errors import DataError

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SLICES = pa.list_(pa.string())


class Row(BaseModel):
    """One row of a Parquet file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    SCHEMA: ClassVar[pa.Schema]


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class Example(Row):
    """The canonical row: a prompt and the answer that is right."""

    id: str
    """sha256 (32 hex digits) of prompt and reference: stable across runs."""
    group: str
    """Rows of one group never stand on both sides of a split."""
    prompt: list[Message]
    """Without the answer; ends with a user turn."""
    reference: str
    """The right answer: what SFT learns and the verifier compares with."""
    slices: list[str] = []
    """`name=value` labels for per-slice tables, for example `difficulty=hard`."""
    source: str = ""
    """Where the row came from: file:line."""

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("id", pa.string()),
            ("group", pa.string()),
            ("prompt", pa.list_(MESSAGE)),
            ("reference", pa.string()),
            ("slices", SLICES),
            ("source", pa.string()),
        ]
    )


class Candidate(Row):
    """One answer to a prompt, with a score: sampled and verified, or rated or edited by a person."""

    prompt_id: str
    group: str
    prompt: list[Message]
    response: str
    score: float
    """Higher is better. From a verifier: the task's reward in [0, 1]. From a person: their scale."""
    source: Literal["sampled", "reference", "edit", "original", "rating"]
    rater: str = ""
    finished: bool = True
    """Ended by itself, not cut at the token limit."""

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("prompt_id", pa.string()),
            ("group", pa.string()),
            ("prompt", pa.list_(MESSAGE)),
            ("response", pa.string()),
            ("score", pa.float64()),
            ("source", pa.string()),
            ("rater", pa.string()),
            ("finished", pa.bool_()),
        ]
    )


class PreferencePair(Row):
    """Two answers to one prompt, the better one first."""

    prompt_id: str
    group: str
    prompt: list[Message]
    chosen: str
    rejected: str
    margin: float
    """Score of the chosen answer less that of the rejected one, in the candidates' units; above 0."""
    source: str
    """For example `sampled>sampled`, `reference>sampled`, `edit>original`, `rating>rating`."""

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("prompt_id", pa.string()),
            ("group", pa.string()),
            ("prompt", pa.list_(MESSAGE)),
            ("chosen", pa.string()),
            ("rejected", pa.string()),
            ("margin", pa.float64()),
            ("source", pa.string()),
        ]
    )


class Result(Row):
    """One arm's answer to one held-out example, and what the verifier says of it."""

    arm: str
    """`baseline`, `few_shot`, a stage (`sft`, `preference`, …), `candidate` or `champion`."""
    example_id: str
    group: str
    response: str
    slices: list[str]
    scores: dict[str, float | None]
    """Value of every metric of the task by name; None where the metric does not apply to the example.
    `confidence` besides, where the task measures calibration."""

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("arm", pa.string()),
            ("example_id", pa.string()),
            ("group", pa.string()),
            ("response", pa.string()),
            ("slices", SLICES),
            ("scores", pa.map_(pa.string(), pa.float64())),
        ]
    )


class Verdict(Row):
    """A judge's comparison of two arms on one example, both orders taken together."""

    example_id: str
    group: str
    arm_a: str
    arm_b: str
    winner: Literal["a", "b", "tie"]
    """`tie` also when the two orders disagree."""
    first: Literal["a", "b", "tie", "unparsed"]
    """Verdict with arm a shown first."""
    swapped: Literal["a", "b", "tie", "unparsed"]
    """Verdict with arm b shown first, named by arm, not by position."""
    label: Literal["a", "b", "tie"] | None = None
    """The labelled winner, where one is known."""
    asked: bool = True
    """False where both answers were the same text: a tie that says nothing of the judge."""
    longer: Literal["a", "b", "tie"] | None = None
    """The arm whose answer has more characters."""
    votes: list[Literal["a", "b", "tie"]] = []
    """Each judge's winner, in the panel's order."""

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("example_id", pa.string()),
            ("group", pa.string()),
            ("arm_a", pa.string()),
            ("arm_b", pa.string()),
            ("winner", pa.string()),
            ("first", pa.string()),
            ("swapped", pa.string()),
            ("label", pa.string()),
            ("asked", pa.bool_()),
            ("longer", pa.string()),
            ("votes", pa.list_(pa.string())),
        ]
    )


class Label(Row):
    """What a person says of one answer."""

    example_id: str
    response: str
    """The answer, to the letter as the results have it."""
    grade: float = Field(ge=1, le=5)
    """By the judge's rubric: 1 (worst) to 5 (best)."""
    rater: str = ""
    """Who; several may grade one answer."""

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [("example_id", pa.string()), ("response", pa.string()), ("grade", pa.float64()), ("rater", pa.string())]
    )


class Grade(Row):
    """What the judges say of one answer by itself, from 1 (worst) to 5 (best)."""

    arm: str
    example_id: str
    group: str
    grade: float | None
    """Of all judges together; None where no reply could be read."""
    grades: list[float | None]
    """Each judge's, in the panel's order."""
    label: float | None = None
    """The mean of people's grades, where there is one."""

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("arm", pa.string()),
            ("example_id", pa.string()),
            ("group", pa.string()),
            ("grade", pa.float64()),
            ("grades", pa.list_(pa.float64())),
            ("label", pa.float64()),
        ]
    )


R = TypeVar("R", bound=Row)


def write_rows(path: str | Path, rows: list[R], kind: type[R]) -> int:
    """Write rows as Parquet and return their number."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([row.model_dump(mode="json") for row in rows], schema=kind.SCHEMA)
    pq.write_table(table, path, compression="zstd")
    return len(rows)


def write_table(path: str | Path, table: pa.Table, kind: type[R]) -> int:
    """Write the columns of `kind` as Parquet and return the number of rows."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.select(kind.SCHEMA.names).cast(kind.SCHEMA), path, compression="zstd")
    return int(table.num_rows)


def read_rows(path: str | Path, kind: type[R]) -> list[R]:
    """Read a Parquet file of `kind`.

    Raises:
        DataError: The file is missing, is not Parquet, or lacks a column.
    """
    return [kind.model_validate(_plain(row)) for row in read_table(path, kind).to_pylist()]


def read_table(path: str | Path, kind: type[R]) -> pa.Table:
    """Read a Parquet file as a table with exactly the columns of `kind`.

    Raises:
        DataError: The file is missing, is not Parquet, or lacks a column.
    """
    path = Path(path)
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"cannot be read as Parquet: {error}",
            where=str(path),
            fix="run the step that writes it again",
        ) from error
    missing = [name for name in kind.SCHEMA.names if name not in table.column_names]
    if missing:
        raise DataError(
            f"column {missing[0]!r} is missing; a file of {kind.__name__} rows has {kind.SCHEMA.names}",
            where=str(path),
        )
    return table.select(kind.SCHEMA.names).cast(kind.SCHEMA)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Undo what Arrow does to a map: a list of pairs back to a dict."""
    if isinstance(row.get("scores"), list):
        row["scores"] = dict(row["scores"])
    return row
