"""What a person sees of a candidate before deciding. All of it is found by digest, and hashed before it is shown."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.components.contracts.errors import AssayError
from assay.components.contracts.recipe import Recipe
from assay.components.contracts.rows import Example, Result, read_rows
from assay.components.runtime.context import home
from assay.components.shared import registry, review
from assay.components.shared.dossier import Dossier, read_dossier, sealed_folders, whole_folder
from assay.components.shared.ledger import Entry
from assay.components.shared.registry import Deployment
from assay.components.shared.review import Waiting
from assay.components.shared.tasks.task import get_task
from assay.components.write_report.cases import compare

from ..engines.local import store


@dataclass(frozen=True)
class Seen:
    """One candidate with its evidence."""

    waiting: Waiting
    decision: dict[str, Any]
    """The gate's record."""
    dossier: Dossier | None
    check: Deployment | None
    champion: Entry | None
    history: list[Entry]
    """What was done with this version so far."""
    examples: dict[str, Any] | None
    """Of `cases.compare`; None when the answers are not on this machine."""
    report: Path | None


def see(name: str, version: int) -> Seen:
    """Return what there is to see of a candidate.

    Raises:
        RegistryError: It is not in the queue, or a record of it was altered.
    """
    waiting = review.waiting(name, version)
    entry = registry.registered(name, version=version)
    dossier = read_dossier(entry.evidence) if entry and entry.evidence else None
    decision = registry.read_decision(waiting.decision)
    return Seen(
        waiting=waiting,
        decision=decision,
        dossier=dossier,
        check=registry.deployment(name, version),
        champion=registry.champion(name),
        history=[entry for entry in registry.history(name) if entry.version == version],
        examples=_examples(dossier) if dossier else None,
        report=find_report(dossier) if dossier else None,
    )


def find_report(dossier: Dossier) -> Path | None:
    """Return the report of the run whose decision a dossier names; None when that run is not on this machine."""
    runs = home() / "runs"
    for folder in sealed_folders().get(dossier.manifests["decision"], []):
        if folder.is_relative_to(runs):
            run = folder.relative_to(runs).parts[0]
            page = store.task_folder(home(), run, "write-report") / "outputs" / "report"
            if page.is_file():
                return page
    return None


def _examples(dossier: Dossier) -> dict[str, Any] | None:
    """Return the held-out examples on which candidate and champion (where there is none, the base model) differ."""
    results, data = (whole_folder(dossier.manifests[name]) for name in ("results", "data"))
    if results is None or data is None:
        return None
    try:
        metrics = get_task(Recipe.model_validate(dossier.recipe).task).metrics
        rows = read_rows(results / "results.parquet", Result)
        examples = {row.id: row for row in read_rows(data / "test.parquet", Example)}
    except (AssayError, ValueError):  # of an older or newer release: the digests are right, the form is another one
        return None
    arms: dict[str, dict[str, Result]] = {}
    for row in rows:
        arms.setdefault(row.arm, {})[row.example_id] = row
    other = "champion" if "champion" in arms else "baseline"
    if not {"candidate", other} <= arms.keys():
        return None
    harm = next((metric for metric in metrics if metric.better == "lower"), None)
    title = {"champion": "Champion", "baseline": "Base model"}[other]
    return compare(arms, examples, other, title, metrics[0], harm)


def numbers(value: Any) -> str:
    """Write a number of the gate's record for a table."""
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:.3f}" if isinstance(value, float) else json.dumps(value)
