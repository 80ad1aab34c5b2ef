"""Post-training, from raw rows to a served champion.

    raw rows (generated, or a file)          base model
        │                                        │
    validate_data ── quarantine, data docs       │
        │                                        │
    prepare_data ── sft │ preference │ rl │ validation │ test
        │                                        │
        │                        train_pretrain ── text of the domain
        └──────────── train_sft ◄────────────────┘
                          │ select_model             a stage that does not help is not built upon
              import_model (the teacher) → train_distill
                          │ select_model
            sample_candidates → build_preferences → train_preference
                          │ select_model          └► train_reward
                      train_rl ◄────────────────────────┘  with PPO, where the recipe has a reward model
                          │ select_model
                          ▼
    find_champion ► evaluate ► judge ► gate ── promote: register_model → deploy_model
                                         └──── otherwise: hold_model
                                                   │
                                              write_report

The graph is a function of the recipe and of where the rows come from, and of nothing else: the same recipe compiles to
the same IR, byte for byte.
"""

from pathlib import Path
from typing import Any

from kfp import dsl
from kfp.compiler import Compiler

from assay.components.build_preferences.component import build_preferences
from assay.components.contracts.recipe import Kind, PairSettings, PretrainSettings, Recipe, TrainSettings
from assay.components.deploy_model.component import deploy_model
from assay.components.evaluate.component import evaluate
from assay.components.find_champion.component import find_champion
from assay.components.gate.component import gate
from assay.components.generate_data.component import generate_data
from assay.components.hold_model.component import hold_model
from assay.components.import_model.component import import_model
from assay.components.judge.component import judge
from assay.components.prepare_data.component import prepare_data
from assay.components.register_model.component import register_model
from assay.components.sample_candidates.component import sample_candidates
from assay.components.select_model.component import select_model
from assay.components.train_distill.component import train_distill
from assay.components.train_preference.component import train_preference
from assay.components.train_pretrain.component import train_pretrain
from assay.components.train_reward.component import train_reward
from assay.components.train_rl.component import train_rl
from assay.components.train_sft.component import train_sft
from assay.components.validate_data.component import validate_data
from assay.components.write_report.component import write_report


def post_training(recipe: Recipe, data: str = "") -> Any:
    """Return the pipeline of a recipe.

    Args:
        recipe: Its sections become constants of the graph.
        data: URI of the user's rows; empty to let the task generate them.
    """

    def wire(raw: Any) -> None:
        stages = Stages(recipe, raw)
        stages.train()
        stages.decide()

    def given(data: str = data) -> None:
        rows = dsl.importer(artifact_uri=data, artifact_class=dsl.Dataset).set_display_name("Import rows")
        wire(rows.output)

    def generated() -> None:
        rows = generate_data(task=recipe.task, rows=recipe.data.rows, seed=recipe.seed)
        wire(place(rows.set_display_name("Generate rows"), recipe, "light").outputs["raw"])

    description = recipe.title or "Raw rows in, a gated and served model out."
    return dsl.pipeline(name=recipe.name, description=description)(given if data else generated)


