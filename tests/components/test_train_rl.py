"""GRPO: rewards reach the samples they belong to, and a group without a signal moves nothing."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

import train_step
from train_step import SETTINGS, Letters, examples

from assay.components.contracts.artifacts import read_manifest
from assay.components.contracts.errors import DataError
from assay.components.contracts.recipe import RLSettings
from assay.components.shared import training
from assay.components.shared.models import load_model
from assay.components.shared.summary import read_summary
from assay.components.train_rl import grpo

TINY = RLSettings(**{**SETTINGS["rl"], "group_size": 4, "max_steps": 2, "precision": "fp32"})


class OnlyFor(Letters):
    """Rewards as `Letters`, and the same for every answer where the reference is another one."""

    def __init__(self, reference: str) -> None:
        self.reference = reference

    def reward(self, response: str, reference: str, finished: bool = True) -> float:
        return super().reward(response, reference) if reference == self.reference else 0.25


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASSAY_CPUS", "1")
    monkeypatch.setenv("ASSAY_WORK", str(tmp_path / "work"))
    monkeypatch.delenv("ASSAY_PROGRESS", raising=False)


def trainer_on(base: Path, task: Any, settings: RLSettings = TINY, count: int = 2) -> Any:
    model, tokenizer = training.load_trainable(base, settings)
    rows, _ = grpo.prompts(examples(count), tokenizer, settings)
    trainer, _ = grpo.make_trainer(model, tokenizer, rows, task, settings, seed=0)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


def gradients(trainer: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in trainer.model.named_parameters() if value.grad is not None}


def test_a_run_trains_and_tells(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo, "get_task", lambda name: Letters())
    data = train_step.data_for("rl", tmp_path / "data", count=4)
    settings = {**SETTINGS["rl"], "group_size": 4, "max_steps": 6}
    train_step.run("rl", settings, str(tiny_model), str(data), str(tmp_path))
    told = read_summary(tmp_path / "summary")
    assert {"loss_first", "loss_last", "weight_change", "tokens", "reward_first", "reward_last"} <= told.metrics.keys()
    assert told.metrics["tokens"] == 6 * 2 * 4 * 6  # steps, prompts, samples, tokens
    assert 0 < told.metrics["informative_groups"] <= 12
    assert {"step", "loss", "learning_rate", "reward", "informative_groups"} <= told.details["curve"][0].keys()
    assert told.details["effect"]["checks"]["rewards_differ"]
    assert read_manifest(tmp_path / "model", "model").metadata["stage"] == "rl"
    load_model(tmp_path / "model")


def test_rewards_go_to_their_samples(tiny_model: Path) -> None:
    seen: dict[str, list[float]] = {}

    class Journal(Letters):
        def reward(self, response: str, reference: str, finished: bool = True) -> float:
            assert not finished  # a random model is cut at the limit
            value = super().reward(response, reference)
            seen.setdefault(response, []).append(value)
            return value

    trainer = trainer_on(tiny_model, Journal())
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    texts = trainer.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    assert sorted(texts) == sorted(seen)
    steps = grpo.REWARD_STEPS
    rewards = torch.tensor([round(seen[text][0] * steps) / steps for text in texts])
    prompts = inputs["prompt_ids"].tolist()
    for prompt in {tuple(one) for one in prompts}:
        group = [place for place, one in enumerate(prompts) if tuple(one) == prompt]
        assert len(group) == TINY.group_size
        wanted = (rewards[group] - rewards[group].mean()) / (rewards[group].std() + 1e-4)
        torch.testing.assert_close(inputs["advantages"][group].flatten(), wanted, atol=1e-4, rtol=1e-4)


def test_leaving_out_silent_groups_keeps_the_gradient(tiny_model: Path) -> None:
    trainer = trainer_on(tiny_model, OnlyFor(examples(1)[0].reference))
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert int((inputs["advantages"] == 0).sum()) == TINY.group_size
    ours = gradients(trainer, trainer._compute_loss(trainer.model, inputs))
    trls = gradients(trainer, GRPOTrainer._compute_loss(trainer, trainer.model, inputs))
    assert ours.keys() == trls.keys()
    assert any(value.abs().max() > 1e-4 for value in trls.values())
    for name, value in trls.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_equal_rewards_move_nothing_and_are_counted(tiny_model: Path) -> None:
    trainer = trainer_on(tiny_model, OnlyFor("nobody's"))
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    training.train(trainer, training.Watcher([]))
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    assert [point["silent_share"] for point in training.curve(trainer, grpo.NAMES)] == [1.0, 1.0]


@pytest.mark.parametrize("size", [5, 7, 8])
def test_equal_rewards_have_no_advantage_in_a_group_of_any_size(size: int, tiny_model: Path) -> None:
    class Constant(Letters):
        def reward(self, response: str, reference: str, finished: bool = True) -> float:
            return 0.1 + 0.4 * 8 / 9  # fp32 gives the mean of five of them as another number

    trainer = trainer_on(tiny_model, Constant(), TINY.model_copy(update={"group_size": size}))
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert not inputs["advantages"].any()
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [1.0]
    assert trainer._metrics["train"]["exact"] == [0.0]


def test_prompts_leave_room_for_the_answer(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="0 prompts are left, a step needs 2"):
        grpo.prompts(examples(3), tiny_tokenizer, TINY.model_copy(update={"max_tokens": 20}))


def test_the_recipe_reaches_trl(tiny_model: Path) -> None:
    settings = TINY.model_copy(update={"batch_size": 16, "method": "lora", "use_vllm": True, "beta": 0.04})
    arguments = trainer_on(tiny_model, Letters(), settings, count=16).args
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (32, 2)
    assert arguments.generation_batch_size == 64
    assert arguments.num_generations == 4
    assert (arguments.epsilon, arguments.epsilon_high, arguments.beta) == (0.2, 0.28, 0.04)
    assert arguments.loss_type == "dapo"
    assert not arguments.use_vllm  # on a CPU
