"""`assay`: the command line. Each command parses, calls one function, and prints.

Exit codes: 0 done (or promoted), 1 held, 3 inconclusive, 2 the input's fault, 130 interrupted, 70 a step broke.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from assay.components.contracts.errors import AssayError, RecipeError, RunError
from assay.components.contracts.recipe import Recipe

RECIPES = Path(__file__).with_name("recipes")
EXIT = {"promote": 0, "hold": 1, "inconclusive": 3}
BROKEN, INTERRUPTED = 70, 130

app = typer.Typer(
    help="Post-training as a pipeline: a model is promoted only on evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes = typer.Typer(help="List, show or copy the recipes that come with Assay.", no_args_is_help=True)
app.add_typer(recipes, name="recipe")

Home = Annotated[Path, typer.Option(envvar="ASSAY_HOME", help="Folder of runs, caches and the registry.")]
Json = Annotated[bool, typer.Option("--json", help="JSON lines for machines.")]
HOME = Path(".assay")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")],
    data: Annotated[
        Path | None, typer.Option(help="Your own rows: .jsonl, .jsonl.gz, .parquet, .csv or a folder.")
    ] = None,
    profile: Annotated[str, typer.Option(help="An overlay of the recipe, for example gpu.")] = "",
    seed: Annotated[int | None, typer.Option(min=0, help="Replaces the recipe's seed.")] = None,
    from_step: Annotated[str, typer.Option("--from", help="Run this step and all after it anew.")] = "",
    cache: Annotated[bool, typer.Option(help="Take results of identical steps from the cache.")] = True,
    as_json: Json = False,
    home: Home = HOME,
) -> None:
    """Run a recipe on this machine, from raw rows to a served champion."""
    from .engines.local import engine, session
    from .post_training import compile_recipe

    loaded = Recipe.load(find_recipe(recipe), profile, seed)
    if data is not None and not data.exists():
        raise RecipeError("there is no such file or folder", where=str(data), fix="check the path given by --data")
    uri = str(data.absolute()) if data else ""
    pipeline = compile_recipe(loaded, home.absolute() / "pipelines" / f"{loaded.name}.yaml", uri)
    with session.watching(loaded, home.absolute(), as_json=as_json) as watch:
        record = engine.run(
            pipeline,
            home=home.absolute(),
            name=loaded.name,
            on_event=watch,
            from_step=from_step or None,
            use_cache=cache,
            metadata={"recipe": loaded.model_dump(mode="json"), "data": uri, "profile": profile},
        )
    _finish(record, home.absolute(), as_json)


@app.command()
def resume(
    run_id: Annotated[str, typer.Argument(help="A run's id; the latest when left out.")] = "latest",
    as_json: Json = False,
    home: Home = HOME,
) -> None:
    """Go on with a run that was interrupted, killed or failed; what is finished stays finished."""
    from .engines.local import engine, session, store

    record = store.load_run(home.absolute(), run_id)
    loaded = Recipe.model_validate(record.metadata["recipe"])
    with session.watching(loaded, home.absolute(), as_json=as_json) as watch:
        record = engine.resume(record.id, home=home.absolute(), on_event=watch)
    _finish(record, home.absolute(), as_json)


@app.command()
def runs(as_json: Json = False, home: Home = HOME) -> None:
    """List the runs of this folder, newest first."""
    from .engines.local import store

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


@app.command()
def report(run_id: Annotated[str, typer.Argument(help="A run's id.")] = "latest", home: Home = HOME) -> None:
    """Print where a run's HTML report lies."""
    from .engines.local import outcome, store

    print(outcome.report(home.absolute(), store.load_run(home.absolute(), run_id)))


@app.command("compile")
def compile_(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the pipeline.")] = Path(
        "pipeline.yaml"
    ),
    profile: Annotated[str, typer.Option(help="An overlay of the recipe.")] = "",
    data: Annotated[str, typer.Option(help="URI of your rows.")] = "",
) -> None:
    """Write a recipe's graph as Kubeflow Pipelines IR (YAML); run nothing."""
    from .post_training import compile_recipe

    loaded = Recipe.load(find_recipe(recipe), profile)
    with _writing(output):
        print(f"wrote {compile_recipe(loaded, output, data)}")


