"""GRPO, DAPO, GSPO and RLOO against numpy, each switch of DAPO alone; a group without a signal moves nothing."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trl import GRPOTrainer, RLOOConfig, RLOOTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

import train_step
from train_step import SETTINGS, Letters, examples

from assay.components.contracts.artifacts import read_manifest
from assay.components.contracts.errors import DataError
from assay.components.contracts.recipe import RLSettings
from assay.components.shared import training
from assay.components.shared.models import load_model
from assay.components.shared.rewards import open_rewards
from assay.components.shared.summary import read_summary
from assay.components.train_rl import grpo

TINY = RLSettings(**{**SETTINGS["rl"], "group_size": 4, "max_steps": 2, "precision": "fp32"})


class OnlyFor(Letters):
    """Rewards as `Letters`, and the same for every answer where the reference is another one."""

    def __init__(self, reference: str) -> None:
        self.reference = reference

    def reward(self, response: str, reference: str, finished: bool = True) -> float:
        return super().reward(response, reference) if reference == self.reference else 0.25


pytestmark = pytest.mark.usefixtures("task")


def trainer_on(base: Path, task: Any, settings: RLSettings = TINY, count: int = 2) -> Any:
    model, tokenizer = training.load_trainable(base, settings)
    rows, _ = grpo.prompts(examples(count), tokenizer, settings)
    trainer, _ = grpo.make_trainer(model, tokenizer, rows, open_rewards(settings.rewards, task), settings, seed=0)
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
    assert (arguments.epsilon, arguments.epsilon_high, arguments.beta) == (0.2, 0.2, 0.04)
    assert arguments.loss_type == "grpo"
    assert not arguments.use_vllm  # on a CPU


def batch_of(trainer: Any, seed: int = 3) -> dict[str, torch.Tensor]:
    """Return a batch of samples whose old log-probabilities are some way off, so that ratios are not 1."""
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    lengths = torch.tensor([1 + place % 6 for place in range(len(inputs["completion_ids"]))])
    inputs["completion_mask"] = (torch.arange(inputs["completion_ids"].shape[1]) < lengths[:, None]).long()
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    noise = 0.4 * torch.randn(inputs["completion_ids"].shape, generator=torch.Generator().manual_seed(seed))
    inputs["old_per_token_logps"] = log_probabilities(trainer, inputs) + noise
    return inputs


def log_probabilities(trainer: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0]


def oracle(settings: RLSettings, now: Any, old: Any, advantages: Any, mask: Any) -> float:
    """The papers' objectives, negated, in float64: [samples, tokens] each, advantages [samples]."""
    ratio = np.exp(now - old)
    if settings.algorithm == "gspo":
        ratio = np.exp(((now - old) * mask).sum(1, keepdims=True) / mask.sum(1, keepdims=True)) * np.ones_like(mask)
    clipped = np.clip(ratio, 1 - settings.epsilon, 1 + settings.epsilon_high)
    each = np.minimum(ratio * advantages[:, None], clipped * advantages[:, None]) * mask
    if settings.token_level_loss:
        return -each.sum() / mask.sum()
    return -(each.sum(1) / mask.sum(1)).mean()


@pytest.mark.parametrize(
    "changes", [{}, {"token_level_loss": True}, {"epsilon_high": 0.28}, {"algorithm": "gspo"}], ids=str
)
def test_an_objective_is_the_papers(changes: dict[str, Any], tiny_model: Path) -> None:
    settings = RLSettings(**{**TINY.model_dump(exclude={"epsilon", "epsilon_high"}), **changes})
    trainer = trainer_on(tiny_model, Letters(), settings)
    inputs = batch_of(trainer)
    loss = trainer._compute_loss(trainer.model, inputs)
    numbers = [inputs[name].double().numpy() for name in ("old_per_token_logps", "advantages", "completion_mask")]
    now = log_probabilities(trainer, inputs).double().numpy()
    assert np.abs(numbers[1]).max() > 0.5
    assert float(loss.detach()) == pytest.approx(oracle(settings, now, *numbers), abs=1e-6)


def test_advantages_are_standardised_in_the_group_or_left_undivided(tiny_model: Path) -> None:
    for scale in ("group", "none"):
        trainer = trainer_on(tiny_model, Letters(), TINY.model_copy(update={"scale_rewards": scale}))
        given = trainer._generate_and_score_completions(
            [{"prompt": [{"role": "user", "content": "e?"}], "reference": ""}] * 4
        )
        texts = trainer.processing_class.batch_decode(given["completion_ids"], skip_special_tokens=True)
        rewards = np.array([Letters().reward(text, "") for text in texts])
        wanted = rewards - rewards.mean()
        wanted = wanted / (rewards.std(ddof=1) + 1e-4) if scale == "group" else wanted
        np.testing.assert_allclose(
            given["advantages"].flatten().numpy(), wanted, atol=2e-3 if scale == "group" else 1e-4
        )


