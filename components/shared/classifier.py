"""A model folder that answers by its features: a language model's files and a light classifier beside them.

`classifier.json` holds labels, layers, pooling, rubric and temperature; `classifier.safetensors` the weights. Whatever
opens such a folder by `generate.open_generator` gets the most probable label as the answer, token for token as the
language model would say it, and the label's calibrated probability as its confidence.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..contracts.artifacts import write_atomically
from ..contracts.errors import ModelError
from .chat import completion_ids
from .features import POOLINGS, Features
from .generate import Batch, Generator, arithmetic

SETTINGS = "classifier.json"
WEIGHTS = "classifier.safetensors"


@dataclass(frozen=True)
class Head:
    """A multinomial logistic regression on features, and what features it wants."""

    labels: list[str]
    layers: list[int]
    """The features are of the states after so many layers, side by side."""
    pooling: list[str]
    """Of `features.POOLINGS`, joined in this order."""
    rubric: list[int]
    """Tokens that prompts begin with."""
    temperature: float
    """Divides the logits (Guo et al. 2017, arXiv:1706.04599)."""
    weights: Tensor
    """[labels, features] in fp32."""
    bias: Tensor
    """[labels] in fp32."""

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the calibrated probability of each label [rows, labels] in fp64.

        Args:
            features: [rows, layers, poolings, size] of the head's layers.
        """
        chosen = choose(features, self.pooling).double()
        return ((chosen @ self.weights.double().T + self.bias.double()) / self.temperature).softmax(-1)


def choose(features: Tensor, pooling: Sequence[str]) -> Tensor:
    """Return the features of some poolings side by side: [rows, layers, poolings, size] to [rows, features]."""
    return features[:, :, [POOLINGS.index(name) for name in pooling]].flatten(1).float()


def save_head(head: Head, folder: str | Path) -> None:
    """Write a head beside a language model's files; files that it replaces are not written into, only let go."""
    from safetensors.torch import save

    settings = {
        "labels": head.labels,
        "layers": head.layers,
        "pooling": head.pooling,
        "rubric": head.rubric,
        "temperature": head.temperature,
    }
    write_atomically(Path(folder) / SETTINGS, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    write_atomically(Path(folder) / WEIGHTS, save({"weights": head.weights.contiguous(), "bias": head.bias}))


def read_head(folder: str | Path) -> Head | None:
    """Return the head of a folder, or None where it holds a language model alone.

    Raises:
        ModelError: Its files are not what `save_head` writes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / SETTINGS
    if not path.is_file():
        return None
    try:
        return Head(**json.loads(path.read_bytes()), **load_file(path.with_name(WEIGHTS)))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"the classifier cannot be read: {error}", where=str(folder), fix="train it again, or restore its files"
        ) from error


class Classifier(Generator):
    """Answers with the most probable label, at any temperature; each sample is the same.

    Args:
        model: The language model that reads.
        tokenizer: Its tokenizer.
        head: What decides.
        dtype: As for `Generator`.
    """

    def __init__(self, model: Any, tokenizer: Any, head: Head, dtype: torch.dtype | None = None) -> None:
        self._take(model, tokenizer)
        self.head = head
        self.features = Features(model, head.layers, head.rubric, dtype or getattr(torch, arithmetic()))
        self.answers = [completion_ids(tokenizer, label) for label in head.labels]

    def probabilities(self, prompts: Sequence[list[int]]) -> Tensor:
        """Return the probability of each label [prompts, labels]."""
        return self.head.probabilities(self.features(prompts))

    def run(
        self,
        prompts: list[list[int]],
        batch: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        samples: int = 1,
        seed: int = 0,
        confidence: bool = False,
    ) -> Batch:
        """Answer one batch of a plan; as for `Generator.run`, but that a confidence is always told."""
        self._check_length(prompts, batch, max_new_tokens)
        sure, labels = self.probabilities([prompts[index] for index in batch]).max(-1)
        made = [
            replace(self.generation(self.answers[label][:max_new_tokens]), confidence=value)
            for label, value in zip(labels.tolist(), sure.tolist(), strict=True)
        ]
        return [(index, [one] * samples) for index, one in zip(batch, made, strict=True)]
