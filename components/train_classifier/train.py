"""From splits to a model that answers with labels: probe, choose, extract, fit, calibrate, check, save.

Which layer and which pooling tell the labels apart differs from task to task (Alain and Bengio 2016, arXiv:1610.01644).
So the first shards are extracted at several layers and the choice is made there, by cross-validation; all other rows
are read no deeper than the deepest chosen one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..contracts.artifacts import Manifest, link_tree, seal
from ..contracts.errors import DataError, TrainingError
from ..contracts.metrics import Summary
from ..contracts.recipe import ClassifierSettings
from ..runtime.context import work_folder
from ..shared.classifier import SETTINGS, Head, save_head
from ..shared.features import Features
from ..shared.generate import arithmetic
from ..shared.models import load_model, load_tokenizer, set_threads
from .extract import Extracted, Shard, Source, extract, find_labels
from .fit import Fit, find_temperature, fit, likelihood

POOLINGS = (["last"], ["mean"], ["mean", "max"])
"""Candidates, from narrow to wide."""
DEPTHS = (1 / 3, 1 / 2, 2 / 3, 5 / 6)
"""Candidate layers as shares of the model's, where the recipe names none."""


@dataclass(frozen=True)
class Candidate:
    """What features, and how strongly their weights are held down; with what that reached on held-out folds."""

    layers: list[int]
    pooling: list[str]
    l2: float
    nll: float
    """Mean negative log-likelihood, in nats."""
    accuracy: float


