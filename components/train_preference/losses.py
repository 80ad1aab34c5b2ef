"""The losses on preference pairs that TRL does not keep, as functions of log-probabilities.

A log-ratio is log π(y|x) − log π_ref(y|x), summed over the tokens of the answer; π_ref is the model as it came in. All
take and give tensors of one value a pair [pairs] and are differentiable in the policy's part.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return the odds-ratio loss (Hong et al. 2024, arXiv:2403.07691): −log p(chosen) + β · L_OR.

    Args:
        chosen: Mean log-probability of a token of the chosen answer, [pairs]; below 0.
        rejected: The same of the rejected one.
        beta: Weight of the odds ratio (the paper's λ).
    """
    odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return -chosen - beta * logsigmoid(odds)


def kto(chosen: Tensor, rejected: Tensor, divergence: Tensor, beta: float) -> Tensor:
    """Return the Kahneman–Tversky loss (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7), both weights 1.

    Args:
        chosen: Log-ratio of the answers that are desirable.
        rejected: Of those that are not.
        divergence: Log-ratio of answers to other prompts. Their mean, not below 0, is the point of reference z₀; no
            gradient flows through it.
        beta: Strength of the pull back to the reference.
    """
    point = divergence.detach().mean().clamp(min=0)
    gain, loss = torch.sigmoid(beta * (chosen - point)), torch.sigmoid(beta * (point - rejected))
    return ((1 - gain) + (1 - loss)) / 2


def rpo(chosen: Tensor, rejected: Tensor, prompts: Tensor, beta: float, temperature: float) -> Tensor:
    """Return the relative preference loss (Yin et al. 2024, arXiv:2402.10958) with weights by distance.

    Each chosen answer is held against every rejected one of the batch: −mean_j log σ(ω_ij β (chosen_i − rejected_j)),
    where ω_i = softmax_j(−d_ij / τ) and d_ij is the cosine distance of the prompts.

    Args:
        chosen: Log-ratio of the chosen answers.
        rejected: Of the rejected ones.
        prompts: Embeddings of the prompts, [pairs, size].
        beta: As in DPO.
        temperature: τ; lower keeps to prompts that are alike.
    """
    unit = normalize(prompts, dim=1)
    weights = torch.softmax((unit @ unit.T - 1) / temperature, dim=1)
    return -logsigmoid(beta * weights * (chosen[:, None] - rejected[None, :])).mean(1)


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 − eˣ) for x < 0 without loss of digits at either end (Mächler 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
