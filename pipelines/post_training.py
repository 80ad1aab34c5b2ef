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
                  train_classifier                   on frozen features
                          │ select_model
                          ▼
    find_champion ► evaluate ► judge ► gate ── promote: register_model → deploy_model
                                         └──── otherwise: hold_model
                                                   │
                                              write_report

The graph is a function of the recipe and of where the rows come from, and of nothing else: the same recipe compiles to
the same IR, byte for byte.
"""

from typing import Any

from kfp import dsl

from assay.components.build_preferences.component import build_preferences
from assay.components.contracts.recipe import PairSettings, PretrainSettings, Recipe, RewardModelSettings
from assay.components.evaluate.component import evaluate
from assay.components.sample_candidates.component import sample_candidates
from assay.components.train_classifier.component import train_classifier
from assay.components.train_distill.component import train_distill
from assay.components.train_preference.component import train_preference
from assay.components.train_pretrain.component import train_pretrain
from assay.components.train_reward.component import train_reward
from assay.components.train_rl.component import train_rl
from assay.components.train_sft.component import train_sft

from .wiring import Wiring, from_rows, place


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

    return from_rows(recipe, data, wire)


class Stages(Wiring):
    """Adds the climb, and its evaluation."""

    def train(self) -> None:
        """Add the training stages, each starting from the best model so far."""
        recipe = self.recipe
        if recipe.pretrain:
            self._pretrain(recipe.pretrain)
        if recipe.sft:
            self._stage("sft", train_sft(**self.given(recipe.sft), base=self.best, data=self.data))
        if recipe.distill:
            teacher = self.import_model(recipe.distill.teacher, "Import teacher")
            given = {**self.given(recipe.distill), "teacher": teacher}
            self._stage("distill", train_distill(**given, base=self.best, data=self.data))
        pairs = self._pairs(recipe.preference or recipe.reward_model)
        rewarding = {}
        if recipe.reward_model:
            rewarding["reward"] = self._train_reward(recipe.reward_model, pairs)
        if recipe.preference:
            given = self.given(recipe.preference)
            self._stage("preference", train_preference(**given, base=self.best, pairs=pairs))
        if recipe.rl:
            self._stage("rl", train_rl(**self.given(recipe.rl), base=self.best, data=self.data, **rewarding))
        if recipe.classifier:
            given = self.given(recipe.classifier)
            self._stage("classifier", train_classifier(**given, base=self.best, data=self.data))

    def decide(self) -> None:
        """Add the evaluation of every stage, and what follows it."""
        measured = evaluate(**self.compared(), **self.stages)
        place(measured.set_display_name("Evaluate every arm"), self.recipe, "generate")
        self.conclude(measured)

    def _pretrain(self, pretrain: PretrainSettings) -> None:
        """Let the model read the domain's text; the step itself decides whether its output goes on."""
        given = {"corpus": pretrain.corpus} | ({"general": pretrain.general} if pretrain.general else {})
        text = {
            name: dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset).set_display_name(f"Import {name} text")
            for name, uri in given.items()
        }
        read = {name: imported.output for name, imported in text.items()}
        trained = train_pretrain(**self.given(pretrain), base=self.best, data=self.data, **read)
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

    def _train_reward(self, settings: RewardModelSettings, pairs: Any) -> Any:
        """Return a reward model; it starts from the model whose answers it ranks."""
        trained = train_reward(**self.given(settings), base=self.best, pairs=pairs)
        place(trained.set_display_name("Train: reward model"), self.recipe, "train")
        self.summaries["reward_model"] = trained.outputs["summary"]
        return trained.outputs["model"]

    def _stage(self, name: str, trained: Any) -> None:
        """Let a stage's model compete with its input, and go on with the better one."""
        title = self.recipe.stages[name]
        place(trained.set_display_name(f"Train: {title}"), self.recipe, "train")
        chosen = self.select(self.best, trained, f"Select after {title}")
        self.summaries |= {name: trained.outputs["summary"], f"select_{name}": chosen.outputs["summary"]}
        self.stages[name] = trained.outputs["model"]
        self.best = chosen.outputs["best"]
