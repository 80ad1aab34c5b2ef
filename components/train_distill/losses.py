"""How far a student's next-token distributions are from its teacher's: pure functions."""

from math import log
from typing import Literal

import torch
from torch import Tensor


def divergence(
    student: Tensor, teacher: Tensor, kind: Literal["forward", "reverse", "js"], temperature: float = 1.0
) -> Tensor:
    """Return the divergence of every pair of distributions, in nats times the temperature squared, [tokens].

    The softened gradient shrinks as 1/T²; the square makes the weight beside a cross-entropy mean the same at every
    temperature (Hinton et al. 2015, arXiv:1503.02531, section 2.1).

    Args:
        student: Logits, [tokens, vocabulary].
        teacher: Logits over the same vocabulary; no gradient flows through them if they were computed without.
        kind: `forward` is KL(teacher‖student), `reverse` KL(student‖teacher), `js` the mean of both models' KL to
            their mean (Lin 1991): at most log 2.
        temperature: By which the logits of both are divided.
    """
    ours, theirs = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    if kind == "forward":
        apart = _kl(theirs, ours)
    elif kind == "reverse":
        apart = _kl(ours, theirs)
    else:
        middle = torch.logaddexp(ours, theirs) - log(2)
        apart = (_kl(ours, middle) + _kl(theirs, middle)) / 2
    return apart * temperature**2


def _kl(one: Tensor, other: Tensor) -> Tensor:
    """Return KL(one‖other) of log-probabilities along the last dimension."""
    return (one.exp() * (one - other)).sum(-1)
