"""A reward model from pairs with TRL (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

The loss is Bradley and Terry's: −log σ(r(chosen) − r(rejected) − w·margin) + c·(r(chosen) + r(rejected))². The pairs
of some groups are held out; the accuracy on them is that of the model as saved.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from ..contracts.artifacts import read_manifest, seal
from ..contracts.errors import DataError
from ..contracts.recipe import RewardModelSettings, TrainSettings
from ..contracts.rows import PreferencePair, read_rows
from ..shared import training
from ..shared.chat import completion_ids, prompt_ids
from ..shared.holdout import is_held_out
from ..shared.models import save_model
from ..shared.reward_model import HEAD, HEAD_WEIGHT, RewardModel, add_head, raw_rewards, write_scale
from ..shared.statistics import mean_interval
from ..shared.summary import write_summary

NAMES = {"loss": "loss", "learning_rate": "learning_rate", "accuracy": "accuracy", "margin": "margin"}
CHANCE = 0.5
"""Accuracy of a coin."""


class PairTrainer(RewardTrainer):  # type: ignore[misc]
    """TRL's trainer on pairs that are tokenised already, as generation tokenises them."""

    def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
        return dataset


def fit(settings: RewardModelSettings, task: str, seed: int, base: str, pairs: str, output: str, summary: Any) -> None:
    """Train, save, measure on held-out pairs, check that it had an effect, and tell."""
    started = time.monotonic()
    parents = {"base": read_manifest(base, "model"), "pairs": read_manifest(pairs, "pairs")}
    model, tokenizer = training.load_trainable(base, settings)
    rows, dropped = tokenize(read_rows(Path(pairs) / "pairs.parquet", PreferencePair), tokenizer, settings)
    kept, held_out = split(rows, settings.holdout)
    trainer, watcher = make_trainer(model, tokenizer, kept, settings, seed)
    training.train(trainer, watcher)
    save(trainer, tokenizer, settings, output, kept)
    metadata = {name: value for name, value in parents["base"].metadata.items() if name in ("reference", "parameters")}
    seal(output, "reward_model", parents=parents, metadata={**metadata, "stage": "reward_model", "task": task})
    points = training.curve(trainer, NAMES)
    ranked, margins = rank(RewardModel(output), held_out)
    by_source = accuracies(ranked, held_out)
    accuracy = mean_interval(ranked, clusters=[row["group"] for row in held_out])
    effect = training.check_effect(
        training.weight_change(base, output, added=[HEAD_WEIGHT]),
        points,
        {
            "ranks_held_out_pairs": (
                accuracy.mean > CHANCE,
                f"{accuracy.mean:.0%} of {accuracy.n} held-out pairs are ranked right, no more than by a coin: raise "
                "reward_model.max_pairs, epochs or learning_rate, or raise min_margin so that pairs differ more",
            )
        },
    )
    told = training.summary(
        "train_reward",
        f"Reward model on {len(kept)} pairs: {accuracy.mean:.0%} ({accuracy.low:.0%} to {accuracy.high:.0%}) of "
        f"{accuracy.n} held-out pairs are ranked right",
        points,
        effect,
        examples=len(kept),
        tokens=sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in kept),
        dropped=dropped,
        metrics={
            "held_out_accuracy": accuracy.mean,
            "held_out_accuracy_low": accuracy.low,
            "held_out_accuracy_high": accuracy.high,
            "held_out_margin": sum(margins) / len(margins),
        },
    )
    told.details["held_out"] = {**accuracy.model_dump(), "by_source": by_source}
    write_summary(summary, told, seconds=time.monotonic() - started, parents=parents)


def tokenize(
    pairs: list[PreferencePair], tokenizer: Any, settings: RewardModelSettings
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return rows of `chosen_ids`, `rejected_ids` (with the prompt), margin, group, source; and the drops."""
    rows = []
    for pair in pairs:
        prompt = prompt_ids(tokenizer, pair.prompt)
        row: dict[str, Any] = {
            "chosen_ids": prompt + completion_ids(tokenizer, pair.chosen),
            "rejected_ids": prompt + completion_ids(tokenizer, pair.rejected),
            "margin": settings.margin_weight * pair.margin,
            "group": pair.group,
            "source": pair.source,
        }
        if max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= settings.max_tokens:
            rows.append(row)
    return rows, {"too_long": len(pairs) - len(rows)}


def split(rows: Sequence[dict[str, Any]], share: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows to train on and those held out, no group on both sides.

    Raises:
        DataError: One side is empty.
    """
    held_out = [row for row in rows if is_held_out(row["group"], share)]
    kept = [row for row in rows if not is_held_out(row["group"], share)]
    if not kept or not held_out:
        raise DataError(
            f"of {len(rows)} pairs {len(kept)} are to train on and {len(held_out)} held out; both need some",
            where="reward_model.holdout",
            fix="raise max_pairs, prompts or max_tokens, or move holdout towards one half",
        )
    return kept, held_out


def make_trainer(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], settings: RewardModelSettings, seed: int
) -> tuple[PairTrainer, training.Watcher]:
    """Return TRL's trainer on tokenised pairs and the watcher on it."""
    watcher = training.Watcher(["loss", "accuracy", "margin"])
    trainer = PairTrainer(
        model=add_head(model, seed),
        args=RewardConfig(
            **training.arguments(settings, seed),
            max_length=settings.max_tokens,
            center_rewards_coefficient=settings.center or None,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter(settings),
        callbacks=[watcher],
    )
    return trainer, watcher


def adapter(settings: TrainSettings) -> Any:
    """Return PEFT's configuration with the head trained whole; None for `method: full`."""
    lora = training.adapter(settings)
    return lora and replace(lora, modules_to_save=[HEAD], exclude_modules=[HEAD])


def save(
    trainer: Any, tokenizer: Any, settings: RewardModelSettings, folder: str | Path, rows: Sequence[dict[str, Any]]
) -> None:
    """Write the model with its head, adapters merged, and the scale of its rewards on some pairs."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    merged.config.pad_token_id = None  # others' code then takes one sequence at a time, and its last token
    save_model(merged, tokenizer, folder, dithered=training.must_dither(trainer, settings))
    merged.eval()
    write_scale(folder, raw_rewards(merged, [row[side] for row in rows for side in ("chosen_ids", "rejected_ids")]))


def accuracies(ranked: Sequence[float], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the accuracy by source: to tell a person's answer from a model's is easier than to rank two of a model."""
    found: dict[str, list[tuple[float, str]]] = {}
    for right, row in zip(ranked, rows, strict=True):
        found.setdefault(row["source"], []).append((right, row["group"]))
    return {
        source: mean_interval([right for right, _ in some], clusters=[group for _, group in some]).model_dump()
        for source, some in sorted(found.items())
    }


def rank(model: RewardModel, rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Return for each pair whether its chosen answer has the higher reward (1 or 0), and by how much."""
    sides = [raw_rewards(model.model, [row[side] for row in rows]) for side in ("chosen_ids", "rejected_ids")]
    margins = [(good - bad) / model.deviation for good, bad in zip(*sides, strict=True)]
    return [float(margin > 0) for margin in margins], margins
