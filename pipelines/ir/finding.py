"""What a lint finds, and the place in the graph that it looks at."""

from dataclasses import dataclass
from typing import Literal

from .model import Component, Container, Pipeline, Task

Target = Literal["local", "kubeflow", "sagemaker"]
Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing to know before a pipeline runs on a target."""

    level: Level
    """An error stops the submission; a warning says that the target does it differently; a note is for information."""
    where: str
    """Place in the graph, for example `root/condition-branches-1/condition-2/deploy-model: env`."""
    what: str
    fix: str = ""


@dataclass(frozen=True)
class Place:
    """One task of a pipeline, and the target it is asked about."""

    pipeline: Pipeline
    path: str
    task: Task
    component: Component
    target: Target
    features: frozenset[str]

    @property
    def container(self) -> Container | None:
        """The container it runs, if it is a leaf that runs one."""
        return self.pipeline.executor(self.component).container if self.component.executor_label else None

    def tell(self, level: Level, what: str, fix: str = "", part: str = "") -> Finding:
        """Return a finding about the task, or about a part of it."""
        where = f"root/{self.path}"
        return Finding(level, f"{where}: {part}" if part else where, what, fix)

    @property
    def known_platforms(self) -> frozenset[str]:
        """The platforms whose settings the target reads."""
        return frozenset({"local": {"local"}, "kubeflow": {"kubernetes"}, "sagemaker": set[str]()}[self.target])
