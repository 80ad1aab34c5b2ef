"""`assay recipe`: the recipes that come with Assay."""

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Recipe

from .options import RECIPES, Profile, RecipeName, find_recipe, load, writing

app = typer.Typer(help="List, show or copy the recipes that come with Assay.", no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """List the recipes that come with Assay."""
    table = Table("name", "what it does", box=None)
    for path in sorted(RECIPES.glob("*.yaml")):
        table.add_row(path.stem, Recipe.load(path).title)
    Console().print(table)


@app.command()
def show(recipe: RecipeName, profile: Profile = "") -> None:
    """Print a recipe with every default filled in."""
    import yaml

    loaded = load(recipe, profile)
    print(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")


@app.command()
def copy(recipe: RecipeName, target: Path) -> None:
    """Copy a recipe to a file of your own, to change it."""
    if target.exists():
        raise RecipeError("the file exists", where=str(target), fix="choose another name")
    text = find_recipe(recipe).read_text(encoding="utf-8")
    with writing(target):
        target.write_text(text, encoding="utf-8")
    print(f"wrote {target}; run it with: assay run {target}")
