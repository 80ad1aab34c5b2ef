"""`assay trigger`: the commands, in this process, on the real local engine with a small pipeline."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from kfp import dsl
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
import steps
from bench import FIXTURES, Bench

from assay.components.contracts.errors import AssayError
from assay.components.contracts.recipe import Recipe
from assay.components.shared import ledger
from assay.components.shared.ledger import Draft
from assay.pipelines.commands.trigger import app
from assay.pipelines.engines.local import store
from assay.pipelines.triggers import cron, launch

ROWS = '{"prompt": "red lamp", "answer": "stop"}\n'


@dsl.pipeline(name="small")
def small():
    steps.echo(text="ran")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A home in an empty folder, and every recipe compiled to a pipeline of one step."""
    monkeypatch.setenv("JOURNAL", "")
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", path)
    made = Bench(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FIXTURES), path]))
    monkeypatch.setenv("ASSAY_HOME", str(made.home))
    monkeypatch.delenv("ASSAY_REGISTRY", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    ir = made.compile(small)
    monkeypatch.setattr(launch, "_compile", lambda job, root: ir)
    return made


@pytest.fixture
def call(bench: Bench) -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def deliver(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text(ROWS)
    (folder / "_MANIFEST.json").write_text(json.dumps({"files": {"rows.jsonl": {"size": len(ROWS)}}}))
    return folder


def test_watch_runs_each_batch_once(call, bench: Bench, tmp_path: Path) -> None:
    deliver(tmp_path / "in" / "monday")
    arguments = ("watch", "medication-directions", str(tmp_path / "in"), "--every", "0")
    assert "data " in call(*arguments).output
    assert call(*arguments).output == ""
    deliver(tmp_path / "in" / "tuesday")
    (tmp_path / "in" / "tuesday" / "rows.jsonl").write_text(ROWS.upper())
    assert "medication-directions run" in call(*arguments).output
    assert [record.metadata["data"].rpartition("/")[2] for record in store.list_runs(bench.home)] == [
        "tuesday",
        "monday",
    ]
    listed = call("list").output.splitlines()
    assert len(listed) == 3
    assert all("data" in line and "SUCCEEDED" in line for line in listed[1:])


def test_due_schedules_run_once_and_from_a_second_shell_not_again(call, bench: Bench) -> None:
    cron.schedule(Recipe(name="lamps"), "0 0 * * *", "")
    path = bench.home / "schedules" / "lamps.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "since": "2020-01-01T00:00:00Z"}))
    assert "schedule 20" in call("cron", "--due").output
    assert call("cron", "--due").output == ""
    assert len(store.list_runs(bench.home)) == 1
    assert "trigger cron --due" in call("cron", "--print", "cron").output


def test_ci_writes_its_files_and_a_rerun_of_the_job_changes_nothing(call, bench: Bench, tmp_path: Path) -> None:
    arguments = ("ci", "medication-directions", "--id", "abc", "--result", "r.json", "--comment", "c.md")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        first, again = call(*arguments), call(*arguments)
    assert first.exit_code == again.exit_code == 70  # this pipeline has no gate, so it ended without a decision
    assert json.loads(first.output) == json.loads(again.output)
    assert json.loads((tmp_path / "r.json").read_text())["state"] == "SUCCEEDED"
    assert (tmp_path / "c.md").read_text().startswith("<!-- assay: medication-directions -->")
    assert len(store.list_runs(bench.home)) == 1


def test_registry_events_reach_a_command(call, bench: Bench, tmp_path: Path) -> None:
    ledger.append("lamps", lambda entries: Draft("promoted", 1, "c" * 64, "d" * 64, reason="better"))
    arguments = ("registry", "lamps", "--run", f"tee {tmp_path / 'told'}")
    assert "told: lamps version 1 promoted" in call(*arguments).output
    assert call(*arguments).output == ""
    assert json.loads((tmp_path / "told").read_text())["version"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("registry", "lamps"), "who is to be told"),
        (("registry", "lamps", "--run", "true", "--webhook", "https://example.com"), "who is to be told"),
        (("watch", "no-such-recipe", "in"), "no recipe"),
        (("watch", "medication-directions", "no-such-folder", "--every", "0"), "no such folder"),
    ],
)
def test_what_is_wrong_is_told(call, arguments: tuple[str, ...], words: str) -> None:
    error = call(*arguments).exception
    assert isinstance(error, AssayError)
    assert words in str(error)
