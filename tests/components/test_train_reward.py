"""The reward model's training: the loss by hand, pairs held out by group, an accuracy that must beat a coin."""

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

import train_step
from train_step import SETTINGS, preferences

from assay.components.contracts.artifacts import read_manifest
from assay.components.contracts.errors import DataError, TrainingError
from assay.components.contracts.recipe import RewardModelSettings
from assay.components.contracts.rows import Message
from assay.components.shared import training
from assay.components.shared.chat import completion_ids, prompt_ids
from assay.components.shared.holdout import is_held_out
from assay.components.shared.reward_model import RewardModel, raw_rewards
from assay.components.shared.summary import read_summary
from assay.components.train_reward import reward

TINY = RewardModelSettings(**SETTINGS["reward"], precision="fp32")


pytestmark = pytest.mark.usefixtures("task")


def trainer_on(base: Path, settings: RewardModelSettings, count: int = 2) -> Any:
    model, tokenizer = training.load_trainable(base, settings)
    rows, _ = reward.tokenize(preferences(count), tokenizer, settings)
    return reward.make_trainer(model, tokenizer, rows, settings, seed=0)[0]


def test_a_run_ranks_held_out_pairs_and_tells(tiny_model: Path, tmp_path: Path) -> None:
    long = preferences(25)[-1].model_copy(update={"prompt": [Message(role="user", content="take one " * 300)]})
    data = train_step.data_for("reward", tmp_path / "data", [*preferences(24), long])
    train_step.run("reward", SETTINGS["reward"], str(tiny_model), str(data), str(tmp_path))
    told = read_summary(tmp_path / "summary")
    assert {"step", "loss", "learning_rate", "accuracy", "margin"} == told.details["curve"][0].keys()
    held_out = told.details["held_out"]
    assert held_out["n"] + told.details["examples"] == 24
    assert told.details["dropped"] == {"too_long": 1}
    assert 0.5 < held_out["low"] < held_out["mean"] <= held_out["high"]
    assert told.metrics["held_out_accuracy"] == held_out["mean"]
    assert held_out["by_source"]["reference>sampled"]["n"] == held_out["n"]
    assert told.details["effect"]["checks"]["ranks_held_out_pairs"]
    manifest = read_manifest(tmp_path / "model", "reward_model")
    assert {"base", "pairs"} == manifest.parents.keys()
    assert "reward.json" in manifest.files


@pytest.mark.parametrize(("weight", "center"), [(0.0, 0.0), (0.5, 0.0), (2.0, 0.01)])
def test_the_loss_is_bradley_and_terrys(weight: float, center: float, tiny_model: Path) -> None:
    trainer = trainer_on(tiny_model, TINY.model_copy(update={"margin_weight": weight, "center": center}))
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        good, bad = (
            trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            .logits[:, 0]
            .double()
            .numpy()
            .reshape(2, -1)
        )
        loss = float(trainer.compute_loss(trainer.model, dict(batch)))
    assert np.abs(good - bad).max() > 1e-3
    asked = good - bad - weight * 1.0  # every pair of the fixture has a margin of 1
    wanted = np.mean(np.log1p(np.exp(-asked))) + center * np.mean((good + bad) ** 2)
    assert loss == pytest.approx(wanted, abs=1e-6)


def test_a_pair_is_tokenised_as_generation_does(tiny_model: Path, tiny_tokenizer: Any) -> None:
    trainer = trainer_on(tiny_model, TINY)
    batch = next(iter(trainer.get_train_dataloader()))
    made = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    good, bad = made[:2], made[2:]
    for pair in preferences(2):
        prompt = prompt_ids(tiny_tokenizer, pair.prompt)
        place = good.index(prompt + completion_ids(tiny_tokenizer, pair.chosen))
        assert bad[place] == prompt + completion_ids(tiny_tokenizer, pair.rejected)


