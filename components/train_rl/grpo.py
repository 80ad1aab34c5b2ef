"""Group relative policy optimization with TRL (Shao et al. 2024, arXiv:2402.03300) on the task's verifier.

The loss is averaged over tokens and its upper clip raised, as in DAPO (arXiv:2503.14476). On a CPU the samples come
from our own decoder, several times quicker than `generate`, and a group whose rewards are all equal is left out of the
update: its advantages are zero, so with `beta: 0` it has no gradient and only costs time. On a GPU samples come from
vLLM or transformers, as TRL does it.
"""

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from ..contracts.artifacts import read_manifest
from ..contracts.errors import DataError
from ..contracts.recipe import RLSettings
from ..contracts.rows import Example, read_rows
from ..shared import training
from ..shared.chat import prompt_ids
from ..shared.generate import Generator
from ..shared.summary import write_summary
from ..shared.tasks.task import Task, get_task

NAMES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "reward": "reward",
    "reward_std": "reward_std",
    "exact": "exact",
    "frac_reward_zero_std": "silent_share",
    "completions/mean_length": "answer_tokens",
}
MICRO_BATCH = 32
"""Sequences whose activations are in memory at once."""
REWARD_STEPS = 2**16
"""Rewards are rounded to one part in so many. Up to 256 of them add without error in fp32, so equal ones have exactly
their mean, and no advantage; unrounded, TRL gives them one of about 1e-3 and counts their group as informative."""


class CPUTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer with our decoder for the samples, and no arithmetic spent on groups without a signal."""

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, fields: Any, num_generations: int, *rest: Any, **more: Any
    ) -> tuple[list[list[int]], None]:
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
            # The step is part of the seed, so a run that is resumed draws what it would have drawn.
            seed=self.args.seed * 1_000_003 + self.state.global_step,
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
        return super()._compute_loss(model, some)


def tune(settings: RLSettings, task: str, seed: int, base: str, data: str, output: str, summary: Any) -> None:
    """Train, save, check that it had an effect, and tell."""
    started = time.monotonic()
    parents = {"base": read_manifest(base, "model"), "data": read_manifest(data, "splits")}
    model, tokenizer = training.load_trainable(base, settings)
    rows, dropped = prompts(read_rows(Path(data) / "rl.parquet", Example), tokenizer, settings)
    trainer, watcher = make_trainer(model, tokenizer, rows, get_task(task), settings, seed)
    training.train(trainer, watcher)
    training.save(trainer, tokenizer, output, parents["base"], {"stage": "rl", "task": task})
    points = training.curve(trainer, NAMES)
    for point in points:
        point["informative_groups"] = round((1 - point.pop("silent_share")) * settings.batch_size)
    informative = sum(point["informative_groups"] for point in points)
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
    first, last = ends(points, "reward")
    told = training.summary(
        "train_rl",
        f"GRPO, {len(points)} steps: reward of the samples {first:.3f} → {last:.3f}, "
        f"{informative:.0f} of {len(points) * settings.batch_size} groups informative",
        points,
        effect,
        examples=len(rows),
        tokens=int(sum(point.get("answer_tokens", 0) for point in points) * settings.batch_size * settings.group_size),
        dropped=dropped,
        metrics={"reward_first": first, "reward_last": last, "informative_groups": informative},
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
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], task: Task, settings: RLSettings, seed: int
) -> tuple[GRPOTrainer, training.Watcher]:
    """Return TRL's trainer on prompts and the watcher on it."""
    watcher = training.Watcher(["loss", "reward", "frac_reward_zero_std"])
    sequences = settings.batch_size * settings.group_size
    micro = max(size for size in range(1, min(MICRO_BATCH, sequences) + 1) if sequences % size == 0)
    on_cpu = training.device(settings) == "cpu"
    trainer = (CPUTrainer if on_cpu else GRPOTrainer)(
        model=model,
        reward_funcs=_reward(task, tokenizer),
        args=GRPOConfig(
            **training.arguments(
                settings,
                seed,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=sequences // micro,
                generation_batch_size=sequences,
            ),
            num_generations=settings.group_size,
            max_completion_length=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=0,
            beta=settings.beta,
            epsilon=settings.epsilon,
            epsilon_high=settings.epsilon_high,
            loss_type="dapo",
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


def _reward(task: Task, tokenizer: Any) -> Any:
    def reward(
        completions: Any, completion_ids: list[list[int]], reference: list[str], log_metric: Any, **more: Any
    ) -> list[float]:
        """Return the verifier's reward of each sample; one that was cut at the token limit is not finished."""
        rewards = [
            task.reward(turns[0]["content"], truth, finished=ids[-1] == tokenizer.eos_token_id)
            for turns, ids, truth in zip(completions, completion_ids, reference, strict=True)
        ]
        log_metric("exact", sum(one == 1 for one in rewards) / len(rewards))
        return [round(one * REWARD_STEPS) / REWARD_STEPS for one in rewards]

    return reward


def ends(points: list[dict[str, float]], name: str) -> tuple[float, float]:
    """Return the mean of a number over the first and over the last quarter of the steps."""
    count = max(1, len(points) // 4)
    values = [point[name] for point in points]
    return sum(values[:count]) / count, sum(values[-count:]) / count
