"""The portability lint: each construct named for the targets that cannot do it, and for no other."""

import sys
from pathlib import Path

import pytest
from kfp import dsl, kubernetes

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
import steps
from clouds import compiled

from assay.components.contracts.recipe import Recipe
from assay.pipelines import cli
from assay.pipelines.graphs import compile_recipe
from assay.pipelines.ir import caching, model, portability

TARGETS = ("local", "kubeflow", "sagemaker")


@pytest.fixture
def lint(tmp_path):
    """Return what is found on a target, as (level, where, what)."""

    def run(pipeline, target, *features):
        found = portability.lint(compiled(pipeline, tmp_path), target, frozenset(features))
        return [(finding.level, finding.where, finding.what) for finding in found]

    return run


def told(found, what):
    """Return level and place of the findings that say so."""
    return [(level, where) for level, where, text in found if what in text]


@dsl.pipeline
def retried():
    steps.echo(text="a").set_retry(2)


@dsl.pipeline
def anyway():
    steps.echo(text="b").after(steps.echo(text="a")).ignore_upstream_failure()


@dsl.pipeline
def exiting():
    with dsl.ExitHandler(steps.echo(text="b")):
        steps.echo(text="a")


@dsl.pipeline
def loop_in_handler():
    with dsl.ExitHandler(steps.echo(text="b")), dsl.ParallelFor([1, 2]) as n:
        steps.double(n=n)


@dsl.pipeline
def runtime_loop():
    many = steps.facts()
    with dsl.ParallelFor(many.outputs["many"]) as n:
        steps.double(n=n)


@dsl.pipeline
def artifact_one_of():
    one = steps.double(n=1)
    with dsl.If(one.outputs["Output"] > 1):
        a = steps.double(n=2)
    with dsl.Else():
        b = steps.double(n=3)
    steps.weigh(model=dsl.OneOf(a.outputs["out"], b.outputs["out"]))


@dsl.pipeline
def dynamic_image(image: str = "x"):
    steps.echo(text="a").set_container_image(image)


@dsl.pipeline
def dynamic_memory(memory: str = "4G"):
    steps.echo(text="a").set_memory_limit(memory)


@dsl.pipeline
def secret():
    task = steps.echo(text="a")
    kubernetes.use_secret_as_env(task, secret_name="s", secret_key_to_env={"token": "HF_TOKEN"})


@dsl.pipeline
def big_constant():
    steps.echo(text="x" * 120_000)


@dsl.pipeline
def long_variable():
    steps.echo(text="a").set_env_variable("A", "x" * 300)


@dsl.pipeline
def other_container():
    steps.shell(text="a", data=steps.write(text="a").outputs["out"])


@dsl.pipeline
def collected():
    with dsl.ParallelFor([1, 2]) as n:
        doubled = steps.double(n=n)
    steps.collect(models=dsl.Collected(doubled.outputs["out"]), numbers=[1])


@dsl.pipeline
def own_key_in_loop():
    with dsl.ParallelFor([1, 2]) as n:
        steps.double(n=n).set_caching_options(True, cache_key="k")


@dsl.pipeline
def scheduled():
    steps.echo(text=dsl.PIPELINE_JOB_SCHEDULE_TIME_UTC_PLACEHOLDER)


@dsl.pipeline
def named_run():
    steps.echo(text=dsl.PIPELINE_JOB_NAME_PLACEHOLDER)


@dsl.pipeline
def long_default(text: str = "x" * 1100):
    steps.echo(text=text)


@dsl.pipeline
def passed_text():
    steps.echo(text=steps.echo(text="a").output)


@dsl.pipeline
def accelerated():
    steps.echo(text="a").set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(1)


@dsl.pipeline
def local_rows():
    steps.read(data=dsl.importer(artifact_uri="/rows", artifact_class=dsl.Dataset).output)


@dsl.pipeline
def s3_rows():
    steps.read(data=dsl.importer(artifact_uri="s3://rows/x", artifact_class=dsl.Dataset).output)


