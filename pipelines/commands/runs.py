"""Runs: start one on any engine, go on with one, list them, find a report."""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Recipe

from ..engines.local.events import Event
from ..engines.outcome import Outcome
from . import engines
from .options import (
    BROKEN,
    EXIT,
    HOME,
    INTERRUPTED,
    USERS_FAULT,
    Data,
    Deploy,
    Engine,
    Home,
    Json,
    Profile,
    RecipeName,
    RunId,
    load,
)


def run(
    recipe: RecipeName,
    data: Data = "",
    engine: Engine = "local",
    deploy: Deploy = None,
    wait: Annotated[bool, typer.Option(help="Follow a run on a distributed engine to its end.")] = True,
    profile: Profile = "",
    seed: Annotated[int | None, typer.Option(min=0, help="Replaces the recipe's seed.")] = None,
    from_step: Annotated[str, typer.Option("--from", help="Run this step and all after it anew (local).")] = "",
    cache: Annotated[bool, typer.Option(help="Take results of identical steps from the cache.")] = True,
    as_json: Json = False,
    home: Home = HOME,
) -> None:
    """Run a recipe, from raw rows to a served champion."""
    loaded = load(recipe, profile, seed)
    if engine != "local":
        if from_step or not cache:
            raise RecipeError("--from and --no-cache are of the local engine", fix="leave them out")
        _run_there(loaded, data, engine, deploy, wait, as_json)
        return
    if deploy or not wait:
        raise RecipeError("--deploy and --no-wait are of the distributed engines", fix="name one with --engine")
    _run_here(loaded, data, profile, from_step, cache, as_json, home.absolute())


def resume(run_id: RunId = "latest", as_json: Json = False, home: Home = HOME) -> None:
    """Go on with a run that was interrupted, killed or failed; what is finished stays finished."""
    from ..engines.local import engine, session, store

    record = store.load_run(home.absolute(), run_id)
    loaded = Recipe.model_validate(record.metadata["recipe"])
    with session.watching(loaded, home.absolute(), as_json=as_json) as watch:
        record = engine.resume(record.id, home=home.absolute(), on_event=watch)
    finish(record, home.absolute(), as_json)


def runs(as_json: Json = False, home: Home = HOME) -> None:
    """List the runs of this folder, newest first."""
    from ..engines.local import store

    found = store.list_runs(home.absolute())
    if as_json:
        for record in found:
            print(json.dumps({"id": record.id, "name": record.name, "state": record.state, "started": record.started}))
        return
    table = Table("run", "recipe", "state", "started", box=None)
    for record in found:
        started = datetime.fromtimestamp(record.started).isoformat(" ", "minutes") if record.started else ""
        table.add_row(record.id, record.name, record.state, started)
    Console().print(table if found else "No run yet: `assay run medication-directions` makes the first.")


def report(run_id: RunId = "latest", home: Home = HOME) -> None:
    """Print where a run's HTML report lies."""
    from ..engines.local import outcome, store

    print(outcome.report(home.absolute(), store.load_run(home.absolute(), run_id)))


def finish(record: Any, home: Path, as_json: bool) -> None:
    """Print how a local run ended and exit with its code."""
    from ..engines.local import outcome

    result = outcome.read(home, record)
    if as_json:
        print(json.dumps({"kind": "result", **result}))
    else:
        print(outcome.words(result))
    if record.state == "SUCCEEDED":
        raise typer.Exit(EXIT.get(result["decision"], 0))
    if record.state == "CANCELLED":
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(USERS_FAULT if result["users_fault"] else BROKEN)


def finish_there(outcome: Outcome, name: str, as_json: bool, approvals: int = 0) -> None:
    """Print how a run on a distributed engine ended, or that it was submitted, and exit with its code."""
    print(
        json.dumps({"kind": "result", "name": name, **asdict(outcome)}) if as_json else _words(outcome, name, approvals)
    )
    codes = {"SUBMITTED": 0, "FAILED": BROKEN, "CANCELLED": INTERRUPTED}
    # A run whose decision is not known must not pass for a promotion.
    raise typer.Exit(codes.get(outcome.state, EXIT.get(outcome.decision, BROKEN)))


def _run_here(recipe: Recipe, data: str, profile: str, from_step: str, cache: bool, as_json: bool, home: Path) -> None:
    from ..engines.local import engine, session
    from ..graphs import compile_recipe

    if data and not Path(data).exists():
        raise RecipeError("there is no such file or folder", where=data, fix="check the path given by --data")
    uri = str(Path(data).absolute()) if data else ""
    pipeline = compile_recipe(recipe, home / "pipelines" / f"{recipe.name}.yaml", uri)
    with session.watching(recipe, home, as_json=as_json) as watch:
        record = engine.run(
            pipeline,
            home=home,
            name=recipe.name,
            on_event=watch,
            from_step=from_step or None,
            use_cache=cache,
            metadata={"recipe": recipe.model_dump(mode="json"), "data": uri, "profile": profile},
        )
    finish(record, home, as_json)


def _run_there(recipe: Recipe, data: str, engine: str, deploy: Path | None, wait: bool, as_json: bool) -> None:
    there = engines.find(engine)
    try:
        with ExitStack() as stack:
            outcome = there.run(recipe, data, deploy, wait, _watching(stack, recipe, as_json))
    except KeyboardInterrupt:
        print("\nassay: no longer waiting; what was submitted goes on, and the same command joins it", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    finish_there(outcome, recipe.name, as_json, recipe.approval.required)


def _watching(stack: ExitStack, recipe: Recipe, as_json: bool) -> Callable[[Event], None]:
    """Return a watcher whose view opens with the first event: until then there is nothing to show."""
    from ..engines.local import session

    opened: list[Callable[[Event], None]] = []

    def watch(event: Event) -> None:
        if not opened:
            opened.append(stack.enter_context(session.watching(recipe, None, as_json=as_json)))
        opened[0](event)

    return watch


def _words(outcome: Outcome, name: str, approvals: int) -> str:
    headlines = {
        "SUBMITTED": f"Submitted: run {outcome.run}.",
        "FAILED": f"Run {outcome.run} failed.",
        "CANCELLED": f"Run {outcome.run} was cancelled.",
    }
    decisions = {
        "promote": f"Passed the gate: {name} has a candidate that awaits approval."
        if approvals
        else f"Promoted: {name} has a new champion.",
        "hold": "Held: nothing was promoted.",
        "inconclusive": "Inconclusive: nothing was promoted.",
    }
    unknown = f"Run {outcome.run} succeeded, and its decision is not known."
    headline = headlines.get(outcome.state) or decisions.get(outcome.decision, unknown)
    lines = [headline, outcome.message, f"See:  {outcome.url}" if outcome.url else ""]
    return "\n  ".join(line for line in lines if line)
