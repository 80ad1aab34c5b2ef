"""The translation of each construct, on small graphs that kfp compiles here."""

import json
import sys
from pathlib import Path

import pytest
from kfp import dsl, kubernetes

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
import steps
from clouds import by_name, deploy, outline, translated

from assay.components.contracts.errors import RecipeError
from assay.pipelines.engines.sagemaker.names import LONGEST, step_name, unique
from assay.pipelines.engines.sagemaker.validate import check


@pytest.fixture
def translate(tmp_path):
    """Translate a pipeline, and hold the result against the validator: no rule here may make what it refuses."""

    def run(pipeline, **settings):
        found = translated(pipeline, tmp_path, **settings)
        assert check(found.definition) == []
        return found

    return run


def first(translation, kind="Processing"):
    return next(step["Arguments"] for step in translation.definition["Steps"] if step["Type"] == kind)


def template_of(translation, name):
    (source,) = [
        entry["S3Input"]["S3Uri"]
        for entry in by_name(translation.definition["Steps"])[name]["Arguments"]["ProcessingInputs"]
        if entry["InputName"] == "task"
    ]
    return json.loads(translation.templates[source.split("/")[-2]])


# ---- values


def test_constants_stand_in_the_template_and_values_of_the_run_are_arguments(translate):
    @dsl.pipeline
    def graph(n: int = 3):
        doubled = steps.double(n=n, suffix="x" * 300)
        steps.double(n=doubled.outputs["Output"])

    found = translate(graph)
    assert template_of(found, "double") == {
        "component": "steps:double",
        "code_digest": template_of(found, "double")["code_digest"],
        "parameters": {
            "n": {"type": "NUMBER_INTEGER", "argument": True},
            "suffix": {"type": "STRING", "value": "x" * 300},
        },
        "artifacts": {},
        "outputs": {"parameters": {"Output": "NUMBER_INTEGER"}, "artifacts": {"out": "system.Model"}},
    }
    assert first(found)["AppSpecification"]["ContainerArguments"] == [
        "--parameter",
        {"Std:Join": {"On": "", "Values": ["n=", {"Get": "Parameters.n"}]}},
    ]
    second = by_name(found.definition["Steps"])["double-2"]
    value = {"Std:JsonGet": {"PropertyFile": {"Get": "Steps.double.PropertyFiles.params"}, "Path": "Output"}}
    assert second["Arguments"]["AppSpecification"]["ContainerArguments"][1] == {
        "Std:Join": {"On": "", "Values": ["n=", value]}
    }
    assert second["DependsOn"] == ["double"]
    assert template_of(found, "double-2")["parameters"]["suffix"] == {"type": "STRING", "value": ""}
    assert found.definition["Parameters"] == [{"Name": "n", "Type": "Integer", "DefaultValue": 3}]


def test_an_artifact_is_the_property_of_who_makes_it(translate):
    @dsl.pipeline
    def graph():
        steps.weigh(model=steps.double(n=1).outputs["out"])

    weigh = by_name(translate(graph).definition["Steps"])["weigh"]
    source = next(entry for entry in weigh["Arguments"]["ProcessingInputs"] if entry["InputName"] == "model")
    assert source["S3Input"]["S3Uri"] == {"Get": "Steps.double.ProcessingOutputConfig.Outputs['out'].S3Output.S3Uri"}
    assert source["S3Input"]["LocalPath"] == "/opt/ml/processing/input/model"
    assert "DependsOn" not in weigh  # the property says it


def test_no_prefix_of_an_output_begins_with_another(translate):
    @dsl.pipeline
    def graph():
        steps.write(text="a")

    (out, params) = first(translate(graph))["ProcessingOutputConfig"]["Outputs"]
    assert out["S3Output"]["S3Uri"]["Std:Join"] == {
        "On": "/",
        "Values": ["s3://assay-test/root/runs", {"Get": "Execution.PipelineExecutionId"}, "write", "out", "data"],
    }
    assert params["OutputName"] == "params"


