"""The graph of retrieval: its own steps and the shared ones, chosen by the recipe, on every engine."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from assay.components.contracts.recipe import EmbeddingSettings, Recipe
from assay.pipelines import cli
from assay.pipelines.engines.local import engine
from assay.pipelines.graphs import compile_recipe
from assay.pipelines.ir import model, portability

RECIPE = cli.RECIPES / "pharmacy-retrieval.yaml"
STEPS = {
    "generate-data",
    "validate-data",
    "prepare-data",
    "import-model",
    "train-embedding",
    "find-champion",
    "evaluate-retrieval",
    "judge",
    "gate",
    "register-model",
    "deploy-model",
    "hold-model",
    "write-report",
}


def steps(path: Path) -> set[str]:
    return {task.path.rpartition("/")[2] for task in engine.plan(path) if task.kind == "container"}


def test_a_recipe_chooses_its_graph(tmp_path: Path) -> None:
    assert steps(compile_recipe(Recipe.load(RECIPE), tmp_path / "pipeline.yaml")) == STEPS
    own = compile_recipe(Recipe.load(RECIPE), tmp_path / "own.yaml", "/rows/mine.jsonl")
    assert steps(own) == STEPS - {"generate-data"}
    other = steps(compile_recipe(Recipe(name="other"), tmp_path / "other.yaml"))
    assert "train-sft" in other
    assert not other & {"train-embedding", "evaluate-retrieval"}


@pytest.mark.parametrize("target", ["local", "kubeflow", "sagemaker"])
@pytest.mark.parametrize("profile", ["", "gpu"])
def test_it_runs_on_every_engine(target: str, profile: str, tmp_path: Path) -> None:
    pipeline = model.load(compile_recipe(Recipe.load(RECIPE, profile), tmp_path / "pipeline.yaml"))
    assert [finding for finding in portability.lint(pipeline, target) if finding.level == "error"] == []


def test_a_graph_has_its_own_stages_only() -> None:
    recipe = Recipe(name="search", graph="retrieval")
    assert recipe.stages == {"embedding": "Embedding"}
    assert recipe.embedding == EmbeddingSettings()
    assert recipe.sft is recipe.preference is recipe.rl is None
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert list(Recipe(name="climb").stages) == ["sft", "preference", "rl"]
    with pytest.raises(ValidationError, match="sft is no stage of the graph 'retrieval'"):
        Recipe.model_validate({"name": "search", "graph": "retrieval", "sft": {"epochs": 2}})
    with pytest.raises(ValidationError, match="embedding is no stage of the graph 'post_training'"):
        Recipe.model_validate({"name": "climb", "embedding": {"epochs": 2}})
