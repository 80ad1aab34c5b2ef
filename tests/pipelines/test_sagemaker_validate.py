"""The validator: the flagship's definition passes, and every planted fault is named with its place."""

import copy
from pathlib import Path

import botocore.session
import pytest
from botocore.validate import ParamValidator

from assay.components.contracts.recipe import Recipe
from assay.pipelines import cli
from assay.pipelines.engines.sagemaker import engine
from assay.pipelines.engines.sagemaker.profile import Deploy
from assay.pipelines.engines.sagemaker.references import is_expression
from assay.pipelines.engines.sagemaker.validate import check, walk

EXAMPLE = Path(__file__).parents[2] / "infra" / "aws" / "deploy.example.yaml"


@pytest.fixture(scope="module")
def flagship():
    recipe = Recipe.load(cli.RECIPES / "medication-directions.yaml")
    return engine.build(recipe, "", Deploy.load(EXAMPLE)).definition


@pytest.fixture
def broken(flagship):
    """A copy to plant a fault in, and its steps by name."""
    definition = copy.deepcopy(flagship)
    return definition, {step["Name"]: step for step in walk(definition["Steps"])}


def test_the_flagship_passes(flagship):
    assert check(flagship) == []


def test_botocore_itself_accepts_the_flagships_requests(flagship):
    # Ours must not be looser than botocore's own validator where that one looks at all.
    model = botocore.session.get_session().get_service_model("sagemaker")
    for step in walk(flagship["Steps"]):
        if step["Type"] == "Condition":
            continue
        request = _filled(step["Arguments"]) | {f"{step['Type']}JobName": "x"}
        report = ParamValidator().validate(request, model.shape_for(f"Create{step['Type']}JobRequest"))
        assert not report.has_errors(), report.generate_report()


def _filled(value):
    if is_expression(value):
        return "s3://bucket/key"
    if isinstance(value, dict):
        return {key: _filled(entry) for key, entry in value.items()}
    return [_filled(entry) for entry in value] if isinstance(value, list) else value


GATE = "gate"
REGISTER = "condition-branches-1-condition-2-register-model"
HOLD = "condition-branches-1-condition-3-hold-model"
INPUT = {
    "InputName": "more",
    "S3Input": {"S3Uri": "s3://b/k", "S3DataType": "S3Prefix", "LocalPath": "/opt/ml/processing/input/more"},
}


def _of(steps, name):
    return steps[name]["Arguments"]


def _cluster(steps):
    return _of(steps, GATE)["ProcessingResources"]["ClusterConfig"]


def _first_input(steps):
    return _of(steps, GATE)["ProcessingInputs"][1]["S3Input"]


