"""Continued pre-training with TRL's SFT trainer on blocks of text, and the step's own gate on perplexity."""

import shutil
import time
from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ..contracts.artifacts import Manifest, digest_of, link_tree, read_manifest
from ..contracts.errors import DataError
from ..contracts.metrics import Summary
from ..contracts.recipe import PretrainSettings
from ..contracts.rows import Example, read_table
from ..runtime.context import work_folder
from ..shared import training
from ..shared.contamination import EVALUATION, contaminated
from ..shared.generate import kept_responses, load_generator
from ..shared.models import load_model, load_tokenizer
from ..shared.statistics import Interval
from ..shared.summary import write_summary
from . import corpus as texts
from .perplexity import Measured, Verdict, decide, log_perplexities

METRIC = "log_perplexity"
"""What the verdict compares; not one of the task's metrics."""


def pretrain(
    settings: PretrainSettings,
    task: str,
    seed: int,
    base: str,
    corpus: str,
    general: str | None,
    output: str,
    summary: Any,
    verdict: Any,
    data: str | None = None,
) -> None:
    """Train, measure both models, write the better one, and tell."""
    started = time.monotonic()
    parents = {"base": read_manifest(base, "model")}
    documents, repeats = texts.read_documents(corpus)
    seen = 0
    if data:
        parents["data"] = read_manifest(data, "splits")
        documents, seen = without_held_out(documents, data)
    learned, apart = texts.split(documents, settings.holdout)
    apart = enough(apart[: settings.max_held_out], settings, "corpus", "holdout")
    model, tokenizer = training.load_trainable(base, settings)
    rows = make_rows(learned, tokenizer, settings.max_tokens)
    trainer, watcher = make_trainer(model, tokenizer, rows, settings, seed)
    training.train(trainer, watcher)
    facts = {"stage": "pretrain", "task": task, "corpus": digest_of(documents)}
    training.save(trainer, tokenizer, settings, output, parents["base"], facts)
    points = training.curve(
        trainer, {"loss": "loss", "learning_rate": "learning_rate", "mean_token_accuracy": "token_accuracy"}
    )
    effect = training.check_effect(training.weight_change(base, output), points, {})
    del trainer, model
    domain = measure(base, output, texts.sequences(apart, tokenizer), settings)
    other = measure(base, output, general_text(settings, seed, base, general), settings)
    choice = decide(domain, other, settings.max_general_rise, settings.confidence)
    if not choice.kept:
        shutil.rmtree(output)
        link_tree(base, output)
    tell_verdict(verdict, choice, domain, other, parents)
    before, after = domain.perplexities
    told = training.summary(
        "train_pretrain",
        f"Continued pre-training on {len(learned)} documents: {choice.reason}",
        points,
        effect,
        examples=len(rows),
        tokens=sum(len(row["input_ids"]) for row in rows),
        dropped={"repeated_documents": repeats, "contaminated_documents": seen},
        metrics={
            "documents": float(len(learned)),
            "domain_perplexity_before": before,
            "domain_perplexity": after,
            "general_rise": exp(choice.general.mean),
            "general_rise_high": exp(choice.general.high),
            "kept": float(choice.kept),
        },
    )
    write_summary(summary, told, seconds=time.monotonic() - started, parents=parents)


def without_held_out(documents: Sequence[str], data: str) -> tuple[list[str], int]:
    """Return the documents that hold no validation or test row, and how many do.

    Args:
        documents: Of the corpus.
        data: Folder of the splits.
    """
    held = {name: read_table(Path(data) / f"{name}.parquet", Example) for name in EVALUATION}
    kept = [one for one, seen in zip(documents, contaminated(documents, held), strict=True) if not seen]
    return kept, len(documents) - len(kept)


