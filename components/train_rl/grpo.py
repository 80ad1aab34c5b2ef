"""Group relative policy optimization and its kin, with TRL's GRPO trainer, on the task's verifier.

GRPO, DAPO, GSPO and RLOO differ in a few places of one computation (`RLSettings.algorithm` names the papers). TRL has
most of them; dynamic sampling and RLOO's baseline are here. On a CPU the samples come from our own decoder, several
times quicker than `generate`, and a group whose rewards are all equal is left out of the update: its advantages are
zero, so with `beta: 0` it has no gradient and only costs time. On a GPU samples come from vLLM or transformers, as TRL
does it.
"""

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_soft_overlong_punishment

from ..contracts.artifacts import read_manifest
from ..contracts.errors import DataError
from ..contracts.recipe import RLSettings
from ..contracts.rows import Example, read_rows
from ..shared import training
from ..shared.chat import prompt_ids
from ..shared.generate import Generator
from ..shared.rewards import Sample, Score, check_probes, open_rewards, probe
from ..shared.summary import write_summary
from ..shared.tasks.task import get_task

NAMES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "reward": "reward",
    "reward_std": "reward_std",
    "exact": "exact",
    "frac_reward_zero_std": "silent_share",
    "completions/mean_length": "answer_tokens",
    "refilled": "refilled_groups",
}
ROUND = 2**40
"""Between the seeds of two rounds of sampling in one step; more than any step."""
MICRO_BATCH = 32
"""Sequences whose activations are in memory at once."""
REWARD_STEPS = 2**16
"""Rewards are rounded to one part in so many. Up to 256 of them add without error in fp32, so equal ones have exactly
their mean, and no advantage; unrounded, TRL gives them one of about 1e-3 and counts their group as informative."""


Drawn = tuple[list[int], Any]
"""Tokens of an answer, and the log-probabilities that vLLM gave them (else None)."""


class GroupTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer with dynamic sampling, and with the baseline of RLOO."""

    def __init__(self, settings: RLSettings, **named: Any) -> None:
        self.settings = settings
        self.round = 0
        self.ready: list[Drawn] = []
        super().__init__(**named)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.settings.dynamic_sampling and self.model.training:
            inputs = self._informative(inputs)
        scored: dict[str, Any] = super()._generate_and_score_completions(inputs)
        self.ready = []
        if self.settings.algorithm == "rloo":  # the mean of the others is as far from a reward as the mean, · G/(G−1)
            scored["advantages"] = scored["advantages"] * self.num_generations / (self.num_generations - 1)
        return scored

    def _informative(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return inputs whose groups have differing rewards, as far as they can be found; keeps their samples ready."""
        size = self.num_generations
        asked = inputs[::size]
        spread: list[tuple[dict[str, Any], list[Drawn]]] = []
        flat: list[tuple[dict[str, Any], list[Drawn]]] = []
        wanted, others = len(asked), self._others(asked)
        for number in range(self.settings.max_resampling + 1):
            self.round = number
            for row, group in zip(asked, self._sample(asked), strict=True):
                rewards = self._rewards(row, [ids for ids, _ in group])
                (spread if max(rewards) > min(rewards) else flat).append((row, group))
            # All processes sample as often as any of them, for the model may be spread over them.
            missing = int(self.accelerator.gather(torch.tensor([wanted - len(spread)]).to(self.args.device)).max())
            asked = list(islice(others, max(missing, 1)))
            if missing <= 0 or not asked:
                break
        self.round = 0
        self._metrics["train"]["refilled"].append(float(len(spread[:wanted]) + len(flat) - wanted))
        chosen = (spread + flat)[:wanted]
        self.ready = [sample for _, group in chosen for sample in group]
        return [row for row, _ in chosen for _ in range(size)]

    def _others(self, asked: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield other rows of the data; the step decides their order, so that a resumed run draws them again."""
        taken = [row["prompt"] for row in asked]
        order = list(range(len(self.train_dataset)))
        Random(f"{self.args.seed} {self.state.global_step} {self.accelerator.process_index}").shuffle(order)
        return (row for row in map(self.train_dataset.__getitem__, order) if row["prompt"] not in taken)

    def _sample(self, rows: list[dict[str, Any]]) -> list[list[Drawn]]:
        size = self.num_generations
        ids, images, fields = self._tokenize_prompts([row["prompt"] for row in rows for _ in range(size)])
        answers, scores = self._generate_single_turn(ids, images, fields, size)
        samples = list(zip(answers, scores or [None] * len(answers), strict=True))
        return [samples[start : start + size] for start in range(0, len(samples), size)]

    def _rewards(self, row: dict[str, Any], answers: list[list[int]]) -> list[float]:
        texts = self.processing_class.batch_decode(answers, skip_special_tokens=True)
        turns = [[{"role": "assistant", "content": text}] for text in texts]
        references = [row["reference"]] * len(answers)
        asked = [row["prompt"]] * len(answers)
        given = {"prompts": asked, "completions": turns, "completion_ids": answers, "reference": references}
        return self.reward_funcs[0](**given, log_metric=lambda *told: None)  # type: ignore[no-any-return]

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, fields: Any, num_generations: int, *rest: Any, **more: Any
    ) -> tuple[list[list[int]], Any]:
        if self.ready:
            scores = [score for _, score in self.ready]
            return [ids for ids, _ in self.ready], None if scores[0] is None else scores
        return self._draw(prompt_ids, images, fields, num_generations, *rest, **more)

    def _draw(self, *positional: Any, **named: Any) -> tuple[list[list[int]], Any]:
        return super()._generate_single_turn(*positional, **named)  # type: ignore[no-any-return]


class CPUTrainer(GroupTrainer):
    """The same with our decoder for the samples, and no arithmetic spent on groups without a signal."""

    def _draw(
        self, prompt_ids: list[list[int]], images: Any, fields: Any, num_generations: int, *rest: Any, **more: Any
    ) -> tuple[list[list[int]], Any]:
        """Sample for each prompt once as many answers as TRL repeats it."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        if not hasattr(self, "sampler"):
            self.sampler = Generator(unwrapped, self.processing_class)
        self.sampler.sync()
        groups = self.sampler.generate(
            prompt_ids[::num_generations],
            max_new_tokens=self.args.max_completion_length,
            temperature=self.args.temperature,
            samples=num_generations,
            # Step and round are part of the seed, so a run that is resumed draws what it would have drawn.
            seed=self.args.seed * 1_000_003 + self.state.global_step + self.round * ROUND,
        )
        return [one.ids for group in groups for one in group], None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        kept = inputs["advantages"] != 0
        if self.beta or bool(kept.all()):
            return super()._compute_loss(model, inputs)
        if not bool(kept.any()):
            kept[0] = True  # one row, of no advantage: a loss of zero that a backward pass can take
        rows = len(kept)
        some = {
            name: value[kept] if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) else value
            for name, value in inputs.items()
        }
        # Where TRL averages over the rows that it is given, the rows that are not stay in the count.
        share = 1.0 if self.loss_type == "dapo" else float(kept.sum()) / rows
        return super()._compute_loss(model, some) * share


def tune(settings: RLSettings, task: str, seed: int, base: str, data: str, output: str, summary: Any) -> None:
    """Train, save, check that it had an effect, and tell."""
    started = time.monotonic()
    parents = {"base": read_manifest(base, "model"), "data": read_manifest(data, "splits")}
    model, tokenizer = training.load_trainable(base, settings)
    rows, dropped = prompts(read_rows(Path(data) / "rl.parquet", Example), tokenizer, settings)
    score = open_rewards(settings.rewards, get_task(task))
    probes = probe(score, [(row["prompt"][-1]["content"], row["reference"]) for row in rows])
    if settings.rewards:  # the task's own verifier is tested with the task
        check_probes(probes)
    trainer, watcher = make_trainer(model, tokenizer, rows, score, settings, seed)
    training.train(trainer, watcher)
    training.save(trainer, tokenizer, settings, output, parents["base"], {"stage": "rl", "task": task})
    points = training.curve(trainer, NAMES)
    sampled = [point for point in points if "reward" in point]  # with `updates` not every step samples
    for point in sampled:
        point["informative_groups"] = round((1 - point.pop("silent_share")) * settings.batch_size)
    informative = sum(point["informative_groups"] for point in sampled)
    refilled = sum(point.get("refilled_groups", 0) for point in sampled)
    effect = training.check_effect(
        training.weight_change(base, output),
        points,
        {
            "rewards_differ": (
                informative > 0,
                "every group had equal rewards: raise temperature or group_size, or take harder (or easier) prompts",
            )
        },
    )
    first, last = training.ends(sampled, "reward")
    told = training.summary(
        "train_rl",
        f"{settings.title}, {len(points)} steps: reward of the samples {first:.3f} → {last:.3f}, "
        f"{informative:.0f} of {len(sampled) * settings.batch_size} groups informative"
        + (f", {refilled:.0f} silent ones replaced" if settings.dynamic_sampling else ""),
        points,
        effect,
        examples=len(rows),
        tokens=int(sum(point.get("answer_tokens", 0) for point in sampled) * settings.batch_size * settings.group_size),
        dropped=dropped,
        metrics={
            "reward_first": first,
            "reward_last": last,
            "informative_groups": informative,
            **({"refilled_groups": refilled} if settings.dynamic_sampling else {}),
            **{f"probe_{name}": value for name, value in probes.items()},
        },
    )
    write_summary(summary, told, seconds=time.monotonic() - started, parents=parents)