RULES = [
    (retried, "never after those of the code", {"sagemaker": ("warning", "root/echo: retryPolicy")}),
    (anyway, "only if everything before it succeeded", {"sagemaker": ("warning", "root/echo: triggerPolicy")}),
    (exiting, "it is left out", {"sagemaker": ("warning", "root/echo: triggerPolicy")}),
    (loop_in_handler, "inside of an ExitHandler", {"kubeflow": ("error", "root/exit-handler-1/for-loop-3")}),
    (runtime_loop, "run time only", {"sagemaker": ("error", "root/for-loop-1")}),
    (
        artifact_one_of,
        "is that of one of several branches",
        {"kubeflow": ("warning", "root/condition-branches-1: outputs")},
    ),
    (artifact_one_of, "cannot join branches", {"sagemaker": ("note", "root/condition-branches-1: outputs")}),
    (dynamic_image, "its image is known at run time only", {"sagemaker": ("error", "root/echo: image")}),
    (
        dynamic_memory,
        "asks of the machine is known at run time",
        {"local": ("warning", "root/echo: resources"), "sagemaker": ("warning", "root/echo: resources")},
    ),
    (
        secret,
        "mean nothing on",
        {
            "local": ("warning", "root/echo: platforms.kubernetes"),
            "sagemaker": ("warning", "root/echo: platforms.kubernetes"),
        },
    ),
    (big_constant, "travel in one argument", {"kubeflow": ("error", "root/echo: parameters")}),
    (long_variable, "300 characters", {"sagemaker": ("error", "root/echo: env")}),
    (other_container, "does not run a step of ours", {"sagemaker": ("error", "root/shell")}),
    (collected, "is a list of artifacts", {"sagemaker": ("error", "root/collect: inputs")}),
    (own_key_in_loop, "share one cache entry", {"kubeflow": ("error", "root/for-loop-2/double: caching")}),
    (own_key_in_loop, "no cache keys", {"sagemaker": ("warning", "root/for-loop-2/double: caching")}),
    (scheduled, "pipeline_job_schedule_time_utc", {"sagemaker": ("error", "root/echo: parameters")}),
    (named_run, "so it is not cached", {"sagemaker": ("warning", "root/echo: caching")}),
    (long_default, "more than 1024 characters", {"sagemaker": ("error", "root: parameter text")}),
    (passed_text, "travels as an argument", {"sagemaker": ("note", "root/echo-2: parameters")}),
    (accelerated, "1 × nvidia.com/gpu", {"local": ("note", "root/echo: resources")}),
    (local_rows, "is not in S3", {"sagemaker": ("error", "root/importer: importer")}),
    (local_rows, "lies on this machine", {"kubeflow": ("error", "root/importer: importer")}),
    (s3_rows, "only where it is mounted", {"local": ("warning", "root/importer: importer")}),
]


@pytest.mark.parametrize(("pipeline", "what", "wanted"), RULES, ids=[f"{rule[0].name}: {rule[1]}" for rule in RULES])
def test_a_construct_is_named_where_it_does_not_carry_over(lint, pipeline, what, wanted):
    for target in TARGETS:
        assert told(lint(pipeline, target), what) == ([wanted[target]] if target in wanted else [])


def test_features_of_the_profile_lift_what_they_make_possible(lint):
    assert told(lint(runtime_loop, "sagemaker", "for_each"), "run time only") == []
    assert told(lint(exiting, "sagemaker", "run_conditions"), "left out") == []
    assert told(lint(anyway, "sagemaker", "run_conditions"), "only if") == []


def test_many_inputs_are_noted_and_many_outputs_refused(lint, tmp_path):
    raw = {
        "pipelineInfo": {"name": "wide"},
        "schemaVersion": "2.1.0",
        "root": {"dag": {"tasks": {"wide": {"componentRef": {"name": "comp-wide"}}}}},
        "components": {
            "comp-wide": {
                "executorLabel": "exec-wide",
                "outputDefinitions": {"artifacts": {f"out_{n}": {"artifactType": {}} for n in range(11)}},
            }
        },
        "deploymentSpec": {"executors": {"exec-wide": {"container": {"image": "x"}}}},
    }
    found = portability.lint(model.load(raw), "sagemaker")
    assert ("error", "root/wide: outputs") in [(finding.level, finding.where) for finding in found]
    recipe = Recipe.load(cli.RECIPES / "medication-directions.yaml")
    found = portability.lint(model.load(compile_recipe(recipe, tmp_path / "flagship.yaml")), "sagemaker")
    (inputs,) = [finding for finding in found if finding.where == "root/write-report: inputs"]
    assert inputs.level == "note"
    assert "15 inputs" in inputs.what
    assert inputs.what.endswith("fetches select_preference, select_rl, select_sft, sft, splits, validation")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", sorted(cli.RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_run_on_every_target(recipe, target, tmp_path):
    for profile in ("", "gpu"):
        pipeline = model.load(compile_recipe(Recipe.load(recipe, profile), tmp_path / "pipeline.yaml"))
        assert [finding for finding in portability.lint(pipeline, target) if finding.level == "error"] == []


def test_what_reads_from_an_uncached_task_is_never_taken_from_the_cache(tmp_path):
    @dsl.pipeline
    def inner(n: int) -> int:
        return steps.double(n=n).outputs["Output"]

    @dsl.pipeline
    def graph():
        kept = steps.double(n=1)
        fresh = steps.double(n=kept.outputs["Output"]).set_caching_options(False)
        nested = inner(n=fresh.outputs["Output"])
        steps.weigh(model=fresh.outputs["out"])
        steps.double(n=nested.output)
        steps.weigh(model=kept.outputs["out"])

    assert caching.never_hit(compiled(graph, tmp_path)) == {
        "inner/double": "double-2",
        "double-3": "double-2",
        "weigh": "double-2",
    }
