"""`assay advise` end to end: it measures the baselines of real rows, and reads a run again."""

import json
import os
import subprocess
import sys
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp.compiler import Compiler

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.metrics import Summary
from assay.components.contracts.recipe import Recipe
from assay.components.shared.advice import Point
from assay.pipelines.commands.advise import PLACES, cost_of, point_of, read_targets, selections
from assay.pipelines.commands.options import RECIPES
from assay.pipelines.measuring import measuring
from fixtures.tiny_chain import make_learner, write_recipe, write_rows


def assay(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "assay.pipelines.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "ASSAY_HOME": str(cwd / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


def last(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_baselines_are_measured_and_a_finished_measurement_is_read_again(base_model: Path, tmp_path: Path) -> None:
    learner = make_learner(tmp_path / "learner", base_model)
    recipe = str(write_recipe(tmp_path / "recipe.yaml", learner))
    rows = str(write_rows(tmp_path / "rows.jsonl"))
    told = last(assay("advise", recipe, "--data", rows, "--target", "exact=0.9", "--json", cwd=tmp_path))
    assert (told["rung"], told["rule"]) == ("classifier", "answers are a small closed set")  # stop, go or wait
    assert "3 different ones" in told["because"]
    assert any(sentence.startswith("few_shot: exact") for sentence in told["passed"])
    again = last(assay("advise", told["run"], "--target", "exact=0.0", "--json", cwd=tmp_path))
    assert (again["rung"], again["run"]) == ("prompting", told["run"])
    spoken = assay("advise", cwd=tmp_path)
    assert spoken.returncode == 0
    assert "tiny-lamps: A classifier on frozen features (" in spoken.stdout
    assert "No training." not in spoken.stdout
    resumed = assay("resume", cwd=tmp_path)
    assert resumed.returncode == 0
    assert f"assay advise {told['run']}" in resumed.stdout
    unknown = assay("advise", told["run"], "--target", "exakt=1", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "the task has no metric 'exakt'" in unknown.stderr


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_a_learning_curve_is_measured_and_told(base_model: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path / "recipe.yaml", make_learner(tmp_path / "learner", base_model)))
    rows = str(write_rows(tmp_path / "rows.jsonl"))
    curved = last(assay("advise", recipe, "--data", rows, "--curve", "--target", "exact=0.99", "--json", cwd=tmp_path))
    counts = [point["rows"] for point in curved["curve"]]
    labels = counts[-1]
    assert counts == [ceil(labels / 4), ceil(labels / 2), labels]
    assert all(point["low"] <= point["mean"] <= point["high"] for point in curved["curve"])
    assert curved["curve"][0]["mean"] < curved["curve"][-1]["mean"]
    assert curved["outlook"].startswith("Learning curve of SFT, exact on ")


def test_a_point_of_the_curve_is_of_the_primary_metric_wherever_it_stands() -> None:
    cells = {
        name: {"mean": mean, "low": 0.0, "high": 1.0, "n": 9} for name, mean in (("length", 0.9), ("similar", 0.4))
    }
    measured = Summary(step="select_model", headline="-", details={"challenger": cells})
    trained = Summary(step="train_sft", headline="-", metrics={"examples": 80.0})
    assert point_of(trained, measured, "similar") == Point(rows=80, mean=0.4, low=0.0, high=1.0, n=9)


def test_a_curve_trains_on_parts_of_the_rows_and_ends_at_the_recipes_own_stage(tmp_path: Path) -> None:
    recipe = Recipe.load(RECIPES / "medication-directions.yaml")
    Compiler().compile(measuring(recipe, curve=True), str(tmp_path / "curve.yaml"))
    tasks = next(yaml.safe_load_all((tmp_path / "curve.yaml").read_text()))["root"]["dag"]["tasks"]
    told = [
        tasks[f"train-sft{place}"]["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"] for place in PLACES
    ]
    assert [one["share"] for one in told] == [0.25, 0.5, 1.0]
    assert recipe.sft is not None
    assert told[-1] == recipe.sft.model_dump(mode="json")
    assert {f"select-model{place}" for place in PLACES} <= tasks.keys()
    with pytest.raises(RecipeError, match="no SFT"):
        measuring(recipe.model_copy(update={"sft": None}), curve=True)


def test_a_target_that_is_none_is_refused() -> None:
    assert read_targets(["exact=0.9", "near_miss = 0.05"]) == {"exact": 0.9, "near_miss": 0.05}
    with pytest.raises(RecipeError, match="METRIC=VALUE"):
        read_targets(["exact"])


def test_what_a_stage_costs_is_what_its_steps_took() -> None:
    recipe = Recipe.load(RECIPES / "medication-directions.yaml")
    assert selections(recipe) == {"sft": "select-model", "preference": "select-model-2", "rl": "select-model-3"}
    known = cost_of("preference", recipe, {})
    assert known is not None
    assert known.seconds == 33 + 35 + 15  # sample, train and select; the pairs' own step is not in the recipe's figures
    assert "the recipe's own figures" in known.source
    here = cost_of("rl", recipe, {"train-rl": 50.0, "select-model-3": 7.0})
    assert here is not None
    assert (here.seconds, here.source) == (57.0, "as it last ran here")
    assert cost_of("distill", recipe, {}) is None


def test_a_search_has_nothing_to_measure_before_its_encoder() -> None:
    with pytest.raises(RecipeError, match="advise from that run"):
        measuring(Recipe.load(RECIPES / "pharmacy-retrieval.yaml"))