def test_the_saved_model_gives_the_rewards_of_the_trained_one(tiny_model: Path, tmp_path: Path) -> None:
    for method in ("full", "lora"):
        settings = TINY.model_copy(update={"method": method, "max_steps": 4})
        trainer = trainer_on(tiny_model, settings, count=4)
        head = trainer.accelerator.unwrap_model(trainer.model).score
        before = {name: value.clone() for name, value in head.named_parameters() if value.requires_grad}
        training.train(trainer, training.Watcher([]))
        assert any(not torch.equal(value, before[name]) for name, value in head.named_parameters() if name in before)
        rows = trainer.train_dataset.to_list()
        reward.save(trainer, trainer.processing_class, settings, tmp_path / method, rows)
        trained = trainer.accelerator.unwrap_model(trainer.model)
        trained = trained.get_base_model() if hasattr(trained, "get_base_model") else trained
        sequences = [row["chosen_ids"] for row in rows]
        saved = RewardModel(tmp_path / method)
        # bf16 keeps eight bits of each weight
        torch.testing.assert_close(
            torch.tensor(raw_rewards(saved.model, sequences)),
            torch.tensor(raw_rewards(trained, sequences)),
            atol=0.1,
            rtol=0.05,
        )
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / method, dtype=torch.float32)
        for ids, ours in zip(sequences, raw_rewards(saved.model, sequences), strict=True):
            assert theirs(input_ids=torch.tensor([ids])).logits.item() == pytest.approx(ours, abs=1e-4)
        shutil.rmtree(tmp_path / "work")  # the next trainer is another run


def test_groups_stand_on_one_side_and_stay_there() -> None:
    rows = [{"group": str(place % 40)} for place in range(200)]
    kept, held_out = reward.split(rows, 0.25)
    assert not {row["group"] for row in kept} & {row["group"] for row in held_out}
    assert 5 <= len({row["group"] for row in held_out}) <= 15
    more, _ = reward.split(rows + [{"group": "new"}], 0.25)
    assert [row for row in more if row["group"] != "new"] == kept


def test_the_side_does_not_follow_from_the_split_that_pairs_are_from() -> None:
    def point(group: str) -> float:
        return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8]) / 2**64

    narrow = [str(place) for place in range(4000) if 0.23 <= point(str(place)) < 0.34]  # as the preference split lies
    share = sum(is_held_out(group, 0.25) for group in narrow) / len(narrow)
    assert share == pytest.approx(0.25, abs=0.07)


def test_accuracies_are_told_by_source() -> None:
    rows = [{"source": source, "group": str(place)} for place, source in enumerate("aabbb")]
    found = reward.accuracies([1.0, 0.0, 1.0, 1.0, 1.0], rows)
    assert {name: (one["mean"], one["n"]) for name, one in found.items()} == {"a": (0.5, 2), "b": (1.0, 3)}


def test_nothing_to_hold_out_is_an_error() -> None:
    with pytest.raises(DataError, match="of 3 pairs 3 are to train on and 0 held out"):
        reward.split([{"group": "one"}] * 3, 1e-6)


def test_a_model_that_ranks_no_better_than_a_coin_fails(tiny_model: Path, tmp_path: Path) -> None:
    rows = preferences(24)
    contrary = [row.model_copy(update={"chosen": row.rejected, "rejected": row.chosen}) for row in rows]
    turned = [
        other if is_held_out(row.group, TINY.holdout) else row for row, other in zip(rows, contrary, strict=True)
    ]  # what is held out says the contrary of what is taught
    data = train_step.data_for("reward", tmp_path / "data", turned)
    with pytest.raises(TrainingError, match="ranks_held_out_pairs") as error:
        train_step.run("reward", SETTINGS["reward"], str(tiny_model), str(data), str(tmp_path))
    assert "max_pairs" in error.value.fix


def test_weights_of_four_bits_are_refused() -> None:
    with pytest.raises(ValidationError, match="full or lora"):
        RewardModelSettings(method="qlora")
