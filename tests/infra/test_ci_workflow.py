"""The workflow to copy: what zizmor says, and that it calls commands that exist."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from assay.pipelines.commands.trigger import app

WORKFLOW = Path(__file__).parents[2] / "infra" / "ci" / "retrain.yaml"


@pytest.fixture
def jobs() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    return found


def zizmor(path: Path) -> "subprocess.CompletedProcess[str]":
    program = str(Path(sys.executable).with_name("zizmor"))
    return subprocess.run(
        [program, "--offline", "--no-progress", "--persona=pedantic", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_zizmor_finds_nothing() -> None:
    done = zizmor(WORKFLOW)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("@08c6903cd8c0fde910a37f88322edcfb5dd907a8", "@v5", "unpinned-uses"),
        ("permissions: {}", "permissions: write-all", "excessive-permissions"),
        ("{persist-credentials: false}", "{fetch-depth: 1}", "artipacked"),
        ('"$RECIPE" --id', '"${{ inputs.recipe }}" --id', "template-injection"),
    ],
)
def test_zizmor_would_find_it(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = WORKFLOW.read_text()
    assert old in text
    broken = tmp_path / "retrain.yaml"
    broken.write_text(text.replace(old, new))
    assert words in zizmor(broken).stdout


def test_the_job_that_runs_code_cannot_write_and_the_one_that_writes_runs_none(jobs: dict[str, Any]) -> None:
    assert jobs["retrain"]["permissions"] == {"contents": "read", "id-token": "write"}
    assert jobs["comment"]["permissions"] == {"pull-requests": "write"}
    assert not [step for step in jobs["comment"]["steps"] if "checkout" in step.get("uses", "")]


def test_every_action_is_pinned_by_sha(jobs: dict[str, Any]) -> None:
    used = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
    assert len(used) == 5
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action) for action in used)


def test_it_calls_options_that_exist(jobs: dict[str, Any]) -> None:
    (call,) = [step["run"] for step in jobs["retrain"]["steps"] if "assay trigger ci" in step.get("run", "")]
    known = CliRunner().invoke(app, ["ci", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    options = re.findall(r"--[a-z-]+", call)
    assert len(options) == 6
    assert all(option in known for option in options)
