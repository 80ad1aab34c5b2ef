"""Features of a split, shard by shard: of bounded memory, and kept when the step is killed.

A shard is a folder in the task's work folder with the features of so many rows, sealed when it is whole; a killed step
goes on after the last whole one. Rows are read as a stream: what is held at a time is one shard.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, stack, tensor

from ..contracts.artifacts import read_manifest, seal
from ..contracts.errors import DataError
from ..contracts.rows import Message
from ..runtime.context import progress
from ..shared.chat import prompt_ids
from ..shared.classifier import choose
from ..shared.features import Features
from ..shared.generate import shared_tokens

FILE = "features.safetensors"
UNKNOWN = -1
"""Number of a label that the training rows do not have."""


@dataclass(frozen=True)
class Source:
    """The rows of one split, and how they become numbers."""

    path: Path
    tokenizer: Any
    labels: list[str]
    seed: int
    max_tokens: int
    shard_rows: int

    @property
    def rows(self) -> int:
        """Rows in the file."""
        return int(pq.ParquetFile(self.path).metadata.num_rows)

    def batches(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows a shard at a time."""
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(self.shard_rows, columns=["group", "prompt", "reference"]):
                yield batch.to_pylist()

    def prompt(self, row: dict[str, Any]) -> list[int]:
        """Return a row's tokens."""
        return prompt_ids(self.tokenizer, [Message(**turn) for turn in row["prompt"]])

    def rubric(self) -> list[int]:
        """Return the tokens that all prompts of the first shard begin with."""
        prompts = [self.prompt(row) for row in next(self.batches())]
        return prompts[0][: shared_tokens(prompts)]


@dataclass(frozen=True)
class Shard:
    """Features on disk."""

    path: Path

    def read(self, layers: Sequence[int], pooling: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return features [rows, features] in fp32 and label numbers [rows], of rows whose label is known.

        Args:
            layers: Of those that were extracted.
            pooling: Of `features.POOLINGS`.
        """
        with safe_open(self.path, framework="pt") as file:
            labels = file.get_tensor("labels")
            known = labels != UNKNOWN
            states = stack([file.get_tensor(f"layer-{layer}")[known] for layer in layers], 1)
            return choose(states, pooling), labels[known]

    def folds(self) -> Tensor:
        """Return a number in [0, 2³¹) for the group of each row whose label is known."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor("folds")[file.get_tensor("labels") != UNKNOWN]


@dataclass(frozen=True)
class Extracted:
    """The shards of some rows of a split."""

    shards: list[Shard]
    tokens: int
    too_long: int
    unknown: int
    """Rows whose label no training row has."""


def extract(source: Source, features: Features, folder: Path, start: int = 0, end: int | None = None) -> Extracted:
    """Write the features of some shards of a source, leaving what a killed run had finished.

    Args:
        source: The rows.
        features: Computes all layers that are wanted.
        folder: Of the shards; has one per run of shards.
        start: First shard.
        end: Shard to stop before; None means all.
    """
    shards, counts = [], {"tokens": 0, "too_long": 0, "unknown": 0}
    total, done = source.rows, start * source.shard_rows
    for number, rows in enumerate(source.batches()):
        if number < start or (end is not None and number >= end):
            continue
        place = folder / f"{source.path.stem}-{number:05d}"
        found = _finished(place) or _write(source, features, rows, place)
        counts = {name: count + found[name] for name, count in counts.items()}
        if found["rows"]:
            shards.append(Shard(place / FILE))
        done += len(rows)
        progress(done, total, "rows")
    return Extracted(shards, **counts)


def _finished(place: Path) -> dict[str, int] | None:
    """Return a whole shard's counts; what a kill or the disk has damaged is removed."""
    try:
        return read_manifest(place, "features").counts
    except DataError:
        shutil.rmtree(place, ignore_errors=True)
        return None


def _write(source: Source, features: Features, rows: list[dict[str, Any]], place: Path) -> dict[str, int]:
    prompts = [(source.prompt(row), row) for row in rows]
    kept = [(prompt, row) for prompt, row in prompts if len(prompt) <= source.max_tokens]
    numbers = {label: number for number, label in enumerate(source.labels)}
    labels = [numbers.get(row["reference"], UNKNOWN) for _, row in kept]
    place.mkdir(parents=True)
    if kept:
        states = features([prompt for prompt, _ in kept])
        columns = {f"layer-{layer}": states[:, at].contiguous() for at, layer in enumerate(features.layers)}
        folds = tensor([_fold(row["group"], source.seed) for _, row in kept])
        save_file({**columns, "labels": tensor(labels), "folds": folds}, place / FILE)
    counts = {
        "rows": len(kept),
        "tokens": sum(len(prompt) for prompt, _ in kept),
        "too_long": len(rows) - len(kept),
        "unknown": labels.count(UNKNOWN),
    }
    seal(place, "features", counts=counts)
    return counts


def _fold(group: str, seed: int) -> int:
    """Return 31 bits of a group, so that its rows fall into one fold."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{group}".encode()).digest()[:4], "big") >> 1


def find_labels(path: Path, least: int) -> dict[str, int]:
    """Return the labels of a split, sorted, with their rows.

    Args:
        path: Its Parquet file; only the references are read.
        least: Rows that a label needs, so that it is in every part of a cross-validation.

    Raises:
        DataError: There are fewer than two labels, or one has too few rows.
    """
    counted = pc.value_counts(pq.read_table(path, columns=["reference"])["reference"]).to_pylist()
    counts = dict(sorted((one["values"], one["counts"]) for one in counted))
    if len(counts) < 2:
        raise DataError(
            f"all rows have one label ({', '.join(counts) or 'none'}), so there is nothing to tell apart",
            where=path.name,
            fix="give rows of at least two labels: a row's reference is its label",
        )
    rare = [label for label, count in counts.items() if count < least]
    if rare:
        raise DataError(
            f"{len(rare)} of {len(counts)} labels stand in fewer than {least} rows, {rare[0][:60]!r} in "
            f"{counts[rare[0]]}; a classifier cannot be fitted and tested on so few",
            where=path.name,
            fix="give more rows of it, join it with another label, or leave it out; free text is no label",
        )
    return counts
