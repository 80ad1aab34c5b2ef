"""What a Kubeflow cluster is told: the deploy profile, the compiled pipeline, and what lint finds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kfp import dsl, kubernetes
from kfp.compiler import Compiler

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "fixtures"))
import steps

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Recipe
from assay.pipelines import cli
from assay.pipelines.engines.kubeflow import compile as compilation
from assay.pipelines.engines.kubeflow import engine
from assay.pipelines.engines.kubeflow.profile import Profile

GOLDEN = ROOT / "tests" / "golden" / "kubeflow"
DEPLOY = GOLDEN / "deploy.yaml"
FLAGSHIP = Recipe.load(cli.RECIPES / "medication-directions.yaml")
PINNED = "registry.example.org/x@sha256:" + 64 * "a"


def profile(tmp_path, **keys) -> Path:
    path = tmp_path / "deploy.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    return engine.compile_recipe(FLAGSHIP, tmp_path_factory.mktemp("kubeflow") / "pipeline.yaml", "", DEPLOY)


@pytest.fixture(scope="module")
def documents(compiled):
    return list(yaml.safe_load_all(compiled.read_text()))


def executor(documents, name) -> tuple[dict, dict]:
    """Return container and platform settings of an executor."""
    container = documents[0]["deploymentSpec"]["executors"][f"exec-{name}"]["container"]
    return container, documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{name}"]


def variables(container) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container.get("env", [])}


@pytest.mark.parametrize("name", sorted(path.stem for path in cli.RECIPES.glob("*.yaml")))
def test_the_golden_definition_has_not_changed(name, tmp_path):
    """Write it anew: ASSAY_UPDATE_GOLDEN=1 pytest tests/pipelines/test_kubeflow_compile.py -k golden"""
    recipe = Recipe.load(cli.RECIPES / f"{name}.yaml")
    compiled = engine.compile_recipe(recipe, tmp_path / "pipeline.yaml", "", DEPLOY)
    text = re.sub(r"(?<=- )[0-9a-f]{64}(?=\n)", "<code digest>", compiled.read_text())
    golden = GOLDEN / f"{name}.yaml"
    if os.environ.get("ASSAY_UPDATE_GOLDEN"):
        golden.write_text(text)
    steps = yaml.safe_load(compiled.read_text().split("---")[0])["deploymentSpec"]["executors"]
    assert text.count("<code digest>") == len(steps) >= 12
    assert text == golden.read_text(), test_the_golden_definition_has_not_changed.__doc__


def test_platform_settings_are_those_that_kfp_kubernetes_writes(tmp_path):
    @dsl.pipeline(name="ours")
    def ours():
        steps.echo(text="a")

    @dsl.pipeline(name="ours")
    def theirs():
        task = steps.echo(text="a")
        kubernetes.use_secret_as_env(task, secret_name="hf", secret_key_to_env={"token": "HF_TOKEN"})
        kubernetes.mount_pvc(task, pvc_name="home", mount_path="/assay")
        kubernetes.empty_dir_mount(task, "dshm", "/dev/shm", medium="Memory", size_limit="16Gi")
        kubernetes.add_toleration(task, key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")
        kubernetes.add_node_selector(task, "pool", "gpu")
        kubernetes.set_image_pull_secrets(task, ["registry"])
        kubernetes.set_timeout(task, 90)
        task.set_accelerator_type("nvidia.com/mig-3g.40gb").set_accelerator_limit(2)
        task.set_retry(3, backoff_duration="10s", backoff_factor=2, backoff_max_duration="300s")
        for name, folder in [("ASSAY_HOME", "home"), ("ASSAY_REGISTRY", "registry"), ("ASSAY_WORK_ROOT", "work")]:
            task.set_env_variable(name, f"/assay/{folder}")
        task.set_env_variable("NCCL_DEBUG", "INFO")

    paths = [tmp_path / "ours.yaml", tmp_path / "theirs.yaml"]
    for pipeline, path in zip((ours, theirs), paths, strict=True):
        Compiler().compile(pipeline, str(path))
    settings = {
        "gpus": 2,
        "gpu_resource": "nvidia.com/mig-3g.40gb",
        "node_selector": {"pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}],
        "shared_memory": "16Gi",
        "secrets": {"hf": {"token": "HF_TOKEN"}},
        "env": {"NCCL_DEBUG": "INFO"},
        "retries": 3,
        "timeout_minutes": 1.5,
    }
    wanted = {"volume": {"claim": "home"}, "image_pull_secrets": ["registry"], "tasks": {"ec*": settings}}
    compilation.place(paths[0], Profile.load(profile(tmp_path, **wanted)))
    ours_, theirs_ = (list(yaml.safe_load_all(path.read_text())) for path in paths)
    assert ours_ == theirs_


def test_images_are_named_by_digest_and_by_role(documents):
    for name, role in [("gate", 1), ("train-sft", 2), ("evaluate", 2), ("deploy-model", 3)]:
        container, _ = executor(documents, name)
        assert container["image"].endswith(64 * str(role)), name


def test_settings_come_from_default_kind_and_task_in_this_order(tmp_path):
    path = profile(
        tmp_path,
        default={"env": {"A": "default", "B": "default"}, "retries": 1, "tolerations": [{"key": "a"}]},
        kinds={"train": {"env": {"B": "kind", "C": "kind"}, "retries": 2}},
        tasks={
            "train-*": {"env": {"C": "first"}, "tolerations": [{"key": "b"}]},
            "train-sft": {"env": {"C": "second"}},
        },
    )
    found = Profile.load(path).settings("train-sft", "train")
    assert found.env == {"A": "default", "B": "kind", "C": "second"}
    assert found.retries == 2
    assert [entry.key for entry in found.tolerations] == ["b"]
    assert Profile.load(path).settings("gate", "light").env == {"A": "default", "B": "default"}


def test_a_recipes_accelerators_and_retries_can_be_taken_away(tmp_path):
    recipe = Recipe.load(cli.RECIPES / "medication-directions.yaml", "gpu")
    none = profile(tmp_path, default={"gpus": 0, "retries": 0})
    path = engine.compile_recipe(recipe, tmp_path / "pipeline.yaml", "", none)
    assert "accelerator" not in path.read_text()
    assert "retryPolicy" not in path.read_text()


def test_without_a_profile_the_pipeline_says_what_the_recipe_says(tmp_path):
    from assay.pipelines.graphs import compile_recipe

    ours = engine.compile_recipe(FLAGSHIP, tmp_path / "ours.yaml", "", None)
    theirs = compile_recipe(FLAGSHIP, tmp_path / "theirs.yaml")
    ours_, theirs_ = (list(yaml.safe_load_all(path.read_text())) for path in (ours, theirs))
    for entry in ours_[0]["deploymentSpec"]["executors"].values():
        resources = entry["container"]["resources"]
        assert resources
    assert ours_ == theirs_
    assert ours.read_text().startswith("# PIPELINE DEFINITION\n# Name: medication-directions\n")


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_command_writes_the_same_bytes_from_a_cold_start_and_imports_no_client(compiled, tmp_path, seed):
    """The client of kfp and that of Kubernetes cost 0.35 s of CPU, boto3 and torch more."""
    code = """
