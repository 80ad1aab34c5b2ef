"""Contrastive training: the loss against numpy, the batches, and that an encoder gets better at what it was taught."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kfp import dsl

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

import train_step
from train_step import SETTINGS

from assay.components.contracts.artifacts import read_manifest
from assay.components.contracts.errors import DataError, RecipeError, TrainingError
from assay.components.contracts.recipe import EmbeddingSettings
from assay.components.contracts.rows import Example, Message
from assay.components.shared import training
from assay.components.shared.embed import Encoding, embed, pool, read_encoding
from assay.components.shared.models import load_model
from assay.components.shared.retrieval import passage, question
from assay.components.shared.summary import read_summary
from assay.components.train_embedding import contrastive as work
from assay.components.train_embedding.component import train_embedding

ENCODING = Encoding(pooling="mean", query_prefix="", lowercase=False, layers=2, dimensions=64)


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASSAY_CPUS", "1")
    monkeypatch.setenv("ASSAY_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ASSAY_PROGRESS", raising=False)


def row(text: str, asked: str, answer: str = "yes") -> Example:
    turns = [Message(role="system", content=text), Message(role="user", content=asked)]
    return Example(id=f"{text}{asked}", group=text, prompt=turns, reference=answer)


def train(base: Path, folder: Path, rows: list[Example] | None = None, count: int = 8, **settings: Any) -> Path:
    data = train_step.data_for("embedding", folder / "data", rows, count)
    train_embedding.python_func(
        settings={**SETTINGS["embedding"], **settings},
        task="pharmacy_retrieval",
        seed=1,
        base=dsl.Model(uri=str(base)),
        data=dsl.Dataset(uri=str(data)),
        model=dsl.Model(uri=str(folder / "model")),
        summary=dsl.Metrics(uri=str(folder / "summary")),
    )
    return folder


def test_the_loss_is_that_of_the_formula() -> None:
    draw = np.random.default_rng(0)
    questions, passages = draw.normal(size=(5, 16)), draw.normal(size=(9, 16))
    questions /= np.linalg.norm(questions, axis=1, keepdims=True)
    passages /= np.linalg.norm(passages, axis=1, keepdims=True)
    right = np.array([3, 0, 8, 8, 2])
    scores = questions @ passages.T / 0.07
    wanted = np.mean([np.log(np.exp(line).sum()) - line[place] for line, place in zip(scores, right, strict=True)])
    tensors = (torch.tensor(questions), torch.tensor(passages), torch.tensor(right))
    loss, first = work.info_nce(*tensors, temperature=0.07)
    assert float(loss) == pytest.approx(wanted, abs=1e-6)
    assert float(first) == pytest.approx(np.mean(scores.argmax(1) == right))


def test_a_passage_that_two_questions_ask_for_is_wrong_for_neither() -> None:
    collate = work.Collator([[10], [11], [12]], padding=0)
    rows = [
        {"question": [1, 2], "passage": 0, "negatives": [1]},
        {"question": [3], "passage": 0, "negatives": [2]},
        {"question": [4], "passage": 1, "negatives": [0]},
    ]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[1, 2], [3, 0], [4, 0], [10, 0], [11, 0], [12, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [2, 1, 1, 1, 1, 1]
    assert batch["right"].tolist() == [0, 0, 1]


def test_equal_passages_are_one_however_they_are_written(tiny_tokenizer: Any) -> None:
    rows = [row("Keep it cold.", "how cold?"), row("keep  it COLD.", "where?"), row("Keep it dry.", "how dry?")]
    asked, dropped = work.tokenize(rows, tiny_tokenizer, EmbeddingSettings(batch_size=2), ENCODING)
    assert asked.passages == ["Keep it cold.", "Keep it dry."]
    assert asked.right == [0, 0, 1]
    assert dropped == {"too_long": 0}


def test_hard_negatives_share_words_and_are_never_the_right_passage(tiny_tokenizer: Any) -> None:
    rows = [
        row("Zelto is kept below 8 °C.", "zelto, how cold?"),
        row("Zelto is taken at noon.", "when is zelto taken?"),
        row("Rubra is green.", "colour?"),
    ]
    asked, _ = work.tokenize(rows, tiny_tokenizer, EmbeddingSettings(batch_size=2), ENCODING)
    assert work.hard_negatives(asked, 1)[:2] == [[1], [0]]
    assert all(len(wrong) == 2 and place not in wrong for place, wrong in enumerate(work.hard_negatives(asked, 5)))
    assert work.hard_negatives(asked, 0) == [[], [], []]


def test_long_rows_are_dropped_and_counted_and_too_few_are_refused(tiny_tokenizer: Any) -> None:
    settings = EmbeddingSettings(batch_size=2, max_tokens=16)
    long = row("word " * 40, "what?")
    kept, dropped = work.tokenize([row("a", "b"), row("c", "d"), long], tiny_tokenizer, settings, ENCODING)
    assert (len(kept.questions), dropped) == (2, {"too_long": 1})
    with pytest.raises(DataError, match="1 of 2 rows fit into 16 tokens; a step takes 2"):
        work.tokenize([row("a", "b"), long], tiny_tokenizer, settings, ENCODING)


def test_the_trainers_vectors_are_the_encoders(tiny_model: Path, tiny_tokenizer: Any) -> None:
    """Packed for training and padded for use, a text has one vector."""
    settings = EmbeddingSettings(**SETTINGS["embedding"], precision="fp32")
    model, tokenizer = training.load_trainable(tiny_model, settings)
    asked, _ = work.tokenize(train_step.questions(4), tokenizer, settings, ENCODING)
    rows = asked.with_negatives(work.hard_negatives(asked, 1))
    trainer, _ = work.make_trainer(model, tokenizer, rows, asked.passage_ids, settings, seed=0)
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        states, place = training.hidden_states(model, batch["input_ids"], batch["attention_mask"], use_cache=False)
        packed = pool(states[place], batch["attention_mask"], "mean").numpy()
    texts = asked.questions + [asked.passages[at] for at in dict.fromkeys([r["passage"] for r in rows])]
    np.testing.assert_allclose(packed[: len(texts)], embed(tiny_model, texts, ENCODING), atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"method": "lora", "pooling": "last"}, {"layers": 1, "lowercase": True}])
def test_an_encoder_learns_its_questions(changes: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    folder = train(tiny_model, tmp_path, count=16, batch_size=8, max_steps=24, precision="fp32", **changes)
    told, made = read_summary(folder / "summary"), read_manifest(folder / "model", "model")
    encoding = read_encoding(folder / "model")
    rows = train_step.questions(16)

    def hits(model: Path) -> int:
        asked = embed(model, [question(one) for one in rows], encoding)
        scores = asked @ embed(model, [passage(one) for one in rows], encoding).T
        return int((scores.argmax(1) == np.arange(16)).sum())

    assert hits(folder / "model") > hits(tiny_model)
    assert told.metrics["loss_last"] < told.metrics["loss_first"]
    assert told.metrics["passages"] == 16
    assert made.metadata["stage"] == "embedding"
    assert "embedding.json" in made.files
    assert load_model(folder / "model").config.num_hidden_layers == encoding.layers == changes.get("layers", 2)


def test_equal_runs_give_equal_bytes(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name in ("one", "two"):
        monkeypatch.setenv("ASSAY_WORK", str(tmp_path / name / "work"))
        train(tiny_model, tmp_path / name)
        made.append([read_manifest(tmp_path / name / part).digest for part in ("model", "summary")])
    assert made[0] == made[1]


def test_what_taught_nothing_fails(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing was learned"):
        train(tiny_model, tmp_path, learning_rate=1e-12)


def test_more_layers_than_there_are_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the model has 2 layers"):
        train(tiny_model, tmp_path, layers=3)