@pytest.mark.parametrize(("ratio", "high", "moves"), [(1.25, 0.2, False), (1.25, 0.28, True), (1.3, 0.28, False)])
def test_clip_higher_lets_a_rare_good_answer_grow_further(
    ratio: float, high: float, moves: bool, tiny_model: Path
) -> None:
    trainer = trainer_on(tiny_model, Letters(), TINY.model_copy(update={"epsilon_high": high}))
    inputs = batch_of(trainer)
    inputs["old_per_token_logps"] = log_probabilities(trainer, inputs) - float(np.log(ratio))
    inputs["advantages"] = torch.ones_like(inputs["advantages"])
    found = gradients(trainer, trainer._compute_loss(trainer.model, inputs))
    assert any(bool(value.abs().max() > 1e-6) for value in found.values()) == moves


def test_clip_higher_does_not_widen_the_clip_below(tiny_model: Path) -> None:
    trainer = trainer_on(tiny_model, Letters(), RLSettings(**{**TINY.model_dump(), "epsilon_high": 0.28}))
    inputs = batch_of(trainer)
    inputs["old_per_token_logps"] = log_probabilities(trainer, inputs) - float(np.log(0.79))
    inputs["advantages"] = -torch.ones_like(inputs["advantages"])
    found = gradients(trainer, trainer._compute_loss(trainer.model, inputs))
    assert all(bool(value.abs().max() == 0) for value in found.values())


def test_overlong_answers_lose_linearly_and_others_nothing(tiny_model: Path, tiny_tokenizer: Any) -> None:
    settings = TINY.model_copy(update={"max_new_tokens": 20, "overlong_buffer": 0.5})

    class Constant(Letters):
        def reward(self, response: str, reference: str, finished: bool = True) -> float:
            return 0.75

    reward = grpo.make_reward(open_rewards([], Constant()), tiny_tokenizer, settings)
    lengths = [1, 10, 11, 15, 20]
    turns = [[{"role": "assistant", "content": "e"}]] * len(lengths)
    found = reward(
        prompts=turns,
        completions=turns,
        completion_ids=[[5] * length for length in lengths],
        reference=[""] * len(lengths),
        log_metric=lambda *_: None,
    )
    assert found == pytest.approx([0.75, 0.75, 0.65, 0.25, -0.25], abs=1e-4)


def test_dynamic_sampling_replaces_groups_of_equal_reward_and_counts_them(tiny_model: Path) -> None:
    rows = examples(6)
    lively = {row.reference for row in rows[:3]}

    class Half(Letters):
        def reward(self, response: str, reference: str, finished: bool = True) -> float:
            return super().reward(response, reference) if reference in lively else 0.5

    settings = TINY.model_copy(update={"dynamic_sampling": True, "max_resampling": 6})
    trainer = trainer_on(tiny_model, Half(), settings, count=6)
    silent = {"prompt": [turn.model_dump() for turn in rows[5].prompt], "reference": rows[5].reference}
    loud = {"prompt": [turn.model_dump() for turn in rows[0].prompt], "reference": rows[0].reference}
    scored = trainer._generate_and_score_completions([silent] * 4 + [loud] * 4)
    assert (scored["advantages"].view(2, 4) != 0).any(1).all()
    drawn = [row["reference"] in lively for row in trainer._others([silent, loud])]
    assert trainer._metrics["train"]["refilled"] == [1.0 + drawn.index(True)]  # the silent one, and those drawn in vain
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [0.0]
    prompts = trainer.processing_class.batch_decode(scored["prompt_ids"][::4])
    assert len({*prompts}) == 2
    assert not any(rows[5].prompt[-1].content in prompt for prompt in prompts)
    again = trainer._generate_and_score_completions([silent] * 4 + [loud] * 4)
    assert torch.equal(again["completion_ids"], scored["completion_ids"])  # drawn by the step, not by history


def test_dynamic_sampling_gives_up_after_its_rounds(tiny_model: Path) -> None:
    settings = TINY.model_copy(update={"dynamic_sampling": True, "max_resampling": 2})
    asked = []

    class Constant(Letters):
        def reward(self, response: str, reference: str, finished: bool = True) -> float:
            asked.append(response)
            return 0.5

    trainer = trainer_on(tiny_model, Constant(), settings, count=12)
    row = {"prompt": [{"role": "user", "content": "e?"}], "reference": ""}
    scored = trainer._generate_and_score_completions([row] * 8)
    assert not scored["advantages"].any()
    assert len(asked) == 3 * 8 + 8  # three rounds, and TRL's own scoring of what was kept


def test_samples_are_drawn_anew_in_every_round(tiny_model: Path) -> None:
    trainer = trainer_on(tiny_model, Letters(), TINY.model_copy(update={"dynamic_sampling": True}))
    row = {"prompt": [{"role": "user", "content": "e?"}], "reference": ""}
    first = trainer._sample([row])
    trainer.round = 1
    assert trainer._sample([row]) != first