def test_texts_are_joined_and_the_name_of_the_run_switches_the_cache_off(translate):
    @dsl.pipeline
    def graph(a: str = "q"):
        said = steps.echo(text="b")
        steps.echo(text=f"{a}-{said.output}!")
        steps.echo(text=dsl.PIPELINE_JOB_NAME_PLACEHOLDER)

    found = by_name(translate(graph).definition["Steps"])
    values = found["echo-2"]["Arguments"]["AppSpecification"]["ContainerArguments"][1]["Std:Join"]["Values"]
    assert values[:3] == ["text=", {"Get": "Parameters.a"}, "-"]
    assert values[4] == "!"
    assert found["echo-2"]["CacheConfig"] == {"Enabled": True, "ExpireAfter": "P30D"}
    assert "CacheConfig" not in found["echo-3"]


def test_rows_in_s3_are_a_constant_uri_and_other_rows_are_refused(translate):
    def graph(uri):
        @dsl.pipeline
        def made():
            rows = dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset)
            steps.read(data=rows.output)

        return made

    (read,) = translate(graph("s3://rows/mine/")).definition["Steps"]
    assert read["Arguments"]["ProcessingInputs"][1]["S3Input"]["S3Uri"] == "s3://rows/mine/"
    with pytest.raises(RecipeError, match=r"root/read: data: '/rows/mine' is not in S3"):
        translate(graph("/rows/mine"))


def test_optional_inputs_that_nobody_gives_are_left_out(translate):
    @dsl.pipeline
    def graph():
        steps.optional()

    found = translate(graph)
    assert template_of(found, "optional")["parameters"] == {}
    assert [entry["InputName"] for entry in first(found)["ProcessingInputs"]] == ["task"]


# ---- conditions


def test_if_else_is_one_condition_and_what_follows_is_copied_into_both_branches(translate):
    @dsl.pipeline
    def graph(n: int = 1):
        doubled = steps.double(n=n)
        with dsl.If(doubled.outputs["Output"] > 3, name="big"):
            one = steps.echo(text="big")
        with dsl.Else(name="small"):
            two = steps.echo(text="small")
        last = steps.echo(text=dsl.OneOf(one.output, two.output))
        steps.echo(text="end").after(last)

    found = translate(graph)
    assert outline(found.definition["Steps"]) == {
        "double": [],
        "condition-branches-1": (
            {
                "condition-branches-1-condition-2-echo": [],
                "echo-3-big": ["condition-branches-1-condition-2-echo"],
                "echo-4-big": ["echo-3-big"],
            },
            {
                "condition-branches-1-condition-3-echo-2": [],
                "echo-3-small": ["condition-branches-1-condition-3-echo-2"],
                "echo-4-small": ["echo-3-small"],
            },
        ),
    }
    condition = by_name(found.definition["Steps"])["condition-branches-1"]
    assert condition["DependsOn"] == ["double"]
    assert condition["Arguments"]["Conditions"] == [
        {
            "Type": "GreaterThan",
            "LeftValue": {
                "Std:JsonGet": {"PropertyFile": {"Get": "Steps.double.PropertyFiles.params"}, "Path": "Output"}
            },
            "RightValue": 3,
        }
    ]
    small = by_name(condition["Arguments"]["ElseSteps"])["echo-3-small"]
    assert "condition-3-echo-2.PropertyFiles" in json.dumps(small)
    assert "condition-2-echo.PropertyFiles" not in json.dumps(small)


def test_elif_is_a_condition_in_the_else_branch(translate):
    @dsl.pipeline
    def graph(n: int = 1):
        doubled = steps.double(n=n)
        with dsl.If(doubled.outputs["Output"] > 3):
            steps.echo(text="a")
        with dsl.Elif(doubled.outputs["Output"] > 1):
            steps.echo(text="b")

    steps_ = translate(graph).definition["Steps"]
    inner = "condition-branches-1-condition-3"
    assert outline(steps_)["condition-branches-1"] == (
        {"condition-branches-1-condition-2-echo": []},
        {inner: ({f"{inner}-echo-2": []}, {})},
    )
    (elif_,) = by_name(steps_)["condition-branches-1"]["Arguments"]["ElseSteps"]
    assert [entry["Type"] for entry in elif_["Arguments"]["Conditions"]] == ["GreaterThan"]


