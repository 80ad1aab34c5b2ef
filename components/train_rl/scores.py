"""What PPO's samples are worth: what the recipe rewards, or the word of a reward model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..contracts.errors import ModelError
from ..shared.chat import completion_ids
from ..shared.generate import Generation
from ..shared.reward_model import RewardModel
from ..shared.rewards import Sample, Score


class Answered(NamedTuple):
    """One answer to one prompt."""

    prompt: list[int]
    reference: str
    answer: Generation
    question: str = ""
    """The prompt's last turn."""


class Verified:
    """What the recipe rewards: the task's verifier, or a list.

    Args:
        score: Of `open_rewards`.
    """

    def __init__(self, score: Score) -> None:
        self.score = score

    def __call__(self, rollouts: Sequence[Answered]) -> list[float]:
        """Return the reward of each; one that was cut at the token limit is not finished."""
        return self.score(
            [Sample(one.question, one.answer.text, one.reference, one.answer.finished) for one in rollouts]
        )


class Judged:
    """Rewards by a reward model, in standard deviations of those of its training pairs.

    Args:
        folder: A `reward_model` artifact.
        tokenizer: The policy's.
        penalty: Taken from the reward of a sample that is not finished: the model has seen finished ones only, and such
            a one is scored as if it ended here.
        device: `cpu` or `cuda`.

    Raises:
        ModelError: The reward model reads other tokens than the policy writes.
    """

    def __init__(self, folder: str, tokenizer: Any, penalty: float, device: str) -> None:
        self.model, self.penalty = RewardModel(folder, device), penalty
        if self.model.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ModelError(
                "the reward model's tokenizer is not the policy's", where=folder, fix="train it from the same base"
            )

    def __call__(self, rollouts: Sequence[Answered]) -> list[float]:
        """Return the reward of each."""
        answers = [completion_ids(self.model.tokenizer, one.answer.text) for one in rollouts]
        scores = self.model.score([one.prompt for one in rollouts], answers)
        return [
            score - (0 if one.answer.finished else self.penalty) for score, one in zip(scores, rollouts, strict=True)
        ]
