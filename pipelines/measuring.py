"""What is known before anything is trained: the rows, and the arms that need no training.

    raw rows ► validate_data ► prepare_data ─┐
                       import_model (base) ──┼► evaluate
                       find_champion ────────┘

The steps are those of the recipe's own graph, so that its run takes their results from the cache.
"""

from typing import Any

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Recipe
from assay.components.evaluate.component import evaluate

from .wiring import Wiring, from_rows, place


def measuring(recipe: Recipe, data: str = "") -> Any:
    """Return the pipeline that measures a recipe's baselines.

    Args:
        recipe: Its stages are left out; the base model stands in for the candidate.
        data: URI of the user's rows; empty to let the task generate them.

    Raises:
        RecipeError: The recipe is of retrieval, whose search has no encoder before one is trained.
    """
    if recipe.graph == "retrieval":
        raise RecipeError(
            "a search by vectors has no encoder before one is trained, so there is nothing to measure beforehand",
            where="graph",
            fix=f"run it once (assay run {recipe.name}), then advise from that run: assay advise latest",
        )

    def wire(raw: Any) -> None:
        measured = evaluate(**Wiring(recipe, raw).compared())
        place(measured.set_display_name("Measure the baselines"), recipe, "generate")

    return from_rows(recipe, data, wire)
