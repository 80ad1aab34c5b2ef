"""The whole chain as SageMaker would run it, both branches of the gate: the local engine's decision, and its bytes.

In the first run the spot instance of the RL job is taken away once it has a checkpoint. The second run differs in the
gate's rule alone: what lies before that job, whose checkpoints switch its cache off, comes from the step cache.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from assay.components.contracts.recipe import Recipe
from assay.components.runtime import s3
from assay.pipelines.engines.local import engine, outcome
from assay.pipelines.engines.sagemaker.emulate import Emulator
from assay.pipelines.engines.sagemaker.emulation.aws import client, provide
from assay.pipelines.engines.sagemaker.emulation.jobs import Fault
from assay.pipelines.engines.sagemaker.translate import translate
from assay.pipelines.engines.sagemaker.validate import check
from assay.pipelines.ir import model
from assay.pipelines.post_training import compile_recipe
from fixtures import aws, clouds, equality
from fixtures.tiny_chain import make_learner, write_recipe, write_rows

ONE_CORE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "ASSAY_CPUS": "1"}
TIMED = {"write-report": "report"}
"""Outputs that may differ: the page says when and how long."""


class Both:
    """The same recipe on both engines, each with caches and a registry of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.aws, self.storage = folder, environment, client("s3", environment)
        self.bucket = aws.bucket(self.storage)
        (folder / "rows").mkdir()
        write_rows(folder / "rows" / "lamps.jsonl")
        s3.upload(self.storage, folder / "rows", f"s3://{self.bucket}/rows")
        inside = {**ONE_CORE, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "ASSAY_HOME": str(folder / "there")}
        self.emulator = Emulator(folder / "emulator", environment, environment=inside, containers=False, limit=1)

    def here(self, recipe: Recipe) -> tuple[dict[str, Any], equality.Left]:
        home = self.folder / "here"
        path = compile_recipe(recipe, self.folder / "here.yaml", str(self.folder / "rows"))
        record = engine.run(path, home=home, name=recipe.name, cores=1)
        assert record.state == "SUCCEEDED", record.message
        return outcome.read(home, record), equality.left_here(home, record)

    def there(self, recipe: Recipe, faults: dict[str, list[Fault]]) -> tuple[Any, equality.Left]:
        path = compile_recipe(recipe, self.folder / "there.yaml", f"s3://{self.bucket}/rows")
        profile = clouds.deploy(
            root=f"s3://{self.bucket}/assay",
            region=aws.REGION,
            tasks={"train-rl": {"spot": True}},
            registry=str(self.folder / "registry"),
            mlflow_tracking_uri=f"sqlite:///{self.folder}/registry/mlflow.db",
        )
        translation = translate(model.load(path), profile)
        assert check(translation.definition) == []
        for digest, text in translation.templates.items():
            task = self.folder / "tasks" / digest / "task.json"
            task.parent.mkdir(parents=True, exist_ok=True)
            task.write_bytes(text)
        provide(translation.definition, self.folder / "tasks", self.aws)
        execution = self.emulator.run(translation.definition, translation.name, faults=faults)
        assert execution.state == "Succeeded", execution.reason
        return execution, equality.left_there(self.storage, execution, self.folder / "left" / execution.id)


@pytest.fixture(scope="module")
def server():
    with aws.server() as environment:
        yield environment


def has_a_checkpoint(ml: Path) -> bool:
    return any((ml / "checkpoints").glob("checkpoints/checkpoint-*/manifest.json"))


def of(left: equality.Left, step: str) -> dict[str, Any]:
    """Return what a step left, whichever branch its copy is in, without what may differ."""
    found = left[step] if step in left else left[next(name for name in left if name.startswith(f"{step}-"))]
    return {name: value for name, value in found.items() if name != TIMED.get(step)}


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_the_emulated_chain_decides_as_the_local_engine_and_leaves_the_same_bytes(
    base_model, tmp_path, server, monkeypatch
):
    for name, value in ONE_CORE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ASSAY_REGISTRY", raising=False)
    learner = make_learner(tmp_path / "learner", base_model)
    both = Both(tmp_path, server)
    faults = {"train-rl": [Fault("Spot", has_a_checkpoint, grace=60)]}
    for rule, decision in [({}, "promote"), ({"min_examples": 10_000}, "inconclusive")]:
        changes = {"gate": {"min_examples": 30, "criteria": [{"metric": "exact"}], **rule}}
        recipe = Recipe.load(write_recipe(tmp_path / "tiny.yaml", learner, **changes))
        result, here = both.here(recipe)
        assert result["decision"] == decision, result
        execution, there = both.there(recipe, faults)
        steps = here.keys() - {"importer"}  # an address there
        assert len(there) == len(steps)
        assert {step: of(there, step) for step in steps} == {step: of(here, step) for step in steps}
        cached = {name for name, step in execution.steps.items() if step.cached}
        assert ({"train-sft", "train-preference", "select-model-2"} <= cached) is (decision == "inconclusive")
        assert not {"train-rl", "gate", "find-champion"} & cached
        faults = {}
