"""Retrieval for answers: from questions with their passages to a served encoder that finds them.

    raw rows (generated, or a file)          base model
        │                                        │
    validate_data ── quarantine, data docs       │
        │                                        │
    prepare_data ── sft │ validation │ test      │
        │                                        │
        └──────── train_embedding ◄──────────────┤
                          │                      │ reads what was found
    find_champion ► evaluate_retrieval ◄─────────┘
                          │
                        judge ► gate ── promote: register_model → deploy_model
                                  └──── otherwise: hold_model
                                            │
                                       write_report

The corpus is the passages of all splits. The judge compares the reader's answers, where a recipe wants one.
"""

from typing import Any

from assay.components.contracts.recipe import EmbeddingSettings, Recipe
from assay.components.evaluate_retrieval.component import evaluate_retrieval
from assay.components.train_embedding.component import train_embedding

from .wiring import Wiring, from_rows, place


def retrieval(recipe: Recipe, data: str = "") -> Any:
    """Return the pipeline of a recipe.

    Args:
        recipe: Its sections become constants of the graph.
        data: URI of the user's rows; empty to let the task generate them.
    """

    def wire(raw: Any) -> None:
        search = Search(recipe, raw)
        search.train(recipe.embedding or EmbeddingSettings())
        search.decide()

    return from_rows(recipe, data, wire)


class Search(Wiring):
    """Adds the encoder, and its evaluation."""

    def train(self, settings: EmbeddingSettings) -> None:
        """Add the training of the encoder, which is the candidate."""
        trained = train_embedding(**self.given(settings), base=self.base, data=self.data)
        place(trained.set_display_name(f"Train: {settings.title}"), self.recipe, "train")
        self.summaries["embedding"] = trained.outputs["summary"]
        self.best = trained.outputs["model"]

    def decide(self) -> None:
        """Add the evaluation of every search, and what follows it."""
        measured = evaluate_retrieval(**self.compared())
        place(measured.set_display_name("Evaluate every search"), self.recipe, "generate")
        self.conclude(measured)
