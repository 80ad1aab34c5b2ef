"""What CI gets: a result, an exit code and a comment, from a run folder made by hand and from other engines' words."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Recipe
from assay.pipelines.engines.local import store
from assay.pipelines.engines.local.store import RunRecord, TaskRecord
from assay.pipelines.engines.outcome import Outcome
from assay.pipelines.triggers import ci
from assay.pipelines.triggers.launch import Job
from assay.pipelines.triggers.once import Claim, End, Record, Trigger

RUN = "20260101-000000-lamps"
DECISION = {
    "decision": "promote",
    "reason": "exact rose from 0.10 to 0.90.",
    "examples": 40,
    "arms": {
        "baseline": {"exact": {"mean": 0.1, "low": 0.05, "high": 0.2, "n": 40}},
        "candidate": {
            "exact": {"mean": 0.9, "low": 0.8, "high": 0.95, "n": 40},
            "near_miss": {"mean": None, "low": None, "high": None, "n": 0},
        },
    },
    "criteria": [
        {"metric": "exact", "versus": "baseline", "test": "superiority", "difference": 0.8, "passed": True},
        {"metric": "unsafe", "versus": "champion", "test": "non-inferiority", "difference": None, "passed": False},
    ],
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path))
    return tmp_path


def record(outcome: Outcome | None) -> Record:
    trigger = Trigger.of("ci", "commit", Job(Recipe(name="lamps"), outcome.engine if outcome else "local"))
    now = datetime.now(UTC)
    claim = Claim(trigger=trigger, number=1, time=now, host="here", pid=1, pid_started=1, nonce="n")
    return Record(claim, End(time=now, outcome=outcome))


def ran(home: Path, state: str = "SUCCEEDED", **changes: Any) -> dict[str, Any]:
    """Make the folder of a local run that ended, and return its result."""
    folder = store.task_folder(home, RUN, "gate") / "outputs" / "decision"
    folder.mkdir(parents=True)
    if state == "SUCCEEDED":
        (folder / "decision.json").write_text(json.dumps({**DECISION, **changes.pop("decision", {})}))
    tasks = changes.pop("tasks", {})
    run = RunRecord(id=RUN, name="lamps", digest="d", state=state, started=1, finished=2, pid=1, pid_started=1)
    store.write_json(store.run_folder(home, RUN) / "run.json", run.model_copy(update={"tasks": tasks}).model_dump())
    return ci.result(record(Outcome("local", RUN, state)))


def test_what_awaits_approval_is_not_called_promoted(home: Path) -> None:
    tasks = {f"promote/{name}": TaskRecord(state="SUCCEEDED") for name in ("register-model", "deploy-model")}
    for task, number in zip(tasks, (4, 0), strict=True):
        folder = store.task_folder(home, RUN, task)
        folder.mkdir(parents=True)
        (folder / "executor_output.json").write_text(json.dumps({"parameterValues": {"Output": number}}))
    result = ran(home, tasks=tasks)
    assert (ci.exit_code(result), result["candidate"]) == (0, 4)
    assert "### Assay: lamps passed the gate, version 4 awaits approval" in ci.comment(result)


@pytest.mark.parametrize(
    ("decision", "code", "words"),
    [("promote", 0, "promoted"), ("hold", 1, "held"), ("inconclusive", 3, "inconclusive")],
)
def test_the_decision_is_the_exit_code_and_the_headline(home: Path, decision: str, code: int, words: str) -> None:
    result = ran(home, decision={"decision": decision})
    assert ci.exit_code(result) == code
    first, headline, *_ = ci.comment(result).splitlines()
    assert first == "<!-- assay: lamps -->"
    assert headline.startswith(f"### Assay: lamps {words}")


def test_the_comment_has_arms_decision_and_reason(home: Path) -> None:
    words = ci.comment(ran(home))
    for line in (
        "exact rose from 0.10 to 0.90.",
        "| arm | exact | near&#95;miss |",
        "| --- | --- | --- |",
        "| baseline | 0.100 (0.050–0.200) | – |",
        "| candidate | 0.900 (0.800–0.950) | – |",
        "40 held-out examples; 95 % intervals.",
        "| exact | baseline | superiority | +0.800 | yes |",
        "| unsafe | champion | non-inferiority | – | no |",
    ):
        assert line in words.splitlines()
    assert f"Run `{RUN}` on local" in words


@pytest.mark.parametrize(("codes", "code"), [((2, 2), 2), ((2, 1), 70)])
def test_a_failed_run_says_which_step_and_whose_fault(home: Path, codes: tuple[int, int], code: int) -> None:
    tasks = {
        "validate-data": TaskRecord(state="FAILED", exit_code=codes[0], message="row 7 has no text"),
        "sft": TaskRecord(state="FAILED", exit_code=codes[1], message="x"),
    }
    result = ran(home, "FAILED", tasks=tasks)
    assert ci.exit_code(result) == code
    words = ci.comment(result)
    assert "### Assay: lamps failed" in words
    assert "* **validate-data** failed: row 7 has no text" in words


def test_words_from_rows_close_no_table_and_call_nobody(home: Path) -> None:
    tasks = {"sft": TaskRecord(state="FAILED", exit_code=1, message="a | b\n| c <img src=x> @everyone `x` [a](b) #1")}
    (line,) = [line for line in ci.comment(ran(home, "FAILED", tasks=tasks)).splitlines() if "sft" in line]
    assert not set("|<>@`[]") & set(line)
    assert "&lt;img src=x&gt; &#64;everyone" in line


@pytest.mark.parametrize(
    ("outcome", "code", "headline"),
    [
        (Outcome("kubeflow", "r", "SUBMITTED", url="https://kfp/r"), 0, "submitted"),
        (Outcome("kubeflow", "r", "SUCCEEDED", decision="hold", message="no better"), 1, "held, nothing was promoted"),
        (
            Outcome("sagemaker", "r", "SUCCEEDED"),
            70,
            "succeeded",
        ),  # it ended and says no decision: that is no promotion
        (Outcome("sagemaker", "r", "FAILED", message="no capacity"), 70, "failed"),
        (Outcome("sagemaker", "r", "CANCELLED"), 130, "cancelled"),
        (Outcome("local", "a run on another machine", "SUCCEEDED", decision="promote"), 0, "promoted"),
    ],
)
def test_every_engine_ends_in_the_same_keys(home: Path, outcome: Outcome, code: int, headline: str) -> None:
    result = ci.result(record(outcome))
    assert result.keys() == ran(home).keys()
    assert ci.exit_code(result) == code
    words = ci.comment(result)
    assert f"### Assay: lamps {headline}" in words
    assert outcome.message in words


@pytest.mark.parametrize("engine", ["kubeflow", "sagemaker", "local"])
def test_what_awaits_approval_elsewhere_is_not_called_promoted(home: Path, engine: str) -> None:
    outcome = Outcome(engine, "a run elsewhere", "SUCCEEDED", decision="promote")
    result = ci.result(record(outcome), approvals=2)
    assert "### Assay: lamps passed the gate, its candidate awaits approval" in ci.comment(result)


def test_a_trigger_without_a_run_has_no_result() -> None:
    with pytest.raises(RecipeError, match="came to no run"):
        ci.result(record(None))


def test_the_commit_names_the_trigger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_SHA", "abc")
    assert ci.identity("") == "abc"
    assert ci.identity("ticket 7") == "ticket 7"
    monkeypatch.delenv("GITHUB_SHA")
    with pytest.raises(RecipeError, match="needs a name"):
        ci.identity("")


def test_files_are_written_where_they_are_asked_for(home: Path) -> None:
    result = ran(home)
    ci.write(result, home / "out" / "result.json", home / "out" / "comment.md")
    assert json.loads((home / "out" / "result.json").read_text()) == result
    assert (home / "out" / "comment.md").read_text() == ci.comment(result)
    ci.write(result, None, None)
