"""The portability rules that look at one step: its container, its files, its parameters, its platform settings."""

import json
from collections.abc import Iterator

from . import placeholders
from .finding import Finding, Place
from .model import Container, Importer, Task

LONGEST_VARIABLE = 256
"""Characters in the value of a variable of a SageMaker Processing job."""
LONGEST_ARGUMENT = 256
"""Characters in an argument of a SageMaker container; values that the run makes travel as arguments."""
LARGEST_INPUT = 100_000
"""Bytes of constants that fit into one argument on Linux (128 KiB), with room for the rest of KFP's ExecutorInput."""
MOST_FILES = 10
"""Inputs, and outputs, of a SageMaker Processing job."""
_RUN_ON_SAGEMAKER = frozenset(
    {
        "pipeline_job_name",
        "pipeline_job_uuid",
        "pipeline_job_resource_name",
        "pipeline_job_create_time_utc",
        "pipeline_task_name",
    }
)
DEADLINE = "activeDeadlineSeconds"
"""The one platform setting that every engine honours."""


def entry_point(container: Container) -> tuple[str, str] | None:
    """Return component (`module:function`) and code digest of a step made by `@step`; None for any other container."""
    given = dict(zip(container.args[::2], container.args[1::2], strict=False))
    if container.command[-1:] != ["assay.components.runtime"] or "--component" not in given:
        return None
    return given["--component"], given.get("--code_digest", "")


def follows_exit_handler(task: Task) -> bool:
    """Return whether a task is the exit task of a `dsl.ExitHandler` (and does not just ignore a failure)."""
    upstream = task.dependent_tasks
    return not task.needs_success and bool(upstream) and all(name.startswith("exit-handler-") for name in upstream)


def containers(place: Place) -> Iterator[Finding]:
    """Yield what is to know of a container, and of what it asks of the machine."""
    container = place.container
    if container is None:
        return
    if place.target == "sagemaker":
        if entry_point(container) is None:
            longest = max(map(len, [*container.command, *container.args]), default=0)
            what = "its container does not run a step of ours"
            what += f", and an argument has {longest} characters (at most {LONGEST_ARGUMENT})" * (
                longest > LONGEST_ARGUMENT
            )
            yield place.tell("error", what, "make it a component with @step")
        if "{{$" in container.image:
            yield place.tell("error", "its image is known at run time only", "name the image when compiling", "image")
        yield from _variables(place, container)
    resources = container.resources
    if "{{$" in resources.model_dump_json() and place.target != "kubeflow":
        what = "what it asks of the machine is known at run time only, and is not looked at"
        yield place.tell("warning", what, "name it when compiling", "resources")
    if resources.accelerator and place.target == "local":
        count = resources.accelerator.resource_count or resources.accelerator.count
        kind = resources.accelerator.resource_type or resources.accelerator.type
        yield place.tell("note", f"it asks for {count} × {kind}; it gets what this machine has", "", "resources")


def _variables(place: Place, container: Container) -> Iterator[Finding]:
    for entry in container.env:
        if "{{$" in entry.value:
            what = f"the variable {entry.name} depends on the run"
            yield place.tell("error", what, "pass it as a parameter", "env")
        elif len(entry.value) > LONGEST_VARIABLE:
            what = (
                f"the variable {entry.name} has {len(entry.value)} characters, at most {LONGEST_VARIABLE} are allowed"
            )
            yield place.tell("error", what, "pass it as a parameter", "env")


def files(place: Place) -> Iterator[Finding]:
    """Yield what is to know of the number of artifacts that go in and out, and of lists of them."""
    if place.container is None or place.target != "sagemaker":
        return
    inputs, outputs = place.task.inputs.artifacts, place.component.output_definitions
    if len(inputs) >= MOST_FILES:
        rest = sorted(inputs)[MOST_FILES - 1 :]
        what = (
            f"{len(inputs)} inputs and its template are more than {MOST_FILES}; the container fetches {', '.join(rest)}"
        )
        yield place.tell("note", what, "", "inputs")
    count = len(outputs.artifacts) + bool(outputs.parameters)
    if count > MOST_FILES:
        yield place.tell("error", f"{count} outputs, at most {MOST_FILES} are allowed", "split the task", "outputs")
    for name, spec in sorted(place.component.input_definitions.artifacts.items()):
        if spec.is_artifact_list and name in inputs:
            yield place.tell("error", f"{name!r} is a list of artifacts", "let one step take each of them", "inputs")