def train(
    settings: ClassifierSettings,
    task: str,
    seed: int,
    base: str,
    data: str,
    output: str,
    parents: dict[str, Manifest],
) -> Summary:
    """Train, check, save, and return what there is to tell.

    Args:
        settings: The stage's section of the recipe.
        task: Kept in the metadata.
        seed: Of the folds.
        base: Model folder.
        data: Folder of the splits.
        output: Model folder to write.
        parents: Manifests of `base` and `data`.

    Raises:
        DataError: The rows are no rows of a classification.
        TrainingError: The base is a classifier, or the features tell nothing.
    """
    if (Path(base) / SETTINGS).is_file():
        raise TrainingError("the base model is a classifier already", where=base, fix="give a language model")
    set_threads()
    path, folder = Path(data) / "sft.parquet", work_folder() / "features"
    counts = find_labels(path, settings.folds)
    tokenizer = load_tokenizer(base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(base, dtype=arithmetic(), device=device)
    source = Source(path, tokenizer, list(counts), seed, settings.max_tokens, settings.shard_rows)
    rubric = source.rubric()
    layers = candidate_layers(settings.layers, model.config.num_hidden_layers)
    probes = math.ceil(settings.probe_rows / settings.shard_rows)
    dtype = getattr(torch, arithmetic())
    probe = extract(source, Features(model, layers, rubric, dtype), folder, end=probes)
    candidates = compare(probe.shards, layers, settings, len(counts))
    best = candidates[0]
    features = Features(model, best.layers, rubric, dtype)
    rest = extract(source, features, folder, start=probes)
    held = extract(replace(source, path=path.with_name("validation.parquet")), features, folder)
    shards = [*probe.shards, *rest.shards]
    fitted = fit(
        lambda: (shard.read(best.layers, best.pooling) for shard in shards), len(counts), best.l2, settings.iterations
    )
    logits, wanted = validation(held, fitted, best)
    temperature = find_temperature(logits, wanted)
    head = Head(list(counts), best.layers, best.pooling, rubric, temperature, fitted.weights, fitted.bias)
    effect = check_effect(fitted, best, counts)
    link_tree(base, output)
    save_head(head, output)
    kept = {k: v for k, v in parents["base"].metadata.items() if k in ("reference", "parameters", "chat_template")}
    seal(output, "model", parents=parents, metadata={**kept, "stage": "classifier", "task": task})
    return tell(counts, [probe, rest, held], candidates, fitted, temperature, (logits, wanted), effect)


def candidate_layers(given: Sequence[int], depth: int) -> list[int]:
    """Return the layers to try.

    Args:
        given: By the recipe; none means those at `DEPTHS`.
        depth: Layers of the model.

    Raises:
        TrainingError: One is not between the first and the last but one (the last one's states are the next token's).
    """
    wrong = [layer for layer in given if not 1 <= layer < depth]
    if wrong:
        raise TrainingError(
            f"layer {wrong[0]} is not one of 1 to {depth - 1} of this model",
            where="classifier.layers",
            fix="name others, or none: then some are tried",
        )
    return sorted(set(given)) or sorted({min(max(round(depth * share), 1), depth - 1) for share in DEPTHS})


def compare(
    shards: Sequence[Shard], layers: Sequence[int], settings: ClassifierSettings, labels: int
) -> list[Candidate]:
    """Return candidates by cross-validation, the best (least negative log-likelihood) first.

    Layers (each alone, and all side by side) and poolings are compared at the middle penalty, and then the penalties at
    the best of these.
    """
    if not shards:
        raise DataError(
            "no row fits into the limit of tokens",
            where="classifier.max_tokens",
            fix="raise it, or shorten the prompts",
        )
    folds = torch.cat([shard.folds() for shard in shards]) % settings.folds
    middle = settings.l2[len(settings.l2) // 2]
    joined = [list(layers)] if len(layers) > 1 else []
    places = [
        _validated(shards, folds, some, pooling, middle, settings, labels)
        for some in [*([layer] for layer in layers), *joined]
        for pooling in POOLINGS
    ]
    best = min(places, key=lambda one: one.nll)
    others = [
        _validated(shards, folds, best.layers, best.pooling, l2, settings, labels) for l2 in settings.l2 if l2 != middle
    ]
    return sorted([*places, *others], key=lambda one: one.nll)


def _validated(
    shards: Sequence[Shard],
    folds: Tensor,
    layers: list[int],
    pooling: list[str],
    l2: float,
    settings: ClassifierSettings,
    labels: int,
) -> Candidate:
    read = [shard.read(layers, pooling) for shard in shards]
    features, wanted = torch.cat([one for one, _ in read]), torch.cat([one for _, one in read])
    loss = right = 0.0
    for fold in range(settings.folds):
        inside = folds != fold
        if inside.all() or not inside.any():
            continue
        block = [(features[inside], wanted[inside])]
        fitted = fit(lambda block=block: block, labels, l2, settings.iterations)  # type: ignore[misc]
        logits = fitted.logits(features[~inside])
        loss += likelihood(logits, wanted[~inside]) * len(logits)
        right += float((logits.argmax(-1) == wanted[~inside]).sum())
    return Candidate(layers, pooling, l2, loss / len(wanted), right / len(wanted))


def validation(held: Extracted, fitted: Fit, best: Candidate) -> tuple[Tensor, Tensor]:
    """Return logits and label numbers of the validation split.

    Raises:
        DataError: It has no row with a label of the training rows.
    """
    read = [shard.read(best.layers, best.pooling) for shard in held.shards]
    if not sum(len(wanted) for _, wanted in read):
        raise DataError(
            "there is no row with a label that the sft split has, so the classifier cannot be calibrated",
            where="validation.parquet",
            fix="raise its share in data.shares",
        )
    return torch.cat([fitted.logits(features) for features, _ in read]), torch.cat([wanted for _, wanted in read])


def check_effect(fitted: Fit, best: Candidate, counts: dict[str, int]) -> dict[str, Any]:
    """Return the effect check, or fail the step: a classifier that knows no more than the labels' shares is none.

    Raises:
        TrainingError: One of the checks does not hold.
    """
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    checks = {
        "finite": bool(torch.isfinite(fitted.weights).all() and math.isfinite(best.nll)),
        "better_than_shares": best.nll < entropy,
    }
    for name, holds in checks.items():
        if not holds:
            raise TrainingError(
                f"nothing was learned: the check {name!r} failed (held-out loss {best.nll:.3g} nats, "
                f"the labels' shares alone {entropy:.3g})",
                fix="give more rows, other layers or a stronger l2; look at whether the prompt tells the label at all",
            )
    return {"ok": True, "checks": checks}


def tell(
    counts: dict[str, int],
    parts: Sequence[Extracted],
    candidates: Sequence[Candidate],
    fitted: Fit,
    temperature: float,
    held: tuple[Tensor, Tensor],
    effect: dict[str, Any],
) -> Summary:
    """Return the step's summary."""
    logits, wanted = held
    best, curve = candidates[0], fitted.objective
    right = float((logits.argmax(-1) == wanted).double().mean())
    before, after = likelihood(logits, wanted), likelihood(logits, wanted, temperature)
    dropped = {
        "too_long": sum(part.too_long for part in parts),
        "unknown_label": sum(part.unknown for part in parts),
    }
    examples = sum(counts.values()) - parts[0].too_long - parts[1].too_long
    return Summary(
        step="train_classifier",
        headline=f"{len(counts)} labels from layer {_words(best.layers)}, {_words(best.pooling)}: {right:.3f} right on "
        f"{len(wanted)} validation rows; temperature {temperature:.2f}, loss {before:.3f} → {after:.3f} nats",
        metrics={
            "loss_first": curve[0],
            "loss_last": curve[-1],
            "steps": float(len(curve) - 1),
            "examples": float(examples),
            "tokens": float(sum(part.tokens for part in parts)),
            "layers": float(len(best.layers)),
            "deepest_layer": float(max(best.layers)),
            "cross_validated_nll": best.nll,
            "cross_validated_accuracy": best.accuracy,
            "validation_accuracy": right,
            "validation_nll": after,
            "temperature": temperature,
        },
        details={
            "curve": [{"step": float(step), "loss": value} for step, value in enumerate(curve)],
            "effect": effect,
            "examples": examples,
            "labels": counts,
            "dropped": dropped,
            "candidates": [vars(one) for one in candidates],
            "calibration": {"temperature": temperature, "nll_before": before, "nll_after": after},
        },
    )


def _words(parts: Sequence[object]) -> str:
    return " + ".join(map(str, parts))
