"""A reward model: a language model with a scalar head that reads the last token of prompt and answer.

Its folder is a model folder with one more tensor (`score.weight`, as transformers' sequence classifiers name it) and
`reward.json`: mean and standard deviation of the rewards of the pairs that it was trained on. `RewardModel.score`
subtracts the one and divides by the other, for the loss knows neither a reward's zero nor its unit (Ouyang et al. 2022,
arXiv:2203.02155, appendix C.2), and a KL penalty is weighed against both.

The last token is found by the attention mask. transformers looks for the last one that is not padding, and where the
end of the sequence pads it passes over the very token at which the head was trained.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..contracts.errors import ModelError
from .llama import is_supported
from .models import load_model, load_tokenizer, set_threads
from .packing import use_tree_attention
from .training import hidden_states

SCALE = "reward.json"
HEAD = "score"
HEAD_WEIGHT = f"{HEAD}.weight"
BATCH = 32
"""Sequences scored together."""


def add_head(model: Any, seed: int) -> Any:
    """Give a causal language model a scalar head and let its forward pass return the reward as `logits`.

    The head's first weights are normal with a variance of 1 / (size + 1) (Stiennon et al. 2020, arXiv:2009.01325).

    Args:
        model: Of transformers; changed in place and returned.
        seed: Of the head.
    """
    size = model.config.hidden_size
    head = torch.nn.Linear(size, 1, bias=False, device=model.device)
    drawn = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) / (size + 1) ** 0.5
    head.weight.data.copy_(drawn)
    setattr(model, HEAD, head)
    model.config.num_labels = 1
    if is_supported(model):
        use_tree_attention(model)

    def forward(input_ids: Tensor, attention_mask: Tensor, **ignored: Any) -> Any:
        """Return the rewards [sequences, 1] of padded sequences; the padding may stand on either side."""
        states, place = hidden_states(model, input_ids, attention_mask=attention_mask, use_cache=False)
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (attention_mask * steps).argmax(-1, keepdim=True)
        pooled = states[place.to(last.device).gather(1, last)[:, 0]]
        with torch.autocast(pooled.device.type, enabled=False):  # rewards of a pair differ by less than bf16 shows
            return SimpleNamespace(logits=getattr(model, HEAD)(pooled.float()))

    model.forward = forward
    return model


class RewardModel:
    """Scores answers.

    Args:
        folder: A `reward_model` artifact.
        device: `cpu` or `cuda`.

    Raises:
        ModelError: The folder holds a language model without a head, or no scale.
    """

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        set_threads()
        model = load_model(folder, device=device)  # fp32: a sequence's reward must not depend on its neighbours
        self.model = add_head(model, 0)
        weights = getattr(self.model, HEAD).weight
        weights.data.copy_(_read_head(Path(folder)))
        self.tokenizer = load_tokenizer(folder)
        self.mean, self.deviation = read_scale(folder)

    def score(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[float]:
        """Return each answer's reward in standard deviations from the mean of the training pairs.

        Args:
            prompts: Token ids.
            answers: Token ids, each closed by the end-of-sequence token, as in training.
        """
        sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return [(value - self.mean) / self.deviation for value in raw_rewards(self.model, sequences)]


@torch.no_grad()
def raw_rewards(model: Any, sequences: Sequence[list[int]]) -> list[float]:
    """Return the rewards of token sequences as the head gives them.

    Args:
        model: With a head.
        sequences: Prompt and answer; none is empty.
    """
    found: list[float] = []
    for start in range(0, len(sequences), BATCH):
        some = sequences[start : start + BATCH]
        width = max(map(len, some))
        ids = torch.tensor([one + [0] * (width - len(one)) for one in some], device=model.device)
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in some], device=model.device)
        found += model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    return found


def write_scale(folder: str | Path, rewards: Sequence[float]) -> None:
    """Write mean and standard deviation of some rewards as the scale of a reward model."""
    values = torch.tensor(rewards, dtype=torch.float64)
    scale = {"mean": float(values.mean()), "deviation": float(values.std(correction=0))}
    (Path(folder) / SCALE).write_text(json.dumps(scale, indent=1) + "\n", encoding="utf-8")


def read_scale(folder: str | Path) -> tuple[float, float]:
    """Return mean and standard deviation.

    Raises:
        ModelError: There are none, or the deviation is not above 0.
    """
    path = Path(folder) / SCALE
    try:
        scale = json.loads(path.read_bytes())
        mean, deviation = float(scale["mean"]), float(scale["deviation"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the reward's scale cannot be read: {error}", where=str(path), fix="run train_reward again"
        ) from error
    if not deviation > 0:
        raise ModelError(f"the rewards' standard deviation is {deviation}", where=str(path), fix="run train_reward")
    return mean, deviation


def _read_head(folder: Path) -> Tensor:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if HEAD_WEIGHT in file.keys():  # noqa: SIM118  safe_open is no mapping
                return file.get_tensor(HEAD_WEIGHT).float()
    raise ModelError(
        f"there is no {HEAD_WEIGHT}, so this is not a reward model",
        where=str(folder),
        fix="give the model that train_reward wrote",
    )
