"""`assay recipe`: the recipes that come with Assay."""

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Recipe, read_mapping, rubric_file

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
    """Copy a recipe to a file of your own, to change it, and the rubric that it names beside it."""
    source = find_recipe(recipe)
    named = rubric_file(read_mapping(source, "a recipe"))
    rubric = {target.parent / named: (source.parent / named).read_text(encoding="utf-8")} if named else {}
    if target.exists():
        raise RecipeError("the file exists", where=str(target), fix="choose another name")
    for path, text in rubric.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise RecipeError("another file is in the rubric's place", where=str(path), fix="choose another folder")
    with writing(target):
        target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        for path, text in rubric.items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    print(f"wrote {' and '.join(map(str, [target, *rubric]))}; run it with: assay run {target}")
