"""Preference tuning with TRL's pair trainer: DPO and IPO are its own losses, ORPO, KTO and RPO are in `losses.py`.

The reference model's log-probabilities are computed once, before the first step, so that one model is in memory. The
negative log-likelihood of the chosen answer is added (Pang et al. 2024, arXiv:2404.19733): without it both answers of a
pair can become less likely, and on short structured answers they do.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ..contracts.artifacts import read_manifest
from ..contracts.errors import DataError
from ..contracts.recipe import PreferenceSettings
from ..contracts.rows import PreferencePair, read_rows
from ..shared import training
from ..shared.chat import completion_ids, prompt_ids
from ..shared.holdout import is_held_out
from ..shared.statistics import proportion
from ..shared.summary import write_summary
from . import losses

NAMES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
}
TRL_LOSSES = {"dpo": "sigmoid", "ipo": "ipo"}
RANKED_AT_ONCE = 16
"""Pairs whose answers are scored in one forward pass outside of training."""
Row = dict[str, Any]
"""`prompt_ids`, `chosen_ids`, `rejected_ids`; KTO adds `other_ids`, RPO `prompt_embedding`."""


@dataclass(frozen=True)
class Likelihoods:
    """Log-probabilities of the chosen and the rejected answers [2, pairs]: of all an answer's tokens, and of one."""

    sums: Tensor
    means: Tensor


class Collator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's collator, with what the further losses want beside the pairs."""

    def torch_call(self, examples: list[Row]) -> dict[str, Any]:
        """Return a padded batch: first the chosen answers, then the rejected ones."""
        batch: dict[str, Any] = super().torch_call(examples)
        if "other_ids" in examples[0]:
            twice = [one | {"chosen_ids": one["other_ids"], "rejected_ids": one["other_ids"]} for one in examples]
            other = super().torch_call(twice)
            batch["other"] = {name: other[name][: len(examples)] for name in MODEL_INPUTS}
        for name in ("ref_other_logps", "prompt_embedding"):
            if name in examples[0]:
                batch[name] = torch.tensor([one[name] for one in examples])
        return batch


MODEL_INPUTS = ("input_ids", "attention_mask", "completion_mask")


class PairTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on pairs that are tokenised already, as generation tokenises them, with three further losses."""

    def __init__(self, settings: PreferenceSettings, **named: Any) -> None:
        self.settings = settings
        # TRL hashes all weights, a second a gigabyte, to name a file in a folder that is this process's own.
        with patch.object(dpo_trainer, "hash_module", lambda model: ""):
            super().__init__(**named)

    def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *rest: Any) -> Any:
        training.score_answers_only(self)  # from here on: the reference is scored as the policy will be, and as quickly
        if self.settings.loss == "orpo":
            return dataset
        if "other_ids" not in dataset.column_names:
            return super()._precompute_ref_logps(dataset, *rest)
        others = dataset.map(lambda row: {"chosen_ids": row["other_ids"], "rejected_ids": row["other_ids"]})
        column = super()._precompute_ref_logps(others, *rest)["ref_chosen_logps"]
        return super()._precompute_ref_logps(dataset, *rest).add_column("ref_other_logps", list(column))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        if self.settings.loss in TRL_LOSSES:
            return super()._compute_loss(model, inputs, return_outputs)
        scored, lengths = self.score(model, inputs)
        (chosen, rejected), (tokens, others) = scored.chunk(2), lengths.chunk(2)
        beta, likelihood = self.settings.beta, self.settings.nll_weight * -chosen.sum() / tokens.sum()
        if self.settings.loss == "orpo":
            ratios = chosen / tokens, rejected / others
            loss = losses.orpo(*ratios, beta).mean()
        else:
            ratios = chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"]
            if self.settings.loss == "kto":
                with torch.no_grad():
                    other, _ = self.score(model, inputs["other"])
                per_pair = losses.kto(*ratios, other - inputs["ref_other_logps"], beta)
            else:
                per_pair = losses.rpo(*ratios, inputs["prompt_embedding"], beta, self.settings.distance_temperature)
            loss = per_pair.mean() + likelihood
        margins = beta * (ratios[0] - ratios[1]).detach()
        told = {"rewards/margins": margins, "rewards/accuracies": (margins > 0).float()}
        for name, values in told.items():
            self._metrics["train"][name].append(self.accelerator.gather(values).mean().item())
        return loss

    def score(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each answer and its number of tokens, both [sequences]."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**asked, labels=labels, use_cache=False, fused_lm_head=True)
        return outputs.log_probs.sum(1), inputs["completion_mask"].sum(1)


def tune(settings: PreferenceSettings, task: str, seed: int, base: str, pairs: str, output: str, summary: Any) -> None:
    """Train, save, check that it had an effect, and tell."""
    started = time.monotonic()
    parents = {"base": read_manifest(base, "model"), "pairs": read_manifest(pairs, "pairs")}
    model, tokenizer = training.load_trainable(base, settings)
    every = read_rows(Path(pairs) / "pairs.parquet", PreferencePair)
    kept = [pair for pair in every if not is_held_out(pair.group, settings.holdout)]
    rows, dropped = tokenize(kept, tokenizer, settings.max_tokens)
    apart = [pair for pair in every if is_held_out(pair.group, settings.holdout)]
    unseen = tokenize(apart, tokenizer, settings.max_tokens)[0] if apart else []
    trainer, watcher = make_trainer(model, tokenizer, rows, settings, seed)
    before = likelihoods(trainer, unseen)
    training.train(trainer, watcher)
    held_out = held_out_metrics(before, likelihoods(trainer, unseen))
    training.save(trainer, tokenizer, settings, output, parents["base"], {"stage": "preference", "task": task})
    points = training.curve(trainer, NAMES)
    accuracy, margin = (training.ends(points, name)[1] for name in ("accuracy", "margin"))
    effect = training.check_effect(
        training.weight_change(base, output),
        points,
        {
            "margin_rose": (
                margin > points[0]["margin"],
                "raise learning_rate or max_pairs; look at the pair report for contradictions",
            )
        },
    )
    told = training.summary(
        "train_preference",
        f"{settings.title} on {len(rows)} pairs: in the last steps {accuracy:.0%} are ranked right, margin {margin:.2f}"
        + _held_out_words(held_out),
        points,
        effect,
        examples=len(rows),
        tokens=sum(len(row["prompt_ids"]) * 2 + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows),
        dropped=dropped,
        metrics={"accuracy": accuracy, "margin": margin, **held_out},
    )
    write_summary(summary, told, seconds=time.monotonic() - started, parents=parents)


def tokenize(pairs: list[PreferencePair], tokenizer: Any, max_tokens: int) -> tuple[list[Row], dict[str, int]]:
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
            f"none of the {len(pairs)} pairs fits into {max_tokens} tokens",
            fix="raise preference.max_tokens, or lower preference.holdout",
        )
    return rows, {"too_long": len(pairs) - len(rows)}


def make_trainer(
    model: Any, tokenizer: Any, rows: list[Row], settings: PreferenceSettings, seed: int
) -> tuple[PairTrainer, training.Watcher]:
    """Return the trainer on tokenised pairs and the watcher on it."""
    watcher = training.Watcher(["loss", "rewards/accuracies", "rewards/margins"])
    if settings.loss == "kto":
        rows = [row | {"other_ids": other} for row, other in zip(rows, answers_to_others(rows), strict=True)]
    if settings.loss == "rpo":
        rows = [row | {"prompt_embedding": at} for row, at in zip(rows, embed_prompts(model, rows), strict=True)]
    kinds = [TRL_LOSSES.get(settings.loss, "sigmoid")]
    with_nll = settings.nll_weight > 0
    common = training.arguments(settings, seed)
    arguments = DPOConfig(
        **common,
        max_length=settings.max_tokens,
        beta=settings.beta,
        loss_type=[*kinds, "sft"] if with_nll else kinds,
        loss_weights=[1.0, settings.nll_weight] if with_nll else [1.0],
        precompute_ref_log_probs=True,
        # On a GPU what fits into its memory is the recipe's to say.
        precompute_ref_batch_size=RANKED_AT_ONCE if common["use_cpu"] else None,
        remove_unused_columns=False,
    )
    trainer = PairTrainer(
        settings,
        model=model,
        args=arguments,
        data_collator=Collator(pad_token_id=tokenizer.pad_token_id, max_length=settings.max_tokens),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=training.adapter(settings),
        callbacks=[watcher],
    )
    return trainer, watcher


def answers_to_others(rows: Sequence[Row]) -> list[list[int]]:
    """Return for each prompt the chosen answer of the next prompt that is another one, as KTO's point of reference.

    Raises:
        DataError: All pairs are of one prompt.
    """
    found = []
    for place, row in enumerate(rows):
        after = [*rows[place + 1 :], *rows[:place]]
        other = next((one["chosen_ids"] for one in after if one["prompt_ids"] != row["prompt_ids"]), None)
        if other is None:
            raise DataError("all pairs are of one prompt, and KTO compares with others", fix="take another loss")
        found.append(other)
    return found


def embed_prompts(model: Any, rows: Sequence[Row]) -> list[list[float]]:
    """Return each prompt's mean final hidden state, less the mean of all: without that, all prompts look alike.

    Args:
        model: The model as it comes in.
        rows: With `prompt_ids`.
    """
    means = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["prompt_ids"]], device=model.device)
            means.append(model.base_model(ids, use_cache=False).last_hidden_state[0].float().mean(0))
    every = torch.stack(means)
    return [[float(value) for value in one] for one in every - every.mean(0)]


def likelihoods(trainer: PairTrainer, rows: Sequence[Row]) -> Likelihoods:
    """Return how likely the model finds the answers of some pairs, as it is now."""
    model = trainer.model.eval()
    sums, means = [], []
    with torch.no_grad():
        for start in range(0, len(rows), RANKED_AT_ONCE):
            batch = trainer._prepare_inputs(trainer.data_collator(list(rows[start : start + RANKED_AT_ONCE])))
            scored, lengths = trainer.score(model, batch)
            sums.append(scored.double().view(2, -1))
            means.append((scored / lengths).double().view(2, -1))
    model.train()
    none = torch.zeros(2, 0, dtype=torch.float64)
    return Likelihoods(torch.cat([none, *sums], 1), torch.cat([none, *means], 1))


def held_out_metrics(before: Likelihoods, after: Likelihoods) -> dict[str, float]:
    """Return how the pairs that were not trained on are ranked; nothing if there are none.

    `held_out_reward_accuracy` is the share whose chosen answer has gained more than the rejected one since the training
    began, in log-probability: the implicit reward (Rafailov et al. 2023, section 5), of which an untrained model is
    right for half. `held_out_accuracy` is the share of which a token of the chosen answer is likelier, on average.
    """
    if not after.sums.shape[1]:
        return {}
    gain = after.sums - before.sums
    right = {"held_out_reward_accuracy": gain[0] > gain[1], "held_out_accuracy": after.means[0] > after.means[1]}
    found = {
        "held_out_pairs": float(gain.shape[1]),
        "held_out_accuracy_before": float((before.means[0] > before.means[1]).double().mean()),
    }
    for name, which in right.items():
        interval = proportion(int(which.sum()), len(which))
        found |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return found


def _held_out_words(found: dict[str, float]) -> str:
    if not found:
        return ""
    low, high = found["held_out_reward_accuracy_low"], found["held_out_reward_accuracy_high"]
    return (
        f"; of {found['held_out_pairs']:.0f} held-out pairs {found['held_out_reward_accuracy']:.0%} gained in the "
        f"right direction ({low:.0%}–{high:.0%}), ranked right {found['held_out_accuracy_before']:.0%} → "
        f"{found['held_out_accuracy']:.0%}"
    )
