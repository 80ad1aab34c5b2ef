"""Retraining that CI triggers: a result for machines, an exit code, and a comment for the pull request.

The exit code is the decision (0 promote, 1 hold, 3 inconclusive), 2 is the input's fault, 70 a step broke, 130 it was
cancelled: the same as `assay run`.
"""

import html
import json
import os
from pathlib import Path
from typing import Any

from assay.components.contracts.artifacts import write_atomically
from assay.components.contracts.errors import RecipeError
from assay.components.runtime.context import home

from ..engines.outcome import Outcome
from .once import Record

EXIT = {"promote": 0, "hold": 1, "inconclusive": 3}
USERS_FAULT, BROKEN, CANCELLED = 2, 70, 130
HEADLINES = {
    "promote": "promoted",
    "hold": "held, nothing was promoted",
    "inconclusive": "inconclusive, nothing was promoted",
}
COMMIT = "GITHUB_SHA"
_ESCAPES = {ord(character): f"&#{ord(character)};" for character in "\\|*_`[]#@"}


def identity(given: str) -> str:
    """Return what names a CI trigger: what was given, or the commit that the runner names.

    Raises:
        RecipeError: There is neither.
    """
    name = given or os.environ.get(COMMIT, "")
    if not name:
        raise RecipeError("a CI trigger needs a name", fix=f"give --id (the commit, a ticket), or set {COMMIT}")
    return name


def result(record: Record, approvals: int = 0) -> dict[str, Any]:
    """Return how a trigger's run ended, the same keys for every engine.

    Keys: `trigger`, `engine`, `run`, `name`, `state`, `decision`, `reason`, `version`, `candidate` (a version that
    awaits approval, where this machine knows of one), `approvals`, `report`, `failed`, `users_fault`, `record` (the
    gate's decision record where this machine has it, else empty).

    Args:
        record: Of the trigger.
        approvals: People who must approve what passed the gate.
    """
    outcome, trigger = record.outcome, record.claim.trigger
    if outcome is None:
        raise RecipeError("this trigger came to no run", where=trigger.id, fix="start it again")
    told = _told(outcome) if outcome.engine != "local" else _read_here(outcome)
    return {"trigger": trigger.id, "engine": outcome.engine, "name": trigger.recipe, "approvals": approvals, **told}


def exit_code(result: dict[str, Any]) -> int:
    """Return the exit code of a result; a run that was only submitted is no failure."""
    if result["state"] == "SUBMITTED":
        return 0
    if result["state"] == "SUCCEEDED" and result["decision"] in EXIT:
        return EXIT[result["decision"]]
    if result["state"] == "CANCELLED":
        return CANCELLED
    return USERS_FAULT if result["users_fault"] else BROKEN


def write(result: dict[str, Any], json_path: Path | None, comment_path: Path | None) -> None:
    """Write the files that a workflow picks up."""
    if json_path:
        write_atomically(json_path, json.dumps(result, indent=1, sort_keys=True) + "\n")
    if comment_path:
        write_atomically(comment_path, comment(result))


def comment(result: dict[str, Any]) -> str:
    """Return the Markdown of a pull request's comment.

    Its first line is a marker, by which a workflow finds the comment of an earlier run and replaces it. Whatever a
    recipe or a row could have put into the words is escaped: it can close no table and call nobody.
    """
    lines = [f"<!-- assay: {_text(result['name'])} -->", f"### Assay: {_text(result['name'])} {_headline(result)}", ""]
    if result["reason"]:
        lines += [_text(result["reason"]), ""]
    lines += [f"* **{_text(step)}** failed: {_text(message)}" for step, message in result["failed"].items()]
    lines += _arms(result["record"]) + _criteria(result["record"])
    where = f"Run `{_code(result['run'])}` on {result['engine']}, trigger `{result['trigger'][:12]}`."
    return "\n".join([*lines, where, ""])


def _headline(result: dict[str, Any]) -> str:
    if result["candidate"]:
        return f"passed the gate, version {result['candidate']} awaits approval"
    if result["decision"] == "promote" and result["approvals"] and not result["version"]:
        return "passed the gate, its candidate awaits approval"
    if result["state"] == "SUCCEEDED" and result["decision"] in HEADLINES:
        version = f" as version {result['version']}" if result["version"] else ""
        return HEADLINES[result["decision"]] + version
    return str(result["state"]).lower()


def _arms(record: dict[str, Any]) -> list[str]:
    arms = record.get("arms", {})
    metrics = sorted({metric for table in arms.values() for metric in table})
    if not metrics:
        return []
    head = ["arm", *metrics]
    rows = [[arm, *(_interval(table.get(metric)) for metric in metrics)] for arm, table in sorted(arms.items())]
    return [*_table([head, *rows]), f"{record.get('examples', 0)} held-out examples; 95 % intervals.", ""]


def _criteria(record: dict[str, Any]) -> list[str]:
    found = record.get("criteria", [])
    if not found:
        return []
    head = ["criterion", "against", "test", "difference", "passed"]
    rows = [
        [item["metric"], item["versus"], item["test"], _number(item.get("difference")), _yes(item["passed"])]
        for item in found
    ]
    return [*_table([head, *rows]), ""]


def _table(rows: list[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(_text(str(cell)) for cell in row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


def _interval(value: dict[str, Any] | None) -> str:
    if not value or value.get("mean") is None:
        return "–"
    low, high = value.get("low"), value.get("high")
    spread = f" ({low:.3f}–{high:.3f})" if low is not None and high is not None else ""
    return f"{value['mean']:.3f}{spread}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _yes(passed: bool) -> str:
    return "yes" if passed else "no"


def _text(words: str) -> str:
    return html.escape(" ".join(words.split()), quote=False).translate(_ESCAPES)


def _code(words: str) -> str:
    return " ".join(words.split()).replace("`", "'")


def _told(outcome: Outcome) -> dict[str, Any]:
    return {
        "run": outcome.run,
        "state": outcome.state,
        "decision": outcome.decision or None,
        "reason": outcome.message,
        "version": 0,
        "candidate": 0,
        "report": outcome.url or None,
        "failed": {},
        "users_fault": False,
        "record": {},
    }


def _read_here(outcome: Outcome) -> dict[str, Any]:
    """Read a local run; where another machine ran it, there is only what it told."""
    from ..engines.local import outcome as ends
    from ..engines.local import store

    if not (store.run_folder(home(), outcome.run) / "run.json").is_file():
        return _told(outcome)
    ended = ends.read(home(), store.load_run(home(), outcome.run))
    path = store.task_folder(home(), outcome.run, "gate") / "outputs" / "decision" / "decision.json"
    keys = ("run", "state", "decision", "reason", "version", "candidate", "report", "failed", "users_fault")
    return {**{key: ended[key] for key in keys}, "record": store.read_json(path) or {}}
