"""DPO: pairs in the tokens of generation, the likelihood term, the margin."""

import sys
from pathlib import Path
from typing import Any

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
from assay.components.train_preference import preference

TINY = PreferenceSettings(**SETTINGS["preference"], precision="fp32")


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASSAY_CPUS", "1")
    monkeypatch.setenv("ASSAY_WORK", str(tmp_path / "work"))
    monkeypatch.delenv("ASSAY_PROGRESS", raising=False)


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
    assert curve[0]["margin"] == pytest.approx(0, abs=1e-5)  # the reference is the model it starts from
    assert told.metrics["margin"] > 0.1
    assert told.metrics["accuracy"] > 0.5
    assert {"step", "loss", "learning_rate", "accuracy", "margin"} == curve[0].keys()
    assert {"loss_first", "loss_last", "weight_change", "tokens"} <= told.metrics.keys()
    assert told.details["dropped"] == {"too_long": 1}
    assert told.details["examples"] == 8
    assert told.details["effect"]["checks"]["margin_moved"]
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
