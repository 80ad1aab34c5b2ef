"""The language of a definition, and the cache's durations."""

import pytest

from assay.components.contracts.errors import RunError
from assay.pipelines.engines.sagemaker.emulation.cache import seconds, step_key
from assay.pipelines.engines.sagemaker.emulation.expressions import Scope, steps_named
from assay.pipelines.engines.sagemaker.emulation.graph import needs

STEPS = {
    "gate": {"ProcessingOutputConfig": {"Outputs": [{"OutputName": "params", "S3Output": {"S3Uri": "s3://b/gate"}}]}},
    "test[1]": {"Outcome": True},
}
FILES = {"s3://b/gate/params.json": {"Output": True, "n": 3, "rate": 0.5, "deep": {"list": [7]}}}
SCOPE = Scope(
    parameters={"name": "x", "n": 3},
    facts={"PipelineExecutionId": "e1"},
    properties=STEPS.__getitem__,
    files={"gate": {"params": "params/params.json"}},
    read=FILES.__getitem__,
).inside({"key": "v"}, {"test": "test[1]"})


def from_gate(path):
    return {"Std:JsonGet": {"PropertyFile": {"Get": "Steps.gate.PropertyFiles.params"}, "Path": path}}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ({"Get": "Parameters.name"}, "x"),
        ({"Get": "Execution.PipelineExecutionId"}, "e1"),
        ({"Get": "Steps.gate.ProcessingOutputConfig.Outputs['params'].S3Output.S3Uri"}, "s3://b/gate"),
        ({"Get": "Steps.test.Outcome"}, True),
        ({"Get": "ForEach.CurrentItem.key"}, "v"),
        (from_gate("Output"), True),
        (from_gate("deep.list[0]"), 7),
        (
            {
                "Std:JsonGet": {
                    "S3Uri": {"Std:Join": {"On": "/", "Values": ["s3://b/gate", "params.json"]}},
                    "Path": "n",
                }
            },
            3,
        ),
        (
            {"Std:Join": {"On": "", "Values": ["a=", from_gate("rate"), from_gate("Output"), {"Get": "Parameters.n"}]}},
            "a=0.5true3",
        ),
        ({"deep": [{"Get": "Parameters.n"}, "plain"]}, {"deep": [3, "plain"]}),
    ],
)
def test_expressions_have_the_values_of_the_service(expression, value):
    assert SCOPE.value(expression) == value


def compare(kind, left, right):
    return {"Type": kind, "LeftValue": left, "RightValue": right}


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (compare("Equals", from_gate("Output"), True), True),
        ({"Type": "Not", "Expression": compare("Equals", from_gate("n"), 3.0)}, False),
        (
            {
                "Type": "Or",
                "Conditions": [compare("LessThan", from_gate("n"), 3), compare("GreaterThan", from_gate("n"), 2)],
            },
            True,
        ),
        (compare("LessThanOrEqualTo", from_gate("rate"), 0.5), True),
        (compare("GreaterThanOrEqualTo", from_gate("rate"), 1), False),
        ({"Type": "In", "QueryValue": {"Get": "Parameters.name"}, "Values": ["x", "y"]}, True),
    ],
)
def test_conditions_hold_as_on_the_service(condition, holds):
    assert SCOPE.holds(condition) is holds


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"Get": "Parameters.other"}, "'Parameters.other' names what is not there"),
        ({"Get": "Steps.gate.ProcessingOutputConfig.Outputs['x'].S3Output.S3Uri"}, "names what is not there"),
        ({"Get": "Nothing.x"}, "names what is not there"),
        (from_gate("missing"), r"s3://b/gate/params.json: missing"),
        (
            {"Std:JsonGet": {"PropertyFile": {"Get": "Steps.gate.PropertyFiles.x"}, "Path": "n"}},
            "names what is not there",
        ),
    ],
)
def test_an_expression_that_leads_nowhere_is_named(wrong, said):
    with pytest.raises(RunError, match=said):
        SCOPE.value(wrong)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        (compare("Equals", {"Get": "Parameters.name"}, 3), "different types"),
        (compare("Equals", True, 1), "different types"),
        (compare("StartsWith", "a", "b"), "'StartsWith' is not known"),
    ],
)
def test_a_condition_that_the_service_refuses_is_refused(condition, said):
    with pytest.raises(RunError, match=said):
        SCOPE.holds(condition)


def test_a_step_waits_for_what_it_reads_and_for_what_it_names_but_not_for_its_own_body():
    body = [{"Name": "inner", "Arguments": {"a": {"Get": "Steps.outer.X"}, "b": {"Get": "Steps.inner.Y"}}}]
    loop = {"Name": "loop", "Arguments": {"IterableItems": {"Get": "Steps.list.Z"}, "ForEachBody": body}}
    assert needs(loop) == {"outer": "Succeeded", "list": "Succeeded"}
    step = {"Name": "a", "Arguments": {"x": from_gate("n")}, "DependsOn": ["b", {"Step": "c", "Trigger": "Any"}]}
    assert needs(step) == {"gate": "Succeeded", "b": "Succeeded", "c": "Any"}
    assert list(steps_named(step)) == ["gate"]
    branch = {"Name": "if", "Arguments": {"Conditions": [], "IfSteps": body, "ElseSteps": []}}
    assert needs(branch) == {}


def test_the_cache_looks_at_what_the_service_looks_at():
    request = {"AppSpecification": {"ImageUri": "a"}, "Environment": {}, "ProcessingInputs": [], "RoleArn": "r"}
    elsewhere = {**request, "RoleArn": "other", "ProcessingOutputConfig": {"Outputs": []}}
    assert step_key("Processing", request) == step_key("Processing", elsewhere)
    assert step_key("Processing", {**request, "Environment": {"A": "1"}}) != step_key("Processing", request)
    training = {"AlgorithmSpecification": {}, "CheckpointConfig": {"S3Uri": "s3://b/1"}}
    assert step_key("Training", training) != step_key(
        "Training", {**training, "CheckpointConfig": {"S3Uri": "s3://b/2"}}
    )


def test_durations_are_those_of_iso_8601():
    assert [seconds(text) for text in ("P30D", "PT1H30M", "p1w", "T12H", "P1Y2M")] == [
        30 * 86400,
        5400,
        7 * 86400,
        12 * 3600,
        (365 + 60) * 86400,
    ]
    for wrong in ("", "30 days", "P"):
        with pytest.raises(RunError, match="not a duration"):
            seconds(wrong)