def test_rloo_is_trls(tiny_model: Path) -> None:
    """The same samples and rewards through TRL's RLOO trainer: equal advantages, equal gradient."""
    trainer = trainer_on(
        tiny_model, Letters(), RLSettings(**{**TINY.model_dump(), "algorithm": "rloo", "scale_rewards": "none"})
    )
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    ours = gradients(trainer, trainer._compute_loss(trainer.model, inputs))
    theirs = RLOOTrainer(
        model=trainer.model,
        reward_funcs=trainer.reward_funcs,
        args=RLOOConfig(
            output_dir=trainer.args.output_dir,
            use_cpu=True,
            bf16=False,
            beta=0.0,
            per_device_train_batch_size=8,
            temperature=TINY.temperature,
            num_generations=4,
            report_to="none",
        ),
        train_dataset=trainer.train_dataset,
        processing_class=trainer.processing_class,
    )
    now = log_probabilities(trainer, inputs)
    given = {**inputs, "old_logps": (now * inputs["completion_mask"]).sum(1)}
    trls = gradients(trainer, theirs._compute_loss(trainer.model, given))
    texts = trainer.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    rewards = np.array([Letters().reward(text, "") for text in texts])
    prompts = [tuple(one) for one in inputs["prompt_ids"].tolist()]
    for place, prompt in enumerate(prompts):
        others = [rewards[at] for at, one in enumerate(prompts) if one == prompt and at != place]
        assert float(inputs["advantages"][place]) == pytest.approx(rewards[place] - np.mean(others), abs=1e-4)
    assert ours.keys() == trls.keys()
    assert any(value.abs().max() > 1e-4 for value in trls.values())
    for name, value in trls.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-3, msg=name)


def test_silent_groups_stay_in_the_count_where_samples_are_averaged(tiny_model: Path) -> None:
    assert not TINY.token_level_loss
    for changes in ({"token_level_loss": True}, {"algorithm": "rloo", "scale_rewards": "none"}):
        settings = RLSettings(**{**TINY.model_dump(), **changes})
        trainer = trainer_on(tiny_model, OnlyFor(examples(1)[0].reference), settings)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        ours = gradients(trainer, trainer._compute_loss(trainer.model, inputs))
        trls = gradients(trainer, GRPOTrainer._compute_loss(trainer, trainer.model, inputs))
        for name, value in trls.items():
            torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("algorithm", ["dapo", "gspo", "rloo"])
def test_a_run_of_each_algorithm_tells_its_name(
    algorithm: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo, "get_task", lambda name: Letters())
    data = train_step.data_for("rl", tmp_path / "data", count=4)
    settings = {**SETTINGS["rl"], "algorithm": algorithm, "group_size": 4, "max_steps": 3}
    train_step.run("rl", settings, str(tiny_model), str(data), str(tmp_path))
    told = read_summary(tmp_path / "summary")
    assert told.headline.startswith(f"{algorithm.upper()}, 3 steps")
    assert ("refilled_groups" in told.metrics) == (algorithm == "dapo")


def test_the_algorithm_gives_defaults_and_the_recipe_overrides_them() -> None:
    dapo = RLSettings(algorithm="dapo")
    assert (dapo.epsilon, dapo.epsilon_high, dapo.token_level_loss, dapo.dynamic_sampling) == (0.2, 0.28, True, True)
    assert dapo.overlong_buffer == 0.2
    assert not RLSettings(algorithm="dapo", dynamic_sampling=False).dynamic_sampling
    assert (RLSettings(algorithm="gspo").epsilon, RLSettings(algorithm="gspo").epsilon_high) == (3e-4, 4e-4)
    assert RLSettings(**dapo.model_dump()) == dapo


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates": 3}, "updates must divide"),
        ({"updates": 2, "save_steps": 5}, "save_steps must be a multiple"),
        ({"algorithm": "rloo", "updates": 2}, "rloo takes one update"),
    ],
)
def test_settings_that_do_not_fit_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RLSettings(**settings)


def tiny_mixture(folder: Path, tokenizer: Any) -> Path:
    """Write a random mixture-of-experts model of two layers."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from assay.components.contracts.artifacts import seal
    from assay.components.shared.models import save_model

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    save_model(Qwen3MoeForCausalLM(config), tokenizer, folder)
    seal(folder, "model", metadata={"reference": "mixture"})
    return folder


def test_gspo_trains_a_mixture_of_experts_with_stale_samples(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo, "get_task", lambda name: Letters())
    base = tiny_mixture(tmp_path / "base", tiny_tokenizer)
    data = train_step.data_for("rl", tmp_path / "data", count=4)
    settings = {
        **SETTINGS["rl"],
        "algorithm": "gspo",
        "group_size": 4,
        "updates": 2,
        "max_steps": 6,
        "save_steps": 2,
        "precision": "fp32",
    }
    train_step.run("rl", settings, str(base), str(data), str(tmp_path))
    curve = read_summary(tmp_path / "summary").details["curve"]
    assert len(curve) == 6
    assert all(np.isfinite(point["loss"]) for point in curve)
    weights = load_model(tmp_path / "model").state_dict()
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
