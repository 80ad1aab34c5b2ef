"""A whole chain by the local engine, as SageMaker would run it and by the rules of KFP's launcher: the same decision
and the same bytes, in both branches of the gate.

In SageMaker's first run the spot instance of the RL job is taken away once it has a checkpoint. The second run differs
in the gate's rule alone: what lies before that job, whose checkpoints switch its cache off, comes from the step cache.

The small chain takes ten minutes, the flagship forty on two cores; ASSAY_TEST_HOME names a home in which the
flagship has run on these very files, so that the local engine answers from its cache.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from assay.components.contracts.recipe import Recipe
from assay.components.runtime import s3
from assay.pipelines.engines.kubeflow import compile as compilation
from assay.pipelines.engines.kubeflow.profile import Profile
from assay.pipelines.engines.local import engine, outcome
from assay.pipelines.engines.sagemaker.emulate import Emulator
from assay.pipelines.engines.sagemaker.emulation.aws import client, provide
from assay.pipelines.engines.sagemaker.emulation.jobs import Fault
from assay.pipelines.engines.sagemaker.translate import translate
from assay.pipelines.engines.sagemaker.validate import check
from assay.pipelines.graphs import compile_recipe
from assay.pipelines.ir import model
from fixtures import aws, clouds, equality, kfp_launcher
from fixtures.tiny_chain import make_learner, write_recipe, write_rows

FLAGSHIP = Path(model.__file__).parents[1] / "recipes" / "medication-directions.yaml"
TIMED = {"write-report": "report"}
"""Outputs that may differ: the page says when and how long."""
TOO_FEW = {"min_examples": 10_000}
"""The gate's rule that leads into the other branch."""


@dataclass
class Engines:
    """The same recipe on every engine, each with caches and a registry of its own."""

    folder: Path
    aws: dict[str, str]
    cores: int
    home: Path
    """Of the local engine."""
    rows: Path | None = None
    """The user's rows; without them the recipe generates its own."""
    inside: dict[str, str] = field(init=False)
    """Environment of every step."""

    def __post_init__(self) -> None:
        self.inside = {
            "OMP_NUM_THREADS": str(self.cores),
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "20000",
            "ASSAY_CPUS": str(self.cores),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        }
        self.storage = client("s3", self.aws)
        self.bucket = aws.bucket(self.storage)
        if self.rows:
            s3.upload(self.storage, self.rows, f"s3://{self.bucket}/rows")
        inside = {**self.inside, "ASSAY_HOME": str(self.folder / "there")}
        self.emulator = Emulator(self.folder / "emulator", self.aws, environment=inside, containers=False, limit=1)

    def here(self, recipe: Recipe) -> tuple[dict[str, Any], equality.Left]:
        """Run on the local engine; return the run's outcome, and what every step left."""
        path = compile_recipe(recipe, self.folder / "here.yaml", str(self.rows or ""))
        record = engine.run(path, home=self.home, name=recipe.name, cores=self.cores)
        assert record.state == "SUCCEEDED", record.message
        return outcome.read(self.home, record), equality.left_here(self.home, record)

    def sagemaker(self, recipe: Recipe, faults: dict[str, list[Fault]]) -> tuple[Any, equality.Left]:
        """Translate, validate and emulate; return the execution, and what every step left."""
        path = compile_recipe(recipe, self.folder / "there.yaml", f"s3://{self.bucket}/rows" if self.rows else "")
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

    def kubeflow(self, recipe: Recipe) -> equality.Left:
        """Compile for a cluster and run by the launcher's rules; return what every step left."""
        root = self.folder / "cluster"
        path = compile_recipe(recipe, self.folder / "cluster.yaml", str(self.rows or ""))
        compilation.place(path, Profile.model_validate({"volume": {"claim": "home", "path": str(root / "volume")}}))
        registry = root / "registry"
        pod = {
            **self.inside,
            "ASSAY_HOME": str(root / "home"),
            "ASSAY_REGISTRY": str(registry),
            "MLFLOW_TRACKING_URI": f"sqlite:///{registry}/mlflow.db",
        }
        return equality.left_launched(kfp_launcher.launch(path, root, pod))


@pytest.fixture(scope="module")
def server():
    with aws.server() as environment:
        yield environment


@pytest.fixture
def quiet(monkeypatch) -> None:
    """Nothing of this process's environment that would change a step's."""
    monkeypatch.delenv("ASSAY_REGISTRY", raising=False)
    for name in ("OMP_NUM_THREADS", "ASSAY_CPUS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def has_a_checkpoint(ml: Path) -> bool:
    return any((ml / "checkpoints").glob("checkpoints/checkpoint-*/manifest.json"))


def of(left: equality.Left, step: str) -> dict[str, Any]:
    """Return what a step left, whichever branch its copy is in, without what may differ."""
    found = left[step] if step in left else left[next(name for name in left if name.startswith(f"{step}-"))]
    return {name: value for name, value in found.items() if name != TIMED.get(step)}


def hold_against(left: equality.Left, here: equality.Left) -> None:
    """Hold what every step of one engine left against the local engine's."""
    steps = here.keys() - {"importer"}  # an address there
    assert len(left.keys() - {"importer"}) == len(steps)
    assert {step: of(left, step) for step in steps} == {step: of(here, step) for step in steps}


def agree_on_both_branches(engines: Engines, promoting: Recipe, other: Recipe, launched: bool) -> None:
    faults = {"train-rl": [Fault("Spot", has_a_checkpoint, grace=60)]}
    for recipe, decision in [(promoting, "promote"), (other, "inconclusive")]:
        result, here = engines.here(recipe)
        assert result["decision"] == decision, result
        execution, there = engines.sagemaker(recipe, faults)
        hold_against(there, here)
        cached = {name for name, step in execution.steps.items() if step.cached}
        assert ({"train-sft", "train-preference", "select-model-2"} <= cached) is (decision == "inconclusive")
        assert not {"train-rl", "gate", "find-champion"} & cached
        faults = {}
        if launched and decision == "promote":
            hold_against(engines.kubeflow(recipe), here)


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_the_small_chain(base_model, tmp_path, server, quiet):
    learner = make_learner(tmp_path / "learner", base_model)
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "lamps.jsonl")
    engines = Engines(tmp_path, server, cores=1, home=tmp_path / "here", rows=tmp_path / "rows")
    changes = {"min_examples": 30, "criteria": [{"metric": "exact"}]}
    promoting, other = (
        Recipe.load(write_recipe(tmp_path / "tiny.yaml", learner, gate={**changes, **rule})) for rule in ({}, TOO_FEW)
    )
    agree_on_both_branches(engines, promoting, other, launched=True)


@pytest.mark.heavy
@pytest.mark.timeout(7200)
def test_the_flagship(tmp_path, server, quiet):
    home = Path(os.environ.get("ASSAY_TEST_HOME", tmp_path / "here"))
    recipe = Recipe.load(FLAGSHIP)
    other = recipe.model_copy(update={"gate": recipe.gate.model_copy(update=TOO_FEW)})
    agree_on_both_branches(Engines(tmp_path, server, cores=2, home=home), recipe, other, launched=False)
