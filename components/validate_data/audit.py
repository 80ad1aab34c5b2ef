"""Rows in canonical form, and the audit table: one narrow row of scalars for every line that came in.

The table is computed from the finished rows, not by the reader, so that the suites check what the reader let through.
It holds no text of a user: counts, digests, labels of ours. Great Expectations sees nothing else.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..contracts.artifacts import digest_of
from ..contracts.rows import Example
from ..runtime.context import progress
from ..shared.tasks.task import Task
from .convert import Row
from .problems import Line, Problem, Quarantine

BIDI_CONTROLS = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""They make a text look other than it reads (CVE-2021-42574)."""
PROGRESS_ROWS = 1000

SCHEMA = pa.schema(
    [
        ("row_no", pa.int64()),  # of all lines read, from 1
        ("line", pa.int64()),  # in its file
        ("kind", pa.string()),  # chat, verifiable, preference; unknown where the form was not recognised
        ("error_code", pa.string()),  # empty for an accepted row; the columns below are null for a refused one
        ("id", pa.string()),
        ("group_digest", pa.string()),
        ("n_turns", pa.int64()),  # of the prompt
        ("roles_ok", pa.bool_()),
        ("ends_with", pa.string()),  # role of the prompt's last turn
        ("empty_turns", pa.int64()),  # the answer included
        ("prompt_characters", pa.int64()),  # of the longest turn
        ("answer_characters", pa.int64()),
        ("chosen_differs", pa.bool_()),  # of a preference row
        ("bidi_controls", pa.int64()),
        ("duplicate_of", pa.int64()),  # row_no of the first row with this id
        ("answers_to_prompt", pa.int64()),  # different answers that the data gives to this prompt
        ("splits_of_group", pa.int64()),  # different split labels in this row's group
    ]
)


@dataclass(frozen=True)
class Audit:
    """Everything that came in, in the order it came."""

    examples: list[Example]
    lines: list[Line]
    """Of each example, without the raw bytes."""
    table: pa.Table
    """`SCHEMA`; a row for every line, accepted or refused."""
    labels: list[str]
    """The user's split label of each example; empty for none."""
    rejected: int
    """Preference rows, whose rejected answer is checked and not carried on."""

    def write(self, path: Path) -> None:
        """Write the audit table."""
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(self.table, path, compression="zstd")

    def leaking(self) -> list[int]:
        """Return the indices of the examples whose group stands in more than one of the user's splits."""
        counts = _count_by([example.group for example in self.examples], self.labels)
        return [index for index, count in enumerate(counts) if count > 1]


def audit(items: Iterable[tuple[Line, Row] | Problem], task: Task, quarantine: Quarantine) -> Audit:
    """Read everything once: problems go to the quarantine, rows become examples, both stand in the audit table."""
    refused: list[dict[str, Any]] = []
    accepted: list[tuple[int, Line, Row]] = []
    for number, item in enumerate(items, start=1):
        if isinstance(item, Problem):
            quarantine.add(item)
            kind = item.kind or "unknown"
            refused.append({"row_no": number, "line": item.line.number, "kind": kind, "error_code": item.code})
        else:
            line, row = item
            bare = Line(line.file, line.number, line.offset, b"", line.size, line.sha256)
            accepted.append((number, bare, row))
        if number % PROGRESS_ROWS == 0:
            progress(number, number, "rows", refused=len(refused))
    examples = _examples(accepted, task)
    facts = _facts(accepted, examples)
    return Audit(
        examples=examples,
        lines=[line for _, line, _ in accepted],
        table=pa.Table.from_pylist(sorted(refused + facts, key=lambda fact: fact["row_no"]), schema=SCHEMA),
        labels=[row.split for _, _, row in accepted],
        rejected=sum(row.rejected is not None for _, _, row in accepted),
    )


def merge_groups(keys: list[str], given: list[str]) -> list[str]:
    """Return each row's group: rows that share the task's key or the user's group belong together.

    A user's group alone could put one question on both sides of a split, and so could the task's key with a patient.

    Args:
        keys: The task's key of each row.
        given: The user's group of each row; empty for none.
    """
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while (above := leader.setdefault(name, name)) != name:
            leader[name] = leader[above]  # path halving: long chains stay cheap
            name = leader[name]
        return name

    names = [f"given:{group}" if group else key for key, group in zip(keys, given, strict=True)]
    for key, name in zip(keys, names, strict=True):
        one, other = sorted((find(key), find(name)))
        leader[other] = one  # the smallest name leads, whatever the order of the rows
    return [find(name) for name in names]


def _examples(accepted: list[tuple[int, Line, Row]], task: Task) -> list[Example]:
    keys = [task.group(row.prompt) for _, _, row in accepted]
    groups = merge_groups(keys, [row.group for _, _, row in accepted])
    return [
        Example(
            id=digest_of([[turn.model_dump() for turn in row.prompt], row.reference])[:32],
            group=group,
            prompt=row.prompt,
            reference=row.reference,
            slices=sorted({*task.slices(row.prompt, row.reference), *row.slices}),
            source=line.place,
        )
        for (_, line, row), group in zip(accepted, groups, strict=True)
    ]


def _facts(accepted: list[tuple[int, Line, Row]], examples: list[Example]) -> list[dict[str, Any]]:
    first: dict[str, int] = {}
    answers = _count_by([digest_of([t.content for t in e.prompt]) for e in examples], [e.reference for e in examples])
    splits = _count_by([example.group for example in examples], [row.split for _, _, row in accepted])
    facts = []
    for index, ((number, line, row), example) in enumerate(zip(accepted, examples, strict=True)):
        earlier = first.setdefault(example.id, number)
        facts.append(
            {
                "row_no": number,
                "line": line.number,
                "kind": row.kind,
                "error_code": "",
                "id": example.id,
                "group_digest": digest_of(example.group)[:32],
                "chosen_differs": None if row.rejected is None else row.rejected.split() != example.reference.split(),
                "duplicate_of": None if earlier == number else earlier,
                "answers_to_prompt": answers[index],
                "splits_of_group": splits[index],
                **_facts_of_text(example),
            }
        )
    return facts


def _facts_of_text(example: Example) -> dict[str, Any]:
    roles = [turn.role for turn in example.prompt]
    asked = roles[1:] if roles[:1] == ["system"] else roles
    texts = [turn.content for turn in example.prompt] + [example.reference]
    return {
        "n_turns": len(roles),
        "roles_ok": asked[:1] == ["user"] and "system" not in asked and all(a != b for a, b in pairwise(asked)),
        "ends_with": roles[-1],
        "empty_turns": sum(not text.strip() for text in texts),
        "prompt_characters": max(len(text) for text in texts[:-1]),
        "answer_characters": len(example.reference),
        "bidi_controls": sum(len(BIDI_CONTROLS.findall(text)) for text in texts),
    }


def _count_by(keys: list[str], values: list[str]) -> list[int]:
    """Return for each row how many different values its key has; an empty value is none."""
    seen: defaultdict[str, set[str]] = defaultdict(set)
    for key, value in zip(keys, values, strict=True):
        if value:
            seen[key].add(value)
    return [len(seen[key]) for key in keys]


def count_kinds(table: pa.Table) -> dict[str, int]:
    """Return the lines of each kind, refused ones included."""
    return dict(sorted(Counter(table["kind"].to_pylist()).items()))
