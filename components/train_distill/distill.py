"""Distillation with TRL's SFT trainer: the teacher's answers as targets, or its distributions beside them.

TRL's own `DistillationTrainer` samples from the student at every step and has no state for what it has sampled; here
the answers are fixed before the first step, so that a killed run goes on as if it had not been.

The teacher's logits are computed in the same step, without gradient and only where there is an answer: a batch of them
is in memory at once. Kept on disk they would have to be cut to the likeliest tokens, 49,152 to a place otherwise, and
the reverse divergence and Jensen–Shannon's look at the rest too.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from trl import SFTConfig, SFTTrainer

from ..contracts.artifacts import read_manifest
from ..contracts.errors import DataError, ModelError
from ..contracts.recipe import DistillSettings
from ..contracts.rows import Example, read_rows
from ..runtime.context import work_folder
from ..shared import training
from ..shared.chat import completion_ids, prompt_ids
from ..shared.generate import Generation, kept_responses, load_generator
from ..shared.models import load_model, load_tokenizer
from ..shared.summary import write_summary
from ..shared.tasks.task import get_task
from . import losses

NAMES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "mean_token_accuracy": "token_accuracy",
    "divergence": "divergence",
}
Answers = list[tuple[Example, list[int]]]
"""An example of which the prompt counts, and the student's tokens of an answer to it, with the end."""


class LogitTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's SFT trainer with the teacher's distributions in the loss."""

    def __init__(self, settings: DistillSettings, teacher: Any, **named: Any) -> None:
        self.settings = settings
        super().__init__(**named)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        training.score_answers_only(self, model=self.teacher)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return weight · divergence + (1 − weight) · cross-entropy, both averaged over the answers' tokens."""
        wanted = inputs["labels"][:, 1:]
        wanted = wanted[wanted != training.IGNORED]
        ours = training.answer_logits(self, model, inputs)
        with torch.no_grad(), self.accelerator.autocast():
            theirs = training.answer_logits(self, self.teacher, inputs)
        apart = losses.divergence(ours, theirs, self.settings.divergence, self.settings.temperature)
        surprise = functional.cross_entropy(ours, wanted, reduction="none")
        count = len(wanted) if num_items_in_batch is None else num_items_in_batch
        loss = (self.settings.weight * apart + (1 - self.settings.weight) * surprise).sum() / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is of all ranks, and their gradients are averaged
        told = {"divergence": apart.detach(), "mean_token_accuracy": (ours.argmax(-1) == wanted).float()}
        for name, values in told.items():
            self._metrics["train"][name].append(self.accelerator.gather(values.mean()).mean().item())
        return loss


def distill(
    settings: DistillSettings, task: str, seed: int, base: str, teacher: str, data: str, output: str, summary: Any
) -> None:
    """Let the teacher answer, train the student, save it, check that it had an effect, and tell."""
    started = time.monotonic()
    parents = {
        "base": read_manifest(base, "model"),
        "teacher": read_manifest(teacher, "model"),
        "data": read_manifest(data, "splits"),
    }
    examples = [row for split in settings.splits for row in read_rows(Path(data) / f"{split}.parquet", Example)]
    if not examples:
        raise DataError(
            f"the splits {settings.splits} are empty", where="distill.splits", fix="raise their shares in data.shares"
        )
    same = same_vocabulary(base, teacher)
    if settings.kind == "logit":
        check_vocabulary(base, teacher, same)
    answers, dropped = find_answers(settings, task, seed, base, teacher, examples, same)
    model, tokenizer = training.load_trainable(base, settings)
    rows, too_long = tokenize(answers, tokenizer, settings.max_tokens)
    dropped |= too_long
    if not rows:
        raise DataError(
            f"none of the teacher's answers to {len(examples)} prompts can be learned: {dropped}",
            where="distill",
            fix="raise max_new_tokens or max_tokens, take only_right: false, or take a better teacher",
        )
    halved = training.device(settings) == "cuda" and settings.precision == "bf16"
    learned = load_model(teacher, dtype="bfloat16" if halved else "float32") if settings.kind == "logit" else None
    trainer, watcher = make_trainer(model, tokenizer, rows, settings, seed, learned)
    training.train(trainer, watcher)
    training.save(trainer, tokenizer, settings, output, parents["base"], {"stage": "distill", "task": task})
    points = training.curve(trainer, NAMES)
    first, last = training.loss_ends(points)
    effect = training.check_effect(
        training.weight_change(base, output),
        points,
        training.loss_fell(points, "take a teacher that is another model"),
    )
    told = training.summary(
        "train_distill",
        f"Distillation ({settings.kind}) on {len(rows)} answers to {len(examples)} prompts: "
        f"loss {first:.3g} → {last:.3g} in {len(points)} steps",
        points,
        effect,
        examples=len(rows),
        tokens=sum(len(row["input_ids"]) for row in rows),
        dropped=dropped,
        metrics={"prompts": float(len(examples)), **_ends(points, "divergence")},
    )
    write_summary(summary, told, seconds=time.monotonic() - started, parents=parents)


