"""The graph: a function of the recipe, with registration below the gate only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from assay.components.contracts.recipe import BenchmarkSettings, JudgeSettings, Recipe
from assay.pipelines import cli
from assay.pipelines.engines.local import engine
from assay.pipelines.graphs import compile_recipe

FLAGSHIP = cli.RECIPES / "medication-directions.yaml"
COMPILE = """
import sys
from pathlib import Path
from assay.components.contracts.recipe import Recipe
from assay.pipelines.graphs import compile_recipe
compile_recipe(Recipe.load(sys.argv[1]), Path(sys.argv[2]))
print(*sorted({"torch", "mlflow", "great_expectations", "transformers", "trl"} & sys.modules.keys()))
"""


@pytest.fixture(scope="module")
def flagship(tmp_path_factory) -> Path:
    return compile_recipe(Recipe.load(FLAGSHIP), tmp_path_factory.mktemp("ir") / "pipeline.yaml")


@pytest.fixture(scope="module")
def documents(flagship):
    """The IR and the platform settings."""
    return list(yaml.safe_load_all(flagship.read_text()))


def dags(ir) -> dict:
    """Return every DAG by the name of its component; the root is `root`."""
    inner = {name: component["dag"] for name, component in ir["components"].items() if "dag" in component}
    return {"root": ir["root"]["dag"], **inner}


def holders(ir, step: str) -> list[str]:
    """Return the DAGs that hold a task of this name."""
    return [name for name, dag in dags(ir).items() if step in dag["tasks"]]


def containers(ir) -> list[dict]:
    executors = ir["deploymentSpec"]["executors"].values()
    return [executor["container"] for executor in executors if "container" in executor]


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_the_same_recipe_gives_the_same_bytes_without_heavy_imports(flagship, tmp_path, seed):
    path = tmp_path / "pipeline.yaml"
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(FLAGSHIP), str(path)],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
    assert path.read_bytes() == flagship.read_bytes()


def test_every_step_runs_the_entry_point_and_installs_nothing(flagship, documents):
    assert "pip install" not in flagship.read_text()
    for container in containers(documents[0]):
        assert container["command"] == ["python", "-m", "assay.components.runtime"]
        assert container["args"][-1] == "{{$}}"
        assert all(len(argument) < 256 for argument in container["args"])


def test_registration_is_reachable_only_below_promote(documents):
    ir = documents[0]
    (branch,) = set(holders(ir, "register-model") + holders(ir, "deploy-model"))
    assert branch != "root"
    (branches,) = [
        name
        for name, dag in dags(ir).items()
        if any(task["componentRef"]["name"] == branch for task in dag["tasks"].values())
    ]
    tasks = dags(ir)[branches]["tasks"]
    (taken,) = [task for task in tasks.values() if task["componentRef"]["name"] == branch]
    condition = taken["triggerPolicy"]["condition"]
    assert "gate-Output'] == true" in condition
    assert not condition.startswith("!")
    (other,) = holders(ir, "hold-model")
    (held,) = [task for task in tasks.values() if task["componentRef"]["name"] == other]
    assert held["triggerPolicy"]["condition"] == f"!({condition})"


def test_what_acts_on_the_world_is_never_cached(documents):
    tasks = {name: task for dag in dags(documents[0]).values() for name, task in dag["tasks"].items()}
    uncached = {
        name
        for name, task in tasks.items()
        if task["componentRef"]["name"] not in dags(documents[0])
        and not task.get("cachingOptions", {}).get("enableCache", False)
    }
    assert uncached == {"find-champion", "register-model", "deploy-model", "hold-model"}


def test_stages_can_be_left_out(tmp_path):
    recipe = Recipe(name="short", preference=None, rl=None)
    planned = engine.plan(compile_recipe(recipe, tmp_path / "short.yaml"))
    names = [task.path.rpartition("/")[2] for task in planned if task.kind == "container"]
    assert "train-sft" in names
    assert "write-report" in names
    assert not {"train-preference", "train-rl", "sample-candidates", "build-preferences", "select-model-2"} & {*names}


def test_pre_training_and_distillation_stand_in_the_order_of_the_climb(tmp_path):
    recipe = Recipe(
        name="long",
        pretrain={"corpus": "/text/corpus.jsonl", "general": "/text/general.txt"},
        distill={"teacher": "models:/big@champion", "kind": "logit"},
    )
    assert list(recipe.stages) == ["pretrain", "sft", "distill", "preference", "rl"]
    ir = next(yaml.safe_load_all(compile_recipe(recipe, tmp_path / "long.yaml").read_text()))
    tasks = ir["root"]["dag"]["tasks"]

    def source(task: str, name: str) -> str:
        return tasks[task]["inputs"]["artifacts"][name]["taskOutputArtifact"]["producerTask"]

    def uri(name: str) -> str:
        component = ir["components"][tasks[source("train-pretrain", name)]["componentRef"]["name"]]
        return ir["deploymentSpec"]["executors"][component["executorLabel"]]["importer"]["artifactUri"]["constant"]

    assert (uri("corpus"), uri("general")) == ("/text/corpus.jsonl", "/text/general.txt")
    assert source("train-pretrain", "base") == "import-model"
    assert source("train-sft", "base") == "train-pretrain"  # which decides by itself: no select_model between
    assert source("train-distill", "base") == "select-model"
    teacher = source("train-distill", "teacher")
    assert tasks[teacher]["inputs"]["parameters"]["reference"]["runtimeValue"]["constant"] == "models:/big@champion"
    assert source("train-preference", "base") == "select-model-2"
    assert {"pretrain", "sft", "distill", "preference", "rl"} <= tasks["evaluate"]["inputs"]["artifacts"].keys()
    shown = {"pretrain", "select_pretrain", "distill", "select_distill"}
    assert shown <= tasks["write-report"]["inputs"]["artifacts"].keys()


def test_the_local_judge_may_be_any_model_that_a_base_model_may_be(tmp_path):
    """It is imported as that is; an alias of the registry is looked up in every run."""
    for reference, cached in {"models:/direction-judge@champion": False, "/models/judge": True}.items():
        recipe = Recipe(name="judged", judge={"model": reference})
        tasks = tasks_of(compile_recipe(recipe, tmp_path / "judged.yaml"))
        imported = tasks[producer(tasks["judge"], "model")]
        assert imported["inputs"]["parameters"]["reference"]["runtimeValue"]["constant"] == reference
        assert imported["cachingOptions"].get("enableCache", False) is cached
        assert producer(tasks["evaluate"], "baseline") == "import-model"
        assert tasks["judge"]["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"]["model"] == "base"
    for judge in ({}, {"backend": "openai", "model": "m", "url": "https://host/v1"}):
        tasks = tasks_of(compile_recipe(Recipe(name="judged", judge=judge), tmp_path / "judged.yaml"))
        assert producer(tasks["judge"], "model") == "import-model"
        assert "import-model-2" not in tasks


def test_rows_of_ones_own_are_imported_and_are_a_parameter(tmp_path):
    path = compile_recipe(Recipe.load(FLAGSHIP), tmp_path / "data.yaml", "/rows/mine.jsonl")
    ir = next(yaml.safe_load_all(path.read_text()))
    assert ir["root"]["inputDefinitions"]["parameters"]["data"]["defaultValue"] == "/rows/mine.jsonl"
    assert "importer" in ir["root"]["dag"]["tasks"]
    assert "generate-data" not in ir["root"]["dag"]["tasks"]


def test_peoples_labels_reach_the_judge_and_a_rubric_travels_in_its_settings(tmp_path):
    recipe = Recipe.load(cli.RECIPES / "engineering-qa.yaml")
    labelled = recipe.judge.model_copy(update={"labels": "/labels/mine.jsonl"})
    for judge, inputs in ((recipe.judge, set()), (labelled, {"labels"})):
        path = compile_recipe(recipe.model_copy(update={"judge": judge}), tmp_path / "pipeline.yaml")
        ir = next(yaml.safe_load_all(path.read_text()))
        [task] = [task for dag in dags(ir).values() for name, task in dag["tasks"].items() if name == "judge"]
        assert task["inputs"]["artifacts"].keys() - {"data", "results", "model"} == inputs
        settings = task["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"]
        assert JudgeSettings.model_validate(settings) == judge
        assert settings["rubric"]["scale"]["5"].startswith("What an experienced engineer would say")
        assert ("/labels/mine.jsonl" in path.read_text()) is bool(inputs)


def test_benchmarks_are_asked_of_what_the_gate_compares_and_reach_it(tmp_path):
    recipe = Recipe(name="asked", benchmarks={"tasks": ["arc_easy", {"task": "mine", "dataset_path": "json"}]})
    tasks = tasks_of(compile_recipe(recipe, tmp_path / "asked.yaml"))
    for arm in ("baseline", "candidate", "champion"):
        assert producer(tasks["benchmark"], arm) == producer(tasks["evaluate"], arm)
    assert producer(tasks["gate"], "benchmarks") == producer(tasks["write-report"], "benchmarking") == "benchmark"
    told = tasks["benchmark"]["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"]
    assert BenchmarkSettings.model_validate(told) == recipe.benchmarks
    plain = tasks_of(compile_recipe(Recipe(name="asked"), tmp_path / "plain.yaml"))
    assert "benchmark" not in plain
    assert "benchmarks" not in plain["gate"]["inputs"]["artifacts"]


def test_without_rows_there_is_no_such_parameter(documents):
    assert "data" not in documents[0]["root"].get("inputDefinitions", {}).get("parameters", {})


def test_the_gpu_profile_asks_for_accelerators_where_models_run(tmp_path, documents):
    path = compile_recipe(Recipe.load(FLAGSHIP, "gpu"), tmp_path / "gpu.yaml")
    executors = next(yaml.safe_load_all(path.read_text()))["deploymentSpec"]["executors"]
    asks = {
        name.removeprefix("exec-")
        for name, executor in executors.items()
        if "accelerator" in executor.get("container", {}).get("resources", {})
    }
    assert asks >= {"train-sft", "train-preference", "train-rl", "evaluate", "judge", "deploy-model"}
    assert not asks & {"validate-data", "prepare-data", "gate", "register-model", "hold-model", "write-report"}
    assert not any("accelerator" in container.get("resources", {}) for container in containers(documents[0]))


def test_every_container_has_a_time_limit(documents):
    ir, platform = documents
    limits = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    wanted = {name for name, executor in ir["deploymentSpec"]["executors"].items() if "container" in executor}
    assert {name for name, limit in limits.items() if limit.get("activeDeadlineSeconds")} == wanted


def tasks_of(path: Path) -> dict:
    """Return the root's tasks of a compiled recipe by name."""
    return next(yaml.safe_load_all(path.read_text()))["root"]["dag"]["tasks"]


