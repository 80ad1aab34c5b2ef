"""Validate a user's rows: read, audit, hold them to the suites, and decide by the policy."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..contracts.artifacts import MANIFEST, Manifest, read_manifest, seal, sha256_file
from ..contracts.errors import DataError
from ..contracts.metrics import Summary
from ..contracts.recipe import DataSettings
from ..contracts.rows import Example, write_rows
from ..shared.tasks.task import Task
from .audit import Audit, audit, count_kinds
from .docs import write_docs
from .problems import FIXES, Problem, Quarantine
from .reader import Reader
from .sources import find_files
from .suite import Limits, Outcome, run_suites

TOP_CODES = 5
"""Codes that the error names."""


@dataclass(frozen=True)
class Folders:
    """Where the artifacts go."""

    accepted: Path
    quarantine: Path
    docs: Path


@dataclass(frozen=True)
class Report:
    """What validation found."""

    rows: int
    """Lines that came in; blank ones are not counted."""
    accepted: int
    reasons: dict[str, int]
    """Refused lines by code, the most frequent first."""
    kinds: dict[str, int]
    notes: dict[str, int]
    outcomes: list[Outcome]

    def summary(self) -> Summary:
        """Return the step's summary."""
        refused = self.rows - self.accepted
        unmet = [outcome for outcome in self.outcomes if not outcome.success]
        return Summary(
            step="validate_data",
            headline=f"{self.accepted:,} of {self.rows:,} rows accepted, {refused:,} quarantined, "
            f"{len(self.outcomes) - len(unmet)} of {len(self.outcomes)} expectations met.",
            metrics={
                "rows": self.rows,
                "accepted": self.accepted,
                "quarantined": refused,
                "quarantined_share": refused / self.rows,
                "duplicates": self.notes.get("duplicates", 0),
                "expectations_failed": len(unmet),
            },
            details={
                "rows": self.rows,
                "accepted": self.accepted,
                "quarantined": refused,
                "reasons": self.reasons,
                "kinds": self.kinds,
                "notes": self.notes,
                "expectations": [outcome.as_json() for outcome in self.outcomes],
            },
        )


def validate(raw: Path, task: Task, settings: DataSettings, folders: Folders) -> Report:
    """Write the accepted rows, the quarantine and the data docs.

    The quarantine and the docs are complete before anything is raised, so that a person can look at them.

    Args:
        raw: A file, a folder of files, or a `raw` artifact.
        task: Of the recipe.
        settings: Caps and policy.
        folders: The outputs.

    Raises:
        DataError: The input cannot be read, more rows are refused than the policy allows, or a critical expectation
            fails.
    """
    parents = raw_parents(raw)
    reader = Reader(task, settings)
    with Quarantine(folders.quarantine / "quarantine.jsonl") as quarantine:
        found = audit(reader.read(raw), task, quarantine)
        for problem in leaks(found):
            quarantine.add(problem)
    reasons = dict(sorted(quarantine.reasons.items(), key=lambda item: (-item[1], item[0])))
    seal(folders.quarantine, "quarantine", parents=parents, counts=reasons)
    if not found.table.num_rows:
        raise DataError("there are no rows in it, only blank lines", where=str(raw), fix="give at least one row")
    limits = Limits(allowed_rows(settings, found.table.num_rows), settings.max_characters)
    found.write(folders.docs / "audit.parquet")
    report = Report(
        rows=found.table.num_rows,
        accepted=len(found.examples),
        reasons=reasons,
        kinds=count_kinds(found.table),
        notes=notes(found, reader),
        outcomes=_examine(found, quarantine, limits, folders.docs),
    )
    seal(folders.docs, "docs", parents=parents, counts={"expectations": len(report.outcomes)})
    decide(report, quarantine, limits, raw, folders)
    write_rows(folders.accepted / "rows.parquet", found.examples, Example)
    metadata = {"task": task.name, "sources": {file.name: sha256_file(file.path) for file in find_files(raw)}}
    seal(folders.accepted, "rows", parents=parents, counts={"rows": report.accepted}, metadata=metadata)
    return report


def raw_parents(raw: Path) -> dict[str, Manifest]:
    """Return the manifest of a `raw` artifact by the input's name; nothing for a user's own files."""
    return {"raw": read_manifest(raw, "raw")} if (raw / MANIFEST).is_file() else {}


def allowed_rows(settings: DataSettings, rows: int) -> int:
    """Return how many of `rows` may be refused: the larger of the two limits."""
    return max(settings.max_bad_rows, int(settings.max_bad_share * rows))


def leaks(found: Audit) -> Iterator[Problem]:
    """Yield a problem for every row whose group stands in two of the user's splits."""
    for index in found.leaking():
        yield Problem(found.lines[index], "E_SPLIT", "rows of this row's group carry different split labels", "$.split")


def notes(found: Audit, reader: Reader) -> dict[str, int]:
    """Return what was passed over or left for a later step, by name; only what occurred."""
    counts = {
        **reader.notes,
        "duplicates": sum(value is not None for value in found.table["duplicate_of"].to_pylist()),
        "rejected_answers_unused": found.rejected,
    }
    return {name: count for name, count in sorted(counts.items()) if count}


def _examine(found: Audit, quarantine: Quarantine, limits: Limits, folder: Path) -> list[Outcome]:
    """Run the suites over the audit table and write the docs."""
    rows, accepted = found.table.num_rows, len(found.examples)
    reasons = [
        {"code": code, "count": count, "place": first.line.place, "message": first.message, "fix": FIXES[code]}
        for code, count, first in top(quarantine, len(FIXES))
    ]
    counts = {"rows": rows, "accepted": accepted, "quarantined": rows - accepted, "allowed": limits.allowed}

    def publish(pages: Path, outcomes: list[Outcome]) -> None:
        write_docs(folder, pages, outcomes, counts, reasons)

    return run_suites(folder / "audit.parquet", count_kinds(found.table), accepted, limits, publish)


def top(quarantine: Quarantine, limit: int) -> list[tuple[str, int, Problem]]:
    """Return the most frequent codes, their counts, and the first problem of each."""
    ranked = sorted(quarantine.reasons.items(), key=lambda item: (-item[1], item[0]))
    return [(code, count, quarantine.first[code]) for code, count in ranked[:limit]]


def decide(report: Report, quarantine: Quarantine, limits: Limits, raw: Path, folders: Folders) -> None:
    """Let the rows pass, or say why not.

    Raises:
        DataError: More lines are refused than allowed, none is left, or a critical expectation fails.
    """
    refused = report.rows - report.accepted
    failed = [one for one in report.outcomes if not one.success and one.severity == "critical"]
    if report.accepted and refused <= limits.allowed and not failed:
        return
    told = [f"{refused:,} of {report.rows:,} rows are refused; the policy allows {limits.allowed:,}"]
    told += [
        f"{code} × {count:,}, first at {first.line.place} {first.column}: {first.message}"
        for code, count, first in top(quarantine, TOP_CODES)
    ]
    told += [f"expectation {one.suite}.{one.name} fails on {one.unexpected:,} rows: {one.sentence}" for one in failed]
    raise DataError(
        "\n    ".join(told),
        where=str(raw),
        fix=f"look at {folders.quarantine / 'quarantine.jsonl'} and {folders.docs / 'index.html'}; correct the rows"
        + (
            ", or raise data.max_bad_rows or data.max_bad_share" if report.accepted and refused > limits.allowed else ""
        ),
    )
