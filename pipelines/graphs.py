"""Which graph a recipe is of, and its compilation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp.compiler import Compiler

from assay.components.contracts.recipe import Graph, Recipe

from .post_training import post_training
from .retrieval import retrieval

GRAPHS: dict[Graph, Callable[[Recipe, str], Any]] = {"post_training": post_training, "retrieval": retrieval}


def compile_recipe(recipe: Recipe, path: Path, data: str = "") -> Path:
    """Write a recipe's IR: a pipeline document, and a second one with the platform settings.

    Args:
        recipe: What to compile.
        path: Where to write the YAML.
        data: URI of the user's rows; empty to let the task generate them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    Compiler().compile(GRAPHS[recipe.graph](recipe, data), str(path))
    return path