@app.command()
def serve(
    name: Annotated[str, typer.Argument(help="A registered model's name.")],
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token (or set ASSAY_SERVE_TOKEN).")
    ] = None,
    home: Home = HOME,
) -> None:
    """Serve the champion: OpenAI's /v1/chat/completions, SageMaker's /ping and /invocations."""
    from assay.components.deploy_model import server

    _use(home)
    server.serve(name, host=host, port=port, token_file=token_file)


@app.command()
def champion(
    name: Annotated[str, typer.Argument(help="A registered model's name.")],
    at: Annotated[
        datetime | None, typer.Option(help="What was champion at this time (UTC unless it says otherwise).")
    ] = None,
    as_json: Json = False,
    home: Home = HOME,
) -> None:
    """Say which version is champion, now or at an earlier time, and why."""
    from assay.components.shared import registry

    _use(home)
    entry = registry.champion(name, at=at)
    if entry is None:
        raise RecipeError(f"{name!r} has no champion" + (f" at {at:%Y-%m-%d %H:%M}" if at else ""))
    if as_json:
        print(entry.model_dump_json())
        return
    print(f"{name} version {entry.version}, since {entry.time}\n  {entry.reason}\n  content {entry.content[:16]}")


@app.command()
def history(name: Annotated[str, typer.Argument(help="A registered model's name.")], home: Home = HOME) -> None:
    """Print the promotion ledger of a model, verified link by link."""
    from assay.components.shared import registry

    _use(home)
    entries = registry.history(name)
    if not entries:
        raise RecipeError(f"{name!r} has no history", fix="run its recipe first")
    table = Table("time", "event", "version", "reason", box=None)
    for entry in entries:
        table.add_row(str(entry.time), entry.event, str(entry.version or ""), entry.reason)
    Console().print(table)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="A registered model's name.")],
    reason: Annotated[str, typer.Option(help="Why; it is kept in the ledger.")],
    to: Annotated[
        int | None, typer.Option(min=1, help="An earlier champion's version; the previous one when left out.")
    ] = None,
    home: Home = HOME,
) -> None:
    """Make an earlier champion the champion again."""
    from assay.components.shared import registry

    _use(home)
    entry = registry.rollback(name, reason=reason, to=to)
    print(f"{name}: version {entry.version} is champion again")


@recipes.command("list")
def recipe_list() -> None:
    """List the recipes that come with Assay."""
    table = Table("name", "what it does", box=None)
    for path in sorted(RECIPES.glob("*.yaml")):
        table.add_row(path.stem, Recipe.load(path).title)
    Console().print(table)


@recipes.command("show")
def recipe_show(recipe: str, profile: str = "") -> None:
    """Print a recipe with every default filled in."""
    import yaml

    loaded = Recipe.load(find_recipe(recipe), profile)
    print(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")


@recipes.command("copy")
def recipe_copy(recipe: str, target: Path) -> None:
    """Copy a recipe to a file of your own, to change it."""
    if target.exists():
        raise RecipeError("the file exists", where=str(target), fix="choose another name")
    text = find_recipe(recipe).read_text(encoding="utf-8")
    with _writing(target):
        target.write_text(text, encoding="utf-8")
    print(f"wrote {target}; run it with: assay run {target}")


def find_recipe(recipe: str) -> Path:
    """Return the path of a recipe given by name or path.

    Raises:
        RecipeError: There is none.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    built_in = RECIPES / f"{recipe}.yaml"
    if not built_in.is_file():
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise RecipeError(f"there is no recipe {recipe!r}", fix=f"choose one of: {known}; or give a YAML file")
    return built_in


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a path that cannot be written into an error a user can act on."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(path), fix="choose another path") from error


def _use(home: Path) -> None:
    os.environ["ASSAY_HOME"] = str(home.absolute())


def _finish(record: Any, home: Path, as_json: bool) -> None:
    """Print how a run ended and exit with its code."""
    from .engines.local import outcome

    result = outcome.read(home, record)
    if as_json:
        print(json.dumps({"kind": "result", **result}))
    else:
        print(outcome.words(result))
    if record.state == "SUCCEEDED":
        raise typer.Exit(EXIT[result["decision"]])
    if record.state == "CANCELLED":
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(2 if result["users_fault"] else BROKEN)


def main() -> None:
    """Run the command line; a user's error prints without a traceback and exits 2."""
    try:
        app()
    except AssayError as error:
        print(f"assay: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