def test_a_task_after_two_conditions_nests_them(translate):
    @dsl.pipeline
    def graph():
        one, two = steps.double(n=1), steps.double(n=2)
        with dsl.If(one.outputs["Output"] > 3, name="a"):
            a = steps.echo(text="a")
        with dsl.Else(name="b"):
            b = steps.echo(text="b")
        with dsl.If(two.outputs["Output"] > 3, name="c"):
            c = steps.echo(text="c")
        with dsl.Else(name="d"):
            d = steps.echo(text="d")
        steps.settle(settings={"n": 1}, prompt=dsl.OneOf(a.output, b.output)).after(
            steps.echo(text=dsl.OneOf(c.output, d.output))
        )

    found = outline(translate(graph).definition["Steps"])
    (first_,) = [value for value in found.values() if isinstance(value, tuple)]
    assert all(any(isinstance(value, tuple) for value in branch.values()) for branch in first_)
    assert json.dumps(found).count('"settle-') == 4


def test_independent_conditions_stay_side_by_side(translate):
    @dsl.pipeline
    def graph():
        one = steps.double(n=1)
        with dsl.If(one.outputs["Output"] > 3):
            steps.echo(text="a")
        with dsl.If(one.outputs["Output"] != 3):
            steps.echo(text="b")
        steps.echo(text="c")

    found = translate(graph).definition["Steps"]
    assert outline(found) == {
        "double": [],
        "echo-3": [],
        "condition-1": ({"condition-1-echo": []}, {}),
        "condition-2": ({"condition-2-echo-2": []}, {}),
    }
    unequal = by_name(found)["condition-2"]["Arguments"]["Conditions"]
    assert unequal[0]["Type"] == "Not"
    assert unequal[0]["Expression"]["Type"] == "Equals"


def test_what_waits_for_a_nested_pipeline_with_a_lone_if_runs_in_either_case(translate):
    @dsl.pipeline
    def inner(n: int):
        doubled = steps.double(n=n)
        with dsl.If(doubled.outputs["Output"] > 3):
            steps.echo(text="a")

    @dsl.pipeline
    def graph():
        steps.echo(text="end").after(inner(n=1))

    assert outline(translate(graph).definition["Steps"]) == {
        "inner-double": [],
        "inner-condition-1": (
            {"inner-condition-1-echo": [], "echo-condition-1": ["inner-condition-1-echo"]},
            {"echo-otherwise": []},
        ),
    }


def test_a_condition_over_constants_is_decided_while_translating(translate):
    @dsl.pipeline
    def graph():
        with dsl.ParallelFor([1, 2]) as n, dsl.If(n == 2):
            steps.double(n=n)

    assert outline(translate(graph).definition["Steps"]) == {"for-loop-2-1-condition-3-double": []}


def test_a_condition_that_only_reads_a_bool_is_an_equality(translate):
    @dsl.pipeline
    def graph(wanted: bool = True, name: str = "x"):
        with dsl.If(wanted == True), dsl.If(name == "y"):  # noqa: E712  kfp records the comparison
            steps.echo(text="a")

    (outer,) = translate(graph).definition["Steps"]
    assert outer["Arguments"]["Conditions"] == [
        {"Type": "Equals", "LeftValue": {"Get": "Parameters.wanted"}, "RightValue": True}
    ]
    (inner,) = outer["Arguments"]["IfSteps"]
    assert inner["Arguments"]["Conditions"] == [
        {"Type": "Equals", "LeftValue": {"Get": "Parameters.name"}, "RightValue": "y"}
    ]


# ---- loops


