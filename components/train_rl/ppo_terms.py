"""The terms of PPO, each a function of tensors [sequences, tokens] and a mask of the answers' tokens.

Answers begin at the first column and the mask is true up to and with their last token; whatever stands behind it has
no part in any of them.
"""

from typing import Literal

import torch
from torch import Tensor

SMALL = 1e-8


def kl_terms(log_ratio: Tensor, estimator: Literal["k1", "k3"]) -> Tensor:
    """Return each token's estimate of KL(policy ‖ reference), to be averaged over tokens of the policy.

    k1 is the log-ratio itself; k3 adds to it what has mean 0 and is correlated with it, so that it is never negative
    (Schulman 2020, joschu.net/blog/kl-approx.html).

    Args:
        log_ratio: log π(token) − log π_reference(token).
        estimator: Which.
    """
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Return each token's reward: its KL penalty, and on an answer's last token the answer's score.

    Args:
        scores: [sequences].
        kl: Of `kl_terms`.
        mask: True on an answer's tokens; every answer has one at least.
        coefficient: Of the penalty (Ouyang et al. 2022, arXiv:2203.02155, eq. 2).
    """
    rewards = -coefficient * kl * mask
    last = mask.sum(-1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Return generalised advantages (Schulman et al. 2016, arXiv:1506.02438, eq. 16) and what the values should be.

    δ_t = r_t + γ·V_{t+1} − V_t and A_t = δ_t + γλ·A_{t+1}, with nothing after the last token; the return is A_t + V_t.

    Args:
        rewards: Of `token_rewards`.
        values: Expected return before each token.
        mask: True on an answer's tokens.
        gamma: Discount.
        gae_lambda: Weight of later tokens' errors.
    """
    rewards, values = rewards * mask, values * mask
    following = torch.zeros_like(values[:, 0])
    advantage = torch.zeros_like(following)
    found = []
    for step in reversed(range(values.shape[1])):
        advantage = rewards[:, step] + gamma * following - values[:, step] + gamma * gae_lambda * advantage
        following = values[:, step]
        found.append(advantage)
    advantages = torch.stack(found[::-1], 1) * mask
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Return values with mean 0 and standard deviation 1 over the mask, and 0 elsewhere."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    return (values - mean) * (variance + SMALL).rsqrt() * mask


def policy_loss(
    new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate's loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7), and the clipped share.

    Args:
        new: Log-probabilities under the policy that learns.
        old: Those under the policy that sampled.
        advantages: Per token.
        mask: Tokens to average over.
        low: The ratio counts down to 1 − low,
        high: and up to 1 + high.
    """
    ratio = (new - old).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    return masked_mean(torch.maximum(plain, clipped), mask), masked_mean((clipped > plain).float(), mask)


def value_loss(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Return half the squared error of the values, of which one that moved beyond `clip` gains nothing more."""
    clipped = old + (new - old).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((new - returns).square(), (clipped - returns).square()), mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the mask; values elsewhere do not matter, not even those that are not finite."""
    return values.masked_fill(~mask, 0).sum() / mask.sum()
