"""The offline half of the SageMaker engine, on the shipped recipes: golden definitions, determinism, and refusals.

After a change that is meant to change them, the golden files are written anew by

    ASSAY_UPDATE_GOLDEN=1 pytest tests/pipelines/test_sagemaker_engine.py

and reviewed like code. Digests are masked in them: they change when a definition does, not when a step's code does.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Recipe
from assay.pipelines import cli
from assay.pipelines.engines.sagemaker import engine
from assay.pipelines.engines.sagemaker.validate import walk

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "infra" / "aws" / "deploy.example.yaml"
GOLDEN = ROOT / "tests" / "golden" / "sagemaker"
RECIPES = sorted(cli.RECIPES.glob("*.yaml"))
COMPILE = """
import sys
from pathlib import Path
from assay.components.contracts.recipe import Recipe
from assay.pipelines.engines.sagemaker import engine
engine.compile_recipe(Recipe.load(sys.argv[1]), Path(sys.argv[2]), "", Path(sys.argv[3]))
print(*sorted({"torch", "sagemaker", "boto3", "transformers", "mlflow"} & sys.modules.keys()))
"""


def read(folder: Path) -> dict[str, str]:
    """Return the content of every file below a folder by its path inside."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def compiled(recipe: Path, folder: Path) -> Path:
    return engine.compile_recipe(Recipe.load(recipe), folder / "pipeline.json", "", EXAMPLE)


def masked(path: Path) -> dict[str, str]:
    """Return a definition, and the template of every step, without digests."""
    definition = json.loads(path.read_text())
    templates = {}
    for step in walk(definition["Steps"]):
        if step["Type"] == "Condition":
            continue
        (digest,) = re.findall(r"/tasks/([0-9a-f]{64})/", json.dumps(step))
        task = path.with_name(f"{path.stem}.tasks") / digest / "task.json"
        templates[step["Name"]] = {**json.loads(task.read_text()), "code_digest": "masked"}
    text = re.sub(r"(?<=/tasks/)[0-9a-f]{64}", "masked", path.read_text())
    return {
        "definition.json": text,
        "templates.json": json.dumps(templates, sort_keys=True, indent=1) + "\n",
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_definition_is_the_golden_one(recipe, tmp_path):
    folder = GOLDEN / recipe.stem
    found = masked(compiled(recipe, tmp_path))
    if os.environ.get("ASSAY_UPDATE_GOLDEN"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in found.items():
            (folder / name).write_text(text)
    assert found == read(folder)


def test_the_same_recipe_gives_the_same_bytes_offline_and_without_heavy_imports(tmp_path):
    written = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, str(RECIPES[0]), str(tmp_path / seed / "pipeline.json"), str(EXAMPLE)],
            env={**os.environ, "PYTHONHASHSEED": seed, "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == []
        written.append(read(tmp_path / seed))
    assert written[0] == written[1]
    assert "pipeline.json" in written[0]


def test_every_template_that_the_definition_names_is_beside_it_and_no_other(tmp_path):
    path = compiled(RECIPES[0], tmp_path)
    stale = tmp_path / "pipeline.tasks" / ("0" * 64)
    stale.mkdir()
    compiled(RECIPES[0], tmp_path)
    named = set(re.findall(r"/tasks/([0-9a-f]{64})/", path.read_text()))
    assert {folder.name for folder in (tmp_path / "pipeline.tasks").iterdir()} == named


def test_the_flagship_reports_once_in_each_branch(tmp_path):
    definition = json.loads(compiled(cli.RECIPES / "medication-directions.yaml", tmp_path).read_text())
    condition = next(step for step in definition["Steps"] if step["Type"] == "Condition")
    promote, hold = (condition["Arguments"][branch] for branch in ("IfSteps", "ElseSteps"))
    assert [step["Name"].rpartition("condition-2-")[2] for step in promote] == [
        "register-model",
        "deploy-model",
        "write-report-promote",
    ]
    assert [step["Name"].rpartition("condition-3-")[2] for step in hold] == ["hold-model", "write-report-hold"]
    uncached = {step["Name"] for step in walk(definition["Steps"]) if "CacheConfig" not in step} - {condition["Name"]}
    acting = {
        "register-model",
        "deploy-model",
        "hold-model",
        "find-champion",
        "train-rl",
    }  # train-rl: spot, by the profile
    assert {name.rpartition("condition-2-")[2].rpartition("condition-3-")[2] for name in uncached} == acting


def test_the_gpu_profile_puts_models_on_accelerators():
    recipe = Recipe.load(cli.RECIPES / "medication-directions.yaml", "gpu")
    definition = engine.build(recipe, "", engine.Deploy.load(EXAMPLE)).definition
    kinds = {step["Name"]: step["Type"] for step in definition["Steps"]}
    assert kinds["train-sft"] == kinds["evaluate"] == "Training"
    assert kinds["gate"] == "Processing"
    train = next(step for step in definition["Steps"] if step["Name"] == "train-sft")
    assert train["Arguments"]["ResourceConfig"]["InstanceType"] == "ml.g5.2xlarge"


def test_without_a_profile_nothing_is_compiled_and_the_graph_is_linted(tmp_path):
    recipe = Recipe.load(RECIPES[0])
    with pytest.raises(RecipeError, match="needs to know region, roles and bucket"):
        engine.compile_recipe(recipe, tmp_path / "pipeline.json", "", None)
    found = engine.lint(recipe, "", None)
    assert "error" not in {finding.level for finding in found}
    assert any("only the graph was looked at" in finding.what for finding in found)


def test_all_reasons_are_told_at_once(tmp_path):
    raw = yaml.safe_load(EXAMPLE.read_text())
    raw["network"], raw["roles"]["training"] = {}, "arn:aws:iam::123456789012:role/AdministratorAccess"
    raw["processing"]["instance_type"] = "ml.m5.huge"
    (tmp_path / "deploy.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(RecipeError) as refused:
        engine.compile_recipe(Recipe.load(RECIPES[0]), tmp_path / "p.json", "", tmp_path / "deploy.yaml")
    for reason in ("outside of your VPC", "AdministratorAccess is a role for everything", "'ml.m5.huge' is none of"):
        assert reason in str(refused.value)
    assert not (tmp_path / "p.json").exists()


def test_rows_of_this_machine_are_refused_with_their_place():
    found = engine.lint(Recipe.load(RECIPES[0]), "/rows/mine.jsonl", EXAMPLE)
    errors = [finding for finding in found if finding.level == "error"]
    assert [(error.where, error.what) for error in errors][0] == (
        "root/importer: importer",
        "'/rows/mine.jsonl' is not in S3",
    )


def test_rows_in_s3_are_a_parameter_of_the_pipeline():
    definition = engine.build(Recipe.load(RECIPES[0]), "s3://rows/mine/", engine.Deploy.load(EXAMPLE)).definition
    assert definition["Parameters"] == [{"Name": "data", "Type": "String", "DefaultValue": "s3://rows/mine/"}]
    validate = next(step for step in definition["Steps"] if step["Name"] == "validate-data")
    assert validate["Arguments"]["ProcessingInputs"][1]["S3Input"]["S3Uri"] == {"Get": "Parameters.data"}


def test_nothing_secret_is_in_a_definition(tmp_path, monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "do-not-tell-4711")
    compiled(RECIPES[0], tmp_path)
    assert "do-not-tell-4711" not in json.dumps(read(tmp_path))
