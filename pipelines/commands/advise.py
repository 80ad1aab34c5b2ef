"""`assay advise`: the lowest rung that suffices, from a finished run or from the baselines alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from assay.components.contracts.errors import DataError, RecipeError, RunError
from assay.components.contracts.recipe import Recipe

from .options import BROKEN, HOME, INTERRUPTED, USERS_FAULT, Data, Home, Json, Profile, find_recipe, load, use

if TYPE_CHECKING:  # numpy, which no other command needs at its start
    from assay.components.contracts.metrics import Summary
    from assay.components.shared.advice import Advice, Cost, Point

MEASURING, CURVE = "measuring", "curve"
"""Mark the record of a run that measures baselines only, and SFT on parts of its rows."""
PLACES = ("", "-2", "-3")
"""Ends of the names of such a run's steps, from the fewest rows to all (`measuring.SHARES`)."""
WITH_SELECTION = ("sft", "distill", "preference", "rl", "classifier")
"""Stages that `select_model` follows, in the order of the graph."""
OWN_STEPS = {
    "pretrain": ("train-pretrain",),
    "sft": ("train-sft",),
    "distill": ("import-model-2", "train-distill"),
    "preference": ("sample-candidates", "build-preferences", "train-preference"),
    "rl": ("train-reward", "train-rl"),
    "classifier": ("train-classifier",),
    "embedding": ("train-embedding",),
}
"""Stage to the steps that it takes, its selection aside."""


def advise_(
    target: Annotated[str, typer.Argument(help="A recipe whose baselines are measured, or a finished run.")] = "latest",
    reach: Annotated[
        list[str] | None, typer.Option("--target", help="METRIC=VALUE: what is needed; in place of the recipe's.")
    ] = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Of a recipe: train SFT on parts of its rows too, for a learning curve.")
    ] = False,
    data: Data = "",
    profile: Profile = "",
    as_json: Json = False,
    home: Home = HOME,
) -> None:
    """Recommend the lowest rung that suffices: a prompt, examples, retrieval, a classifier, a training, or none."""
    use(home)
    wanted = read_targets(reach) if reach else None
    record = _measured(target, curve, data, profile, as_json, home.absolute())
    recipe = Recipe.model_validate(record.metadata["recipe"])
    advice = advise_run(home.absolute(), record, recipe, wanted)
    if as_json:
        print(json.dumps({"kind": "advice", "run": record.id, "recipe": recipe.name, **advice.model_dump()}))
    else:
        show(advice, recipe.name, record.id)


def show(advice: "Advice", name: str, run: str) -> None:
    """Print an advice: first the rung, then what decided, then what was found before."""
    console = Console(highlight=False)
    console.print(f"\n[bold]{name}: {advice.title}[/bold]", soft_wrap=True)
    for line in (advice.because, advice.cost, f"Rule: {advice.rule}. {advice.reason}"):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    if advice.passed:
        console.print("  What the rungs below it showed:", markup=False)
    for line in advice.passed:
        console.print(f"    {line}", markup=False, soft_wrap=True)
    if advice.outlook:
        console.print(f"  {advice.outlook}", markup=False, soft_wrap=True)
    console.print(f"  Measured by run {run}.", markup=False)


def read_targets(given: list[str]) -> dict[str, float]:
    """Return the targets of `METRIC=VALUE`.

    Raises:
        RecipeError: One is not of that form.
    """
    targets = {}
    for one in given:
        name, _, value = one.partition("=")
        try:
            targets[name.strip()] = float(value)
        except ValueError:
            raise RecipeError(
                f"{one!r} is no target", where="--target", fix="write METRIC=VALUE, for example exact=0.9"
            ) from None
    return targets