def enough(documents: Sequence[Any], settings: PretrainSettings, where: str, setting: str) -> list[Any]:
    """Return the documents if there are enough of them to decide anything.

    Args:
        documents: That are to be measured.
        settings: Say how many are enough.
        where: The corpus that they come from.
        setting: What to raise.

    Raises:
        DataError: There are not.
    """
    if len(documents) < settings.min_held_out:
        raise DataError(
            f"{len(documents)} documents to measure, and {settings.min_held_out} are wanted",
            where=f"pretrain.{where}",
            fix=f"give more documents, raise {setting}, or lower min_held_out",
        )
    return list(documents)


def make_rows(documents: Sequence[str], tokenizer: Any, size: int) -> list[dict[str, list[int]]]:
    """Return blocks as rows of `input_ids` and `completion_mask`, which is 1 everywhere.

    Raises:
        DataError: No document is left to train on.
    """
    if not documents:
        raise DataError("no document is left to train on", where="pretrain.corpus", fix="give more, or lower holdout")
    made = texts.blocks(texts.sequences(documents, tokenizer), size)
    return [{"input_ids": block, "completion_mask": [1] * len(block)} for block in made]


def make_trainer(
    model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], settings: PretrainSettings, seed: int
) -> tuple[SFTTrainer, training.Watcher]:
    """Return TRL's trainer on blocks, with its labels checked, and the watcher on it."""
    watcher = training.Watcher(["loss", "mean_token_accuracy"])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**training.arguments(settings, seed), max_length=settings.max_tokens, completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=training.adapter(settings),
        callbacks=[watcher],
    )
    training.check_labels(rows, trainer.train_dataset)
    training.score_answers_only(trainer)
    return trainer, watcher


def general_text(settings: PretrainSettings, seed: int, base: str, given: str | None) -> list[list[int]]:
    """Return token sequences of no domain: the user's text, or what the base model writes when it is given nothing.

    On its own samples the base model's cross-entropy is an estimate of its entropy, and what the tuned model's is
    above it estimates KL(base‖tuned), per token: it shows any drift, not whether the drift is for the worse.
    """
    tokenizer = load_tokenizer(base)
    if given is not None:
        documents, _ = texts.read_documents(given)
        _, ordered = texts.split(documents, 1.0)
        return texts.sequences(enough(ordered[: settings.max_held_out], settings, "general", "max_held_out"), tokenizer)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    [samples] = kept_responses(
        load_generator(base),
        [[start]],
        max_new_tokens=settings.general_tokens,
        temperature=1.0,
        samples=settings.max_held_out,
        seed=seed,
        work=work_folder(),
    )
    return [[start, *sample.ids] for sample in samples]


def measure(base: str | Path, tuned: str | Path, documents: list[list[int]], settings: PretrainSettings) -> Measured:
    """Return both models' log-perplexity on each document, in fp32, by the weights as they are saved."""
    place = training.device(settings)
    before, after = (
        log_perplexities(load_model(folder, device=place), documents, settings.max_tokens, "documents")
        for folder in (base, tuned)
    )
    return Measured(before, after)


def tell_verdict(
    output: Any, verdict: Verdict, domain: Measured, general: Measured, parents: dict[str, Manifest]
) -> None:
    """Write the verdict as `select_model` writes a choice, so that the report shows both alike."""
    chosen = "challenger" if verdict.kept else "incumbent"
    (domain_before, domain_after), (general_before, general_after) = domain.perplexities, general.perplexities
    told = Summary(
        step="select_pretrain",
        headline=f"{chosen}: {verdict.reason}",
        metrics={"challenger_won": float(verdict.kept), "difference": verdict.domain.mean},
        details={
            "chosen": chosen,
            "metric": METRIC,
            "incumbent": {"domain_perplexity": domain_before, "general_perplexity": general_before},
            "challenger": {"domain_perplexity": domain_after, "general_perplexity": general_after},
            "difference": _ends(verdict.domain),
            "general_difference": _ends(verdict.general),
            "reason": verdict.reason,
        },
    )
    write_summary(output, told, parents=parents)


def _ends(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}