import sys
from assay.pipelines import cli
try:
    cli.main()
finally:
    heavy = {"torch", "mlflow", "transformers", "boto3", "kubernetes", "kfp.client", "requests"}
    print(*sorted(heavy & sys.modules.keys()))
"""
    path = tmp_path / "pipeline.yaml"
    command = ["compile", "medication-directions", "--engine", "kubeflow", "--deploy", str(DEPLOY), "-o", str(path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {path}\n\n"
    assert path.read_bytes() == compiled.read_bytes()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hots": "x"}, "hots: Extra inputs are not permitted"),
        ({"host": "kubeflow"}, "host: String should match"),
        ({"auth": {"token_file": "a", "cookie_env": "B"}}, "auth: Value error, give a token_file or a cookie_env"),
        ({"auth": {"token": "abc"}}, "auth.token: Extra inputs"),
        ({"kinds": {"heavy": {}}}, "kinds.heavy"),
        ({"images": {"cook": "x"}}, "images.cook"),
        ({"default": {"shared_memory": "16 GB"}}, "default.shared_memory"),
        ({"default": {"tolerations": [{"key": "a", "value": "b"}]}}, "a value needs operator: Equal"),
        ({"default": {"env": {"HF_TOKEN": "hf_abcdef"}}}, "HF_TOKEN looks like a secret"),
        ({"tasks": {"train-*": {"nodes": {"count": 1}}}}, "tasks.train-*.nodes.count"),
        ({"volume": {"claim": "Home_1"}}, "volume.claim"),
    ],
)
def test_a_wrong_profile_is_named_by_its_key_and_shows_no_value(tmp_path, keys, words):
    with pytest.raises(RecipeError) as caught:
        Profile.load(profile(tmp_path, **keys))
    assert words in str(caught.value)
    assert "hf_abcdef" not in str(caught.value)
    assert "abc\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a", "a: [", "\x00"])
def test_a_profile_that_is_no_mapping(tmp_path, text):
    path = tmp_path / "deploy.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="deploy.yaml"):
        Profile.load(path)


def findings(tmp_path, recipe=FLAGSHIP, data="", **keys) -> dict[str, tuple[str, str]]:
    found = engine.lint(recipe, data, profile(tmp_path, **keys))
    ours = [finding for finding in found if not finding.where.endswith(": caching")]  # of each graph on each engine
    return {finding.where: (finding.level, finding.what) for finding in ours}


def test_lint_finds_nothing_to_refuse_in_the_complete_profile():
    assert {finding.level for finding in engine.lint(FLAGSHIP, "s3://bucket/rows", DEPLOY)} == {"note"}


GOOD = {"images": dict.fromkeys(("data", "train", "serve"), PINNED), "volume": {"claim": "home"}}


@pytest.mark.parametrize(
    ("changes", "options", "where", "level"),
    [
        ({"images": {}}, {}, "image assay-train-python", "error"),
        (
            {"images": {**GOOD["images"], "train": "registry.example.org/x:1"}},
            {},
            "image registry.example.org/x:1",
            "warning",
        ),
        ({"volume": None}, {}, "volume", "error"),
        ({}, {}, "default.env", "warning"),
        ({}, {"data": "rows.jsonl"}, "data", "error"),
        ({}, {"data": "file:///rows.jsonl"}, "data", "error"),
        ({}, {"recipe": FLAGSHIP.model_copy(update={"base_model": "./model"})}, "base_model", "error"),
        ({"tasks": {"train-stf": {}}}, {}, "tasks.train-stf", "error"),
        ({"kinds": {"train": {"gpus": 1, "shared_memory": "1Gi"}}}, {}, "root/train-sft", "note"),
        ({"tasks": {"train-sft": {"gpus": 1, "tolerations": [{"key": "a"}]}}}, {}, "root/train-sft", "warning"),
    ],
)
def test_lint(tmp_path, changes, options, where, level):
    clean = findings(tmp_path, **{**GOOD, "default": {"env": {"MLFLOW_TRACKING_URI": "https://x"}}})
    assert clean == {}
    found = findings(tmp_path, **options, **{key: value for key, value in {**GOOD, **changes}.items() if value})
    assert found[where][0] == level, found


def test_data_on_the_shared_volume_is_there_in_a_pod(tmp_path):
    assert {*findings(tmp_path, data="/assay/rows.jsonl", **GOOD)} == {"default.env"}


def test_a_registry_elsewhere_needs_no_volume(tmp_path):
    keys = {"images": GOOD["images"], "default": {"env": {"ASSAY_REGISTRY": "s3://bucket/registry"}}}
    assert "volume" not in findings(tmp_path, **keys)


def test_the_golden_platform_settings_are_known_to_kfp_kubernetes(documents):
    from google.protobuf import json_format
    from kfp.kubernetes import kubernetes_executor_config_pb2 as messages

    for settings in documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        message = json_format.ParseDict(settings, messages.KubernetesExecutorConfig())
        assert json_format.MessageToDict(message) == settings
