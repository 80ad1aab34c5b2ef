import copy
import sys
from pathlib import Path

import pytest
import yaml
from kfp import dsl, kubernetes

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
import steps
from bench import Bench

from assay.components.contracts.errors import RecipeError, RunError
from assay.pipelines.ir import model, values


@dsl.pipeline(name="small")
def small(n: int = 1):
    first = steps.double(n=n).set_cpu_request("1500m").set_retry(3, "2s", 3.0, "10s").set_display_name("First")
    kubernetes.set_timeout(first, 60)
    with dsl.If(first.outputs["Output"] > 1):
        steps.weigh(model=first.outputs["out"])


@pytest.fixture
def raw(tmp_path):
    documents = list(yaml.safe_load_all(Bench(tmp_path).compile(small).read_text()))
    return {**documents[0], **documents[1]}


def test_the_parts_of_a_pipeline(raw):
    pipeline = model.load(raw)
    tasks = {path: task for path, task, _ in pipeline.walk()}
    assert list(tasks) == ["double", "condition-1", "condition-1/weigh"]
    first = tasks["double"]
    assert first.task_info.name == "First"
    assert [first.retry_policy.delay(failures) for failures in (1, 2, 3)] == [2, 6, 10]
    container = pipeline.executor(pipeline.component(first)).container
    assert container.resources.cores == 1.5
    assert pipeline.platform("kubernetes", "exec-double") == {"activeDeadlineSeconds": "60"}
    assert tasks["condition-1"].trigger_policy.expression.names == {"pipelinechannel--double-Output"}
    assert model.load(raw).digest == pipeline.digest


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("root/dag/tasks/double/surprise", 1, "root.dag.tasks.double.surprise: unknown key"),
        ("root/dag/tasks/double/triggerPolicy", {"strategy": "SOME_DAY"}, "strategy"),
        ("root/dag/tasks/double/componentRef/name", "comp-nowhere", "no component 'comp-nowhere'"),
        ("root/dag/tasks/double/dependentTasks", ["ghost"], "no task 'ghost'"),
        ("root/dag/tasks/double/dependentTasks", ["condition-1"], "wait for each other"),
        ("root/dag/tasks/condition-1/triggerPolicy/condition", "size(x) > 1", "cannot be parsed"),
        (
            "root/dag/tasks/condition-1/triggerPolicy/condition",
            "inputs.parameter_values['ghost'] == 1",
            "no input 'ghost'",
        ),
        ("root/dag/tasks/double/inputs/parameters/n", {}, "exactly one source"),
        (
            "root/dag/tasks/double/inputs/parameters/n/parameterExpressionSelector",
            "eval(string_value)",
            "parameterExpressionSelector",
        ),
        ("components/comp-double/executorLabel", "exec-ghost", "no executor 'exec-ghost'"),
        ("deploymentSpec/executors/exec-double/container/args", ["{{$.secret}}"], "placeholder"),
        ("deploymentSpec/executors/exec-double/resolver", {}, "unknown key"),
    ],
)
def test_nothing_unknown_is_skipped(raw, path, value, message):
    broken = copy.deepcopy(raw)
    *parents, last = path.split("/")
    place = broken
    for name in parents:
        place = place[name]
    place[last] = value
    with pytest.raises(RecipeError, match=message):
        model.load(broken)


def test_a_file_that_is_no_pipeline(tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text("just words")
    with pytest.raises(RecipeError, match="YAML mapping"):
        model.load(path)
    path.write_text("a: [")
    with pytest.raises(RecipeError, match="cannot be read"):
        model.load(path)


def test_values_by_type():
    assert values.cast(3.0, "NUMBER_INTEGER", "x") == 3
    assert isinstance(values.cast(3.0, "NUMBER_INTEGER", "x"), int)
    assert isinstance(values.cast(3, "NUMBER_DOUBLE", "x"), float)
    assert values.parse_text("True", "BOOLEAN", "x") is True
    assert values.parse_text("[1]", "LIST", "x") == [1]
    for value, kind in [(3.5, "NUMBER_INTEGER"), (True, "NUMBER_INTEGER"), ("3", "NUMBER_DOUBLE"), (1, "BOOLEAN")]:
        with pytest.raises(RunError, match="is not a"):
            values.cast(value, kind, "x")
