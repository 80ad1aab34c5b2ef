"""PPO: its terms against numbers by hand, its reading of a model against transformers, and rewards that rise."""

import sys
from dataclasses import replace
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

import tiny_chain
import train_step
from train_step import SETTINGS, Letters, examples, preferences

from assay.components.contracts.artifacts import read_manifest
from assay.components.contracts.errors import ModelError, TrainingError
from assay.components.contracts.recipe import Recipe, RLSettings
from assay.components.shared import training
from assay.components.shared.chat import completion_ids
from assay.components.shared.generate import Generation
from assay.components.shared.models import load_model
from assay.components.shared.reward_model import RewardModel
from assay.components.shared.rewards import open_rewards
from assay.components.shared.summary import read_summary
from assay.components.train_rl import grpo, ppo, ppo_terms
from assay.components.train_rl.scores import Answered, Judged, Verified

TINY = RLSettings(**{**SETTINGS["ppo"], "precision": "fp32"})


pytestmark = pytest.mark.usefixtures("task")


@pytest.fixture(scope="module")
def learner(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chain.make_learner(tmp_path_factory.mktemp("learner"), base_model)


def trainer_on(base: Path, settings: RLSettings = TINY, count: int = 2) -> Any:
    model, tokenizer = training.load_trainable(base, settings)
    rows, _ = grpo.prompts(examples(count), tokenizer, settings)
    return ppo.make_trainer(model, tokenizer, rows, Letters(), settings, 0, base)[0]


def rows_of(trainer: Any) -> list[dict[str, Any]]:
    return next(iter(trainer.get_train_dataloader()))["rows"]


# --- terms ----------------------------------------------------------------------------------------------------------


def test_advantages_and_returns_by_hand() -> None:
    # Rewards 0, 0, 1; values 0.5, 0.4, 0.6; γ 0.9, λ 0.5.
    # δ₃ = 1 − 0.6 = 0.4                        A₃ = 0.4                        return 1.0
    # δ₂ = 0 + 0.9·0.6 − 0.4 = 0.14             A₂ = 0.14 + 0.45·0.4 = 0.32     return 0.72
    # δ₁ = 0 + 0.9·0.4 − 0.5 = −0.14            A₁ = −0.14 + 0.45·0.32 = 0.004  return 0.504
    # The second row ends after two tokens: rewards 0, 2; values 1, 1; behind its end stands rubbish.
    # A₂ = 2 − 1 = 1, return 2; A₁ = (0.9 − 1) + 0.45·1 = 0.35, return 1.35
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 99.0]])
    values = torch.tensor([[0.5, 0.4, 0.6], [1.0, 1.0, 77.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages, returns = ppo_terms.advantages_and_returns(rewards, values, mask, 0.9, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.004, 0.32, 0.4], [0.35, 1.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.504, 0.72, 1.0], [1.35, 2.0, 0.0]]))


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.97, 0.8), (0.9, 0.0), (1.0, 1.0)])
def test_advantages_are_the_sum_that_defines_them(gamma: float, gae_lambda: float) -> None:
    draw = np.random.default_rng(0)
    rewards, values = draw.normal(size=(6, 9)), draw.normal(size=(6, 9))
    lengths = [9, 1, 4, 7, 2, 9]
    mask = np.arange(9) < np.array(lengths)[:, None]
    wanted = np.zeros((6, 9))
    for row, length in enumerate(lengths):
        for step in range(length):
            for ahead in range(length - step):
                at = step + ahead
                after = values[row, at + 1] if at + 1 < length else 0.0
                error = rewards[row, at] + gamma * after - values[row, at]
                wanted[row, step] += (gamma * gae_lambda) ** ahead * error
    found, returns = ppo_terms.advantages_and_returns(
        torch.tensor(rewards), torch.tensor(values), torch.tensor(mask), gamma, gae_lambda
    )
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)
    np.testing.assert_allclose(returns.numpy(), (wanted + values) * mask, atol=1e-6)


def test_an_answers_score_stands_on_its_last_token_and_the_penalty_on_every_one() -> None:
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rewards = ppo_terms.token_rewards(torch.tensor([1.0, -1.0]), kl, mask, 0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, -0.1, 0.85], [-0.2, -1.25, 0.0]]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0.0),  # unmoved: the gradient of −A·ratio by its logarithm is −A·ratio
        (1.27, 2.0, -2.54, -2.54, 0.0),  # below the upper clip of 1.28
        (1.29, 2.0, -2.56, 0.0, 1.0),  # beyond it: nothing more to gain
        (0.5, 2.0, -1.0, -1.0, 0.0),  # less likely though good: no clip holds it there
        (0.81, -2.0, 1.62, 1.62, 0.0),  # above the lower clip of 0.8
        (0.79, -2.0, 1.6, 0.0, 1.0),  # beyond it
        (1.5, -2.0, 3.0, 3.0, 0.0),  # more likely though bad: no clip holds it there
    ],
)
def test_the_clipped_surrogate_by_hand(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: float
) -> None:
    new = torch.tensor([[log(ratio) - 3.0]], dtype=torch.float64, requires_grad=True)
    old, worth = torch.tensor([[-3.0]]), torch.tensor([[advantage]])
    found, share = ppo_terms.policy_loss(new, old, worth, torch.tensor([[True]]), 0.2, 0.28)
    found.backward()
    assert new.grad is not None
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert new.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert share.item() == clipped