def test_a_loop_is_unrolled_and_its_limit_is_kept(translate):
    @dsl.pipeline
    def graph():
        with dsl.ParallelFor([{"a": 1, "b": 2}, {"a": 3, "b": 4}, {"a": 5, "b": 6}], parallelism=2) as item:
            one = steps.double(n=item.a)
            steps.double(n=item.b).after(one)

    found = translate(graph)
    assert outline(found.definition["Steps"]) == {
        "for-loop-2-0-double": [],
        "for-loop-2-0-double-2": ["for-loop-2-0-double"],
        "for-loop-2-1-double": [],
        "for-loop-2-1-double-2": ["for-loop-2-1-double"],
        "for-loop-2-2-double": ["for-loop-2-0-double-2"],
        "for-loop-2-2-double-2": ["for-loop-2-2-double"],
    }
    assert template_of(found, "for-loop-2-2-double-2")["parameters"]["n"]["value"] == 6


def test_numbers_are_collected_as_json_text(translate):
    @dsl.pipeline
    def graph():
        with dsl.ParallelFor([1, 2]) as n:
            doubled = steps.double(n=n)
        steps.many(numbers=dsl.Collected(doubled.outputs["Output"]))

    many = by_name(translate(graph).definition["Steps"])["many"]
    values = many["Arguments"]["AppSpecification"]["ContainerArguments"][1]["Std:Join"]["Values"]
    assert [value for value in values if isinstance(value, str)] == ["numbers=[", ", ", "]"]
    assert many["DependsOn"] == ["for-loop-2-0-double", "for-loop-2-1-double"]


def test_a_list_of_artifacts_is_refused(translate):
    @dsl.pipeline
    def graph():
        with dsl.ParallelFor([1, 2]) as n:
            doubled = steps.double(n=n)
        steps.collect(models=dsl.Collected(doubled.outputs["out"]), numbers=[1])

    with pytest.raises(RecipeError, match=r"root/collect: the input 'models' is a list of artifacts"):
        translate(graph)


@dsl.pipeline
def over_a_parameter(numbers: list = [1, 2]):  # noqa: B006  kfp reads the default
    with dsl.ParallelFor(numbers, parallelism=3) as n:
        doubled = steps.double(n=n)
        steps.weigh(model=doubled.outputs["out"])


def test_a_list_that_only_the_run_knows_needs_for_each(translate):
    with pytest.raises(RecipeError, match=r"root/for-loop-1: the list of this loop is known at run time only"):
        translate(over_a_parameter)
    (loop,) = translate(over_a_parameter, features={"for_each": True}).definition["Steps"]
    assert loop["Type"] == "ForEach"
    assert loop["Arguments"]["IterableItems"] == {"Get": "Parameters.numbers"}
    assert loop["Arguments"]["MaxConcurrency"] == 3
    body = by_name(loop["Arguments"]["ForEachBody"])
    assert set(body) == {"for-loop-1-double", "for-loop-1-weigh"}
    assert "CacheConfig" not in body["for-loop-1-double"]
    outputs = body["for-loop-1-double"]["Arguments"]["ProcessingOutputConfig"]["Outputs"]
    assert {"Get": "ForEach.CurrentItem"} in outputs[0]["S3Output"]["S3Uri"]["Std:Join"]["Values"]


# ---- exit handlers, retries, limits


@dsl.pipeline
def with_an_exit_task():
    with dsl.ExitHandler(steps.final()):
        steps.weigh(model=steps.double(n=1).outputs["out"])


def test_an_exit_task_is_left_out_without_run_conditions(translate):
    assert outline(translate(with_an_exit_task).definition["Steps"]) == {
        "exit-handler-1-double": [],
        "exit-handler-1-weigh": [],
    }


