"""Multinomial logistic regression by L-BFGS over shards, and the temperature that makes its confidence honest.

The objective is the mean negative log-likelihood plus l2 / 2 · ‖weights‖² on standardised features; it is convex, so
the start does not matter. Each evaluation is one pass over the shards, so that no more than one is in memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Gives (features [rows, features], label numbers [rows]) block by block, each time from the beginning."""
FLAT = 1e-6
"""Standard deviation under which a feature is taken to be constant, and left out."""
TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True)
class Fit:
    """A fitted regression on features as they come."""

    weights: Tensor
    """[labels, features]."""
    bias: Tensor
    """[labels]."""
    objective: list[float] = field(default_factory=list)
    """After each iteration, the start first."""

    def logits(self, features: Tensor) -> Tensor:
        """Return [rows, labels] in fp64."""
        return features.double() @ self.weights.double().T + self.bias.double()


def fit(blocks: Blocks, labels: int, l2: float, iterations: int) -> Fit:
    """Return the regression that minimises the objective.

    Args:
        blocks: The rows.
        labels: Number of labels.
        l2: Weight of the penalty; the bias is not penalised.
        iterations: At most.
    """
    from scipy.optimize import minimize

    mean, scale = _moments(blocks)
    size = len(mean)

    def evaluate(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights, bias = _unflatten(flat, labels, size)
        # The standardisation is taken into the weights: no block is copied.
        plain = weights * scale
        shift = bias - plain @ mean
        loss, rows = 0.0, 0
        slope, tilt = torch.zeros(labels, size, dtype=torch.float64), torch.zeros(labels, dtype=torch.float64)
        for features, wanted in blocks():
            every = ((features @ plain.float().T).double() + shift).log_softmax(-1)
            loss -= float(every.gather(1, wanted[:, None]).sum())
            error = every.exp()
            error[torch.arange(len(wanted)), wanted] -= 1
            slope += (error.float().T @ features).double()
            tilt += error.sum(0)
            rows += len(wanted)
        slope = (slope - tilt[:, None] * mean) * scale
        gradient = torch.cat([slope / rows + l2 * weights, tilt[:, None] / rows], 1)
        return loss / rows + l2 / 2 * float(weights.square().sum()), gradient.flatten().numpy()

    curve = [float(evaluate(np.zeros(labels * (size + 1)))[0])]

    def note(intermediate_result: Any) -> None:
        curve.append(float(intermediate_result.fun))

    found = minimize(
        evaluate,
        np.zeros(labels * (size + 1)),
        jac=True,
        method="L-BFGS-B",
        callback=note,
        options={"maxiter": iterations, "gtol": 1e-5},
    )
    weights, bias = _unflatten(found.x, labels, size)
    plain = weights * scale  # on features as they come
    return Fit(plain.float(), (bias - plain @ mean).float(), curve)


def _unflatten(flat: NDArray[np.float64], labels: int, size: int) -> tuple[Tensor, Tensor]:
    table = torch.from_numpy(np.array(flat)).view(labels, size + 1)
    return table[:, :size], table[:, size]


def _moments(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Return mean and inverse standard deviation of each feature in fp64; 0 where a feature is constant."""
    rows, total, squares = 0, torch.zeros(()), torch.zeros(())
    for features, _ in blocks():
        wide = features.double()
        rows, total, squares = rows + len(wide), total + wide.sum(0), squares + wide.square().sum(0)
    mean = total / rows
    deviation = (squares / rows - mean.square()).clamp(min=0).sqrt()
    return mean, torch.where(deviation > FLAT, 1 / deviation, 0.0)


def likelihood(logits: Tensor, wanted: Tensor, temperature: float = 1.0) -> float:
    """Return the mean negative log-likelihood, in nats."""
    return float(-(logits / temperature).log_softmax(-1).gather(1, wanted[:, None]).mean())


def find_temperature(logits: Tensor, wanted: Tensor) -> float:
    """Return the temperature with the least negative log-likelihood (Guo et al. 2017, arXiv:1706.04599).

    Args:
        logits: [rows, labels], of rows that the fit has not seen.
        wanted: Label numbers [rows].
    """
    from scipy.optimize import minimize_scalar

    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(
        lambda log: likelihood(logits, wanted, float(np.exp(log))), bounds=(low, high), method="bounded"
    )
    return float(np.exp(found.x))