def parameters(place: Place) -> Iterator[Finding]:
    """Yield what is to know of the values that travel as parameters."""
    sources = place.task.inputs.parameters
    constants = {name: source.runtime_value.constant for name, source in sources.items() if source.runtime_value}
    size = len(json.dumps(constants).encode())
    if place.container and size > LARGEST_INPUT and place.target == "kubeflow":
        what = f"its constants are {size:,} bytes, and all of them travel in one argument (128 KiB)"
        yield place.tell("error", what, "write them to a file and pass it as an artifact", "parameters")
    if place.target != "sagemaker":
        return
    names = set(placeholders.run_values([json.dumps(constants)], dict.fromkeys(placeholders.RUN, "")))
    if unknown := sorted(names - _RUN_ON_SAGEMAKER):
        what = f"SageMaker has nothing for {', '.join(unknown)}"
        yield place.tell("error", what, "pass the value as a parameter", "parameters")
    if place.container is None:
        return
    if names & _RUN_ON_SAGEMAKER - {"pipeline_task_name"} and place.task.caching_options.enable_cache:
        yield place.tell("warning", "it is told which run this is, so it is not cached", "", "caching")
    declared = place.component.input_definitions.parameters
    for name in sorted(sources.keys() & declared.keys()):
        if sources[name].task_output_parameter and declared[name].parameter_type in ("STRING", "LIST", "STRUCT"):
            what = f"{name!r} travels as an argument: at most {LONGEST_ARGUMENT} characters, its name included"
            yield place.tell("note", what, "pass what may be longer as an artifact", "parameters")


def platforms(place: Place) -> Iterator[Finding]:
    """Yield the settings for other platforms."""
    for name in sorted(place.pipeline.platforms):
        settings = set(place.pipeline.platform(name, place.component.executor_label)) - {DEADLINE}
        if not settings or name in place.known_platforms:
            continue
        what = f"{', '.join(sorted(settings))} of {name} mean nothing on {place.target}"
        secret = any("secret" in key.lower() for key in settings)
        fix = "let the step's role read the secret" if secret else "say it in the deploy profile, or leave it out"
        yield place.tell("warning", what, fix, f"platforms.{name}")


def imports(place: Place) -> Iterator[Finding]:
    """Yield an importer's artifact that the target cannot reach."""
    importer = place.pipeline.executor(place.component).importer if place.component.executor_label else None
    uri = _uri(place, importer) if importer else ""
    if not uri:
        return
    remote = "://" in uri and not uri.startswith("file://")
    if place.target == "sagemaker" and not uri.startswith("s3://"):
        yield place.tell("error", f"{uri!r} is not in S3", "upload it, and name its s3:// URI", "importer")
    elif place.target == "kubeflow" and not remote:
        yield place.tell("error", f"{uri!r} lies on this machine", "upload it, and name its URI", "importer")
    elif place.target == "local" and remote:
        yield place.tell("warning", f"{uri!r} is read only where it is mounted", "download it", "importer")


def _uri(place: Place, importer: Importer) -> str:
    """Return an importer's URI as far as it is known: a constant, or the default of a parameter of the pipeline."""
    if not importer.artifact_uri.runtime_parameter:
        return str(importer.artifact_uri.constant or "")
    source = place.task.inputs.parameters.get(importer.artifact_uri.runtime_parameter)
    if source is None:
        return ""
    if source.runtime_value:
        return str(source.runtime_value.constant or "")
    root = place.pipeline.root.input_definitions.parameters
    spec = root.get(source.component_input_parameter or "") if "/" not in place.path else None
    return str(spec.default_value or "") if spec else ""