def test_an_exit_task_runs_whatever_became_of_the_others(translate):
    found = by_name(translate(with_an_exit_task, features={"run_conditions": True}).definition["Steps"])
    assert found["final"]["DependsOn"] == [
        {"Step": "exit-handler-1-double", "Trigger": "Any"},
        {"Step": "exit-handler-1-weigh", "Trigger": "Any"},
    ]
    assert "CacheConfig" not in found["final"]
    told = found["final"]["Arguments"]["AppSpecification"]["ContainerArguments"][1]["Std:Join"]["Values"]
    text = "".join(value if isinstance(value, str) else "arn:aws:sagemaker" for value in told)
    assert json.loads(text.removeprefix("status="))["pipelineJobResourceName"] == "arn:aws:sagemaker"


def test_retries_are_those_that_the_service_knows(translate):
    @dsl.pipeline
    def graph():
        steps.echo(text="a").set_retry(3, backoff_duration="10s", backoff_factor=3.0)

    (step,) = translate(graph).definition["Steps"]
    shared = {"IntervalSeconds": 10, "BackoffRate": 3.0, "MaxAttempts": 3}
    assert [{**policy, "ExceptionType": 0} for policy in step["RetryPolicies"]] == 2 * [{**shared, "ExceptionType": 0}]
    kinds = {kind for policy in step["RetryPolicies"] for kind in policy["ExceptionType"]}
    assert "SageMaker.CAPACITY_ERROR" in kinds


def test_the_time_limit_and_the_cache_are_the_graphs(translate):
    @dsl.pipeline
    def graph():
        kubernetes.set_timeout(steps.echo(text="a").set_caching_options(False), 90)

    (step,) = translate(graph).definition["Steps"]
    assert step["Arguments"]["StoppingCondition"] == {"MaxRuntimeInSeconds": 90}
    assert "CacheConfig" not in step


def test_containers_that_are_no_steps_of_ours_are_refused(translate):
    @dsl.pipeline
    def graph():
        steps.shell(text="x", data=steps.write(text="a").outputs["out"])

    with pytest.raises(RecipeError, match="root/shell: its container does not run a step of ours"):
        translate(graph)


# ---- jobs


@dsl.pipeline
def learning():
    taught = steps.teach(n=3)
    steps.weigh(model=taught.outputs["model"])


TEACH = {"teach": {"kind": "training"}}


def test_a_training_job_leaves_its_outputs_in_one_folder(translate):
    found = translate(learning, tasks=TEACH)
    job = first(found, "Training")
    assert job["OutputDataConfig"]["CompressionType"] == "NONE"
    assert job["Environment"]["ASSAY_WORK"] == "/opt/ml/checkpoints"
    assert template_of(found, "weigh")["artifacts"]["model"]["subfolder"] == "model"
    weigh = by_name(found.definition["Steps"])["weigh"]
    source = weigh["Arguments"]["ProcessingInputs"][1]["S3Input"]["S3Uri"]
    assert source == {"Get": "Steps.teach.ModelArtifacts.S3ModelArtifacts"}


def test_spot_needs_checkpoints_and_they_switch_the_cache_off(translate):
    spot = {"teach": {"kind": "training", "spot": True, "max_runtime_minutes": 10}}
    found = translate(learning, tasks=spot)
    job, step = first(found, "Training"), found.definition["Steps"][0]
    assert job["EnableManagedSpotTraining"] is True
    assert job["StoppingCondition"] == {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 1200}
    assert job["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"
    assert "CacheConfig" not in step
    assert [finding.level for finding in found.findings if "cache" in finding.what] == ["warning"]
    assert "CacheConfig" in translate(learning, tasks=TEACH).definition["Steps"][0]


def test_warm_pool_nodes_network_keys_and_tags(translate):
    settings = {"kind": "training", "keep_alive_minutes": 15, "instance_count": 2, "instance_type": "ml.g5.2xlarge"}
    found = translate(
        learning,
        tasks={"teach": settings},
        network={"subnets": ["subnet-1"], "security_groups": ["sg-1"], "encrypt_traffic": True},
        keys={"volume": "key-1", "output": "key-2"},
        tags={"team": "a"},
    )
    job = first(found, "Training")
    assert job["ResourceConfig"] == {
        "InstanceType": "ml.g5.2xlarge",
        "InstanceCount": 2,
        "VolumeSizeInGB": 30,
        "KeepAlivePeriodInSeconds": 900,
    }  # no volume key: the instance has its own disks
    assert job["VpcConfig"] == {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]}
    assert job["EnableInterContainerTrafficEncryption"] is True
    assert job["OutputDataConfig"]["KmsKeyId"] == "key-2"
    processing = first(found)
    assert processing["ProcessingResources"]["ClusterConfig"]["VolumeKmsKeyId"] == "key-1"
    assert processing["NetworkConfig"]["VpcConfig"] == job["VpcConfig"]
    assert processing["Tags"] == job["Tags"] == [{"Key": "team", "Value": "a"}]


