"""Contrastive fine-tuning of an encoder: InfoNCE (van den Oord et al. 2018, arXiv:1807.03748).

Negatives are the other passages of a step, and hard ones by BM25 (Karpukhin et al. 2020, arXiv:2004.04906).
A step's passages are those that its questions ask for and their hard negatives, each text once. So a passage that two
questions ask for is right for both and never counted as wrong for one of them, and a hard negative of one question that
is another's right passage is one column of the scores, not two.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from ..contracts.artifacts import read_manifest
from ..contracts.errors import DataError, RecipeError
from ..contracts.recipe import EmbeddingSettings
from ..contracts.rows import Example, read_rows
from ..shared import training
from ..shared.embed import Encoding, keep_layers, pad, pool, text_ids, write_encoding
from ..shared.llama import is_supported
from ..shared.packing import use_tree_attention
from ..shared.retrieval import bm25, nearest, passage, question
from ..shared.summary import write_summary
from ..shared.tasks.retrieval import normalise

NAMES = {"loss": "loss", "learning_rate": "learning_rate", "accuracy": "accuracy"}


def fine_tune(
    settings: EmbeddingSettings, task: str, seed: int, base: str, data: str, output: str, summary: Any
) -> None:
    """Choose hard negatives, train, save, check that it had an effect, and tell."""
    started = time.monotonic()
    parents = {"base": read_manifest(base, "model"), "data": read_manifest(data, "splits")}
    model, tokenizer = training.load_trainable(base, settings)
    encoding = encoding_of(settings, model)
    keep_layers(model, encoding.layers)
    asked, dropped = tokenize(read_rows(Path(data) / "sft.parquet", Example), tokenizer, settings, encoding)
    rows = asked.with_negatives(hard_negatives(asked, settings.hard_negatives))
    trainer, watcher = make_trainer(model, tokenizer, rows, asked.passage_ids, settings, seed)
    training.train(trainer, watcher)
    write_encoding(output, encoding)
    training.save(trainer, tokenizer, settings, output, parents["base"], {"stage": "embedding", "task": task})
    points = training.curve(trainer, NAMES)
    first, last = training.loss_ends(points)
    effect = training.check_effect(
        training.weight_change(base, output),
        points,
        training.loss_fell(points, "look for questions whose passage is not theirs"),
    )
    told = training.summary(
        "train_embedding",
        f"InfoNCE on {len(rows)} questions about {len(asked.passages)} passages: loss {first:.3g} → {last:.3g} "
        f"in {len(points)} steps",
        points,
        effect,
        examples=len(rows),
        tokens=sum(map(len, asked.question_ids)) + sum(map(len, asked.passage_ids)),
        dropped=dropped,
        metrics={"passages": float(len(asked.passages))},
    )
    write_summary(summary, told, seconds=time.monotonic() - started, parents=parents)


def encoding_of(settings: EmbeddingSettings, model: Any) -> Encoding:
    """Return how a model is to be used as an encoder.

    Raises:
        RecipeError: The model has fewer layers than the recipe keeps.
    """
    config = model.config
    if settings.layers > config.num_hidden_layers:
        raise RecipeError(
            f"the model has {config.num_hidden_layers} layers", where=f"embedding.layers: {settings.layers}"
        )
    return Encoding(
        pooling=settings.pooling,
        query_prefix=settings.query_prefix,
        lowercase=settings.lowercase,
        layers=settings.layers or config.num_hidden_layers,
        dimensions=config.hidden_size,
    )


@dataclass(frozen=True)
class Asked:
    """Questions, and the passages that answer them: each passage once, however many questions it answers."""

    questions: list[str]
    """With their prefix."""
    question_ids: list[list[int]]
    passages: list[str]
    passage_ids: list[list[int]]
    right: list[int]
    """Of each question the place of its passage."""

    def with_negatives(self, negatives: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """Return the training rows: a question's tokens, and the places of its passage and of its hard negatives."""
        return [
            {"question": ids, "passage": right, "negatives": list(wrong)}
            for ids, right, wrong in zip(self.question_ids, self.right, negatives, strict=True)
        ]