def compile_recipe(recipe: Recipe, path: Path, data: str = "") -> Path:
    """Write a recipe's IR: a pipeline document, and a second one with the platform settings.

    Args:
        recipe: What to compile.
        path: Where to write the YAML.
        data: As for `post_training`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    Compiler().compile(post_training(recipe, data), str(path))
    return path


class Stages:
    """Wires one recipe's steps; an attribute holds what later steps read."""

    def __init__(self, recipe: Recipe, raw: Any) -> None:
        self.recipe = recipe
        settings = recipe.data.model_dump(mode="json")
        checked = validate_data(settings=settings, task=recipe.task, raw=raw)
        place(checked.set_display_name("Validate data"), recipe, "light")
        split = prepare_data(settings=settings, accepted=checked.outputs["accepted"])
        place(split.set_display_name("Prepare data"), recipe, "light")
        base = import_model(reference=recipe.base_model)
        place(base.set_display_name("Import base model"), recipe, "light")
        self.data, self.base = split.outputs["data"], base.outputs["model"]
        self.summaries = {"validation": checked.outputs["summary"], "splits": split.outputs["summary"]}
        self.stages: dict[str, Any] = {}
        self.best = self.base

    def train(self) -> None:
        """Add the training stages, each starting from the best model so far."""
        recipe = self.recipe
        if recipe.pretrain:
            self._pretrain(recipe.pretrain)
        if recipe.sft:
            self._stage("sft", train_sft(**self._given(recipe.sft), base=self.best, data=self.data))
        if recipe.distill:
            teacher = import_model(reference=recipe.distill.teacher)
            place(teacher.set_display_name("Import teacher"), recipe, "light")
            given = {**self._given(recipe.distill), "teacher": teacher.outputs["model"]}
            self._stage("distill", train_distill(**given, base=self.best, data=self.data))
        pairs = self._pairs(recipe.preference or recipe.reward_model)
        rewarding = {}
        if recipe.reward_model:
            rewarding["reward"] = self._train_reward(recipe.reward_model, pairs)
        if recipe.preference:
            given = self._given(recipe.preference)
            self._stage("preference", train_preference(**given, base=self.best, pairs=pairs))
        if recipe.rl:
            self._stage("rl", train_rl(**self._given(recipe.rl), base=self.best, data=self.data, **rewarding))

    def decide(self) -> None:
        """Add the evaluation, the gate, its two branches, and the report."""
        recipe = self.recipe
        champion = find_champion(name=recipe.name, candidate=self.best)
        place(champion.set_display_name("Find champion"), recipe, "light")
        champion.set_caching_options(False)  # the registry is not an input
        measured = evaluate(
            settings=recipe.evaluate.model_dump(mode="json"),
            task=recipe.task,
            data=self.data,
            baseline=self.base,
            candidate=self.best,
            champion=champion.outputs["champion"],
            **self.stages,
        )
        place(measured.set_display_name("Evaluate every arm"), recipe, "generate")
        results = measured.outputs["results"]
        judged = judge(
            settings=recipe.judge.model_dump(mode="json"),
            task=recipe.task,
            data=self.data,
            results=results,
            model=self.base,
        )
        place(judged.set_display_name("Judge"), recipe, "generate")
        decided = gate(
            settings=recipe.gate.model_dump(mode="json"),
            task=recipe.task,
            results=results,
            verdicts=judged.outputs["verdicts"],
            judging=judged.outputs["summary"],
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

    def _given(self, settings: TrainSettings) -> dict[str, Any]:
        """Return what every training step is told."""
        return {"settings": settings.model_dump(mode="json"), "task": self.recipe.task, "seed": self.recipe.seed}

    def _pretrain(self, pretrain: PretrainSettings) -> None:
        """Let the model read the domain's text; the step itself decides whether its output goes on."""
        given = {"corpus": pretrain.corpus} | ({"general": pretrain.general} if pretrain.general else {})
        text = {
            name: dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset).set_display_name(f"Import {name} text")
            for name, uri in given.items()
        }
        read = {name: imported.output for name, imported in text.items()}
        trained = train_pretrain(**self._given(pretrain), base=self.best, **read)
        place(trained.set_display_name(f"Train: {pretrain.title}"), self.recipe, "train")
        self.summaries |= {"pretrain": trained.outputs["summary"], "select_pretrain": trained.outputs["verdict"]}
        self.stages["pretrain"] = self.best = trained.outputs["model"]

    def _pairs(self, settings: PairSettings | None) -> Any:
        """Let the best model so far answer, and return the pairs made of its answers; None where nothing asks."""
        if settings is None:
            return None
        recipe = self.recipe
        # Their own settings alone: another learning rate must not sample anew.
        chosen = PairSettings(**settings.model_dump(include=set(PairSettings.model_fields))).model_dump(mode="json")
        sampled = sample_candidates(
            settings=chosen, task=recipe.task, seed=recipe.seed, model=self.best, data=self.data
        )
        place(sampled.set_display_name("Sample candidates"), recipe, "generate")
        paired = build_preferences(settings=chosen, candidates=sampled.outputs["candidates"])
        place(paired.set_display_name("Build preference pairs"), recipe, "light")
        self.summaries |= {"candidates": sampled.outputs["summary"], "pairs": paired.outputs["summary"]}
        return paired.outputs["pairs"]

    def _train_reward(self, settings: TrainSettings, pairs: Any) -> Any:
        """Return a reward model; it starts from the model whose answers it ranks."""
        trained = train_reward(**self._given(settings), base=self.best, pairs=pairs)
        place(trained.set_display_name("Train: reward model"), self.recipe, "train")
        self.summaries["reward_model"] = trained.outputs["summary"]
        return trained.outputs["model"]

    def _stage(self, name: str, trained: Any) -> None:
        """Let a stage's model compete with its input, and go on with the better one."""
        recipe, title = self.recipe, self.recipe.stages[name]
        place(trained.set_display_name(f"Train: {title}"), recipe, "train")
        chosen = select_model(
            settings=recipe.select.model_dump(mode="json"),
            evaluation=recipe.evaluate.model_dump(mode="json"),
            task=recipe.task,
            incumbent=self.best,
            challenger=trained.outputs["model"],
            data=self.data,
        )
        place(chosen.set_display_name(f"Select after {title}"), recipe, "generate")
        self.summaries |= {name: trained.outputs["summary"], f"select_{name}": chosen.outputs["summary"]}
        self.stages[name] = trained.outputs["model"]
        self.best = chosen.outputs["best"]

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
