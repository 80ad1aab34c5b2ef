"""The command line as a person meets it: bad input is named, exits 2 and shows no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from tiny_chain import write_recipe, write_rows

from assay.components.contracts.recipe import Recipe
from assay.pipelines import cli

FLAGSHIP = "medication-directions"


def assay(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "assay.pipelines.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Call the entry point in this process, in an empty folder; return its exit code and all it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))

    def called(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["assay", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return called


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("run", "nosuch"),
            "choose one of: direction-judge, engineering-qa, medication-directions, pharmacy-retrieval, product",
        ),
        (("run", "nosuch.yaml"), "nosuch.yaml: cannot be read"),
        (("run", "."), "cannot be read"),
        (("run", FLAGSHIP, "--data", "nope.jsonl"), "nope.jsonl: there is no such file or folder"),
        (("run", FLAGSHIP, "--profile", "nope"), "there is no profile 'nope'"),
        (("run", FLAGSHIP, "--from", "nope"), "train-sft, select-model"),
        (("resume",), "there is no run yet"),
        (("resume", "nope"), "there is no run 'nope'"),
        (("report",), "there is no run yet"),
        (("champion", "nope"), "'nope' has no champion"),
        (("history", "nope"), "'nope' has no history"),
        (("rollback", "nope", "--reason", "x"), "'nope' has no champion"),
        (("serve", "nope"), "'nope' has no champion to serve"),
        (("compile", FLAGSHIP, "-o", "/proc/nope/pipeline.yaml"), "/proc/nope/pipeline.yaml: cannot be written"),
        (("recipe", "copy", FLAGSHIP, "no/such/folder.yaml"), "no/such/folder.yaml: cannot be written"),
    ],
)
def test_bad_input_is_named_and_exits_2(call, arguments, words):
    code, printed = call(*arguments)
    assert code == 2
    assert words in printed
    assert "Traceback" not in printed


def test_what_needs_no_run_works_in_an_empty_folder(call, tmp_path):
    assert call("runs") == (0, "No run yet: `assay run medication-directions` makes the first.\n")
    assert call("recipe", "copy", FLAGSHIP, "mine.yaml")[0] == 0
    assert call("recipe", "copy", FLAGSHIP, "mine.yaml")[0] == 2
    code, printed = call("recipe", "show", "mine.yaml", "--profile", "gpu")
    assert code == 0
    assert "method: lora" in printed


def test_a_recipe_is_copied_with_the_rubric_it_names(call, tmp_path):
    assert call("recipe", "copy", "engineering-qa", "mine.yaml")[0] == 0
    assert Recipe.load(tmp_path / "mine.yaml") == Recipe.load(cli.RECIPES / "engineering-qa.yaml")
    assert call("recipe", "copy", "engineering-qa", "other.yaml")[0] == 0  # the rubric is there, and the same
    (tmp_path / "rubrics" / "engineering-answers.yaml").write_text("title: mine\n")
    code, printed = call("recipe", "copy", "engineering-qa", "third.yaml")
    assert (code, (tmp_path / "third.yaml").exists()) == (2, False)
    assert "rubrics/engineering-answers.yaml: another file is in" in printed


def test_a_bad_recipe_lists_all_its_problems_at_once(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: Bad Name\nsedd: 1\nsft: {learning_rate: 7, epoch: 2}\n")
    done = assay("run", "bad.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for key in ("name:", "sedd:", "sft.learning_rate:", "sft.epoch:"):
        assert key in done.stderr


def test_bad_rows_and_a_bad_model_are_both_reported(tmp_path):
    """Nothing heavy can start: the base model is a folder that does not exist."""
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "no-model")
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    twice = '{"messages": [{"role": "user", "content": "a"}], "messages": []}\n'
    rows.write_text('{"messages": [\n' + twice + rows.read_text())
    done = assay("run", str(recipe), "--data", str(rows), "--home", "home", "--json", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["state"] == "FAILED"
    assert result["users_fault"] is True
    assert sorted(result["failed"]) == ["import-model", "validate-data"]
    assert "no-model: there is no such folder" in result["failed"]["import-model"]
    assert "quarantine.jsonl" in result["failed"]["validate-data"]
    (quarantine,) = (tmp_path / "home" / "runs").glob("*/tasks/validate-data/outputs/quarantine/quarantine.jsonl")
    assert len(quarantine.read_text().splitlines()) == 2
