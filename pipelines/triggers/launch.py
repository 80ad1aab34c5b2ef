"""A job, and how it is run on any engine."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Recipe
from assay.components.runtime.context import home

from ..engines.local.events import Event
from ..engines.outcome import Outcome

ENGINES = ("local", "kubeflow", "sagemaker")
TRIGGER = "ASSAY_TRIGGER_ID"
"""Tells a distributed engine which run a submission belongs to: the same trigger is one run there too."""
Watch = Callable[[Event], None]


@dataclass(frozen=True)
class Job:
    """What a trigger starts."""

    recipe: Recipe
    engine: str = "local"
    data: str = ""
    """URI of the rows; empty to let the task generate them."""
    deploy: Path | None = None
    """The engine's deploy profile."""
    wait: bool = True
    """Wait for the end of the run; the local engine always does."""


def launch(job: Job, trigger: str, on_event: Watch) -> Outcome:
    """Run a job, or go on with the run that this trigger already started here.

    Args:
        job: What to run.
        trigger: Id of the trigger. The local engine keeps it in the run's record, the others are told it by
            ASSAY_TRIGGER_ID; all find the run by it again.
        on_event: Told what happens.

    Raises:
        RecipeError: There is no such engine.
        AssayError: The engine refuses, before anything ran.
    """
    if job.engine not in ENGINES:
        raise RecipeError(f"there is no engine {job.engine!r}", fix=f"choose one of: {', '.join(ENGINES)}")
    if job.engine == "local":
        return _launch_here(job, trigger, on_event)
    engine = import_module(f"assay.pipelines.engines.{job.engine}.engine")
    with _naming(trigger):
        outcome: Outcome = engine.run(job.recipe, job.data, job.deploy, job.wait, on_event)
    return outcome


@contextmanager
def _naming(trigger: str) -> Iterator[None]:
    before = os.environ.get(TRIGGER)
    os.environ[TRIGGER] = trigger
    try:
        yield
    finally:
        os.environ.pop(TRIGGER) if before is None else os.environ.update({TRIGGER: before})


def _launch_here(job: Job, trigger: str, on_event: Watch) -> Outcome:
    from ..engines.local import engine, outcome, store

    root = home()
    record = next((known for known in store.list_runs(root) if known.metadata.get("trigger") == trigger), None)
    if record is None:
        record = engine.run(
            _compile(job, root), home=root, name=job.recipe.name, on_event=on_event, metadata=_metadata(job, trigger)
        )
    elif record.state != "SUCCEEDED":
        record = engine.resume(record.id, home=root, on_event=on_event)
    return _outcome(outcome.read(root, record))


def _compile(job: Job, root: Path) -> Path:
    from ..graphs import compile_recipe

    return compile_recipe(job.recipe, root / "pipelines" / f"{job.recipe.name}.yaml", job.data)


def _metadata(job: Job, trigger: str) -> dict[str, Any]:
    return {"recipe": job.recipe.model_dump(mode="json"), "data": job.data, "profile": "", "trigger": trigger}


def _outcome(result: dict[str, Any]) -> Outcome:
    failures = "; ".join(f"{step} failed: {message}" for step, message in result["failed"].items())
    return Outcome(
        engine="local",
        run=result["run"],
        state=result["state"],
        url=result["report"] or "",
        decision=result["decision"] or "",
        message=result["reason"] or failures,
    )