def tokenize(
    examples: Sequence[Example], tokenizer: Any, settings: EmbeddingSettings, encoding: Encoding
) -> tuple[Asked, dict[str, int]]:
    """Return what is asked, and how many rows were too long.

    Raises:
        DataError: Fewer rows are left than one step needs.
    """
    texts: dict[str, tuple[int, str, list[int]]] = {}
    questions, question_ids, right = [], [], []
    for example in examples:
        text, asked = passage(example), settings.query_prefix + question(example)
        ids, passage_ids = (text_ids(tokenizer, one, encoding) for one in (asked, text))
        if max(len(ids), len(passage_ids)) <= settings.max_tokens:
            place, _, _ = texts.setdefault(normalise(text), (len(texts), text, passage_ids))
            questions.append(asked)
            question_ids.append(ids)
            right.append(place)
    if len(questions) < settings.batch_size:
        raise DataError(
            f"{len(questions)} of {len(examples)} rows fit into {settings.max_tokens} tokens; a step takes "
            f"{settings.batch_size}",
            where="sft split",
            fix="give more rows, or lower embedding.batch_size or raise embedding.max_tokens",
        )
    passages, ids_of = [text for _, text, _ in texts.values()], [ids for _, _, ids in texts.values()]
    return Asked(questions, question_ids, passages, ids_of, right), {"too_long": len(examples) - len(questions)}


def hard_negatives(asked: Asked, count: int) -> list[list[int]]:
    """Return for each question the places of the passages that share most of its words, its own left out."""
    scores = bm25(asked.questions, asked.passages)
    scores[range(len(asked.right)), asked.right] = -np.inf
    return [list(map(int, row)) for row in nearest(scores, min(count, len(asked.passages) - 1))]


def info_nce(questions: Tensor, passages: Tensor, right: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the loss, −log softmax(cosine / temperature) of the right passage, and the share ranked first; scalars.

    Args:
        questions: [questions, dimensions], of length 1.
        passages: [passages, dimensions], of length 1; no two are the same text.
        right: [questions], the place of each one's passage.
        temperature: Above 0.
    """
    scores = questions @ passages.T / temperature
    first = (scores.argmax(1) == right).float().mean()
    return functional.cross_entropy(scores, right), first


@dataclass(frozen=True)
class Collator:
    """Makes a step's batch: its questions, then every passage they need, each once.

    Args:
        passage_ids: Tokens of all passages.
        padding: Token that fills up.
    """

    passage_ids: Sequence[list[int]]
    padding: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` [questions + passages, tokens], and `right` [questions]."""
        wanted = dict.fromkeys([row["passage"] for row in rows] + [place for row in rows for place in row["negatives"]])
        column = {place: number for number, place in enumerate(wanted)}
        tokens, mask = pad([row["question"] for row in rows] + [self.passage_ids[p] for p in wanted], self.padding)
        right = torch.tensor([column[row["passage"]] for row in rows])
        return {"input_ids": tokens, "attention_mask": mask, "right": right}


class ContrastiveTrainer(Trainer):  # type: ignore[misc]
    """transformers' trainer with InfoNCE over the batches of `Collator`."""

    settings: EmbeddingSettings
    accuracy = 0.0

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *positional: Any, **named: Any) -> Tensor:
        """Return the loss of one step's questions."""
        right = inputs["right"]
        vectors = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss, first = info_nce(vectors[: len(right)], vectors[len(right) :], right, self.settings.temperature)
        self.accuracy = float(first)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the share of a step's questions whose passage is nearest of the step's."""
        super().log(logs | {"accuracy": self.accuracy} if "loss" in logs else logs, start_time)


def make_trainer(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    passage_ids: list[list[int]],
    settings: EmbeddingSettings,
    seed: int,
) -> tuple[ContrastiveTrainer, training.Watcher]:
    """Return the trainer on tokenised rows and the watcher on it."""
    if config := training.adapter(settings):
        from peft import get_peft_model

        model = get_peft_model(model, config)
    watcher = training.Watcher(["loss", "accuracy"])
    trainer = ContrastiveTrainer(
        model=model,
        args=TrainingArguments(
            **training.arguments(settings, seed, remove_unused_columns=False, dataloader_drop_last=True)
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=Collator(passage_ids, tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[watcher],
    )
    trainer.settings = settings
    _give_vectors(model, settings.pooling)
    return trainer, watcher


def _give_vectors(model: Any, pooling: str) -> None:
    """Let a causal language model return its texts' vectors [texts, dimensions] in place of logits.

    It is the model's own `forward`, so that what wraps it (adapters, autocast, several processes) stays around it.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if is_supported(plain):
        use_tree_attention(plain)

    def forward(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        states, place = training.hidden_states(plain, input_ids, attention_mask, use_cache=False)
        return pool(states[place], attention_mask, pooling)

    plain.forward = forward
