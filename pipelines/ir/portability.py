"""Portability: what of a compiled pipeline a target cannot do, or does differently, named with its place.

Each rule looks at one task and speaks for the targets it knows. What only a deploy profile decides (which job, which
instance) is the engine's to say.
"""

from collections.abc import Callable, Iterator

from . import caching
from . import portability_steps as steps
from .finding import Finding as Finding
from .finding import Place, Target
from .model import Pipeline

LONGEST_DEFAULT = 1024
"""Characters in the value of a parameter of a SageMaker pipeline."""
_PLATFORMS = {"local": "local", "kubeflow": "kubernetes", "sagemaker": ""}
"""The platform whose settings a target reads."""


def lint(pipeline: Pipeline, target: Target, features: frozenset[str] = frozenset()) -> list[Finding]:
    """Return everything in a pipeline that a target cannot do or does differently, in the order of the graph.

    Args:
        pipeline: The compiled pipeline.
        target: Where it is to run.
        features: What the target may use though it is new: `for_each`, `run_conditions` (SageMaker).
    """
    found = list(_whole(pipeline, target))
    for path, task, component in pipeline.walk():
        place = Place(pipeline, path, task, component, target, features)
        for rule in _RULES:
            found += rule(place)
    if target != "local":  # by content, the local cache hits all the same
        found += _never_cached(pipeline)
    return found


def _whole(pipeline: Pipeline, target: Target) -> Iterator[Finding]:
    if target == "sagemaker":
        for name, spec in sorted(pipeline.root.input_definitions.parameters.items()):
            if len(str(spec.default_value)) > LONGEST_DEFAULT:
                what = f"the default has more than {LONGEST_DEFAULT} characters"
                yield Finding("error", f"root: parameter {name}", what, "pass it as a file")
            if spec.is_optional and spec.default_value is None:
                what = "an optional parameter without a default cannot be given there; it is left out"
                yield Finding("warning", f"root: parameter {name}", what, "give it a default")
    for name, platform in sorted(pipeline.platforms.items()):
        for key in sorted(platform.pipeline_config):
            if name != _PLATFORMS[target] and not (key == steps.DEADLINE and target == "local"):
                what = f"{target} does not know the pipeline setting {key!r} of {name}"
                yield Finding("warning", f"root: platforms.{name}", what)


def _never_cached(pipeline: Pipeline) -> Iterator[Finding]:
    for path, source in caching.never_hit(pipeline).items():
        what = (
            f"it runs each time: what it reads comes from {source}, which is never cached, under another URI each time"
        )
        yield Finding("note", f"root/{path}: caching", what, "let it read what does not change, or accept it")


def _attempts(place: Place) -> Iterator[Finding]:
    """Retries, and tasks that run though something before them failed."""
    if place.target != "sagemaker":
        return
    if place.task.retry_policy.max_retry_count:
        what = "SageMaker tries again after faults of its own (capacity, throttling), never after those of the code"
        yield place.tell("warning", what, "let the step itself try again what may fail for a while", "retryPolicy")
    if place.task.needs_success or "run_conditions" in place.features:
        return
    if steps.follows_exit_handler(place.task):
        what = "an exit handler is no step there: it is left out"
        fix = "start it by an EventBridge rule on the execution's status, or set features.run_conditions"
        yield place.tell("warning", what, fix, "triggerPolicy")
    else:
        what = "it runs only if everything before it succeeded"
        yield place.tell("warning", what, "set features.run_conditions in the deploy profile", "triggerPolicy")


def _loops(place: Place) -> Iterator[Finding]:
    task = place.task
    if task.artifact_iterator and place.target != "local":
        yield place.tell("error", "a loop over artifacts", "loop over a list of constants")
    if not task.parameter_iterator:
        return
    if place.target == "kubeflow" and "exit-handler-" in place.path:
        what = "a ParallelFor inside of an ExitHandler fails on KFP backends (kubeflow/pipelines#12390)"
        yield place.tell("error", what, "take the loop out of the handler")
    source = task.inputs.parameters.get(task.parameter_iterator.items.input_parameter)
    runtime = source is not None and source.runtime_value is None
    if place.target == "sagemaker" and runtime and "for_each" not in place.features:
        what = "the list may be known at run time only; then it cannot be unrolled"
        passed = source is not None and source.component_input_parameter is not None and "/" in place.path
        fix = "loop over a list of constants, or set features.for_each in the deploy profile"
        yield place.tell("warning" if passed else "error", what, fix)


def _joins(place: Place) -> Iterator[Finding]:
    """One of several branches' outputs, and lists of a loop's outputs."""
    dag = place.component.dag
    if dag is None:
        return
    for name, output in sorted(dag.outputs.artifacts.items()):
        if len(output.artifact_selectors) > 1 and place.target == "kubeflow":
            what = f"the artifact {name!r} is that of one of several branches: backends before 2.17 cannot do that"
            yield place.tell("warning", what, "use a parameter, or a backend of 2.17", "outputs")
    several = [output.selectors for output in dag.outputs.parameters.values()]
    several += [output.selectors for output in dag.outputs.artifacts.values()]
    if any(len(selectors) > 1 for selectors in several) and place.target == "sagemaker":
        what = "SageMaker cannot join branches again: what follows is copied into each of them"
        yield place.tell("note", what, "", "outputs")


def _cache(place: Place) -> Iterator[Finding]:
    caching_ = place.task.caching_options
    if place.container is None:
        return
    if not caching_.enable_cache:
        yield place.tell("note", "it runs each time: caching is off", "", "caching")
    if caching_.cache_key and place.target == "sagemaker":
        yield place.tell("warning", "SageMaker knows no cache keys of one's own", "leave cache_key out", "caching")
    if caching_.cache_key and place.target == "kubeflow" and "for-loop-" in place.path:
        what = "all rounds of the loop share one cache entry, because the key leaves out the inputs"
        yield place.tell("error", what, "leave cache_key out", "caching")


_RULES: tuple[Callable[[Place], Iterator[Finding]], ...] = (
    steps.containers,
    steps.files,
    steps.parameters,
    _attempts,
    _loops,
    _joins,
    _cache,
    steps.platforms,
    steps.imports,
)