def _ends(points: Sequence[dict[str, float]], name: str) -> dict[str, float]:
    known = [point[name] for point in points if name in point]
    return {f"{name}_first": known[0], f"{name}_last": known[-1]} if known else {}


def same_vocabulary(base: str | Path, teacher: str | Path) -> bool:
    """Return whether both models' tokenizers have the same tokens under the same numbers."""
    one, other = load_tokenizer(base), load_tokenizer(teacher)
    return bool(one.get_vocab() == other.get_vocab() and one.eos_token_id == other.eos_token_id)


def check_vocabulary(base: str | Path, teacher: str | Path, same: bool) -> None:
    """Refuse two models whose distributions are over different things.

    Args:
        base: The student.
        teacher: Its teacher.
        same: Whether their tokenizers agree.

    Raises:
        ModelError: They do not, or one model has more logits than the other.
    """
    from transformers import AutoConfig

    sizes = [AutoConfig.from_pretrained(folder, local_files_only=True).vocab_size for folder in (base, teacher)]
    if not same or sizes[0] != sizes[1]:
        raise ModelError(
            f"teacher and student have different vocabularies ({sizes[1]:,} and {sizes[0]:,} logits), so their "
            "distributions cannot be compared token by token",
            where="distill.teacher",
            fix="take kind: sequence, which passes text on, or a teacher of the student's family",
        )


def find_answers(
    settings: DistillSettings,
    task: str,
    seed: int,
    base: str | Path,
    teacher: str | Path,
    examples: Sequence[Example],
    same: bool,
) -> tuple[Answers, dict[str, int]]:
    """Return the answers to learn from, and how many were left out for each reason.

    Args:
        settings: Whose answers, and which of them.
        task: Verifies them.
        seed: Of the samples.
        base: The student; its tokens are wanted.
        teacher: Is asked.
        examples: Their prompts; their references are looked at by `answers: reference` and `only_right` alone.
        same: Whether both models have one vocabulary: the teacher's tokens are then passed on as they are.
    """
    tokenizer = load_tokenizer(base)
    if settings.answers == "reference":
        return [(example, completion_ids(tokenizer, example.reference)) for example in examples], {}
    generator = load_generator(teacher)
    made = kept_responses(
        generator,
        [prompt_ids(generator.tokenizer, example.prompt) for example in examples],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.sample_temperature,
        samples=settings.samples,
        seed=seed,
        work=work_folder(),
    )
    reward = get_task(task).reward
    answers: Answers = []
    dropped = {"unfinished": 0, "wrong": 0}
    for example, some in zip(examples, made, strict=True):
        for answer in some:
            if not answer.finished:
                dropped["unfinished"] += 1
            elif settings.only_right and reward(answer.text, example.reference, True) < 1:
                dropped["wrong"] += 1
            else:
                answers.append((example, _tokens(answer, tokenizer, same)))
    return answers, dropped


def _tokens(answer: Generation, tokenizer: Any, same: bool) -> list[int]:
    return [*answer.ids[:-1], tokenizer.eos_token_id] if same else completion_ids(tokenizer, answer.text)


def tokenize(answers: Answers, tokenizer: Any, max_tokens: int) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Return rows of `input_ids` and `completion_mask` (1 on the answer and its end), and how many were too long."""
    rows = []
    for example, answer in answers:
        prompt = prompt_ids(tokenizer, example.prompt)
        if len(prompt) + len(answer) <= max_tokens:
            rows.append({"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)})
    return rows, {"too_long": len(answers) - len(rows)}


def make_trainer(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, list[int]]],
    settings: DistillSettings,
    seed: int,
    teacher: Any = None,
) -> tuple[SFTTrainer, training.Watcher]:
    """Return the trainer on tokenised rows, with its labels checked, and the watcher on it.

    Args:
        model: The student.
        tokenizer: Its tokenizer.
        rows: Of `tokenize`.
        settings: The stage's.
        seed: Of the data order.
        teacher: Of `kind: logit`; None trains on the answers alone.
    """
    watcher = training.Watcher(["loss", "mean_token_accuracy", "divergence"])
    named: dict[str, Any] = {
        "model": model,
        "args": SFTConfig(
            **training.arguments(settings, seed), max_length=settings.max_tokens, completion_only_loss=True
        ),
        "train_dataset": Dataset.from_list(rows),
        "processing_class": tokenizer,
        "peft_config": training.adapter(settings),
        "callbacks": [watcher],
    }
    trainer = SFTTrainer(**named) if teacher is None else LogitTrainer(settings, teacher, **named)
    training.check_labels(rows, trainer.train_dataset)
    training.score_answers_only(trainer)
    return trainer, watcher
