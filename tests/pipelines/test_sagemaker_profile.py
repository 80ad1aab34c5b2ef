"""The deploy profile: all mistakes at once, nothing secret, and the policy lint over what was made with it."""

import copy
import sys
from pathlib import Path

import pytest
import yaml
from kfp import dsl

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
import steps
from clouds import PROFILE, ROLE, compiled, deploy

from assay.components.contracts.errors import RecipeError
from assay.pipelines.engines.sagemaker.lint import policy
from assay.pipelines.engines.sagemaker.profile import Deploy
from assay.pipelines.engines.sagemaker.translate import translate

EXAMPLE = Path(__file__).parents[2] / "infra" / "aws" / "deploy.example.yaml"


def test_the_example_is_a_profile_and_shows_every_section():
    profile = Deploy.load(EXAMPLE)
    assert set(yaml.safe_load(EXAMPLE.read_text())) == set(Deploy.model_fields)
    assert profile.root == "s3://your-bucket/assay"


def test_all_mistakes_are_listed_at_once(tmp_path):
    raw = copy.deepcopy(PROFILE)
    raw["root"] = "/local"
    raw["roles"].pop("training")
    raw["processing"] = {"instances": 2}
    raw["tasks"] = {"train-sft": {"spot": True, "keep_alive_minutes": 5}}
    raw["policy"] = {"kms": "maybe"}
    (tmp_path / "deploy.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(RecipeError) as refused:
        Deploy.load(tmp_path / "deploy.yaml")
    for place in ("root", "roles.training", "processing.instances", "tasks.train-sft", "policy.kms"):
        assert f"\n    {place}: " in str(refused.value)
    assert str(tmp_path / "deploy.yaml") in str(refused.value)


@pytest.mark.parametrize("text", ["", "[1]", "{region: [", "region: 1"])
def test_what_is_no_profile_is_refused(tmp_path, text):
    (tmp_path / "deploy.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"deploy\.yaml"):
        Deploy.load(tmp_path / "deploy.yaml")


@pytest.mark.parametrize(
    "settings",
    [
        {"environment": {"HF_TOKEN": "hf_4711"}},
        {"environment": {"AWS_SECRET_ACCESS_KEY": "4711"}},
        {"environment": {"WHO": "AKIAABCDEFGHIJKLMNOP"}},
        {"tasks": {"judge": {"environment": {"OPENAI_API_KEY": "sk-4711"}}}},
        {"mlflow_tracking_uri": "https://user:pa4711@mlflow.example"},
    ],
)
def test_a_secret_is_refused_and_not_repeated(tmp_path, settings):
    (tmp_path / "deploy.yaml").write_text(yaml.safe_dump({**PROFILE, **settings}))
    with pytest.raises(RecipeError, match="looks like a secret") as refused:
        Deploy.load(tmp_path / "deploy.yaml")
    assert "4711" not in str(refused.value)
    assert "AKIA" not in str(refused.value)


def test_a_variable_that_only_sounds_like_a_secret_is_allowed():
    assert deploy(environment={"TOKENIZERS_PARALLELISM": "false", "MAX_TOKENS": "9"}).environment["MAX_TOKENS"] == "9"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": {"subnets": ["subnet-1"]}}, "go together"),
        ({"processing": {"kind": "processing", "spot": True}}, "for Training jobs"),
        ({"processing": {"kind": "processing", "instance_count": 2}}, "for Training jobs"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        deploy(**settings)


def test_settings_that_do_not_go_together_once_merged_are_refused():
    profile = deploy(training={"keep_alive_minutes": 5}, tasks={"train-rl": {"spot": True}})
    with pytest.raises(RecipeError, match=r"deploy profile: train-rl: a warm pool"):
        profile.job("train-rl", accelerated=False, scalars=False)


# ---- the policy lint


@dsl.pipeline
def learning():
    taught = steps.teach(n=1)
    steps.weigh(model=taught.outputs["model"])


SAFE = {
    "images": {"data": f"repo@sha256:{'0' * 64}"},
    "network": {"subnets": ["subnet-1"], "security_groups": ["sg-1"], "encrypt_traffic": True},
    "keys": {"volume": "key", "output": "key"},
    "tasks": {"teach": {"kind": "training", "instance_count": 2}},
}


def linted(folder, **settings):
    profile = deploy(**{**copy.deepcopy(SAFE), **settings})
    return policy(profile, translate(compiled(learning, folder), profile))


def test_a_safe_profile_has_nothing_to_tell(tmp_path):
    assert linted(tmp_path) == []


ADMIN = "arn:aws:iam::123456789012:role/Admin"
BREACHES = {
    "kms": ({"keys": {}}, "encrypted with AWS's own key"),
    "vpc": ({"network": {}}, "outside of your VPC"),
    "wildcard_role": ({"roles": {**PROFILE["roles"], "processing": ADMIN}}, "a role for everything"),
    "shared_role": ({"roles": dict.fromkeys(("pipeline", "processing", "training"), f"{ROLE}all")}, "several duties"),
    "unpinned_image": ({"images": {"data": "repo:latest"}}, "repo:latest is not named by digest (teach, weigh)"),
    "public_traffic": ({"network": {**SAFE["network"], "encrypt_traffic": False}}, "is not encrypted"),
}


@pytest.mark.parametrize("rule", BREACHES)
@pytest.mark.parametrize(("verdict", "level"), [("refuse", "error"), ("warn", "warning"), ("ignore", None)])
def test_a_breach_is_refused_warned_of_or_ignored(tmp_path, rule, verdict, level):
    settings, what = BREACHES[rule]
    others = {name: "ignore" for name in BREACHES if name != rule}
    found = linted(tmp_path, **settings, policy={**others, rule: verdict})
    assert {finding.level for finding in found if what in finding.what} == ({level} if level else set())
    assert level or found == []


def test_an_accelerator_that_the_instance_has_not_is_told(tmp_path):
    @dsl.pipeline
    def graph():
        steps.teach(n=1).set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(1)

    for instance, wanted in (("ml.m5.xlarge", 1), ("ml.g5.2xlarge", 0)):
        profile = deploy(**{**SAFE, "tasks": {}, "accelerator": {"instance_type": instance}})
        found = policy(profile, translate(compiled(graph, tmp_path), profile))
        assert sum("asks for an accelerator" in finding.what for finding in found) == wanted


def test_isolation_and_mlflow_do_not_go_together(tmp_path):
    network = {**SAFE["network"], "isolation": True}
    found = linted(tmp_path, network=network, mlflow_tracking_uri="https://mlflow.example")
    assert [finding.where for finding in found] == ["teach", "weigh"]
    assert all("cut off" in finding.what for finding in found)
