"""The recipes that come with Assay, and how one is found by name or path."""

from pathlib import Path

from assay.components.contracts.errors import RecipeError

RECIPES = Path(__file__).with_name("recipes")


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
