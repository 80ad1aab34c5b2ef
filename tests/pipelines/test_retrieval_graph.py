"""The graph of retrieval: its own steps and the shared ones, chosen by the recipe, on every engine."""

from pathlib import Path
from typing import Any

import pytest
from kfp import dsl
from pydantic import ValidationError

from assay.components.contracts.recipe import EmbeddingSettings, Recipe
from assay.pipelines import cli
from assay.pipelines.engines.local import engine
from assay.pipelines.graphs import compile_recipe
from assay.pipelines.ir import model, portability
from fixtures.tiny_chain import make_learner

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


@pytest.mark.heavy
def test_the_steps_of_the_graph_fit_together(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From rows to champion and report, on two layers of the base model, in one process."""
    from assay.components.contracts.artifacts import read_manifest
    from assay.components.deploy_model.component import deploy_model
    from assay.components.evaluate_retrieval.component import evaluate_retrieval
    from assay.components.find_champion.component import find_champion
    from assay.components.gate.component import gate
    from assay.components.generate_data.component import generate_data
    from assay.components.judge.component import judge
    from assay.components.prepare_data.component import prepare_data
    from assay.components.register_model.component import register_model
    from assay.components.shared import registry
    from assay.components.train_embedding.component import train_embedding
    from assay.components.validate_data.component import validate_data
    from assay.components.write_report.component import write_report

    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ASSAY_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("ASSAY_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("ASSAY_CPUS", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe = Recipe.model_validate(
        {
            "name": "tiny-search",
            "graph": "retrieval",
            "task": "pharmacy_retrieval",
            "data": {"rows": 480, "shares": {"sft": 0.35, "validation": 0.05, "test": 0.6}, "min_test_rows": 200},
            "embedding": {
                "lowercase": True,
                "learning_rate": 1.0e-3,
                "batch_size": 24,
                "max_steps": 24,
                "epochs": 9,
                "precision": "fp32",
            },
            "evaluate": {"few_shot": 1, "max_new_tokens": 4, "golden_prompts": 2},
            "judge": {"backend": "none"},
            "gate": {"min_examples": 40, "criteria": [{"metric": "recall_1", "versus": ["baseline", "lexical"]}]},
        }
    )
    settings: dict[str, Any] = {name: value for name, value in recipe.model_dump(mode="json").items() if value}

    def at(name: str, kind: type[dsl.Artifact] = dsl.Dataset) -> Any:
        return kind(name=name, uri=str(tmp_path / name))

    base = dsl.Model(uri=str(make_learner(tmp_path / "base", base_model)))
    generate_data.python_func(task=recipe.task, rows=480, seed=0, raw=at("raw"))
    made = {"accepted": at("accepted"), "quarantine": at("quarantine"), "docs": at("docs", dsl.Artifact)}
    checks, parts = at("validation", dsl.Metrics), at("splits", dsl.Metrics)
    validate_data.python_func(settings=settings["data"], task=recipe.task, raw=at("raw"), summary=checks, **made)
    data, candidate = at("data"), at("candidate", dsl.Model)
    prepare_data.python_func(settings=settings["data"], accepted=made["accepted"], data=data, summary=parts)
    learned = at("embedding", dsl.Metrics)
    given = {"settings": settings["embedding"], "task": recipe.task, "seed": 0}
    train_embedding.python_func(base=base, data=data, model=candidate, summary=learned, **given)
    champion = at("champion", dsl.Model)
    looks = at("looks", dsl.Artifact)
    asked = {"policy": settings["gate"], "evaluation": settings["evaluate"], "measurement": recipe.measurement}
    find_champion.python_func(name=recipe.name, candidate=candidate, data=data, champion=champion, looks=looks, **asked)
    results, measured = at("results"), at("evaluation", dsl.Metrics)
    evaluate_retrieval.python_func(
        settings=settings["evaluate"],
        task=recipe.task,
        data=data,
        baseline=base,
        candidate=candidate,
        champion=champion,
        results=results,
        summary=measured,
    )
    verdicts, judging = at("verdicts"), at("judging", dsl.Metrics)
    given = {"settings": settings["judge"], "task": recipe.task, "data": data, "results": results}
    judge.python_func(model=base, verdicts=verdicts, summary=judging, **given)
    decision, decided = at("decision", dsl.Artifact), at("decided", dsl.Metrics)
    given = {"settings": settings["gate"], "task": recipe.task, "results": results, "looks": looks}
    assert gate.python_func(verdicts=verdicts, judging=judging, decision=decision, summary=decided, **given) is True
    whole = recipe.model_dump(mode="json")
    version = register_model.python_func(
        name=recipe.name, recipe=whole, candidate=candidate, decision=decision, data=data, results=results
    )
    deployed = deploy_model.python_func(
        name=recipe.name,
        version=version,
        settings=settings["evaluate"],
        task=recipe.task,
        candidate=candidate,
        data=data,
    )
    report = dsl.HTML(uri=str(tmp_path / "report.html"))
    write_report.python_func(
        recipe=whole,
        version=deployed,
        validation=checks,
        splits=parts,
        decision=decision,
        results=results,
        evaluation=measured,
        judging=judging,
        data=data,
        report=report,
        embedding=learned,
    )
    entry = registry.champion(recipe.name)
    assert entry
    assert entry.content == read_manifest(tmp_path / "candidate").content
    page = (tmp_path / "report.html").read_text()
    for words in ("Promoted as version 1", "Keyword search", "Right passage", "Train Embedding"):
        assert words in page
    (described,) = (tmp_path / "registry").rglob("MLmodel")
    assert '"name": "input"' in described.read_text()
    assert "encoder" in (described.parent / "README.md").read_text()
