"""The Kubeflow engine: what the command line calls. It compiles, lints, submits and schedules; the cluster runs."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Recipe
from assay.pipelines import graphs
from assay.pipelines.engines.local import engine as local
from assay.pipelines.engines.local.events import Event
from assay.pipelines.engines.outcome import Outcome
from assay.pipelines.ir.portability import Finding

from . import compile as compilation
from . import decision, follow, submit
from . import schedule as schedules
from .client import Server
from .lint import check
from .profile import Profile

NAME = "kubeflow"


def compile_recipe(recipe: Recipe, path: Path, data: str, deploy: Path | None) -> Path:
    """Write the pipeline as the cluster would get it.

    Args:
        recipe: What to compile.
        path: Where to write the YAML.
        data: URI of the user's rows; empty to let the task generate them.
        deploy: The deploy profile.

    Raises:
        RecipeError: The deploy profile is wrong.
    """
    return _compile(recipe, path, data, Profile.load(deploy))


def lint(recipe: Recipe, data: str, deploy: Path | None) -> list[Finding]:
    """Return what would not work, or work otherwise, on this cluster.

    Args:
        recipe: The recipe.
        data: As for `compile_recipe`.
        deploy: The deploy profile.

    Raises:
        RecipeError: The deploy profile is wrong.
    """
    profile = Profile.load(deploy)
    with tempfile.TemporaryDirectory() as folder:
        path = graphs.compile_recipe(recipe, Path(folder) / "pipeline.yaml", data)
        return check(path, recipe, data, profile)


def run(recipe: Recipe, data: str, deploy: Path | None, wait: bool, on_event: Callable[[Event], None]) -> Outcome:
    """Submit a run, unless it is there already, and wait for its end if asked to.

    Args:
        recipe: What to run.
        data: As for `compile_recipe`.
        deploy: The deploy profile.
        wait: Whether to follow the run to its end.
        on_event: Told what happens while waiting.

    Raises:
        RecipeError: The recipe or the deploy profile asks for what cannot be done.
        RunError: The server cannot be reached, or refuses.
    """
    profile = Profile.load(deploy)
    _refuse(lint(recipe, data, deploy))
    trigger = submit.trigger_id()
    with tempfile.TemporaryDirectory() as folder:
        path = _compile(recipe, Path(folder) / f"{recipe.name}.yaml", data, profile)
        server = Server(profile)
        started = submit.start(server, submit.upload(server, recipe.name, path), trigger)
        planned = local.plan(path)
    if not wait:
        return Outcome(NAME, started.run_id, "SUBMITTED", server.url(started.run_id))
    return _outcome(server, follow.wait(server, started.run_id, planned, on_event), recipe.name)


def schedule(recipe: Recipe, cron: str, data: str, deploy: Path | None) -> str:
    """Make the recipe run at these times, and say what is now scheduled; doing it again changes nothing.

    Args:
        recipe: What to run.
        cron: Five fields, or six with seconds first; UTC.
        data: As for `compile_recipe`.
        deploy: The deploy profile.

    Raises:
        RecipeError: The expression, the recipe or the deploy profile is wrong.
        RunError: The server cannot be reached, or refuses.
    """
    expression, profile = schedules.cron(cron), Profile.load(deploy)
    _refuse(lint(recipe, data, deploy))
    with tempfile.TemporaryDirectory() as folder:
        path = _compile(recipe, Path(folder) / f"{recipe.name}.yaml", data, profile)
        server = Server(profile)
        version = submit.upload(server, recipe.name, path)
    done = schedules.ensure(server, recipe.name, expression, version)
    return (
        f"{recipe.name} runs at '{expression}' (seconds first, UTC) on {profile.host}, version {version.name}: {done}"
    )


def _compile(recipe: Recipe, path: Path, data: str, profile: Profile) -> Path:
    graphs.compile_recipe(recipe, path, data)
    compilation.place(path, profile)
    return path


def _refuse(findings: list[Finding]) -> None:
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        told = "\n    ".join(f"{finding.where}: {finding.what}; {finding.fix}" for finding in errors)
        raise RecipeError(
            f"this would not run on Kubeflow:\n    {told}", fix="`assay lint RECIPE --engine kubeflow` shows all"
        )


def _outcome(server: Server, run: Any, pipeline: str) -> Outcome:
    state, run_id = run.state, run.run_id
    url = server.url(run_id)
    if state == "SUCCEEDED":
        decided, reason = decision.read(server, run, pipeline)
        return Outcome(NAME, run_id, "SUCCEEDED", url, decided, reason)
    if state == "FAILED":
        return Outcome(NAME, run_id, "FAILED", url, message=follow.failures(run))
    words = "it was cancelled on the server" if state == "CANCELED" else "the server skipped it"
    return Outcome(NAME, run_id, "CANCELLED", url, message=words)
