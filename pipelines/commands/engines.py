"""The engines: write, check or schedule what one of them would run."""

import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Recipe

from .options import (
    HOME,
    USERS_FAULT,
    Data,
    Deploy,
    Engine,
    Home,
    Json,
    Profile,
    RecipeName,
    load,
    use,
    writing,
)

if TYPE_CHECKING:
    from ..ir.portability import Finding

OUTPUT = {"local": "pipeline.yaml", "kubeflow": "pipeline.yaml", "sagemaker": "pipeline.json"}
_STYLE = {"error": "red", "warning": "yellow", "note": "dim"}


def find(engine: str) -> Any:
    """Return the module of a distributed engine: `compile_recipe`, `lint`, `run`, `schedule`."""
    return import_module(f"assay.pipelines.engines.{engine}.engine")


def compile_(
    recipe: RecipeName,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write it; pipeline.yaml or .json when left out.")
    ] = None,
    engine: Engine = "local",
    deploy: Deploy = None,
    profile: Profile = "",
    data: Data = "",
) -> None:
    """Write what an engine would run (Kubeflow Pipelines IR, or a SageMaker definition); run nothing."""
    loaded, path = load(recipe, profile), output or Path(OUTPUT[engine])
    with writing(path):
        if engine == "local":
            written = _compile_here(loaded, path, data, deploy)
        else:
            written = find(engine).compile_recipe(loaded, path, data, deploy)
    print(f"wrote {written}")


def lint(
    recipe: RecipeName,
    engine: Engine,
    deploy: Deploy = None,
    profile: Profile = "",
    data: Data = "",
    as_json: Json = False,
) -> None:
    """Say what of a recipe an engine cannot do, or does otherwise; exits 2 when it could not run there."""
    loaded = load(recipe, profile)
    findings = _lint_here(loaded, data, deploy) if engine == "local" else find(engine).lint(loaded, data, deploy)
    if as_json:
        for finding in findings:
            print(json.dumps(asdict(finding)))
    else:
        Console().print(_list(findings) if findings else f"{loaded.name} runs on {engine} as it is.", soft_wrap=True)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(USERS_FAULT)


def schedule(
    recipe: RecipeName,
    cron: Annotated[str, typer.Option(help="Minute, hour, day, month, weekday (UTC); seconds first if there are six.")],
    engine: Engine = "local",
    deploy: Deploy = None,
    profile: Profile = "",
    data: Data = "",
    home: Home = HOME,
) -> None:
    """Run a recipe at these times; the same schedule twice is one, and a changed one replaces the old."""
    use(home)
    # The local schedule is a file that `assay trigger cron` works off.
    module = "assay.pipelines.triggers.cron" if engine == "local" else f"assay.pipelines.engines.{engine}.engine"
    print(import_module(module).schedule(load(recipe, profile), cron, data, deploy))


def _compile_here(recipe: Recipe, path: Path, data: str, deploy: Path | None) -> Path:
    from ..graphs import compile_recipe

    if deploy:
        raise RecipeError("the local engine has no deploy profile", where=str(deploy), fix="leave --deploy out")
    return compile_recipe(recipe, path, data)


def _lint_here(recipe: Recipe, data: str, deploy: Path | None) -> "list[Finding]":
    from tempfile import TemporaryDirectory

    from ..ir import model, portability

    with TemporaryDirectory() as folder:
        path = _compile_here(recipe, Path(folder) / "pipeline.yaml", data, deploy)
        return portability.lint(model.load(path), "local")


def _list(findings: "list[Finding]") -> Text:
    """Return what was found, each thing once, with all its places and what to do about it."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for finding in findings:
        places.setdefault((finding.level, finding.what, finding.fix), []).append(finding.where)
    text = Text()
    for (level, what, fix), where in places.items():
        text.append(f"{level:8}", style=_STYLE[level]).append(f"{what}\n", style="bold")
        text.append("".join(f"        {place}\n" for place in where))
        text.append(f"        → {fix}\n" if fix else "")
    text.rstrip()
    return text