def producer(task: dict, name: str) -> str:
    """Return the task that makes an input artifact."""
    return task["inputs"]["artifacts"][name]["taskOutputArtifact"]["producerTask"]


REWARDED = {"name": "rewarded", "reward_model": {"prompts": 7}, "rl": {"algorithm": "ppo"}}


def test_a_reward_model_is_trained_on_the_answers_of_the_model_after_sft_and_goes_to_rl(tmp_path):
    recipe = Recipe.model_validate({**REWARDED, "preference": False})
    tasks = tasks_of(compile_recipe(recipe, tmp_path / "rewarded.yaml"))
    assert producer(tasks["train-rl"], "reward") == "train-reward"
    assert producer(tasks["train-reward"], "pairs") == "build-preferences"
    assert producer(tasks["train-reward"], "base") == producer(tasks["sample-candidates"], "model") == "select-model"
    assert producer(tasks["write-report"], "reward_model") == "train-reward"
    settings = tasks["sample-candidates"]["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"]
    assert settings["prompts"] == 7
    assert "learning_rate" not in settings  # another one must not sample anew
    assert "train-preference" not in tasks


def test_pairs_are_made_once_for_both_who_need_them(tmp_path):
    tasks = tasks_of(compile_recipe(Recipe.model_validate(REWARDED), tmp_path / "both.yaml"))
    assert [name for name in tasks if name.startswith(("sample", "build"))] == [
        "build-preferences",
        "sample-candidates",
    ]
    assert producer(tasks["train-reward"], "pairs") == producer(tasks["train-preference"], "pairs")
    settings = tasks["sample-candidates"]["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"]
    assert settings["prompts"] == 160  # the preference section's
    assert producer(tasks["train-rl"], "base") == "select-model-2"