def advise_run(home: Path, record: Any, recipe: Recipe, targets: Mapping[str, float] | None = None) -> "Advice":
    """Return the advice of a run of the local engine.

    Args:
        home: Folder of runs.
        record: The run's record.
        recipe: What it was compiled from.
        targets: In place of the recipe's.

    Raises:
        RunError: The run did not come as far as its evaluation.
        RecipeError: A target is of no metric of the task.
    """
    from assay.components.shared.advice import advise, read_facts
    from assay.components.shared.summary import read_summary

    from ..engines.local import session, store

    def summary(step: str) -> Any:
        try:
            return read_summary(store.task_folder(home, record.id, step) / "outputs" / "summary")
        except DataError as error:
            raise RunError(
                f"this run has not finished its step {step}",
                where=record.id,
                fix=f"go on with it: assay resume {record.id}",
            ) from error

    selects = selections(recipe) if not record.metadata.get(MEASURING) else {}
    here = session.last_seconds(home, recipe.name)
    evaluation = summary("evaluate-retrieval" if recipe.graph == "retrieval" else "evaluate")
    primary = str(evaluation.details["metrics"][0]["name"])
    facts = read_facts(
        recipe,
        summary("prepare-data"),
        evaluation,
        {stage: summary(step) for stage, step in selects.items()},
        {stage: cost for stage in OWN_STEPS if (cost := cost_of(stage, recipe, here))},
        targets,
        [
            point_of(summary(f"train-sft{place}"), summary(f"select-model{place}"), primary)
            for place in (PLACES if record.metadata.get(CURVE) else ())
        ],
    )
    return advise(facts)


def point_of(trained: "Summary", measured: "Summary", metric: str) -> "Point":
    """Return a point of a metric's learning curve from the summaries of a training and of its measurement."""
    from assay.components.shared.advice import Point

    details: dict[str, Any] = dict(measured.details)
    return Point(rows=int(trained.metrics["examples"]), **details["challenger"][metric])


def selections(recipe: Recipe) -> dict[str, str]:
    """Return for each stage of a recipe the step that chose between its input and its output."""
    stages = [stage for stage in WITH_SELECTION if getattr(recipe, stage)]
    return {stage: "select-model" + (f"-{place}" if place > 1 else "") for place, stage in enumerate(stages, 1)}


def cost_of(stage: str, recipe: Recipe, here: Mapping[str, float]) -> "Cost | None":
    """Return what a stage's steps took when they last ran here, else what the recipe says; None where neither knows."""
    from assay.components.shared.advice import Cost

    steps = [*OWN_STEPS[stage], *(step for name, step in selections(recipe).items() if name == stage)]
    for known, source in (
        (here, "as it last ran here"),
        (recipe.seconds, "the recipe's own figures, on two CPU cores"),
    ):
        seconds = [known[step] for step in steps if step in known]
        if OWN_STEPS[stage][-1] in known:
            return Cost(sum(seconds), source)
    return None


def _measured(target: str, curve: bool, data: str, profile: str, as_json: bool, home: Path) -> Any:
    """Return the record of a run that was named, or of a new one that measures a recipe's baselines."""
    from ..engines.local import store

    if curve:
        return _measure(load(target, profile), data, as_json, home, curve)
    if target == "latest" or Path(target, "run.json").is_file() or store.run_folder(home, target).is_dir():
        return store.load_run(home, target)
    find_recipe(target)  # neither a run nor a recipe: its error names the recipes that there are
    return _measure(load(target, profile), data, as_json, home)


def _measure(recipe: Recipe, data: str, as_json: bool, home: Path, curve: bool = False) -> Any:
    from kfp.compiler import Compiler

    from ..engines.local import engine, outcome, session
    from ..measuring import measuring

    if data and not Path(data).exists():
        raise RecipeError("there is no such file or folder", where=data, fix="check the path given by --data")
    uri = str(Path(data).absolute()) if data else ""
    path = home / "pipelines" / f"{recipe.name}-baselines.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    Compiler().compile(measuring(recipe, uri, curve), str(path))
    with session.watching(recipe, home, as_json=as_json) as watch:
        record = engine.run(
            path,
            home=home,
            name=f"{recipe.name}-baselines",
            on_event=watch,
            metadata={"recipe": recipe.model_dump(mode="json"), "data": uri, MEASURING: True, CURVE: curve},
        )
    if record.state != "SUCCEEDED":
        result = outcome.read(home, record)
        print(json.dumps({"kind": "result", **result}) if as_json else outcome.words(result))
        fault = USERS_FAULT if result["users_fault"] else BROKEN
        raise typer.Exit(INTERRUPTED if record.state == "CANCELLED" else fault)
    return record