def prompts(
    examples: list[Example], tokenizer: Any, settings: RLSettings
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return rows of `prompt` and `reference`, and how many were left out for their length.

    Raises:
        DataError: Fewer are left than a step needs.
    """
    room = settings.max_tokens - settings.max_new_tokens
    rows = [
        {"prompt": [turn.model_dump() for turn in example.prompt], "reference": example.reference}
        for example in examples
        if len(prompt_ids(tokenizer, example.prompt)) <= room
    ]
    if len(rows) < settings.batch_size:
        raise DataError(
            f"{len(rows)} prompts are left, a step needs {settings.batch_size}",
            where="rl split",
            fix="lower rl.batch_size, or give the split a larger share of the data",
        )
    return rows, {"too_long": len(examples) - len(rows)}


def make_trainer(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], score: Score, settings: RLSettings, seed: int
) -> tuple[GRPOTrainer, training.Watcher]:
    """Return TRL's trainer on prompts and the watcher on it."""
    watcher = training.Watcher(["loss", "reward", "frac_reward_zero_std"], every=settings.updates)
    samples = settings.batch_size * settings.group_size
    sequences = training.own_share(samples // settings.updates, "batch_size · group_size / updates")
    micro = max(size for size in range(1, min(MICRO_BATCH, sequences) + 1) if sequences % size == 0)
    on_cpu = training.device(settings) == "cpu"
    trainer = (CPUTrainer if on_cpu else GroupTrainer)(
        settings,
        model=model,
        reward_funcs=make_reward(score, tokenizer, settings),
        args=GRPOConfig(
            **training.arguments(
                settings,
                seed,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=sequences // micro,
                generation_batch_size=samples,
            ),
            num_generations=settings.group_size,
            max_completion_length=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=0,
            beta=settings.beta,
            epsilon=settings.epsilon,
            epsilon_high=settings.epsilon_high,
            loss_type=_loss_type(settings),
            importance_sampling_level="sequence" if settings.algorithm == "gspo" else "token",
            scale_rewards=settings.scale_rewards,
            use_vllm=settings.use_vllm and not on_cpu,
            **({"vllm_mode": "colocate"} if settings.use_vllm and not on_cpu else {}),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=training.adapter(settings),
        callbacks=[watcher],
    )
    training.score_answers_only(trainer, settings.temperature)
    return trainer, watcher


def _loss_type(settings: RLSettings) -> str:
    """Return TRL's name of how the loss is averaged."""
    if settings.algorithm == "rloo":
        return "luspo"  # summed over a sample's tokens: the log-probability of the whole sample
    return "dapo" if settings.token_level_loss else "grpo"


def make_reward(score: Score, tokenizer: Any, settings: RLSettings) -> Any:
    """Return the rewards as TRL asks for them.

    Args:
        score: Of `open_rewards`.
        tokenizer: Its end-of-sequence token tells an answer that ended from one that was cut.
        settings: Whether long answers lose.
    """
    buffer = round(settings.overlong_buffer * settings.max_new_tokens)
    overlong = get_soft_overlong_punishment(settings.max_new_tokens, buffer) if buffer else None

    def reward(
        prompts: Any, completions: Any, completion_ids: list[list[int]], reference: list[str], log_metric: Any, **_: Any
    ) -> list[float]:
        samples = [
            Sample(asked[-1]["content"], turns[0]["content"], truth, finished=ids[-1] == tokenizer.eos_token_id)
            for asked, turns, ids, truth in zip(prompts, completions, completion_ids, reference, strict=True)
        ]
        rewards = score(samples)
        log_metric("exact", sum(one == 1 for one in rewards) / len(rewards))
        if overlong:
            rewards = [one + less for one, less in zip(rewards, overlong(completion_ids), strict=True)]
        return [round(one * REWARD_STEPS) / REWARD_STEPS for one in rewards]

    return reward