def test_without_a_reward_model_none_is_wired(documents):
    tasks = documents[0]["root"]["dag"]["tasks"]
    assert "train-reward" not in tasks
    assert "reward" not in tasks["train-rl"]["inputs"]["artifacts"]


def test_a_recipe_may_have_the_classifier_as_its_only_stage(tmp_path):
    recipe = Recipe.load(cli.RECIPES / "product-content.yaml")
    assert recipe.stages == {"classifier": "Classifier"}
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    path = compile_recipe(recipe, tmp_path / "product.yaml")
    names = [task.path.rpartition("/")[2] for task in engine.plan(path) if task.kind == "container"]
    assert [name for name in names if name.startswith(("train-", "select-"))] == ["train-classifier", "select-model"]
    tasks = dags(next(yaml.safe_load_all(path.read_text())))["root"]["tasks"]
    artifacts = tasks["evaluate"]["inputs"]["artifacts"]
    made = artifacts["classifier"]["taskOutputArtifact"]
    assert made == {"producerTask": "train-classifier", "outputArtifactKey": "model"}
    chosen = artifacts["candidate"]["taskOutputArtifact"]
    assert chosen == {"producerTask": "select-model", "outputArtifactKey": "best"}
    shown = tasks["write-report"]["inputs"]["artifacts"]
    assert {"classifier", "select_classifier"} <= shown.keys()
    assert not {"sft", "preference", "rl"} & {*artifacts, *shown}
