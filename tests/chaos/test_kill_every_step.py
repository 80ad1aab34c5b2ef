"""Kill -9 in every step of the real chain, resume each time, and end with the same decision and the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fixtures.tiny_chain import make_learner, write_recipe, write_rows


@pytest.fixture(scope="module")
def files(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("chain")
    learner = make_learner(folder / "learner", base_model)
    return write_recipe(folder / "tiny.yaml", learner), write_rows(folder / "lamps.jsonl")


def start(home: Path, *words: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "ASSAY_HOME": str(home)}
    command = [sys.executable, "-m", "assay.pipelines.cli", *words, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def follow(process: "subprocess.Popen[str]", killed: dict[str, float] | None = None) -> dict[str, Any] | None:
    """Return the result of a run that ends; kill the engine soon after it starts a step that is not in `killed`.

    `killed` has the seconds after which each step was.
    """
    assert process.stdout
    for line in process.stdout:
        event = json.loads(line)
        if event["kind"] == "result":
            process.wait()
            return event
        started = event["kind"] == "task_state" and event["state"] == "RUNNING"
        if (
            killed is not None
            and started
            and event["task"] not in killed
            and "condition" not in Path(event["task"]).name
        ):
            killed[event["task"]] = 0.4 + 0.35 * ((len(killed) + 1) % 7)  # early in one step, late in the next
            time.sleep(killed[event["task"]])
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
    raise AssertionError("the run ended without a result")


def contents(home: Path, run: str) -> dict[str, str]:
    """Content digests of what every step of a run wrote."""
    tasks = home / "runs" / run / "tasks"
    return {
        str(path.parent.relative_to(tasks)): json.loads(path.read_text())["files"]
        for path in sorted(tasks.glob("**/outputs/*/manifest.json"))
        if not str(path).endswith("summary/manifest.json")
    }


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_a_run_killed_in_every_step_ends_as_if_nothing_had_happened(files, tmp_path, capsys):
    recipe, rows = files
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    wanted = follow(start(calm, "run", str(recipe), "--data", str(rows)))
    assert wanted is not None
    assert wanted["decision"] == "promote", wanted

    killed: dict[str, float] = {}
    result = follow(start(rough, "run", str(recipe), "--data", str(rows)), killed)
    while result is None:
        assert len(killed) < 40
        result = follow(start(rough, "resume"), killed)

    assert {name.rpartition("/")[2] for name in killed} >= {
        "train-sft",
        "train-preference",
        "train-rl",
        "evaluate",
        "gate",
    }
    assert (result["decision"], result["reason"], result["version"]) == (
        wanted["decision"],
        wanted["reason"],
        wanted["version"],
    )
    made = contents(rough, result["run"])
    assert made == contents(calm, wanted["run"])
    with capsys.disabled():
        print()
        for name, seconds in killed.items():
            print(f"{name.rpartition('/')[2]:20} killed -9 after {seconds:.2f} s, with the engine; resumed")
        print(f"{len(killed)} kills: the same decision ({result['decision']}), {len(made)} artifacts of equal bytes")
