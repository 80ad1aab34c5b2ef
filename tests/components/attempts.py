"""The inputs of the registry's steps, as the steps before them leave them; the registry itself never loads a model."""

import json
from pathlib import Path
from typing import Any

from kfp import dsl

from assay.components.contracts.artifacts import seal
from assay.components.contracts.recipe import Recipe
from assay.components.register_model.component import register_model
from assay.components.shared import registry

RECIPE = Recipe(name="directions", title="Directions to fields: an engineering fixture, not clinical advice.")
ARMS = {
    "baseline": {"exact": {"mean": 0.1, "low": 0.05, "high": 0.2, "n": 40}},
    "candidate": {"exact": {"mean": 0.9, "low": 0.8, "high": 0.95, "n": 40}, "near_miss": {"mean": None, "n": 0}},
}


class Attempt:
    """One candidate with the gate's decision about it."""

    def __init__(self, folder: Path, words: str, champion: str | None = None, verdict: str = "promote") -> None:
        self.folder = folder
        self.content = self._seal("model", "model", {"config.json": "{}", "model.safetensors": words})
        record = {
            "schema": 1,
            "decision": verdict,
            "reason": f"exact rose with {words}",
            "needed": None,
            "candidate": self.content,
            "champion": champion,
            "baseline": "b" * 64,
            "examples": 40,
            "arms": ARMS,
            "criteria": [
                {
                    "metric": "exact",
                    "versus": "baseline",
                    "test": "superiority",
                    "difference": 0.8,
                    "low": 0.6,
                    "high": 0.9,
                    "p_value": 0.001,
                    "passed": True,
                }
            ],
        }
        self._seal("decision", "decision", {"decision.json": json.dumps(record)})
        self._seal("data", "splits", {"test.parquet": "rows"}, counts={"sft": 20, "test": 40})
        self._seal("results", "results", {"results.parquet": words})

    def _seal(self, name: str, kind: str, files: dict[str, str], counts: dict[str, int] | None = None) -> str:
        (self.folder / name).mkdir(parents=True)
        for file, text in files.items():
            (self.folder / name / file).write_text(text)
        return seal(self.folder / name, kind, counts=counts).content

    def inputs(self, *names: str) -> dict[str, Any]:
        kinds = {"candidate": "model"}
        return {name: dsl.Artifact(uri=str(self.folder / kinds.get(name, name))) for name in names}

    def register(self, name: str) -> int:
        inputs = self.inputs("candidate", "decision", "data", "results")
        return register_model.python_func(name=name, recipe=RECIPE.model_dump(mode="json"), **inputs)

    def register_in_ledger(self, name: str, version: int) -> None:
        """Register without MLflow, for tests of what comes after."""
        registry.keep_model(self.folder / "model")
        registry.register(name, version, self.content, registry.keep_decision(self.folder / "decision"))
