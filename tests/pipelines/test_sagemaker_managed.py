"""Managed alternatives: requests that pass the service models, and settings that cannot work refused."""

import sys
from pathlib import Path

import pytest
from kfp import dsl
from pydantic import TypeAdapter, ValidationError

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
import steps
from clouds import deploy, translated

from assay.components.contracts.errors import RecipeError
from assay.pipelines.engines.sagemaker.managed import Managed
from assay.pipelines.engines.sagemaker.validate import check, check_request

READ = TypeAdapter(Managed).validate_python
HUB = "arn:aws:sagemaker:eu-central-1:aws:hub-content/SageMakerPublicHub/Model/qwen3-4b/1.0.0"
EVALUATOR = "arn:aws:lambda:eu-central-1:123456789012:function:reward"
SERVERLESS = {"by": "serverless", "base_model": HUB, "technique": "SFT", "data": "s3://assay-test/rows/"}
BEDROCK = {
    "by": "bedrock",
    "base_model": "amazon.nova-lite-v1:0",
    "custom_model_name": "directions",
    "data": "s3://assay-test/rows.jsonl",
    "role": "arn:aws:iam::123456789012:role/bedrock",
    "hyperparameters": {"epochCount": "2"},
}
HYPERPOD = {"by": "hyperpod", "nodes": 2, "gpus": 8, "efa": 4, "queue": "training"}


@dsl.pipeline
def learning():
    steps.teach(n=1)


def managed(settings, folder):
    return translated(learning, folder, tasks={"teach": {"kind": "training", "managed": settings}})


@pytest.mark.parametrize(
    "settings",
    [
        SERVERLESS,
        {**SERVERLESS, "technique": "DPO", "peft": "", "sequence_length": "4K", "accept_eula": True},
        {**SERVERLESS, "technique": "RLVR", "evaluator": EVALUATOR},
        {
            **SERVERLESS,
            "technique": "RLAIF",
            "evaluator": EVALUATOR,
            "model_package_group": "arn:aws:sagemaker:eu-central-1:123456789012:model-package-group/directions",
            "mlflow_app": "arn:aws:sagemaker:eu-central-1:123456789012:mlflow-app/app-1",
        },
    ],
)
def test_serverless_customization_is_a_training_step(settings, tmp_path):
    found = managed(settings, tmp_path)
    assert check(found.definition) == []
    (step,) = found.definition["Steps"]
    config = step["Arguments"]["ServerlessJobConfig"]
    assert config["CustomizationTechnique"] == settings["technique"]
    assert ("Peft" in config) == (settings.get("peft", "LORA") == "LORA")
    assert "AlgorithmSpecification" not in step["Arguments"]
    assert found.requests == {}


def test_the_validator_knows_the_serverless_request(tmp_path):
    found = managed({**SERVERLESS, "base_model": "qwen3-4b"}, tmp_path)
    assert [finding.where for finding in check(found.definition)] == ["teach: ServerlessJobConfig.BaseModelArn"]


def test_bedrocks_request_stands_beside_the_definition(tmp_path):
    found = managed({**BEDROCK, "validation": "s3://assay-test/held.jsonl"}, tmp_path)
    request = found.requests["teach"]
    assert check_request("bedrock", "CreateModelCustomizationJobRequest", request, "teach") == []
    assert request["outputDataConfig"]["s3Uri"] == "s3://assay-test/root/managed/teach/"
    assert found.definition["Steps"][0]["Type"] == "Training"
    assert "ServerlessJobConfig" not in found.definition["Steps"][0]["Arguments"]
    wrong = check_request("bedrock", "CreateModelCustomizationJobRequest", {**request, "roleArn": "x"}, "teach")
    assert [finding.where for finding in wrong] == ["teach: roleArn"]


def test_a_hyperpod_manifest_with_an_elastic_policy(tmp_path):
    elastic = {"min_replicas": 1, "max_replicas": 4, "replica_increment_step": 1}
    manifest = managed({**HYPERPOD, "elastic": elastic}, tmp_path).requests["teach"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("sagemaker.amazonaws.com/v1", "HyperPodPyTorchJob")
    spec = manifest["spec"]
    assert spec["elasticPolicy"]["minReplicas"] == 1
    assert spec["elasticPolicy"]["gracefulShutdownTimeoutInSeconds"] == 600
    (replicas,) = spec["replicaSpecs"]
    assert (replicas["replicas"], replicas["maxReplicas"]) == (2, 4)
    (container,) = replicas["template"]["spec"]["containers"]
    assert container["command"][0] == "hyperpodrun"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "4"}
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "training"}
    assert "elasticPolicy" not in managed(HYPERPOD, tmp_path).requests["teach"]["spec"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SERVERLESS, "technique": "RLVR"}, "needs an evaluator"),
        ({**SERVERLESS, "technique": "PPO"}, "technique"),
        ({**SERVERLESS, "sequence_length": "4096"}, "sequence_length"),
        ({**HYPERPOD, "elastic": {"min_replicas": 3, "max_replicas": 2}}, "min_replicas"),
        ({**HYPERPOD, "elastic": {"min_replicas": 3, "max_replicas": 4}}, "nodes must lie between"),
        (
            {**HYPERPOD, "elastic": {"max_replicas": 4, "replica_increment_step": 1, "replica_discrete_values": [2]}},
            "exclude each other",
        ),
        ({**BEDROCK, "technique": "DPO"}, "technique"),
        ({"by": "magic"}, "by"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        READ(settings)


def test_only_a_training_job_is_handed_over(tmp_path):
    with pytest.raises(RecipeError, match="only a Training job"):
        translated(learning, tmp_path, tasks={"teach": {"kind": "processing", "managed": SERVERLESS}})


def test_the_profile_reads_a_managed_service():
    assert deploy(tasks={"teach": {"managed": HYPERPOD}}).tasks["teach"].managed.nodes == 2
