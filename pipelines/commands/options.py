"""What commands share: their options, how a recipe is found, and the exit codes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from assay.components.contracts.errors import RecipeError, RunError
from assay.components.contracts.recipe import Recipe

RECIPES = Path(__file__).parents[1] / "recipes"
EXIT = {"promote": 0, "hold": 1, "inconclusive": 3}
USERS_FAULT, BROKEN, INTERRUPTED = 2, 70, 130

RecipeName = Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")]
ModelName = Annotated[str, typer.Argument(help="A registered model's name.")]
RunId = Annotated[str, typer.Argument(help="A run's id; the latest when left out.")]
Profile = Annotated[str, typer.Option(help="An overlay of the recipe, for example gpu.")]
Engine = Annotated[Literal["local", "kubeflow", "sagemaker"], typer.Option(help="What runs the graph.")]
Deploy = Annotated[
    Path | None, typer.Option(help="Deploy profile (YAML): where the engine is, and what each step gets there.")
]
Data = Annotated[str, typer.Option(help="URI of your rows, where the engine can read it.")]
Home = Annotated[Path, typer.Option(envvar="ASSAY_HOME", help="Folder of runs, caches and the registry.")]
Json = Annotated[bool, typer.Option("--json", help="JSON lines for machines.")]
Reason = Annotated[str, typer.Option(help="Why; it is kept in the ledger.")]
AsPerson = Annotated[
    str,
    typer.Option(
        "--as",
        help="Who acts; ASSAY_PERSON or your user name when left out. Believed, unless the registry has a list of "
        "people: then ASSAY_REVIEW_TOKEN proves it.",
    ),
]
HOME = Path(".assay")


def load(recipe: str, profile: str = "", seed: int | None = None) -> Recipe:
    """Return a recipe given by name or path.

    Raises:
        RecipeError: There is none, or it is wrong.
    """
    return Recipe.load(find_recipe(recipe), profile, seed)


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
def writing(path: Path) -> Iterator[None]:
    """Turn a path that cannot be written into an error a user can act on.

    Raises:
        RunError: With the reason.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(path), fix="choose another path") from error


def use(home: Path) -> None:
    """Make a folder the home of all that follows."""
    os.environ["ASSAY_HOME"] = str(home.absolute())
