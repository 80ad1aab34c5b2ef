"""How a run is said to have ended, from a run folder made by hand."""

import json

import pytest
import typer

from assay.components.contracts.errors import RunError
from assay.pipelines.commands import runs
from assay.pipelines.engines.local import outcome, store
from assay.pipelines.engines.local.store import RunRecord, TaskRecord

RUN = "20260101-000000-lamps"


def record(state: str, **tasks: TaskRecord) -> RunRecord:
    named = {name.replace("_", "-").replace("--", "/"): task for name, task in tasks.items()}
    return RunRecord(
        id=RUN, name="lamps", digest="d", state=state, started=10, finished=12.5, pid=1, pid_started=1, tasks=named
    )


def decide(home, decision: str, version: int = 0) -> RunRecord:
    folder = store.task_folder(home, RUN, "gate") / "outputs" / "decision"
    folder.mkdir(parents=True)
    (folder / "decision.json").write_text(json.dumps({"decision": decision, "reason": "Because."}))
    page = store.task_folder(home, RUN, "write-report") / "outputs" / "report"
    page.parent.mkdir(parents=True)
    page.write_text("<html>")
    deployed = store.task_folder(home, RUN, "promote/deploy-model")
    deployed.mkdir(parents=True)
    if version:
        (deployed / "executor_output.json").write_text(json.dumps({"parameterValues": {"Output": version}}))
    state = "SUCCEEDED" if version else "SKIPPED"
    return record("SUCCEEDED", promote__deploy_model=TaskRecord(state=state))


def test_a_candidate_that_waits_is_no_champion_and_no_failure(tmp_path, capsys):
    made = decide(tmp_path, "promote")
    made.tasks["promote/deploy-model"].state = "SUCCEEDED"
    registered = store.task_folder(tmp_path, RUN, "promote/register-model")
    registered.mkdir(parents=True)
    for folder, number in ((registered, 4), (registered.parent / "deploy-model", 0)):
        (folder / "executor_output.json").write_text(json.dumps({"parameterValues": {"Output": number}}))
    made.tasks["promote/register-model"] = TaskRecord(state="SUCCEEDED")
    result = outcome.read(tmp_path, made)
    assert (result["version"], result["candidate"]) == (0, 4)
    with pytest.raises(typer.Exit) as ended:
        runs.finish(made, tmp_path, as_json=False)
    assert ended.value.exit_code == 0
    printed = capsys.readouterr().out
    assert "Passed the gate: lamps version 4 awaits approval." in printed
    assert "assay review, or: assay queue lamps" in printed
    assert "assay serve" not in printed


@pytest.mark.parametrize(
    ("decision", "version", "headline", "code"),
    [
        ("promote", 3, "Promoted: lamps version 3 is champion.", 0),
        ("hold", 0, "Held: nothing was promoted.", 1),
        ("inconclusive", 0, "Inconclusive: nothing was promoted.", 3),
    ],
)
def test_a_decision_has_its_words_and_its_exit_code(tmp_path, capsys, decision, version, headline, code):
    made = decide(tmp_path, decision, version)
    result = outcome.read(tmp_path, made)
    assert result["seconds"] == 2.5
    assert result["version"] == version
    with pytest.raises(typer.Exit) as ended:
        runs.finish(made, tmp_path, as_json=False)
    printed = capsys.readouterr().out
    assert ended.value.exit_code == code
    assert headline in printed
    assert "  Because." in printed
    assert "report.html" in printed
    assert ("assay serve lamps" in printed) == bool(version)


def test_what_the_gate_found_is_a_table(tmp_path):
    made = decide(tmp_path, "hold")
    finding = {
        "metric": "exact",
        "tier": "primary",
        "versus": "champion",
        "test": "non_inferiority",
        "margin": 0.05,
        "n": 400,
        "candidate": 0.61,
        "reference": 0.5,
        "difference": 0.11,
        "low": 0.07,
        "high": 0.15,
        "p_value": 0.00002,
        "passed": True,
    }
    bound = finding | {"metric": "near_miss", "test": "bound", "versus": "absolute", "passed": None, "p_value": 0.2}
    slices = [
        finding | {"tier": "slice", "slice": f"flag={flag}", "passed": passed}
        for flag, passed in (("ok", None), ("overdose", False))
    ]
    path = store.task_folder(tmp_path, RUN, "gate") / "outputs" / "decision" / "decision.json"
    record = json.loads(path.read_text()) | {"criteria": [finding, bound], "slices": slices}
    path.write_text(json.dumps(record))
    lines = [line.split() for line in outcome.words(outcome.read(tmp_path, made)).splitlines()]
    table = [line for line in lines if line and line[0] in ("pass", "open", "fail")]
    assert [line[0] for line in table] == ["pass", "open", "fail"]  # of the slices the one that is worse
    assert table[0][1:5] == ["exact", "(primary)", "champion,", "-0.05"]
    assert table[0][5:] == ["0.500", "0.610", "+0.110", "+0.070", "to", "+0.150", "<0.001", "400"]
    assert table[1][3] == "bound"
    assert "flag=overdose)" in table[2]


def test_the_report_opens_in_a_browser_and_is_asked_for_twice(tmp_path):
    made = decide(tmp_path, "hold")
    assert outcome.report(tmp_path, made) == outcome.report(tmp_path, made)
    assert outcome.report(tmp_path, made).read_text() == "<html>"


def test_no_report_yet(tmp_path):
    with pytest.raises(RunError, match="no report yet") as caught:
        outcome.report(tmp_path, record("FAILED"))
    assert f"assay resume {RUN}" in caught.value.fix


@pytest.mark.parametrize(("codes", "exit_code"), [((2, 2), 2), ((2, 1), 70), ((-9, 1), 70)])
def test_failures_are_listed_by_the_step_that_failed(tmp_path, capsys, codes, exit_code):
    made = record(
        "FAILED",
        validate_data=TaskRecord(state="FAILED", exit_code=codes[0], message="bad rows"),
        loop=TaskRecord(state="FAILED", exit_code=0, message="a step in it failed"),
        loop__train=TaskRecord(state="FAILED", exit_code=codes[1], message="bad model"),
        gate=TaskRecord(state="SKIPPED"),
    )
    with pytest.raises(typer.Exit) as ended:
        runs.finish(made, tmp_path, as_json=False)
    printed = capsys.readouterr().out
    assert ended.value.exit_code == exit_code
    assert "validate-data failed: bad rows" in printed
    assert "loop/train failed: bad model" in printed
    assert "a step in it" not in printed
    assert f"assay resume {RUN}" in printed


def test_a_cancelled_run_says_what_is_kept(tmp_path, capsys):
    with pytest.raises(typer.Exit) as ended:
        runs.finish(record("CANCELLED", sft=TaskRecord(state="CANCELLED")), tmp_path, as_json=False)
    printed = capsys.readouterr().out
    assert ended.value.exit_code == 130
    assert "The run was cancelled; what is finished is kept." in printed


def test_json_is_one_line_that_a_machine_reads(tmp_path, capsys):
    with pytest.raises(typer.Exit):
        runs.finish(decide(tmp_path, "promote", 2), tmp_path, as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    value = json.loads(line)
    assert (value["kind"], value["decision"], value["version"], value["failed"]) == ("result", "promote", 2, {})
