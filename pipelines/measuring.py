"""What is known before anything is trained: the rows, and the arms that need no training.

    raw rows ► validate_data ► prepare_data ─┐
                       import_model (base) ──┼► evaluate
                       find_champion ────────┘
                                             └► train_sft ► select_model     three times, for a learning curve

The steps are those of the recipe's own graph, so that its run takes their results from the cache, and that of SFT on
all rows. The curve is measured on the validation split: held-out rows are for decisions.
"""

from typing import Any

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Recipe
from assay.components.evaluate.component import evaluate
from assay.components.train_sft.component import train_sft

from .wiring import Wiring, from_rows, place

SHARES = (0.25, 0.5, 1.0)
"""Of SFT's rows: the points of a learning curve."""


def measuring(recipe: Recipe, data: str = "", curve: bool = False) -> Any:
    """Return the pipeline that measures a recipe's baselines.

    Args:
        recipe: Its stages are left out; the base model stands in for the candidate.
        data: URI of the user's rows; empty to let the task generate them.
        curve: Train SFT on `SHARES` of its rows too.

    Raises:
        RecipeError: The recipe is of retrieval, whose search has no encoder before one is trained; or a curve is
            wanted, and it has no SFT.
    """
    if curve and not recipe.sft:
        raise RecipeError("the recipe has no SFT, so there is no curve", where="--curve", fix="give it a section sft")
    if recipe.graph == "retrieval":
        raise RecipeError(
            "a search by vectors has no encoder before one is trained, so there is nothing to measure beforehand",
            where="graph",
            fix=f"run it once (assay run {recipe.name}), then advise from that run: assay advise latest",
        )

    def wire(raw: Any) -> None:
        wiring = Wiring(recipe, raw)
        measured = evaluate(**wiring.compared())
        place(measured.set_display_name("Measure the baselines"), recipe, "generate")
        if not curve or not recipe.sft:
            return
        for share in SHARES:
            given = wiring.given(recipe.sft.model_copy(update={"share": share}))
            trained = train_sft(**given, base=wiring.base, data=wiring.data)
            place(trained.set_display_name(f"Train: SFT on {share:.0%} of its rows"), recipe, "train")
            wiring.select(wiring.base, trained, f"Measure SFT on {share:.0%}")

    return from_rows(recipe, data, wire)
