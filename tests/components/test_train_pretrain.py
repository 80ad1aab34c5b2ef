"""Continued pre-training: blocks token by token, perplexity against a plain loop, the gate's two branches."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kfp import dsl
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

import train_step
from train_step import SETTINGS

from assay.components.contracts.artifacts import read_manifest, seal
from assay.components.contracts.errors import DataError, TrainingError
from assay.components.contracts.recipe import PretrainSettings
from assay.components.contracts.rows import Example, Message, write_rows
from assay.components.shared import training
from assay.components.shared.models import load_model
from assay.components.shared.summary import read_summary
from assay.components.train_pretrain import corpus, perplexity, pretrain
from assay.components.train_pretrain.component import train_pretrain

TINY = PretrainSettings(**SETTINGS["pretrain"], precision="fp32")


pytestmark = pytest.mark.usefixtures("task")


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_every_format_gives_the_same_documents_each_once(tmp_path: Path) -> None:
    texts = ["one\ntwo", "drei Grüße", "one\ntwo", "4"]
    lines = "\n".join(json.dumps({"text": text, "id": 1}) for text in texts)
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "text": texts}), tmp_path / "a.parquet")
    files = [
        write(tmp_path / "a.jsonl", "\ufeff" + lines.replace("\n", "\r\n") + "\n\n"),
        write(tmp_path / "a.txt", "\n\n" + "\n \n\n".join(texts) + "\n"),
        tmp_path / "a.parquet",
    ]
    for file in files:
        assert corpus.read_documents(file) == (["one\ntwo", "drei Grüße", "4"], 1), file.suffix
    (tmp_path / "_SUCCESS").touch()
    assert corpus.read_documents(tmp_path) == (["one\ntwo", "drei Grüße", "4"], 9)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", "\n \n", "there is no document"),
        ("a.jsonl", '{"text": "a"}\n{"body": "b"}', r"a\.jsonl:2: there is no 'text', but \['body'\]"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}', r"a\.jsonl:2: the document is int, not text"),
        ("a.jsonl", '{"text": null}', "is NoneType, not text"),
        ("a.jsonl", '{"text": "a", "text": "b"}', "not one JSON object"),
        ("a.jsonl", '["a"]', "not one JSON object"),
        ("a.jsonl", '{"text": "  "}', "the document is empty"),
        ("a.jsonl", '{"text": "a\\u0000b"}', "NUL or half a character"),
        ("a.jsonl", '{"text": "a\\ud800b"}', "NUL or half a character"),
        ("a.txt", b"good\n\nbad \xff", "byte 10 is not UTF-8"),
        ("a.csv", "text\na", "the format is not known"),
        ("a.parquet", "PAR1", "cannot be read as Parquet"),
    ],
)
def test_what_is_no_text_says_where(name: str, data: str | bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        corpus.read_documents(write(tmp_path / name, data))


def test_a_table_without_text_and_a_row_without_it(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text', but \['body'\]"):
        corpus.read_documents(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="row 2: the document is NoneType"):
        corpus.read_documents(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="no such file"):
        corpus.read_documents(tmp_path / "c.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no file"):
        corpus.read_documents(tmp_path / "empty")


def test_the_split_is_by_the_text_alone() -> None:
    documents = [f"document {number}" for number in range(1000)]
    learned, apart = corpus.split(documents, 0.2)
    assert sorted(learned + apart) == sorted(documents)
    assert 150 < len(apart) < 250
    assert learned == [text for text in documents if text not in apart]
    assert corpus.split(documents[::-1], 0.2)[1] == apart


def test_blocks_are_the_stream_cut_with_one_end_between_documents(tiny_tokenizer: Any) -> None:
    texts = ["Take one tablet.", "Twice a day", "as needed for pain, at most six"]
    end = tiny_tokenizer.eos_token_id
    stream = [end]
    for text in texts:
        stream += [*tiny_tokenizer(text)["input_ids"], end]
    assert stream.count(end) == 4
    for size in (2, 5, 7, len(stream) - 1, len(stream), 100):
        made = corpus.blocks(corpus.sequences(texts, tiny_tokenizer), size)
        joined = [token for block in made for token in block]
        assert joined == stream[: len(joined)]
        assert len(stream) - len(joined) == (1 if len(stream) % size == 1 else 0)  # a last token alone
        assert all(len(block) == size for block in made[:-1])


def test_every_token_of_a_block_is_a_label(tiny_model: Path) -> None:
    settings = TINY.model_copy(update={"max_tokens": 16, "batch_size": 64, "max_steps": 1})
    model, tokenizer = training.load_trainable(tiny_model, settings)
    texts = [f"Take {number} tablets by mouth every {number + 3} hours." for number in range(6)]
    rows = pretrain.make_rows(texts, tokenizer, 16)
    trainer, _ = pretrain.make_trainer(model, tokenizer, rows, settings, seed=0)
    (batch,) = list(trainer.get_train_dataloader())
    seen = set()
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        count = int(mask.sum())
        assert torch.equal(ids[:count], labels[:count])
        assert (labels[count:] == training.IGNORED).all()
        seen.add(tuple(ids[:count].tolist()))
    assert seen == {tuple(row["input_ids"]) for row in rows}
    assert len(rows) > 4
    wanted = []  # the loss, token by token
    plain = load_model(tiny_model)
    for row in rows:
        with torch.no_grad():
            scores = plain(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        wanted += [-float(scores[place, token]) for place, token in enumerate(row["input_ids"][1:])]
    found = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    assert float(found.detach()) == pytest.approx(np.mean(wanted), rel=1e-5)


@pytest.mark.parametrize("window", [4, 7, 512])
def test_perplexity_is_a_plain_loops(window: int, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 24)
    model = load_model(tiny_model)
    draw = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 1000, (size,), generator=draw).tolist() for size in (2, 13, 5, 30, 4, 7, 8)]
    wanted = []
    for document in documents:
        total = 0.0
        for place in range(1, len(document)):
            begin = (place - 1) // (window - 1) * (window - 1)  # where the piece that scores this token begins
            with torch.no_grad():
                logits = model(torch.tensor([document[begin:place]])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[document[place]])
        wanted.append(total / (len(document) - 1))
    assert perplexity.log_perplexities(model, documents, window) == pytest.approx(wanted, rel=1e-6)


def test_the_interval_is_students() -> None:
    from scipy.stats import ttest_rel

    draw = np.random.default_rng(0)
    old, new = draw.normal(3, 1, 20), draw.normal(2.8, 1, 20)
    found = perplexity.mean_difference(new.tolist(), old.tolist(), 0.9)
    wanted = ttest_rel(new, old).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.mean == pytest.approx((new - old).mean())


def planted(mean: float, spread: float, count: int = 16) -> perplexity.Measured:
    """Paired differences of a known mean, half of them above it and half below."""
    before = [3.0 + place / 10 for place in range(count)]
    after = [value + mean + (spread if place % 2 else -spread) for place, value in enumerate(before)]
    return perplexity.Measured(before, after)


@pytest.mark.parametrize(
    ("domain", "general", "kept", "words"),
    [
        ((-0.2, 0.05), (0.01, 0.01), True, "the stage's output goes on"),
        ((-0.2, 0.05), (-0.01, 0.01), True, "goes on"),
        ((-0.2, 0.50), (0.01, 0.01), False, "not certainly better on the domain, so left out"),
        ((0.1, 0.01), (0.0, 0.01), False, "not certainly better on the domain"),
        ((-0.2, 0.05), (0.12, 0.01), False, "general text may be worse by more than × 1.1, so left out"),
        ((-0.2, 0.05), (0.05, 0.15), False, "general text may be worse"),  # its mean is below, its upper end is not
    ],
)
def test_the_gate_on_planted_numbers(domain: Any, general: Any, kept: bool, words: str) -> None:
    verdict = perplexity.decide(planted(*domain), planted(*general), 1.10, 0.95)
    assert verdict.kept is kept
    assert words in verdict.reason
    assert f"× {math.exp(domain[0]):.3f} [" in verdict.reason
    assert verdict.domain.mean == pytest.approx(domain[0])
    assert verdict.general.n == 16


def run(base: Path, text: Path, output: Path, **settings: Any) -> None:
    train_step.run("pretrain", {**SETTINGS["pretrain"], **settings}, str(base), str(text), str(output))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_learns_the_domain_saves_and_tells(method: str, tiny_model: Path, tmp_path: Path) -> None:
    text = train_step.data_for("pretrain", tmp_path / "text", count=16)
    run(tiny_model, text, tmp_path, method=method, max_tokens=64)
    told, verdict = read_summary(tmp_path / "summary"), read_summary(tmp_path / "verdict")
    assert told.metrics["domain_perplexity"] < told.metrics["domain_perplexity_before"]
    assert told.metrics["kept"] == 1
    assert verdict.details["chosen"] == "challenger"
    assert verdict.details["metric"] == "log_perplexity"
    assert verdict.details.keys() >= {"incumbent", "challenger", "difference", "reason"}
    learned, apart = corpus.split(corpus.read_documents(text)[0], 0.4)
    assert told.metrics["documents"] == len(learned)
    assert f"on {min(8, len(apart))} documents)" in str(verdict.details["reason"])
    manifest, base = read_manifest(tmp_path / "model", "model"), read_manifest(tiny_model)
    assert manifest.metadata["stage"] == "pretrain"
    assert manifest.parents == {"base": base.digest}
    before, after = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert "model.embed_tokens.weight" not in changed


def test_a_model_that_forgets_too_much_is_left_out_and_the_base_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    text = train_step.data_for("pretrain", tmp_path / "text", count=16)
    run(tiny_model, text, tmp_path, max_general_rise=1.0)
    told, verdict = read_summary(tmp_path / "summary"), read_summary(tmp_path / "verdict")
    assert told.metrics["kept"] == 0
    assert "left out" in told.headline
    assert verdict.details["chosen"] == "incumbent"
    assert told.metrics["general_rise_high"] > 1
    assert read_manifest(tmp_path / "model", "model") == read_manifest(tiny_model, "model")


def held_out(folder: Path, question: str) -> Path:
    """Splits of which the test asks what a document of the corpus says."""
    for split, text in (("validation", "something else"), ("test", question)):
        row = Example(id=split, group=split, prompt=[Message(role="user", content=text)], reference="x")
        write_rows(folder / f"{split}.parquet", [row], Example)
    seal(folder, "splits")
    return folder


def test_documents_that_hold_a_held_out_row_are_left_out(tmp_path: Path) -> None:
    question = " ".join(f"word{place}" for place in range(20))
    documents = ["a chapter", f"Before. {question} After.", "another chapter"]
    data = held_out(tmp_path / "data", question.upper())
    assert pretrain.without_held_out(documents, str(data)) == (["a chapter", "another chapter"], 1)


def test_general_text_of_ones_own_is_measured_instead_of_samples(tiny_model: Path, tmp_path: Path) -> None:
    text = train_step.data_for("pretrain", tmp_path / "text", count=16)
    general = write(tmp_path / "general.txt", "\n\n".join(f"The weather of day {day} is fair." for day in range(12)))
    settings = TINY.model_copy(update={"max_held_out": 5, "min_held_out": 4})
    made = pretrain.general_text(settings, 0, str(tiny_model), str(general))
    tokenizer = training.load_tokenizer(tiny_model)
    assert len(made) == 5
    assert all(ids[0] == ids[-1] == tokenizer.eos_token_id for ids in made)
    assert all(tokenizer.decode(ids[1:-1]).startswith("The weather of day") for ids in made)
    train_pretrain.python_func(
        settings=SETTINGS["pretrain"],
        task="medication_directions",
        seed=1,
        base=dsl.Model(uri=str(tiny_model)),
        corpus=dsl.Dataset(uri=str(text)),
        model=dsl.Model(uri=str(tmp_path / "model")),
        summary=dsl.Metrics(uri=str(tmp_path / "summary")),
        verdict=dsl.Metrics(uri=str(tmp_path / "verdict")),
        general=dsl.Dataset(uri=str(general)),
        data=dsl.Dataset(uri=str(held_out(tmp_path / "data", corpus.read_documents(text)[0][0]))),
    )
    told: Any = read_summary(tmp_path / "summary")
    assert told.details["dropped"]["contaminated_documents"] == 1
    assert "data" in read_manifest(tmp_path / "summary").parents
    assert "general" in read_summary(tmp_path / "verdict").headline
    with pytest.raises(DataError, match="2 documents to measure, and 4 are wanted"):
        pretrain.general_text(settings, 0, str(tiny_model), str(write(tmp_path / "two.txt", "one\n\ntwo")))


def test_the_samples_rise_is_an_estimate_of_the_divergence(tiny_model: Path, tmp_path: Path) -> None:
    """One-token samples: their mean surprise less the base's own, against the sum over the vocabulary."""
    model, other = load_model(tiny_model), load_model(tiny_model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(3)
    settings = TINY.model_copy(update={"max_held_out": 2000, "general_tokens": 1})
    samples = pretrain.general_text(settings, 3, str(tiny_model), None)
    assert {len(ids) for ids in samples} == {2}
    rise = np.subtract(*(perplexity.log_perplexities(one, samples, 16) for one in (other, model)))
    with torch.no_grad():
        p, q = (one(torch.tensor([samples[0][:1]])).logits[0, -1].double().log_softmax(-1) for one in (model, other))
    exact = float((p.exp() * (p - q)).sum())
    assert exact > 0.01
    assert rise.mean() == pytest.approx(exact, abs=4 * rise.std() / math.sqrt(len(rise)))


def test_too_little_text_is_refused_before_any_training(tiny_model: Path, tmp_path: Path) -> None:
    text = train_step.data_for("pretrain", tmp_path / "text")
    with pytest.raises(DataError, match="100 are wanted") as error:
        run(tiny_model, text, tmp_path, min_held_out=100, max_held_out=100)
    assert "raise holdout" in error.value.fix
    assert not (tmp_path / "work").exists() or not list((tmp_path / "work").glob("checkpoints/*"))
    with pytest.raises(DataError, match="no document is left to train on"):
        pretrain.make_rows([], None, 16)


def test_a_run_that_changes_no_weight_fails(tiny_model: Path, tmp_path: Path) -> None:
    text = train_step.data_for("pretrain", tmp_path / "text")
    with pytest.raises(TrainingError, match="nothing was learned.*weights changed by 0"):
        run(tiny_model, text, tmp_path, learning_rate=1e-12, max_steps=2)


def test_settings_that_measure_too_little_are_refused() -> None:
    with pytest.raises(ValueError, match="max_held_out must not be below"):
        PretrainSettings(corpus="a", min_held_out=10, max_held_out=5)
