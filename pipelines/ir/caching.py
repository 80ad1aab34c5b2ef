"""Which tasks a cache can never give that is keyed by the place of the inputs, as all but the local one are."""

from dataclasses import dataclass, field

from .model import Component, Pipeline, Task, in_order


@dataclass
class _Fresh:
    """What is new in each run, and the uncached task it comes from."""

    outputs: dict[str, str] = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict)


def never_hit(pipeline: Pipeline) -> dict[str, str]:
    """Return every cached task that reads from an uncached one: its path, and the path of that one."""
    return _dag(pipeline, pipeline.root, {}, "").found


def _dag(pipeline: Pipeline, component: Component, inputs: dict[str, str], prefix: str) -> _Fresh:
    """Walk a DAG; `inputs` names those of its inputs that are new in each run."""
    assert component.dag is not None
    made: dict[str, dict[str, str]] = {}
    found: dict[str, str] = {}
    for name in in_order(component.dag, prefix):
        task, path = component.dag.tasks[name], f"{prefix}{name}"
        given = _given(task, inputs, made)
        inner = pipeline.component(task)
        if inner.dag:
            below = _dag(pipeline, inner, given, f"{path}/")
            found |= below.found
            made[name] = below.outputs
            continue
        made[name] = {}
        source = next(iter(given.values()), "")
        if not pipeline.executor(inner).container:
            continue
        if not task.caching_options.enable_cache:
            source = path
        elif source:
            found[path] = source
        if source:
            outputs = [*inner.output_definitions.parameters, *inner.output_definitions.artifacts]
            made[name] = dict.fromkeys(outputs, source)
    return _Fresh(_outputs(component, made), found)


def _given(task: Task, inputs: dict[str, str], made: dict[str, dict[str, str]]) -> dict[str, str]:
    given = {}
    for name, source in task.inputs.parameters.items():
        if source.task_output_parameter:
            origin = source.task_output_parameter
            given[name] = made[origin.producer_task].get(origin.output_parameter_key, "")
        elif source.component_input_parameter:
            given[name] = inputs.get(source.component_input_parameter, "")
    for name, entry in task.inputs.artifacts.items():
        if entry.task_output_artifact:
            written = entry.task_output_artifact
            given[name] = made[written.producer_task].get(written.output_artifact_key, "")
        else:
            given[name] = inputs.get(entry.component_input_artifact or "", "")
    return {name: source for name, source in given.items() if source}


def _outputs(component: Component, made: dict[str, dict[str, str]]) -> dict[str, str]:
    assert component.dag is not None
    selectors = {name: entry.selectors for name, entry in component.dag.outputs.parameters.items()}
    selectors |= {name: entry.selectors for name, entry in component.dag.outputs.artifacts.items()}
    found = {}
    for name, several in selectors.items():
        source = next((made[task][key] for task, key in several if key in made.get(task, {})), "")
        if source:
            found[name] = source
    return found
