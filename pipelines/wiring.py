"""What the graphs have in common: how one begins with rows and ends with a decision, and where its steps are placed."""

from collections.abc import Callable
from typing import Any

from kfp import dsl

from assay.components.benchmark.component import benchmark
from assay.components.contracts.recipe import JudgeSettings, Kind, Recipe, Section
from assay.components.deploy_model.component import deploy_model
from assay.components.find_champion.component import find_champion
from assay.components.gate.component import gate
from assay.components.generate_data.component import generate_data
from assay.components.hold_model.component import hold_model
from assay.components.import_model.component import import_model
from assay.components.judge.component import judge
from assay.components.prepare_data.component import prepare_data
from assay.components.register_model.component import register_model
from assay.components.select_model.component import select_model
from assay.components.validate_data.component import validate_data
from assay.components.write_report.component import write_report


def from_rows(recipe: Recipe, data: str, wire: Callable[[Any], None]) -> Any:
    """Return the pipeline of a recipe.

    Args:
        recipe: Its sections become constants of the graph.
        data: URI of the user's rows; empty to let the task generate them.
        wire: Adds all further steps to the raw rows.
    """

    def given(data: str = data) -> None:
        rows = dsl.importer(artifact_uri=data, artifact_class=dsl.Dataset).set_display_name("Import rows")
        wire(rows.output)

    def generated() -> None:
        rows = generate_data(task=recipe.task, rows=recipe.data.rows, seed=recipe.seed)
        wire(place(rows.set_display_name("Generate rows"), recipe, "light").outputs["raw"])

    description = recipe.title or "Raw rows in, a gated and served model out."
    return dsl.pipeline(name=recipe.name, description=description)(given if data else generated)


