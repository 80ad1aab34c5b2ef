"""Supervised fine-tuning with TRL; the loss is on the assistant's tokens and on no other."""

import time
from math import ceil
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ..contracts.artifacts import read_manifest
from ..contracts.errors import DataError
from ..contracts.recipe import SFTSettings
from ..contracts.rows import Example, read_rows
from ..shared import training
from ..shared.chat import completion_ids, prompt_ids
from ..shared.measure import first_rows
from ..shared.summary import write_summary


def fine_tune(settings: SFTSettings, task: str, seed: int, base: str, data: str, output: str, summary: Any) -> None:
    """Train, save, check that it had an effect, and tell."""
    started = time.monotonic()
    parents = {"base": read_manifest(base, "model"), "data": read_manifest(data, "splits")}
    model, tokenizer = training.load_trainable(base, settings)
    examples = read_rows(Path(data) / "sft.parquet", Example)
    if settings.share < 1:
        examples = first_rows(examples, ceil(settings.share * len(examples)))
    rows, dropped = tokenize(examples, tokenizer, settings.max_tokens)
    trainer, watcher = make_trainer(model, tokenizer, rows, settings, seed)
    training.train(trainer, watcher)
    training.save(trainer, tokenizer, settings, output, parents["base"], {"stage": "sft", "task": task})
    points = training.curve(
        trainer, {"loss": "loss", "learning_rate": "learning_rate", "mean_token_accuracy": "token_accuracy"}
    )
    first, last = training.loss_ends(points)
    effect = training.check_effect(
        training.weight_change(base, output),
        points,
        training.loss_fell(points, "look at the data for contradictions"),
    )
    told = training.summary(
        "train_sft",
        f"SFT on {len(rows)} examples: loss {first:.3g} → {last:.3g} in {len(points)} steps",
        points,
        effect,
        examples=len(rows),
        tokens=sum(len(row["input_ids"]) for row in rows),
        dropped=dropped,
    )
    write_summary(summary, told, seconds=time.monotonic() - started, parents=parents)


def tokenize(
    examples: list[Example], tokenizer: Any, max_tokens: int
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Return rows of `input_ids` and `completion_mask` (1 on the answer and its end), and how many were too long.

    Raises:
        DataError: None is left.
    """
    rows = []
    for example in examples:
        prompt = prompt_ids(tokenizer, example.prompt)
        answer = completion_ids(tokenizer, example.reference)
        if len(prompt) + len(answer) <= max_tokens:
            rows.append({"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)})
    if not rows:
        raise DataError(
            f"none of the {len(examples)} examples fits into {max_tokens} tokens",
            where="sft split",
            fix="raise sft.max_tokens, or give the split a share of the data",
        )
    return rows, {"too_long": len(examples) - len(rows)}


def make_trainer(
    model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], settings: SFTSettings, seed: int
) -> tuple[SFTTrainer, training.Watcher]:
    """Return TRL's trainer on tokenised rows, with its labels checked, and the watcher on it."""
    watcher = training.Watcher(["loss", "mean_token_accuracy"])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **training.arguments(settings, seed),
            max_length=settings.max_tokens,
            completion_only_loss=True,
            packing=settings.packing,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=training.adapter(settings),
        callbacks=[watcher],
    )
    if not settings.packing:
        training.check_labels(rows, trainer.train_dataset)
    training.score_answers_only(trainer)
    return trainer, watcher
