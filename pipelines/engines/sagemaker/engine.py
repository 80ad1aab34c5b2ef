"""The SageMaker engine: what the command line calls.

`compile_recipe` and `lint` need neither network nor credentials; `run` and `schedule` are in `submit`.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from assay.components.contracts.errors import RecipeError, RunError
from assay.components.contracts.recipe import Recipe
from assay.pipelines.ir import model, portability
from assay.pipelines.ir.model import Pipeline
from assay.pipelines.ir.portability import Finding

from .profile import Deploy
from .translate import Translation, translate

if TYPE_CHECKING:
    from assay.pipelines.engines.local.events import Event
    from assay.pipelines.engines.outcome import Outcome

EXAMPLE = "infra/aws/deploy.example.yaml"


def build(recipe: Recipe, data: str, deploy: Deploy) -> Translation:
    """Return what would be submitted, checked: the definition and its task templates.

    Args:
        recipe: What to compile.
        data: URI of the user's rows; empty to let the task generate them.
        deploy: The deploy profile.

    Raises:
        RecipeError: SageMaker, the service's model, or the policy of the profile refuses it; all reasons at once.
    """
    pipeline = _pipeline(recipe, data)
    found = portability.lint(pipeline, "sagemaker", _features(deploy))
    _refuse(found, recipe.name)
    translation = translate(pipeline, deploy)
    _refuse(_review(translation, deploy), recipe.name)
    return translation


def compile_recipe(recipe: Recipe, path: Path, data: str, deploy: Path | None) -> Path:
    """Write the pipeline definition, and beside it `<stem>.tasks/<sha256>/task.json` for every task.

    Requests to managed services that are no step of a pipeline go to `<stem>.managed/<step>.json`.

    Args:
        recipe: What to compile.
        path: Where to write the JSON.
        data: As for `build`.
        deploy: The deploy profile.

    Raises:
        RecipeError: As `build`.
        RunError: The folder cannot be written.
    """
    translation = build(recipe, data, profile_of(deploy))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(translation.text, encoding="utf-8")
        _write(
            path.with_name(f"{path.stem}.tasks"),
            {f"{sha}/task.json": text for sha, text in translation.templates.items()},
        )
        requests = {f"{step}.json": _json(request) for step, request in translation.requests.items()}
        _write(path.with_name(f"{path.stem}.managed"), requests)
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(path), fix="choose another path") from error
    return path


def lint(recipe: Recipe, data: str, deploy: Path | None) -> list[Finding]:
    """Return what SageMaker cannot do or does differently, and what the profile's policy says, in the graph's order.

    Without a profile only the graph is looked at.

    Raises:
        RecipeError: The profile cannot be read.
    """
    pipeline = _pipeline(recipe, data)
    if deploy is None:
        told = Finding("note", "deploy profile", "none was given, so only the graph was looked at", f"see {EXAMPLE}")
        return [*portability.lint(pipeline, "sagemaker"), told]
    profile = Deploy.load(deploy)
    found = portability.lint(pipeline, "sagemaker", _features(profile))
    try:
        return found + _review(translate(pipeline, profile), profile)
    except RecipeError as error:
        known = error.where in {finding.where for finding in found if finding.level == "error"}
        return found if known else [*found, Finding("error", error.where, error.what, error.fix)]


def run(recipe: Recipe, data: str, deploy: Path | None, wait: bool, on_event: "Callable[[Event], None]") -> "Outcome":
    """Submit a run, the same one for the same recipe and data, and wait for its end if asked."""
    from .submit import run as submit

    return submit(recipe, data, deploy, wait, on_event)


def schedule(recipe: Recipe, cron: str, data: str, deploy: Path | None) -> str:
    """Make or change the schedule of a recipe, and say in one line what is now scheduled."""
    from .submit import schedule as put

    return put(recipe, cron, data, deploy)


def _pipeline(recipe: Recipe, data: str) -> Pipeline:
    from assay.pipelines import graphs

    with tempfile.TemporaryDirectory(prefix="assay-compile-") as folder:
        return model.load(graphs.compile_recipe(recipe, Path(folder) / "pipeline.yaml", data))


def profile_of(deploy: Path | None) -> Deploy:
    """Return the deploy profile of a file.

    Raises:
        RecipeError: None is given, or it is not one.
    """
    if deploy is None:
        raise RecipeError(
            "SageMaker needs to know region, roles and bucket",
            where="--deploy",
            fix=f"copy {EXAMPLE}, fill it in, and name it with --deploy",
        )
    return Deploy.load(deploy)


def _features(deploy: Deploy) -> frozenset[str]:
    return frozenset(name for name, wanted in deploy.features if wanted)


def _review(translation: Translation, deploy: Deploy) -> list[Finding]:
    """Return what the translator told, what the validator found, and what the policy says."""
    from .lint import policy
    from .validate import check, check_request

    found = [*translation.findings, *check(translation.definition)]
    for step, request in sorted(translation.requests.items()):
        if "jobName" in request:  # Bedrock's; botocore has no model of HyperPod's manifest
            found += check_request("bedrock", "CreateModelCustomizationJobRequest", request, step)
    return [*found, *policy(deploy, translation)]


def _refuse(findings: Iterable[Finding], name: str) -> None:
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        lines = [f"{error.where}: {error.what}" + (f" → {error.fix}" if error.fix else "") for error in errors]
        raise RecipeError(
            "SageMaker cannot run it as it is:\n    " + "\n    ".join(lines),
            where=name,
            fix="correct these; `assay lint` shows warnings and notes as well",
        )


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Make a folder hold these files and no others; no folder when there are none."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)


def _json(value: object) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()