def test_a_task_with_output_parameters_cannot_be_a_training_job(translate):
    @dsl.pipeline
    def graph():
        steps.train(steps=3).set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(1)

    found = translate(graph)
    assert found.definition["Steps"][0]["Type"] == "Processing"
    assert any("hands on no parameters" in finding.what for finding in found.findings)
    with pytest.raises(RecipeError, match="root/train: a Training job hands on no parameters"):
        translate(graph, tasks={"train": {"kind": "training"}})


def test_a_pattern_that_fits_no_task_is_refused(translate):
    with pytest.raises(RecipeError, match=r"no task of learning is called teech"):
        translate(learning, tasks={"teech": {"volume_gb": 50}})


def test_images_by_role_and_variables(translate):
    found = translate(
        learning,
        images={"data": "repo/data@sha256:0"},
        tasks={"teach": {"image": "repo/own@sha256:1", "environment": {"A": "2"}}},
        environment={"A": "1"},
        registry="s3://assay-test/registry",
        mlflow_tracking_uri="https://mlflow.example",
    )
    teach, weigh = (step["Arguments"] for step in found.definition["Steps"])
    assert teach["AppSpecification"]["ImageUri"] == "repo/own@sha256:1"
    assert weigh["AppSpecification"]["ImageUri"] == "repo/data@sha256:0"
    assert teach["Environment"]["A"] == "2"
    assert weigh["Environment"] == {
        "A": "1",
        "ASSAY_REGISTRY": "s3://assay-test/registry",
        "MLFLOW_EXPERIMENT_NAME": "learning",
        "MLFLOW_TRACKING_URI": "https://mlflow.example",
    }


# ---- names


def test_names_are_short_distinct_and_stable():
    long = "condition-branches-1/" * 5 + "register-model"
    one, other = step_name(long), step_name(long, "promote")
    assert len(one) <= LONGEST
    assert len(other) <= LONGEST
    assert one != other
    assert step_name(long) == one
    taken: set[str] = set()
    assert [unique("a", taken) for _ in range(3)] == ["a", "a-2", "a-3"]
    assert len(unique("x" * LONGEST, {"x" * LONGEST})) == LONGEST


def test_layers_of_a_profile_are_laid_over_each_other():
    profile = deploy(
        training={"volume_gb": 100},
        accelerator={"instance_type": "ml.g5.2xlarge"},
        tasks={"train-*": {"volume_gb": 200}, "*/train-b": {"instance_type": "ml.p4d.24xlarge"}},
    )
    plain = profile.job("train-a", accelerated=False, scalars=False)
    assert (plain.kind, plain.instance_type, plain.volume_gb) == ("training", "ml.m5.xlarge", 200)
    wanted = profile.job("for-loop-1[3]/train-b", accelerated=True, scalars=False)
    assert (wanted.kind, wanted.instance_type, wanted.volume_gb) == ("training", "ml.p4d.24xlarge", 200)
    assert profile.job("evaluate", accelerated=True, scalars=True).kind == "processing"
    assert profile.job("evaluate", accelerated=True, scalars=True).instance_type == "ml.g5.2xlarge"
