"""How well a model foretells documents, and whether tuning helped where it should and did no harm elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..runtime.context import progress
from ..shared.statistics import Interval

BATCH_TOKENS = 2048
"""Tokens scored in one forward pass, padding included: 0.4 GB of logits over 49,152 tokens."""


def log_perplexities(model: Any, documents: Sequence[Sequence[int]], window: int, said: str = "") -> list[float]:
    """Return for each document the mean negative log-likelihood of its tokens, in nats; the first is given, not scored.

    A document longer than the window is read in pieces, each beginning with the last token of the one before, so that
    every token is scored once.

    Args:
        model: In evaluation mode.
        documents: Token ids, at least two each.
        window: Tokens that the model sees at once.
        said: What the progress calls the documents; empty for none.
    """
    pieces = [
        (place, document[start : start + window])
        for place, document in enumerate(documents)
        for start in range(0, len(document) - 1, window - 1)
    ]
    pieces.sort(key=lambda piece: len(piece[1]))
    sums, done = [0.0] * len(documents), 0
    while done < len(pieces):
        count = max(1, BATCH_TOKENS // len(pieces[done][1]))
        while count > 1 and count * len(pieces[min(done + count, len(pieces)) - 1][1]) > BATCH_TOKENS:
            count -= 1
        batch = pieces[done : done + count]
        for (place, _), surprise in zip(batch, _surprises(model, [ids for _, ids in batch]), strict=True):
            sums[place] += surprise
        done += len(batch)
        if said:
            progress(done, len(pieces), said)
    return [total / (len(document) - 1) for total, document in zip(sums, documents, strict=True)]


@torch.no_grad()
def _surprises(model: Any, batch: Sequence[Sequence[int]]) -> list[float]:
    """Return the summed negative log-likelihood of each sequence."""
    width = max(map(len, batch))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    wanted = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    every = functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
    return [float(value) for value in every.double().sum(1)]


def mean_difference(new: Sequence[float], old: Sequence[float], confidence: float) -> Interval:
    """Return the mean of paired differences with Student's interval.

    Log-perplexities have no bound, as the gate's intervals need; each is a mean over a document's tokens, and their
    differences are near normal.

    Args:
        new: At least two.
        old: On the same documents.
        confidence: Two-sided.
    """
    from scipy.stats import t

    apart = np.asarray(new, dtype=np.float64) - np.asarray(old, dtype=np.float64)
    half = float(t.ppf((1 + confidence) / 2, len(apart) - 1) * apart.std(ddof=1) / sqrt(len(apart)))
    mean = float(apart.mean())
    return Interval(mean=mean, low=mean - half, high=mean + half, n=len(apart))


@dataclass(frozen=True)
class Measured:
    """Log-perplexities by document."""

    before: list[float]
    after: list[float]

    @property
    def perplexities(self) -> tuple[float, float]:
        """Perplexity before and after: the exponential of the documents' mean."""
        return exp(sum(self.before) / len(self.before)), exp(sum(self.after) / len(self.after))


@dataclass(frozen=True)
class Verdict:
    """Whether the tuned model goes on, and why."""

    kept: bool
    reason: str
    domain: Interval
    """Of the log-perplexity, tuned less base."""
    general: Interval


def decide(domain: Measured, general: Measured, max_rise: float, confidence: float) -> Verdict:
    """Keep a tuned model if it is better on the domain for certain, and certainly not much worse elsewhere.

    Args:
        domain: Held-out documents of the domain.
        general: Text of no domain.
        max_rise: Factor by which general perplexity may rise.
        confidence: Of both intervals, two-sided.
    """
    inside = mean_difference(domain.after, domain.before, confidence)
    outside = mean_difference(general.after, general.before, confidence)
    told = (
        f"domain perplexity {_arrow(domain)} (× {exp(inside.mean):.3f} [{exp(inside.low):.3f}, {exp(inside.high):.3f}] "
        f"on {inside.n} documents), general {_arrow(general)} (× {exp(outside.mean):.3f} [{exp(outside.low):.3f}, "
        f"{exp(outside.high):.3f}] on {outside.n})"
    )
    if inside.high >= 0:
        return Verdict(False, f"{told}: not certainly better on the domain, so left out", inside, outside)
    if outside.high > log(max_rise):
        return Verdict(
            False, f"{told}: general text may be worse by more than × {max_rise:g}, so left out", inside, outside
        )
    return Verdict(True, f"{told}: the stage's output goes on", inside, outside)


def _arrow(measured: Measured) -> str:
    before, after = measured.perplexities
    return f"{before:.4g} → {after:.4g}"