FAULTS = {
    "a wrong instance type": (
        lambda d, s: _cluster(s).update(InstanceType="ml.m5.huge"),
        "gate: ProcessingResources.ClusterConfig.InstanceType",
        "none of the",
    ),
    "an argument of 300 characters": (
        lambda d, s: _of(s, GATE)["AppSpecification"].update(ContainerArguments=["x" * 300]),
        "gate: AppSpecification.ContainerArguments[0]",
        "300 characters, at most 256",
    ),
    "an argument that the run can only make longer": (
        lambda d, s: _of(s, GATE)["AppSpecification"].update(
            ContainerArguments=[{"Std:Join": {"On": "", "Values": ["y" * 257, {"Get": "Execution.PipelineName"}]}}]
        ),
        "gate: AppSpecification.ContainerArguments[0]",
        "at least 257 characters",
    ),
    "a member that does not exist": (
        lambda d, s: _of(s, GATE).update(Instances=2),
        "gate: Instances",
        "no such member",
    ),
    "no role": (lambda d, s: _of(s, GATE).pop("RoleArn"), "gate", "RoleArn is missing"),
    "a role that is none": (
        lambda d, s: _of(s, GATE).update(RoleArn="assay-processing"),
        "gate: RoleArn",
        "does not match",
    ),
    "a wrong property": (
        lambda d, s: _first_input(s).update(
            S3Uri={"Get": "Steps.judge.ProcessingOutputConfig.Outputs['summary'].S3Output.S3Url"}
        ),
        "gate",
        "no 'S3Url'",
    ),
    "an output that the step does not have": (
        lambda d, s: _first_input(s).update(
            S3Uri={"Get": "Steps.judge.ProcessingOutputConfig.Outputs['summery'].S3Output.S3Uri"}
        ),
        "gate",
        "no 'summery'",
    ),
    "eleven inputs": (
        lambda d, s: _of(s, GATE)["ProcessingInputs"].extend({**INPUT, "InputName": f"i{n}"} for n in range(6)),
        "gate: ProcessingInputs",
        "11 items, at most 10",
    ),
    "an input twice": (
        lambda d, s: _of(s, GATE)["ProcessingInputs"].extend([INPUT, INPUT]),
        "gate",
        "'more' stands twice",
    ),
    "a bad pattern": (
        lambda d, s: _first_input(s).update(S3Uri="/local/path"),
        "gate: ProcessingInputs[1].S3Input.S3Uri",
        "does not match",
    ),
    "a wrong enum": (
        lambda d, s: _first_input(s).update(S3InputMode="Files"),
        "gate: ProcessingInputs[1].S3Input.S3InputMode",
        "none of the",
    ),
    "a number out of bounds": (
        lambda d, s: _of(s, "train-sft")["ResourceConfig"].update(KeepAlivePeriodInSeconds=30000),
        "train-sft: ResourceConfig.KeepAlivePeriodInSeconds",
        "at most 21600",
    ),
    "a text where a number is wanted": (
        lambda d, s: _cluster(s).update(VolumeSizeInGB="30"),
        "gate: ProcessingResources.ClusterConfig.VolumeSizeInGB",
        "wanted integer",
    ),
    "a joined text where a number is wanted": (
        lambda d, s: _cluster(s).update(VolumeSizeInGB={"Std:Join": {"On": "", "Values": ["3", "0"]}}),
        "gate: ProcessingResources.ClusterConfig.VolumeSizeInGB",
        "gives string",
    ),
    "a variable of 300 characters": (
        lambda d, s: _of(s, GATE)["Environment"].update(A="x" * 300),
        "gate: Environment[A]",
        "at most 256",
    ),
    "two steps of one name": (
        lambda d, s: d["Steps"].append(copy.deepcopy(s[GATE])),
        "gate",
        "two steps have this name",
    ),
    "a name of 65 characters": (lambda d, s: s[GATE].update(Name="x" * 65), "x" * 65, "not a step's name"),
    "a cycle": (
        lambda d, s: s["generate-data"].update(DependsOn=["gate"]),
        "generate-data",
        "wait for each other",
    ),
    "a dependency on nothing": (lambda d, s: s[GATE].update(DependsOn=["ghost"]), "gate", "names 'ghost'"),
    "a dependency on a condition": (
        lambda d, s: d["Steps"].append(
            {**copy.deepcopy(s["generate-data"]), "Name": "x", "DependsOn": ["condition-branches-1"]}
        ),
        "x",
        "nothing can wait for a Condition",
    ),
    "an unknown parameter": (
        lambda d, s: _first_input(s).update(S3Uri={"Get": "Parameters.rows"}),
        "gate",
        "no such parameter",
    ),
    "an unknown execution variable": (
        lambda d, s: _first_input(s).update(S3Uri={"Get": "Execution.RunId"}),
        "gate",
        "no such execution variable",
    ),
    "a step of the other branch": (
        lambda d, s: _of(s, HOLD)["AppSpecification"].update(
            ContainerArguments=[
                {"Std:JsonGet": {"PropertyFile": {"Get": f"Steps.{REGISTER}.PropertyFiles.params"}, "Path": "Output"}}
            ]
        ),
        HOLD,
        "it is not upstream",
    ),
    "a step inside of a branch": (
        lambda d, s: _first_input(s).update(
            S3Uri={"Get": f"Steps.{REGISTER}.ProcessingOutputConfig.Outputs['params'].S3Output.S3Uri"}
        ),
        "gate",
        "it is not upstream",
    ),
    "a step that does not exist": (
        lambda d, s: _first_input(s).update(S3Uri={"Get": "Steps.ghost.ModelArtifacts.S3ModelArtifacts"}),
        "gate",
        "there is no step 'ghost'",
    ),
    "a property file that does not exist": (
        lambda d, s: s[GATE].pop("PropertyFiles"),
        "condition-branches-1",
        "no property file 'params'",
    ),
    "a property file in no output": (
        lambda d, s: s[GATE]["PropertyFiles"][0].update(OutputName="numbers"),
        "gate",
        "which is no output",
    ),
    "a condition that is none": (
        lambda d, s: _of(s, "condition-branches-1").update(Conditions=[{"Type": "Is", "LeftValue": 1}]),
        "condition-branches-1",
        "no condition of type 'Is'",
    ),
    "a condition over a constant": (
        lambda d, s: _of(s, "condition-branches-1")["Conditions"][0].update(LeftValue=True),
        "condition-branches-1",
        "a constant on its left",
    ),
    "the run in a cache key": (
        lambda d, s: _of(s, GATE)["Environment"].update(RUN={"Get": "Execution.PipelineExecutionId"}),
        "gate",
        "it would never hit",
    ),
    "an expiry that is none": (
        lambda d, s: s[GATE]["CacheConfig"].update(ExpireAfter="30 days"),
        "gate",
        "no duration",
    ),
    "retries of the code": (
        lambda d, s: s[GATE].update(RetryPolicies=[{"ExceptionType": ["SageMaker.CODE"], "MaxAttempts": 2}]),
        "gate",
        "a retry policy is for some of",
    ),
    "spot with too short a wait": (
        lambda d, s: _of(s, "train-rl")["StoppingCondition"].update(MaxWaitTimeInSeconds=1),
        "train-rl",
        "at least MaxRuntimeInSeconds",
    ),
    "a step of an unknown kind": (lambda d, s: s[GATE].update(Type="Process"), "gate", "no step type 'Process'"),
    "a key that no step has": (lambda d, s: s[GATE].update(Retries=3), "gate", "has no Retries"),
    "a default of the wrong type": (
        lambda d, s: d.update(Parameters=[{"Name": "n", "Type": "Integer", "DefaultValue": "1"}]),
        "Parameters.n",
        "not of type Integer",
    ),
    "more than a mebibyte": (
        lambda d, s: d["Metadata"].update(note="x" * (1 << 20)),
        "definition",
        "larger than 1 MiB",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_with_its_place(broken, fault):
    definition, steps = broken
    plant, where, what = FAULTS[fault]
    plant(definition, steps)
    found = check(definition)
    assert any(finding.where == where and what in finding.what for finding in found), found
    assert all(finding.level == "error" for finding in found)
