"""The compiled graph as a SageMaker pipeline definition: offline, deterministic, without AWS's SDK.

`flatten` opens the graph, `layout` puts its nodes into lists of steps, `steps` writes each of them.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import assay.components
from assay.components.contracts.errors import RecipeError
from assay.pipelines.ir.model import Pipeline
from assay.pipelines.ir.portability import Finding

from .expressions import Json
from .flatten import flatten
from .graph import Leaf, Loop, Node
from .layout import Layout
from .profile import TRAINS, Deploy, Job
from .steps import Writer

TYPES = {
    "STRING": "String",
    "NUMBER_INTEGER": "Integer",
    "NUMBER_DOUBLE": "Float",
    "BOOLEAN": "Boolean",
    "LIST": "String",
    "STRUCT": "String",
}
"""SageMaker's type of a pipeline parameter; lists and mappings travel as JSON text."""


@dataclass(frozen=True)
class Translation:
    """What would be submitted."""

    name: str
    definition: dict[str, Json]
    templates: dict[str, bytes]
    """Task templates (`task.json`) by the sha256 of their bytes; they lie at `<root>/tasks/<sha256>/task.json`."""
    requests: dict[str, dict[str, Any]]
    """Requests to managed services that are no step of a pipeline, by step."""
    accelerated: list[str]
    """Names of the steps whose tasks ask for an accelerator."""
    findings: list[Finding]

    @property
    def text(self) -> str:
        """The definition as it is written to a file: the same bytes for the same graph and profile."""
        return json.dumps(self.definition, sort_keys=True, indent=1) + "\n"

    @property
    def wire(self) -> str:
        """The definition as it is submitted: without the spaces, for the service counts them."""
        return json.dumps(self.definition, sort_keys=True, separators=(",", ":"))


def translate(pipeline: Pipeline, deploy: Deploy) -> Translation:
    """Translate a compiled pipeline.

    Args:
        pipeline: The compiled pipeline.
        deploy: Where and on what it is to run.

    Raises:
        RecipeError: It holds what SageMaker cannot do; the message names the place.
    """
    nodes = flatten(pipeline, for_each=deploy.features.for_each)
    jobs = {leaf.path: _job(leaf, deploy) for leaf in _all_leaves(nodes)}
    # One profile serves recipes of every graph, so it may name a step that this one does not have.
    names = [*jobs, *_steps()]
    unmatched = [pattern for pattern in deploy.tasks if not any(pattern in deploy.patterns(path) for path in names)]
    if unmatched:
        raise RecipeError(
            f"no task of {pipeline.pipeline_info.name} is called {', '.join(unmatched)}",
            where="deploy profile: tasks",
            fix=f"the tasks are: {', '.join(sorted({path.rpartition('/')[2] for path in jobs}))}",
        )
    writer = Writer(pipeline, deploy, jobs)
    for leaf in _all_leaves(nodes):
        if _turned(leaf, jobs[leaf.path]):
            what = (
                "a Processing job, since a Training job hands on no parameters: no spot, no checkpoints, no warm pool"
            )
            writer.findings.append(Finding("note", f"root/{leaf.path}", what))
    layout = Layout(writer, nodes)
    steps, _ = layout.lay(nodes, {}, {})
    definition = {
        "Version": "2020-12-01",
        "Metadata": {"assay.pipeline": pipeline.pipeline_info.name, "assay.sdk": pipeline.sdk_version},
        "Parameters": _parameters(pipeline),
        "Steps": steps,
    }
    findings = sorted(set(writer.findings), key=lambda found: (found.where, found.what))
    return Translation(
        pipeline.pipeline_info.name, definition, layout.templates, writer.requests, writer.accelerated, findings
    )


def _job(leaf: Leaf, deploy: Deploy) -> Job:
    scalars = bool(leaf.component.output_definitions.parameters)
    return deploy.job(leaf.path, accelerated=leaf.container.resources.accelerator is not None, scalars=scalars)


def _turned(leaf: Leaf, job: Job) -> bool:
    """Return whether a task would be a Training job if it handed on no parameters."""
    trains = fnmatchcase(leaf.path.rpartition("/")[2], TRAINS) or leaf.container.resources.accelerator is not None
    return trains and job.kind == "processing"


def _steps() -> list[str]:
    """Return the names that Assay's own steps have in a graph."""
    found = (path for room in assay.components.__path__ for path in Path(room).glob("*/component.py"))
    return [path.parent.name.replace("_", "-") for path in found]


def _all_leaves(nodes: Iterable[Node]) -> Iterable[Leaf]:
    for node in nodes:
        if isinstance(node, Leaf):
            yield node
        elif isinstance(node, Loop):
            yield from node.body


def _parameters(pipeline: Pipeline) -> list[Json]:
    declared = []
    for name, spec in sorted(pipeline.root.input_definitions.parameters.items()):
        if spec.is_optional and spec.default_value is None:
            continue
        entry: dict[str, Json] = {"Name": name, "Type": TYPES[spec.parameter_type]}
        if spec.default_value is not None:
            entry["DefaultValue"] = _default(spec.default_value, spec.parameter_type)
        declared.append(entry)
    return declared


def _default(value: Any, kind: str) -> Json:
    if kind in ("LIST", "STRUCT"):
        return json.dumps(value, sort_keys=True)
    return int(value) if kind == "NUMBER_INTEGER" else value
