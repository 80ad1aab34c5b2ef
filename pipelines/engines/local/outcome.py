"""How a run ended: the gate's decision, the version in force, where the report lies, and what to do next."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from assay.components.contracts.errors import RunError

from . import store
from .store import RunRecord


def read(home: Path, record: RunRecord) -> dict[str, Any]:
    """Return the result of a run as JSON values.

    Keys: `run`, `name`, `state`, `decision` (None if the gate was not reached), `reason`, `version` (0 when nothing was
    promoted), `candidate` (a version that awaits approval; 0 for none), `criteria` (the gate's findings; of slices
    those that are worse), `report` (path or None), `failed` (step to its message), `users_fault`, `seconds`.
    """
    decision, version = _decision(home, record), _output(home, record, "deploy-model")
    page = _report_path(home, record)
    failed = {path: task for path, task in record.tasks.items() if task.state == "FAILED"}
    leaves = {path: task for path, task in failed.items() if not any(other.startswith(f"{path}/") for other in failed)}
    return {
        "run": record.id,
        "name": record.name,
        "state": record.state,
        "decision": decision.get("decision"),
        "reason": decision.get("reason", ""),
        "version": version,
        "candidate": 0 if version else _output(home, record, "register-model"),
        "criteria": [*decision.get("criteria", []), *(one for one in decision.get("slices", []) if _worse(one))],
        "report": str(page) if page else None,
        "failed": {path: task.message for path, task in leaves.items()},
        "users_fault": bool(leaves) and all(task.exit_code == 2 for task in leaves.values()),
        "seconds": round(max(record.finished - record.started, 0), 1),
    }


def report(home: Path, record: RunRecord) -> Path:
    """Return the path of a run's HTML report.

    Raises:
        RunError: The run did not come so far.
    """
    path = _report_path(home, record)
    if path is None:
        raise RunError("this run has no report yet", where=record.id, fix=f"go on with it: assay resume {record.id}")
    return path


def words(result: dict[str, Any]) -> str:
    """Write a result as the last lines of a run."""
    if result["state"] != "SUCCEEDED":
        return "\n".join([*_failures(result), f"Go on with: assay resume {result['run']}"])
    if result["decision"] is None:  # it measures the baselines only
        return f"\nMeasured. What follows from it: assay advise {result['run']}"
    headline = {
        "promote": f"Promoted: {result['name']} version {result['version']} is champion.",
        "hold": "Held: nothing was promoted.",
        "inconclusive": "Inconclusive: nothing was promoted.",
    }[result["decision"]]
    if result["candidate"]:
        headline = f"Passed the gate: {result['name']} version {result['candidate']} awaits approval."
    lines = ["", headline, f"  {result['reason']}", *_table(result["criteria"]), f"  Report:  {result['report']}"]
    if result["version"]:
        lines.append(f"  Serve:   assay serve {result['name']}")
    if result["candidate"]:
        lines.append(f"  Review:  assay review, or: assay queue {result['name']}")
    return "\n".join(lines)


def _worse(finding: dict[str, Any]) -> bool:
    return finding["passed"] is False


def _table(findings: Sequence[dict[str, Any]]) -> list[str]:
    """Write what the gate found as lines of equal columns; a gain is positive where the candidate is better."""
    if not findings:
        return []
    rows = [("", "criterion", "against", "reference", "candidate", "gain", "interval of the gain", "p", "n")]
    for one in findings:
        metric = f"{one['metric']} ({one['tier']}{': ' + one['slice'] if one.get('slice') else ''})"
        means = (f"{one['reference']:.3f}", f"{one['candidate']:.3f}", f"{one['difference']:+.3f}")
        interval, p = f"{one['low']:+.3f} to {one['high']:+.3f}", one["p_value"]
        passed = {True: "pass", False: "fail", None: "open"}[one["passed"]]
        bar = f"{'+' if one['test'] == 'superiority' else '-'}{one['margin']:g}"
        asked = "bound" if one["test"] == "bound" else f"{one['versus']}, {bar}"
        rows.append((passed, metric, asked, *means, interval, f"{p:.3f}" if p >= 0.001 else "<0.001", str(one["n"])))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return ["", *(f"  {line.rstrip()}" for line in padded), ""]


def _failures(result: dict[str, Any]) -> list[str]:
    if result["state"] != "FAILED":
        return ["", f"The run was {result['state'].lower()}; what is finished is kept."]
    lines = [f"\n{path} failed: {message}" for path, message in result["failed"].items()]
    return lines or ["\nThe run failed."]


def _decision(home: Path, record: RunRecord) -> dict[str, Any]:
    path = store.task_folder(home, record.id, "gate") / "outputs" / "decision" / "decision.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _report_path(home: Path, record: RunRecord) -> Path | None:
    folder = store.task_folder(home, record.id, "write-report")
    named, plain = folder / "report.html", folder / "outputs" / "report"
    if not plain.is_file():
        return None
    named.unlink(missing_ok=True)
    named.hardlink_to(plain)  # a browser goes by the ending, which an artifact's file has not
    return named


def _output(home: Path, record: RunRecord, step: str) -> int:
    """Return the version that a step gave out; 0 when it did not run."""
    for path, task in record.tasks.items():
        if path.endswith(step) and task.state in ("SUCCEEDED", "CACHED"):
            output = store.read_json(store.task_folder(home, record.id, path) / "executor_output.json") or {}
            return int(output.get("parameterValues", {}).get("Output", 0))
    return 0
