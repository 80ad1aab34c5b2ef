"""Scoring: neither the batch nor the padding changes a reward, and a folder without a head is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from assay.components.contracts.errors import ModelError
from assay.components.shared import reward_model
from assay.components.shared.models import load_model, save_model
from assay.components.shared.reward_model import RewardModel, add_head, raw_rewards, read_scale, write_scale


@pytest.fixture
def scorer(tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path) -> RewardModel:
    model = add_head(load_model(tiny_model), 1)
    save_model(model, tiny_tokenizer, tmp_path)
    write_scale(tmp_path, [1.0, 3.0])
    return RewardModel(tmp_path)


def sequences(count: int = 9) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (count,), generator=draw).tolist()
    start = [5, 6, 7]
    return [start + torch.randint(3, 900, (length,), generator=draw).tolist() for length in lengths]


def test_a_batch_scores_as_one_at_a_time(scorer: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    some = sequences()
    prompts, answers = [one[:2] for one in some], [one[2:] for one in some]
    together = scorer.score(prompts, answers)
    alone = [scorer.score([prompt], [answer])[0] for prompt, answer in zip(prompts, answers, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert max(together) - min(together) > 0.1
    monkeypatch.setattr(reward_model, "BATCH", 2)
    assert scorer.score(prompts, answers) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_the_last_token_is_found_on_either_side_of_the_padding(
    packed: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr("assay.components.shared.training.is_supported", lambda model: False)
        monkeypatch.setattr(reward_model, "is_supported", lambda model: False)
    model = add_head(load_model(tiny_model), 1)
    ids, end = [9, 8, 7, 2], 2
    alone = raw_rewards(model, [ids])[0]
    other = [4] * 7
    right = torch.tensor([ids + [end] * 3, other])  # padded with the token that also ends the sequence
    left = torch.tensor([[end] * 3 + ids, other])
    with torch.no_grad():
        one = model(input_ids=right, attention_mask=torch.tensor([[1] * 4 + [0] * 3, [1] * 7])).logits
        two = model(input_ids=left, attention_mask=torch.tensor([[0] * 3 + [1] * 4, [1] * 7])).logits
    assert one.shape == (2, 1)
    assert float(one[0]) == pytest.approx(alone, abs=1e-5)
    assert float(two[0]) == pytest.approx(alone, abs=1e-5)
    assert raw_rewards(model, [ids[:-1]])[0] != pytest.approx(alone, abs=1e-3)


def test_rewards_are_told_in_deviations_from_the_mean(scorer: RewardModel) -> None:
    [ids] = sequences(1)
    assert (scorer.mean, scorer.deviation) == (2.0, 1.0)
    assert scorer.score([ids[:1]], [ids[1:]])[0] == pytest.approx(raw_rewards(scorer.model, [ids])[0] - 2)


def test_a_head_is_the_seeds(tiny_model: Path) -> None:
    heads = [add_head(load_model(tiny_model), seed).score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(65**-0.5, rel=0.3)


def test_a_language_model_is_no_reward_model(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="no score.weight"):
        RewardModel(tiny_model)


@pytest.mark.parametrize(
    ("text", "what"),
    [(None, "cannot be read"), ("{}", "cannot be read"), ('{"mean": 0, "deviation": 0}', "deviation is 0")],
)
def test_a_scale_that_is_none_is_refused(text: str | None, what: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "reward.json").write_text(text)
    with pytest.raises(ModelError, match=what):
        read_scale(tmp_path)