class Wiring:
    """Wires one recipe's steps; an attribute holds what later steps read."""

    def __init__(self, recipe: Recipe, raw: Any) -> None:
        self.recipe = recipe
        settings = recipe.data.model_dump(mode="json")
        checked = validate_data(settings=settings, task=recipe.task, raw=raw)
        place(checked.set_display_name("Validate data"), recipe, "light")
        split = prepare_data(settings=settings, accepted=checked.outputs["accepted"])
        place(split.set_display_name("Prepare data"), recipe, "light")
        self.data, self.base = split.outputs["data"], self.import_model(recipe.base_model, "Import base model")
        self.summaries = {"validation": checked.outputs["summary"], "splits": split.outputs["summary"]}
        self.stages: dict[str, Any] = {}
        self.best = self.base
        self.champion: Any = None
        self.looks: Any = None

    def import_model(self, reference: str, title: str) -> Any:
        """Add the import of a model, and return it."""
        imported = import_model(reference=reference)
        place(imported.set_display_name(title), self.recipe, "light")
        if reference.startswith("models:/"):
            imported.set_caching_options(False)  # the registry is not an input, and an alias moves
        return imported.outputs["model"]

    def given(self, settings: Section) -> dict[str, Any]:
        """Return what every training step is told."""
        return {"settings": settings.model_dump(mode="json"), "task": self.recipe.task, "seed": self.recipe.seed}

    def select(self, incumbent: Any, trained: Any, title: str) -> Any:
        """Add the comparison of a trained model with another on the validation split, and return it."""
        chosen = select_model(
            settings=self.recipe.select.model_dump(mode="json"),
            evaluation=self.recipe.evaluate.model_dump(mode="json"),
            task=self.recipe.task,
            incumbent=incumbent,
            challenger=trained.outputs["model"],
            data=self.data,
        )
        return place(chosen.set_display_name(title), self.recipe, "generate")

    def compared(self) -> dict[str, Any]:
        """Return what every evaluation is given: the held-out rows, and the models to compare on them."""
        return {
            "settings": self.recipe.evaluate.model_dump(mode="json"),
            "task": self.recipe.task,
            "data": self.data,
            "baseline": self.base,
            "candidate": self.best,
            "champion": self._find_champion(),
        }

    def _find_champion(self) -> Any:
        """Add the question which model the best one must beat, and return it."""
        champion = find_champion(
            name=self.recipe.name,
            policy=self.recipe.gate.model_dump(mode="json"),
            evaluation=self.recipe.evaluate.model_dump(mode="json"),
            measurement=self.recipe.measurement,
            candidate=self.best,
            data=self.data,
        )
        place(champion.set_display_name("Find champion"), self.recipe, "light")
        champion.set_caching_options(False)  # the registry is not an input
        self.looks, self.champion = champion.outputs["looks"], champion.outputs["champion"]
        return self.champion

    def conclude(self, measured: Any) -> None:
        """Add what follows the evaluation: the judge, the gate, its two branches, and the report."""
        recipe = self.recipe
        results = measured.outputs["results"]
        settings, model = self._judge()
        judged = judge(
            settings=settings.model_dump(mode="json"),
            task=recipe.task,
            data=self.data,
            results=results,
            model=model,
            **self._labels(),
        )
        place(judged.set_display_name("Judge"), recipe, "generate")
        decided = gate(
            settings=recipe.gate.model_dump(mode="json"),
            task=recipe.task,
            results=results,
            verdicts=judged.outputs["verdicts"],
            judging=judged.outputs["summary"],
            looks=self.looks,
            **self._benchmarks(),
        )
        place(decided.set_display_name("Gate"), recipe, "light")
        self.summaries |= {"evaluation": measured.outputs["summary"], "judging": judged.outputs["summary"]}
        version = self._act(decided, results)
        report = write_report(
            recipe=recipe.model_dump(mode="json"),
            version=version,
            decision=decided.outputs["decision"],
            results=results,
            data=self.data,
            **self.summaries,
        )
        place(report.set_display_name("Write report"), recipe, "light")

    def _judge(self) -> tuple[JudgeSettings, Any]:
        """Return what the judge is told, and the model that it calls `base`: the one that a local judge is."""
        wanted = self.recipe.judge
        if wanted.backend != "local" or wanted.model == "base":
            return wanted, self.base
        return wanted.model_copy(update={"model": "base"}), self.import_model(wanted.model, "Import judge")

    def _labels(self) -> dict[str, Any]:
        """Return people's grades of answers, as the judge takes them; nothing where the recipe names none."""
        uri = self.recipe.judge.labels
        if not uri:
            return {}
        return {
            "labels": dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset)
            .set_display_name("Import labels")
            .output
        }

    def _benchmarks(self) -> dict[str, Any]:
        """Add the benchmarks, and return their results as the gate takes them; nothing where the recipe asks none."""
        recipe = self.recipe
        if not recipe.benchmarks:
            return {}
        asked = benchmark(
            settings=recipe.benchmarks.model_dump(mode="json"),
            data=self.data,
            baseline=self.base,
            candidate=self.best,
            champion=self.champion,
        )
        place(asked.set_display_name("Ask benchmarks"), recipe, "generate")
        self.summaries["benchmarking"] = asked.outputs["summary"]
        return {"benchmarks": asked.outputs["results"]}

    def _act(self, decided: Any, results: Any) -> Any:
        """Add both branches of the gate, and return the version in force after it (0 for none)."""
        recipe = self.recipe
        decision = decided.outputs["decision"]
        with dsl.If(decided.outputs["Output"] == True, name="promote"):  # noqa: E712  kfp records the comparison
            registered = register_model(
                name=recipe.name,
                recipe=recipe.model_dump(mode="json"),
                candidate=self.best,
                decision=decision,
                data=self.data,
                results=results,
            )
            # Registration and deployment act on the world, so they run each time; both know when nothing is to do.
            place(registered.set_display_name("Register").set_caching_options(False), recipe, "light")
            deployed = deploy_model(
                name=recipe.name,
                version=registered.outputs["Output"],
                settings=recipe.evaluate.model_dump(mode="json"),
                task=recipe.task,
                candidate=self.best,
                data=self.data,
            )
            place(deployed.set_display_name("Deploy").set_caching_options(False), recipe, "generate")
        with dsl.Else(name="hold"):
            held = hold_model(name=recipe.name, candidate=self.best, decision=decision)
            place(held.set_display_name("Hold").set_caching_options(False), recipe, "light")
        return dsl.OneOf(deployed.outputs["Output"], held.outputs["Output"])


def place(task: Any, recipe: Recipe, kind: Kind) -> Any:
    """Ask the engine for what a kind of step needs, and return the task.

    Args:
        task: The task.
        recipe: Holds the resources.
        kind: `light`, `train` or `generate`.
    """
    wanted = recipe.resources[kind]
    task.set_cpu_request(f"{wanted.cpus:g}").set_memory_limit(f"{wanted.memory_gb:g}G")
    if wanted.gpus:
        task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(wanted.gpus)
    if wanted.retries:
        task.set_retry(wanted.retries, backoff_duration="10s", backoff_factor=2, backoff_max_duration="300s")
    # What `kfp.kubernetes` would write; to import it brings Kubernetes' client, 0.35 s of CPU. Our engine reads it too.
    task.platform_config["kubernetes"] = {
        "activeDeadlineSeconds": str(round(wanted.timeout_minutes * 60)),
        "podMetadata": {"labels": {"assay-kind": kind}},  # deploy profiles place steps by kind
    }
    return task
