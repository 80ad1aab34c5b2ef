"""Direct preference optimization with TRL (Rafailov et al. 2023, arXiv:2305.18290).

The reference model's log-probabilities are computed once, before the first step, so that one model is in memory. The
loss adds the chosen answer's negative log-likelihood (Pang et al. 2024, arXiv:2404.19733): without it both answers of a
pair can become less likely, and on short structured answers they do.
"""

import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from ..contracts.artifacts import read_manifest
from ..contracts.errors import DataError
from ..contracts.recipe import PreferenceSettings
from ..contracts.rows import PreferencePair, read_rows
from ..shared import training
from ..shared.chat import completion_ids, prompt_ids
from ..shared.summary import write_summary

NAMES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
}


class PairTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on pairs that are tokenised already, as generation tokenises them."""

    def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *positional: Any) -> Any:
        training.score_answers_only(self)  # from here on: the reference is scored as the policy will be, and as quickly
        return super()._precompute_ref_logps(*positional)


def tune(settings: PreferenceSettings, task: str, seed: int, base: str, pairs: str, output: str, summary: Any) -> None:
    """Train, save, check that it had an effect, and tell."""
    started = time.monotonic()
    parents = {"base": read_manifest(base, "model"), "pairs": read_manifest(pairs, "pairs")}
    model, tokenizer = training.load_trainable(base, settings)
    rows, dropped = tokenize(read_rows(Path(pairs) / "pairs.parquet", PreferencePair), tokenizer, settings.max_tokens)
    trainer, watcher = make_trainer(model, tokenizer, rows, settings, seed)
    training.train(trainer, watcher)
    training.save(trainer, tokenizer, output, parents["base"], {"stage": "preference", "task": task})
    points = training.curve(trainer, NAMES)
    accuracy, margin = _last(points, "accuracy"), _last(points, "margin")
    effect = training.check_effect(
        training.weight_change(base, output),
        points,
        {"margin_moved": (margin > 0, "raise learning_rate or max_pairs; look at the pair report for contradictions")},
    )
    told = training.summary(
        "train_preference",
        f"DPO on {len(rows)} pairs: in the last steps {accuracy:.0%} are ranked right, margin {margin:.2f}",
        points,
        effect,
        examples=len(rows),
        tokens=sum(len(row["prompt_ids"]) * 2 + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows),
        dropped=dropped,
        metrics={"accuracy": accuracy, "margin": margin},
    )
    write_summary(summary, told, seconds=time.monotonic() - started, parents=parents)


def tokenize(
    pairs: list[PreferencePair], tokenizer: Any, max_tokens: int
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Return rows of `prompt_ids`, `chosen_ids`, `rejected_ids`, and how many were too long.

    Raises:
        DataError: None is left.
    """
    rows = []
    for pair in pairs:
        row = {
            "prompt_ids": prompt_ids(tokenizer, pair.prompt),
            "chosen_ids": completion_ids(tokenizer, pair.chosen),
            "rejected_ids": completion_ids(tokenizer, pair.rejected),
        }
        if len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= max_tokens:
            rows.append(row)
    if not rows:
        raise DataError(
            f"none of the {len(pairs)} pairs fits into {max_tokens} tokens", fix="raise preference.max_tokens"
        )
    return rows, {"too_long": len(pairs) - len(rows)}


def make_trainer(
    model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], settings: PreferenceSettings, seed: int
) -> tuple[PairTrainer, training.Watcher]:
    """Return TRL's trainer on tokenised pairs and the watcher on it."""
    watcher = training.Watcher(["loss", "rewards/accuracies", "rewards/margins"])
    with_nll = settings.nll_weight > 0
    trainer = PairTrainer(
        model=model,
        args=DPOConfig(
            **training.arguments(settings, seed),
            max_length=settings.max_tokens,
            beta=settings.beta,
            loss_type=["sigmoid", "sft"] if with_nll else ["sigmoid"],
            loss_weights=[1.0, settings.nll_weight] if with_nll else [1.0],
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=training.adapter(settings),
        callbacks=[watcher],
    )
    return trainer, watcher


def _last(points: list[dict[str, float]], name: str) -> float:
    """Return the mean of a number over the last quarter of the steps."""
    values = [point[name] for point in points if name in point]
    kept = values[-max(1, len(values) // 4) :]
    return sum(kept) / len(kept)
