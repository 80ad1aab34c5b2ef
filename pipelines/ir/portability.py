"""Portability: what of a compiled pipeline a target cannot do, or does differently, named with its place."""

from dataclasses import dataclass
from typing import Literal

from .model import Container, Task

Target = Literal["local", "kubeflow", "sagemaker"]


@dataclass(frozen=True)
class Finding:
    """One thing to know before a pipeline runs on a target."""

    level: Literal["error", "warning", "note"]
    """An error stops the submission; a warning says that the target does it differently; a note is for information."""
    where: str
    """Place in the graph, for example `root/condition-branches-1/condition-2/deploy-model: env`."""
    what: str
    fix: str = ""


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
