"""Preference losses against numpy; pairs in the tokens of generation, the likelihood term, held-out pairs."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

import train_step
from train_step import SETTINGS, preferences

from assay.components.contracts.artifacts import read_manifest
from assay.components.contracts.errors import DataError
from assay.components.contracts.recipe import PreferenceSettings
from assay.components.contracts.rows import Message
from assay.components.shared import training
from assay.components.shared.chat import completion_ids, prompt_ids
from assay.components.shared.models import load_model
from assay.components.shared.summary import read_summary
from assay.components.train_preference import losses, preference

TINY = PreferenceSettings(**SETTINGS["preference"], precision="fp32")


pytestmark = pytest.mark.usefixtures("task")


def trainer_on(base: Path, settings: PreferenceSettings, count: int = 2) -> Any:
    model, tokenizer = training.load_trainable(base, settings)
    rows, _ = preference.tokenize(preferences(count), tokenizer, settings.max_tokens)
    return preference.make_trainer(model, tokenizer, rows, settings, seed=0)[0]


def test_a_run_moves_the_margin_and_tells(tiny_model: Path, tmp_path: Path) -> None:
    long = preferences(9)[-1].model_copy(update={"prompt": [Message(role="user", content="take one " * 300)]})
    data = train_step.data_for("preference", tmp_path / "data", [*preferences(8), long])
    train_step.run("preference", SETTINGS["preference"], str(tiny_model), str(data), str(tmp_path))
    told = read_summary(tmp_path / "summary")
    curve = told.details["curve"]
    # The reference is the model it starts from; that it is scored in other batches shows in the last bits of bf16.
    assert curve[0]["margin"] == pytest.approx(0, abs=1e-3)
    assert told.metrics["margin"] > 0.1
    assert told.metrics["accuracy"] > 0.5
    assert {"step", "loss", "learning_rate", "accuracy", "margin"} == curve[0].keys()
    assert {"loss_first", "loss_last", "weight_change", "tokens"} <= told.metrics.keys()
    assert told.details["dropped"] == {"too_long": 1}
    assert told.details["examples"] == 8
    assert told.details["effect"]["checks"]["margin_rose"]
    assert read_manifest(tmp_path / "model", "model").metadata["stage"] == "preference"
    load_model(tmp_path / "model")


def test_a_pair_is_tokenised_as_generation_does(tiny_model: Path, tiny_tokenizer: Any) -> None:
    trainer = trainer_on(tiny_model, TINY)
    batch = next(iter(trainer.get_train_dataloader()))
    made = {
        (tuple(ids[kept.bool()].tolist()), tuple(ids[answer.bool()].tolist()))
        for ids, kept, answer in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
    }
    wanted = set()
    for pair in preferences(2):
        for text in (pair.chosen, pair.rejected):
            answer = completion_ids(tiny_tokenizer, text)
            wanted.add(((*prompt_ids(tiny_tokenizer, pair.prompt), *answer), tuple(answer)))
    assert made == wanted


@pytest.mark.parametrize(
    ("weight", "types", "weights"), [(0.5, ["sigmoid", "sft"], [1.0, 0.5]), (0.0, ["sigmoid"], [1.0])]
)
def test_the_likelihood_term_is_on_or_off(
    weight: float, types: list[str], weights: list[float], tiny_model: Path
) -> None:
    trainer = trainer_on(tiny_model, TINY.model_copy(update={"nll_weight": weight}))
    assert trainer.args.loss_type == types
    assert trainer.args.loss_weights == weights
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, batch))
        chosen = {name: value[:2] for name, value in batch.items()}
        labels = chosen["input_ids"].masked_fill(chosen["completion_mask"] == 0, -100)
        kept = {name: chosen[name] for name in ("input_ids", "attention_mask")}
        likelihood = float(trainer.model(**kept, labels=labels, fused_lm_head=True).loss)
    assert loss == pytest.approx(0.6931 + weight * likelihood, abs=1e-3)  # ln 2: no margin yet


def test_no_pair_that_fits_is_an_error(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="none of the 3 pairs fits into 20 tokens"):
        preference.tokenize(preferences(3), tiny_tokenizer, 20)


def test_with_adapters_the_reference_is_the_model_without_them(tiny_model: Path) -> None:
    trainer = trainer_on(tiny_model, TINY.model_copy(update={"method": "lora", "max_steps": 3}))
    training.train(trainer, training.Watcher([]))
    points = training.curve(trainer, preference.NAMES)
    assert points[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert points[-1]["margin"] != points[0]["margin"]
    assert trainer.ref_model is None


LOSSES = ("dpo", "ipo", "orpo", "kto", "rpo")
BETA = 0.3


def log_sigmoid(values: Any) -> Any:
    return -np.logaddexp(0, -values)


def oracle(loss: str, got: dict[str, Any]) -> float:
    """The papers' formulas on float64 numbers: sums of log-probabilities, lengths, the reference's, prompts."""
    chosen, rejected = got["chosen"], got["rejected"]
    tokens, others = got["chosen_tokens"], got["rejected_tokens"]
    likelihood = -chosen.sum() / tokens.sum()
    if loss == "orpo":
        odds = [np.exp(mean) / (1 - np.exp(mean)) for mean in (chosen / tokens, rejected / others)]
        return float((-chosen / tokens - BETA * log_sigmoid(np.log(odds[0] / odds[1]))).mean())
    plus, minus = chosen - got["ref_chosen"], rejected - got["ref_rejected"]
    if loss == "dpo":
        value = -log_sigmoid(BETA * (plus - minus)).mean()
    elif loss == "ipo":
        value = ((plus / tokens - minus / others - 1 / (2 * BETA)) ** 2).mean()
    elif loss == "kto":
        point = max(0.0, (got["other"] - got["ref_other"]).mean())
        gains = 1 / (1 + np.exp(-BETA * (plus - point))), 1 / (1 + np.exp(-BETA * (point - minus)))
        value = np.concatenate([1 - gains[0], 1 - gains[1]]).mean()
    else:
        unit = got["prompts"] / np.linalg.norm(got["prompts"], axis=1, keepdims=True)
        close = np.exp(-(1 - unit @ unit.T) / 0.5)
        weights = close / close.sum(axis=1, keepdims=True)
        rows = [
            -log_sigmoid(BETA * weights[i, j] * (plus[i] - minus[j]))
            for i in range(len(plus))
            for j in range(len(minus))
        ]
        value = np.mean(rows)
    return float(value + 0.5 * likelihood)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_the_papers(loss: str, tiny_model: Path) -> None:
    trainer = trainer_on(tiny_model, TINY.model_copy(update={"loss": loss, "beta": BETA, "nll_weight": 0.5}), count=4)
    with torch.no_grad():  # away from the reference, where every ratio is 0
        for weight in trainer.model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    rows = trainer.train_dataset.to_list()
    batch = trainer.data_collator(rows)
    loss_value = float(trainer.compute_loss(trainer.model, batch).detach().double())
    with torch.no_grad():
        scored, lengths = trainer.score(trainer.model, batch)
    got = {name: value.double().numpy() for name, value in zip(("chosen", "rejected"), scored.chunk(2), strict=True)}
    got |= {f"{name}_tokens": value.numpy() for name, value in zip(got, lengths.chunk(2), strict=True)}
    got |= {
        f"ref_{name}": np.array([row.get(f"ref_{name}_logps", np.nan) for row in rows])
        for name in ("chosen", "rejected", "other")
    }
    if loss == "kto":
        with torch.no_grad():
            got["other"] = trainer.score(trainer.model, batch["other"])[0].double().numpy()
        assert (got["other"] - got["ref_other"]).mean() != 0
    if loss == "rpo":
        got["prompts"] = np.array([row["prompt_embedding"] for row in rows])
    assert loss_value == pytest.approx(oracle(loss, got), rel=1e-6)


def test_the_losses_on_numbers_worked_out_by_hand() -> None:
    plus, minus = torch.tensor([2.0, 0.0]).double(), torch.tensor([-1.0, 1.0]).double()
    # z0 = 1: sigmoid(1), sigmoid(-1) for the chosen; sigmoid(2), sigmoid(0) for the rejected
    wanted = [(1 - 0.731058578630) + (1 - 0.880797077978), (1 - 0.268941421370) + (1 - 0.5)]
    found = losses.kto(plus, minus, torch.tensor([3.0, -1.0]).double(), beta=1.0)
    assert (2 * found).tolist() == pytest.approx(wanted, abs=1e-9)
    # at p = 1/2 the odds are 1, at p = 1/4 a third: log 3
    found = losses.orpo(torch.tensor([0.5]).double().log(), torch.tensor([0.25]).double().log(), beta=2.0)
    assert float(found) == pytest.approx(0.6931471805599 + 2 * 0.2876820724518, abs=1e-9)
    # one prompt twice: every weight is a half, so (2 − −1)/2, (2 − 1)/2 and (0 − −1)/2, (0 − 1)/2
    found = losses.rpo(plus, minus, torch.ones(2, 3).double(), beta=1.0, temperature=0.5)
    wanted = [
        (np.log1p(np.exp(-1.5)) + np.log1p(np.exp(-0.5))) / 2,
        (np.log1p(np.exp(-0.5)) + np.log1p(np.exp(0.5))) / 2,
    ]
    assert found.tolist() == pytest.approx(wanted, abs=1e-9)


def test_orpo_keeps_its_digits_at_both_ends_and_its_gradient_is_finite() -> None:
    for mean in (-1e-7, -60.0):
        chosen = torch.tensor([mean], dtype=torch.float32, requires_grad=True)
        loss = losses.orpo(chosen, torch.tensor([-1.0]), beta=1.0)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(chosen.grad).all()


def test_no_gradient_flows_through_the_point_of_reference_of_kto() -> None:
    other = torch.tensor([0.5, 0.7], requires_grad=True)
    value = losses.kto(torch.ones(2, requires_grad=True), torch.zeros(2), other, beta=0.1)
    value.sum().backward()
    assert other.grad is None


def test_kto_compares_with_answers_to_other_prompts() -> None:
    rows = [{"prompt_ids": [prompt], "chosen_ids": [answer]} for prompt, answer in ((1, 10), (1, 11), (2, 12))]
    assert preference.answers_to_others(rows) == [[12], [12], [10]]
    with pytest.raises(DataError, match="all pairs are of one prompt"):
        preference.answers_to_others(rows[:2])


def test_prompts_that_differ_are_told_apart(tiny_model: Path) -> None:
    trainer = trainer_on(tiny_model, TINY.model_copy(update={"loss": "rpo"}), count=4)
    every = torch.tensor(trainer.train_dataset["prompt_embedding"])
    assert every.mean(0).abs().max() < 1e-5
    unit = torch.nn.functional.normalize(every, dim=1)
    alike = unit @ unit.T
    assert float(alike.diagonal().min()) == pytest.approx(1, abs=1e-5)
    assert float((alike - torch.eye(4)).max()) < 0.5


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_ranks_held_out_pairs_better(loss: str, tiny_model: Path, tmp_path: Path) -> None:
    data = train_step.data_for("preference", tmp_path / "data", preferences(48))
    settings = {"loss": loss, "holdout": 0.35, "batch_size": 4, "max_steps": 12, "save_steps": 50}
    beta = 1.0 if loss in ("orpo", "kto") else 0.1
    train_step.run(
        "preference",
        {**SETTINGS["preference"], **settings, "beta": beta, "nll_weight": 0.0},
        str(tiny_model),
        str(data),
        str(tmp_path),
    )
    told = read_summary(tmp_path / "summary")
    count = sum(preference.is_held_out(pair.group, 0.35) for pair in preferences(48))
    assert told.metrics["held_out_pairs"] == count
    assert told.details["examples"] == 48 - count
    assert told.metrics["held_out_accuracy_low"] > told.metrics["held_out_accuracy_before"]
    assert f"of {count} held-out pairs" in told.headline


def test_a_batch_of_one_cannot_contrast_prompts() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        PreferenceSettings(loss="rpo", batch_size=1)