@pytest.mark.parametrize(
    ("new", "loss", "gradient"),
    [
        (1.1, 0.5 * 0.9**2, -0.9),  # moved by 0.1 from 1: free
        (1.5, 0.5 * 0.8**2, 0.0),  # towards the return of 2, beyond the clip of 0.2: as at 1.2, no gradient
        (0.5, 0.5 * 1.5**2, -1.5),  # away from it: the larger error counts
    ],
)
def test_the_clipped_value_loss_by_hand(new: float, loss: float, gradient: float) -> None:
    value = torch.tensor([[new]], requires_grad=True)
    one = torch.tensor([[1.0]])
    found = ppo_terms.value_loss(value, one, 2 * one, torch.tensor([[True]]), 0.2)
    found.backward()
    assert value.grad is not None
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert value.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_the_estimators_have_the_kl_as_their_mean() -> None:
    policy = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.2, 0.2, 0.4], dtype=torch.float64)
    exact = sum(p * log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    for name in ("k1", "k3"):
        terms = ppo_terms.kl_terms((policy / reference).log(), name)  # type: ignore[arg-type]
        assert float((policy * terms).sum()) == pytest.approx(exact, abs=1e-9)
        assert bool((terms >= 0).all()) == (name == "k3")


def test_as_a_reward_only_k1_has_the_gradient_of_the_kl() -> None:
    reference = torch.tensor([0.2, 0.2, 0.2, 0.4], dtype=torch.float64)
    logits = torch.tensor([1.0, 0.4, -0.3, -1.0], dtype=torch.float64, requires_grad=True)

    def gradient(of: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(of, logits, retain_graph=True)
        return found

    policy = logits.softmax(0)
    exact = gradient((policy * (policy / reference).log()).sum())
    rewarded = {
        name: gradient(
            (policy.detach() * policy.log() * ppo_terms.kl_terms((policy / reference).log(), name).detach()).sum()  # type: ignore[arg-type]
        )
        for name in ("k1", "k3")
    }
    torch.testing.assert_close(rewarded["k1"], exact)
    assert not torch.allclose(rewarded["k3"], exact, atol=1e-2)


def test_whitening_is_over_the_answers_tokens() -> None:
    values = torch.tensor([[1.0, 3.0, 1e9], [5.0, 1e9, float("nan")]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    white = ppo_terms.whiten(values.nan_to_num(), mask)
    spread = (8 / 3) ** 0.5  # of 1, 3, 5
    torch.testing.assert_close(white, torch.tensor([[-2 / spread, 0.0, 0.0], [2 / spread, 0.0, 0.0]]))
    assert float(ppo_terms.masked_mean(values, mask)) == 3.0


# --- reading a model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_probabilities_and_values_are_those_of_the_answers_tokens(temperature: float, tiny_model: Path) -> None:
    trainer = trainer_on(tiny_model, TINY.model_copy(update={"temperature": temperature}))
    torch.nn.init.normal_(trainer.head.outer.weight)
    model = load_model(tiny_model)
    answers = [[9, 8, 7, 6], [5, 4], [3]]
    prompts = [[11, 12, 13], [11, 12, 14, 15], [20]]
    samples = [
        Answered(prompt, "", Generation("", answer, True)) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    ids, lengths = trainer._pad(samples)
    with torch.no_grad():
        logps, values, entropy = trainer._read(trainer.plain, ids, lengths)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            out = model(torch.tensor([prompt + answer]), output_hidden_states=True)
            every = (out.logits[0] / temperature).log_softmax(-1)
            before = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
            wanted = every[before].gather(1, torch.tensor(answer)[:, None])[:, 0]
            torch.testing.assert_close(logps[row, : len(answer)], wanted, atol=1e-4, rtol=1e-4)
            states = trainer.head(out.hidden_states[-1][0, before])
            torch.testing.assert_close(values[row, : len(answer)], states, atol=1e-4, rtol=1e-4)
            spread = torch.distributions.Categorical(logits=every[before]).entropy()
            torch.testing.assert_close(entropy[row, : len(answer)], spread, atol=1e-4, rtol=1e-4)
            assert not logps[row, len(answer) :].any()
            assert not values[row, len(answer) :].any()


def test_what_stands_behind_an_answers_end_has_no_part_in_the_loss(tiny_model: Path) -> None:
    trainer = trainer_on(tiny_model)
    rollout = trainer.roll_out(rows_of(trainer))
    lengths = rollout.lengths.clone()
    lengths[::2, 1] = 3  # as if every second answer had ended early
    short = replace(rollout, lengths=lengths)
    ids, advantages = rollout.ids.clone(), rollout.advantages.clone()
    for row in range(0, len(ids), 2):
        ids[row, lengths[row].sum() :] = 17
        advantages[row, 3:] = 1e6
    other = replace(short, ids=ids, advantages=advantages)
    found = []
    for batch in (short, other):
        trainer.model.zero_grad()
        loss, _ = trainer.loss(batch)
        loss.backward()
        found.append((loss.detach(), trainer.model.model.layers[0].mlp.up_proj.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1].abs().max() > 1e-6


def test_the_value_loss_does_not_reach_the_policy(tiny_model: Path) -> None:
    trainer = trainer_on(tiny_model)
    torch.nn.init.normal_(trainer.head.outer.weight)
    rollout = trainer.roll_out(rows_of(trainer))
    _, values, _ = trainer._read(trainer.plain, rollout.ids, rollout.lengths)
    values.square().sum().backward()
    assert all(value.grad is None for value in trainer.model.parameters())
    assert trainer.head.inner.weight.grad.abs().max() > 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_round_starts_at_no_distance_and_moves_policy_and_values(method: str, tiny_model: Path) -> None:
    trainer = trainer_on(tiny_model, TINY.model_copy(update={"method": method, "max_steps": 2}))
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    training.train(trainer, training.Watcher([]))
    points = training.curve(trainer, ppo.NAMES)
    assert points[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the model it starts from
    assert points[1]["kl"] > 1e-4
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora" in name for name in moved) == (method == "lora")
    assert trainer.head.outer.weight.abs().max() > 0
    assert trainer.optimizer.param_groups[-1]["initial_lr"] == TINY.ppo.value_learning_rate


def test_a_round_passes_over_every_sample_once_an_epoch(tiny_model: Path) -> None:
    settings = TINY.model_copy(update={"ppo": TINY.ppo.model_copy(update={"epochs": 3, "minibatch_size": 3})})
    trainer = trainer_on(tiny_model, settings)
    batches = [rows.tolist() for rows in trainer._minibatches(8)]
    assert [len(rows) for rows in batches] == [3, 3, 2] * 3
    assert all(sorted(sum(batches[at : at + 3], [])) == list(range(8)) for at in (0, 3, 6))
    assert batches[:3] != batches[3:6]
    assert [rows.tolist() for rows in trainer._minibatches(8)] == batches  # as a resumed run draws it


def test_the_kl_controller_by_hand(tiny_model: Path) -> None:
    trainer = trainer_on(tiny_model, TINY.model_copy(update={"ppo": TINY.ppo.model_copy(update={"kl_target": 0.1})}))
    for nats, wanted in ((0.11, 1.01), (0.5, 1.02), (0.0, 0.98), (0.1, 1.0)):  # errors 0.1, clipped 0.2, −0.2, 0
        trainer.coefficient = 1.0
        trainer._control(nats)
        assert trainer.coefficient == pytest.approx(wanted)


# --- rewards --------------------------------------------------------------------------------------------------------


def test_the_verifier_is_told_whether_a_sample_is_finished() -> None:
    told = []
    task = SimpleNamespace(reward=lambda text, truth, finished: told.append((text, truth, finished)) or 0.5)
    samples = [
        Answered([1], "right", Generation("one", [3], True)),
        Answered([1], "wrong", Generation("two", [4], False)),
    ]
    assert Verified(open_rewards([], task))(samples) == [0.5, 0.5]  # type: ignore[arg-type]
    assert told == [("one", "right", True), ("two", "wrong", False)]


@pytest.fixture(scope="module")
def judge(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of the tiny model, trained by the component."""
    folder = tmp_path_factory.mktemp("judge")
    data = train_step.data_for("reward", folder / "data", preferences(24))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASSAY_WORK", str(folder / "work"))
        patch.setenv("ASSAY_CPUS", "1")
        train_step.run("reward", SETTINGS["reward"], str(tiny_model), str(data), str(folder))
    return folder / "model"


def test_a_sample_that_was_cut_costs_the_penalty(judge: Path, tiny_tokenizer: Any) -> None:
    ends, cut = (Answered([5, 6], "", Generation("take one", [9], done)) for done in (True, False))
    whole, less = Judged(str(judge), tiny_tokenizer, 0.75, "cpu")([ends, cut])
    assert whole - less == pytest.approx(0.75)
    assert whole == pytest.approx(RewardModel(judge).score([[5, 6]], [completion_ids(tiny_tokenizer, "take one")])[0])


def test_a_reward_model_of_other_tokens_is_refused(judge: Path) -> None:
    other = SimpleNamespace(get_vocab=lambda: {"a": 0})
    with pytest.raises(ModelError, match="tokenizer is not the policy's"):
        Judged(str(judge), other, 1.0, "cpu")


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_on_a_reward_model_tells_what_the_verifier_thinks(judge: Path, tiny_model: Path, tmp_path: Path) -> None:
    data = train_step.data_for("ppo", tmp_path / "data", count=4)
    settings = {**SETTINGS["ppo"], "max_steps": 4}
    train_step.run("ppo", settings, str(tiny_model), str(data), str(tmp_path), reward=str(judge))
    told = read_summary(tmp_path / "summary")
    assert told.metrics["tokens"] == 4 * 2 * 4 * 6  # rounds, prompts, samples, tokens
    assert {"reward_first", "reward_last", "verified_first", "verified_last", "kl_last"} <= told.metrics.keys()
    assert ppo.NAMES.keys() | {"step"} == told.details["curve"][0].keys()
    assert 0 <= told.details["curve"][0]["verified"] <= 1
    assert told.details["effect"]["checks"] == {
        "finite": True,
        "rewards_differ": True,
        "kl_bounded": True,
        "weights_changed": True,
    }
    assert read_manifest(tmp_path / "summary", "summary").parents["reward"] == read_manifest(judge).digest
    files = read_manifest(tmp_path / "model", "model").files
    assert not any("value" in name for name in files)
    load_model(tmp_path / "model")


def test_rewards_rise_at_a_bounded_kl(learner: Path, tmp_path: Path) -> None:
    data = train_step.data_for("ppo", tmp_path / "data", count=8)
    settings = {**SETTINGS["ppo"], "precision": "fp32", "learning_rate": 3e-4, "batch_size": 4, "group_size": 8}
    settings["ppo"] = {"minibatch_size": 16, "kl_coefficient": 0.01, "max_kl": 1.0}
    train_step.run("ppo", {**settings, "max_steps": 6, "save_steps": 50}, str(learner), str(data), str(tmp_path))
    curve = read_summary(tmp_path / "summary").details["curve"]
    assert curve[0]["reward"] < 0.05
    assert curve[-1]["reward"] > 3 * curve[0]["reward"]
    assert 0.1 < curve[-1]["kl"] < 1.0
    assert curve[-1]["value_loss"] < curve[0]["value_loss"]
    assert curve[0]["clipped_share"] > 0


def test_a_policy_that_runs_away_fails_and_says_what_to_try(learner: Path, tmp_path: Path) -> None:
    data = train_step.data_for("ppo", tmp_path / "data", count=4)
    settings = {**SETTINGS["ppo"], "learning_rate": 1e-3, "max_steps": 3}
    settings["ppo"] = {"kl_coefficient": 0.0, "max_kl": 0.05}
    with pytest.raises(TrainingError, match="kl_bounded") as error:
        train_step.run("ppo", settings, str(learner), str(data), str(tmp_path))
    assert "ppo.kl_coefficient" in error.value.fix


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"use_vllm": True}, "use_vllm: false"),
        ({"beta": 0.1}, "ppo.kl_coefficient"),
        ({"updates": 2}, "ppo.epochs"),
        ({"dynamic_sampling": True}, "no dynamic_sampling"),
        ({"overlong_buffer": 0.2}, "no overlong_buffer"),
    ],
)
def test_what_ppo_does_not_do_is_refused_by_the_recipe(asked: dict[str, Any], what: str) -> None:
    RLSettings(**asked)  # GRPO does
    with pytest.raises(ValidationError, match=what):
        RLSettings(algorithm="ppo", **asked)


def test_a_reward_model_that_nothing_would_use_is_refused() -> None:
    for rl in (False, {"algorithm": "grpo"}):
        with pytest.raises(ValidationError, match="say rl.algorithm: ppo"):
            Recipe.model_validate({"name": "unused", "reward_model": {}, "rl": rl})


def test_a_stage_bears_its_algorithms_name() -> None:
    recipe = Recipe.model_validate({"name": "named", "rl": {"algorithm": "ppo"}})
    assert recipe.stages["rl"] == "PPO"
    assert Recipe(name="named").stages["rl"] == "GRPO"
