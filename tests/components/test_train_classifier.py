"""A classifier on frozen features: what is read, what is fitted, what is answered, and what a kill leaves."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kfp import dsl

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

import train_step

from assay.components.contracts.artifacts import link_tree, read_manifest, seal
from assay.components.contracts.errors import DataError, ModelError, TrainingError
from assay.components.contracts.recipe import EvaluateSettings
from assay.components.contracts.rows import Example, Message, write_rows
from assay.components.shared import features as reading
from assay.components.shared.chat import prompt_ids
from assay.components.shared.classifier import Head, choose, read_head, save_head
from assay.components.shared.features import POOLINGS, Features
from assay.components.shared.generate import Generator, greedy_responses, open_generator
from assay.components.shared.measure import measure, tabulate
from assay.components.shared.models import load_model, model_digest, model_files
from assay.components.shared.summary import read_summary
from assay.components.shared.tasks.task import get_task
from assay.components.train_classifier import extract, fit, train

TASK = get_task("product_content")
SETTINGS: dict[str, Any] = {"layers": [1], "folds": 2, "shard_rows": 16, "probe_rows": 32, "iterations": 60}
WORDS = {"publish": "quiet", "contradiction": "thunder", "wrong_unit": "7 mm"}


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASSAY_CPUS", "1")
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ASSAY_WORK", str(tmp_path / "work"))
    monkeypatch.delenv("ASSAY_PROGRESS", raising=False)


def example(number: int, label: str, text: str) -> Example:
    prompt = TASK.prompt(f"Title: {text}")
    return Example(id=f"{number:032x}", group=str(number), prompt=prompt, reference=label)


def examples(count: int, start: int = 0) -> list[Example]:
    """Return rows in which a word tells the label, among words that do not."""
    labels = list(WORDS)
    return [
        example(n, labels[n % 3], f"lamp {n * 7919 % 1000} {WORDS[labels[n % 3]]}" + " so it goes" * (n % 4))
        for n in range(start, start + count)
    ]


def splits(folder: Path, rows: Sequence[Example] | None = None, held: Sequence[Example] | None = None) -> Path:
    write_rows(folder / "sft.parquet", list(examples(72) if rows is None else rows), Example)
    write_rows(folder / "validation.parquet", list(examples(30, 500) if held is None else held), Example)
    seal(folder, "splits")
    return folder


def run(base: Path, data: Path, output: Path, **settings: Any) -> Path:
    train_step.run("classifier", {**SETTINGS, **settings}, str(base), str(data), str(output))
    return output / "model"


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `summary` and `data` of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("classifier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASSAY_CPUS", "1")
        patch.setenv("ASSAY_WORK", str(folder / "work"))
        run(tiny_model, splits(folder / "data"), folder)
    return folder


def prompts_of(rows: Sequence[Example], tokenizer: Any) -> list[list[int]]:
    return [prompt_ids(tokenizer, row.prompt) for row in rows]


def plain(model: Any, prompt: list[int], layer: int, skipped: int) -> torch.Tensor:
    """Return the features of one prompt by transformers' own forward pass: [poolings, size]."""
    with torch.no_grad():
        hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[layer][0].double()
    states = hidden / (hidden.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    own = states[skipped:] if len(prompt) > skipped else states[-1:]
    return torch.stack([states[-1], own.mean(0), own.amax(0)])


@pytest.mark.parametrize("quick", [True, False], ids=["decoder", "transformers"])
def test_features_are_those_of_a_plain_pass_one_prompt_at_a_time(
    quick: bool, base_model: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(base_model)
    model.model.layers = model.model.layers[:4]
    prompts = prompts_of(examples(7), tiny_tokenizer)
    rubric = prompts[0][: extract.shared_tokens(prompts)]
    stranger = prompt_ids(tiny_tokenizer, [Message(role="user", content="lamp " * 90)])
    short = prompt_ids(tiny_tokenizer, [Message(role="user", content="?")])
    assert len(short) < len(rubric) < len(stranger)
    asked = [*prompts, stranger, short]
    if not quick:
        monkeypatch.setattr(reading, "is_supported", lambda model: False)
    found = Features(model, [1, 3], rubric, torch.float32)(asked)
    assert found.shape == (9, 2, len(POOLINGS), 576)
    for prompt, one in zip(asked, found, strict=True):
        for place, layer in enumerate([1, 3]):
            wanted = plain(model, prompt, layer, len(rubric))
            torch.testing.assert_close(one[place].double(), wanted, atol=4e-3, rtol=2e-3)  # fp16 of values up to 8
    assert found.float().abs().max() < 100


def test_features_of_a_prompt_do_not_depend_on_what_else_is_asked(tiny_model: Path, tiny_tokenizer: Any) -> None:
    prompts = prompts_of(examples(40), tiny_tokenizer)
    reader = Features(load_model(tiny_model), [1], prompts[0][:60], torch.float32)
    together, alone = reader(prompts), torch.cat([reader([prompt]) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


def test_probabilities_are_a_softmax_that_can_be_worked_by_hand() -> None:
    head = Head(
        labels=["a", "b"],
        layers=[1],
        pooling=["mean"],
        rubric=[],
        temperature=2.0,
        weights=torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
        bias=torch.tensor([0.0, 1.0]),
    )
    features = torch.tensor([[[[9.0, 9.0], [2.0, 0.5], [9.0, 9.0]]]])  # last, mean, max of one layer
    # logits 2 and 2·0.5 + 1 = 2, so even; with mean (4, 0.5): 4 and 2, halved 2 and 1
    torch.testing.assert_close(head.probabilities(features), torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    features[0, 0, 1, 0] = 4
    likely = 1 / (1 + math.exp(1 - 2))
    torch.testing.assert_close(head.probabilities(features), torch.tensor([[likely, 1 - likely]], dtype=torch.float64))
    assert choose(features, ["last", "max"]).tolist() == [[9.0, 9.0, 9.0, 9.0]]


def test_the_fit_is_the_minimum_whatever_the_blocks() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(90, 5, generator=draw) * torch.tensor([1.0, 10.0, 0.1, 1.0, 0.0]) + 3
    wanted = (features[:, 0] + torch.randn(90, generator=draw) > 3).long()
    whole = fit.fit(lambda: [(features, wanted)], 2, 0.01, 300)
    parts = fit.fit(lambda: [(features[at : at + 20], wanted[at : at + 20]) for at in range(0, 90, 20)], 2, 0.01, 300)
    torch.testing.assert_close(whole.weights, parts.weights, atol=1e-3, rtol=1e-3)
    assert whole.objective[0] == pytest.approx(math.log(2))
    assert whole.objective == sorted(whole.objective, reverse=True)
    assert not whole.weights[:, 4].any()  # constant: left out
    # At the minimum the slope is 0: of the bias, the mean error of each label.
    error = whole.logits(features).softmax(-1) - torch.nn.functional.one_hot(wanted)
    assert error.mean(0).abs().max() < 1e-4
    from sklearn.linear_model import LogisticRegression

    scaled = ((features - features.mean(0)) / features.std(0, correction=0).clamp(min=1e-3)).numpy()
    # sklearn's objective: C · sum of losses + ½‖w‖², of one weight vector for two labels (here: their difference)
    other = LogisticRegression(C=1 / (90 * 0.01 / 2), max_iter=1000, tol=1e-8).fit(scaled, wanted.numpy())
    theirs = torch.tensor(other.predict_proba(scaled)).double()
    torch.testing.assert_close(whole.logits(features).softmax(-1), theirs, atol=2e-3, rtol=0)


@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_the_temperature_undoes_confidence_that_is_too_high_or_too_low(factor: float) -> None:
    draw = torch.Generator().manual_seed(1)
    honest = torch.randn(4000, 3, generator=draw, dtype=torch.float64) * 2
    wanted = torch.multinomial(honest.softmax(-1), 1, generator=draw)[:, 0]
    temperature = fit.find_temperature(honest * factor, wanted)
    assert temperature == pytest.approx(factor, rel=0.1)
    before, after = fit.likelihood(honest * factor, wanted), fit.likelihood(honest * factor, wanted, temperature)
    assert after < before if factor != 1 else after <= before


def test_a_run_learns_saves_and_tells(trained: Path, tiny_model: Path) -> None:
    told = read_summary(trained / "summary")
    assert told.metrics["validation_accuracy"] > 0.8  # a third by chance; the features are of a random model
    assert told.metrics["loss_last"] < told.metrics["loss_first"] == pytest.approx(math.log(3))
    assert told.metrics["examples"] == 72
    assert told.details["labels"] == {"contradiction": 24, "publish": 24, "wrong_unit": 24}
    assert told.details["dropped"] == {"too_long": 0, "unknown_label": 0}
    assert told.details["effect"]["ok"]
    assert [point["step"] for point in told.details["curve"]][:3] == [0, 1, 2]
    tried = told.details["candidates"]
    assert len(tried) == len(train.POOLINGS) + 2
    assert [one["nll"] for one in tried] == sorted(one["nll"] for one in tried)
    base, made = read_manifest(tiny_model, "model"), read_manifest(trained / "model", "model")
    assert made.metadata == {"reference": "tiny", "stage": "classifier", "task": "medication_directions"}
    assert made.parents == {"base": base.digest, "data": read_manifest(trained / "data").digest}
    assert made.files.keys() - base.files.keys() == {"classifier.json", "classifier.safetensors"}
    assert {name: made.files[name] for name in base.files} == base.files
    weights = trained / "model" / "model.safetensors"
    assert weights.stat().st_ino == (tiny_model / "model.safetensors").stat().st_ino
    assert not (tiny_model / "classifier.json").exists()


def test_the_folder_answers_like_any_other(trained: Path, tiny_model: Path, tiny_tokenizer: Any) -> None:
    folder, rows = trained / "model", examples(30, 900)
    prompts = prompts_of(rows, tiny_tokenizer)
    answers = greedy_responses(folder, prompts, max_new_tokens=6)
    head = read_head(folder)
    assert head is not None
    assert {answer.text for answer in answers} <= set(head.labels)
    assert sum(answer.text == row.reference for answer, row in zip(answers, rows, strict=True)) > 24
    assert all(answer.finished and answer.ids[-1] == tiny_tokenizer.eos_token_id for answer in answers)
    assert all(1 / 3 <= (answer.confidence or 0) <= 1 for answer in answers)
    # The same from the cache, from the features themselves, and from the opened folder that a server asks.
    assert greedy_responses(folder, prompts, max_new_tokens=6) == answers
    opened = open_generator(folder, load_model(folder), tiny_tokenizer)
    assert [one.text for [one] in opened.generate(prompts, max_new_tokens=6)] == [one.text for one in answers]
    (twice,) = opened.generate(prompts[:1], max_new_tokens=6, temperature=1.0, samples=2)
    assert twice[0] == twice[1]
    base = open_generator(tiny_model, load_model(tiny_model), tiny_tokenizer)
    assert type(base) is Generator
    assert greedy_responses(tiny_model, prompts[:1], max_new_tokens=6)[0].text not in head.labels


def test_an_answer_that_does_not_fit_is_cut_as_any_other(trained: Path, tiny_tokenizer: Any) -> None:
    (answer,) = greedy_responses(trained / "model", prompts_of(examples(1), tiny_tokenizer), max_new_tokens=1)
    assert not answer.finished
    assert len(answer.ids) == 1


def test_a_changed_head_is_another_model(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    head = read_head(trained / "model")
    assert head is not None
    link_tree(tiny_model, tmp_path / "one")
    (tmp_path / "one" / "manifest.json").unlink()
    without = model_digest(tmp_path / "one")
    save_head(head, tmp_path / "one")
    before = model_digest(tmp_path / "one")
    assert before != without
    link_tree(tmp_path / "one", tmp_path / "two")
    save_head(Head(**{**vars(head), "temperature": 9.0}), tmp_path / "two")
    assert model_digest(tmp_path / "two") != before
    assert model_digest(tmp_path / "one") == before  # linked files are replaced, not written into
    assert {"classifier.json", "classifier.safetensors"} <= {path.name for path in model_files(tmp_path / "one")}
    (tmp_path / "two" / "classifier.safetensors").write_bytes(b"{}")
    with pytest.raises(ModelError, match="the classifier cannot be read"):
        read_head(tmp_path / "two")


def test_confidence_becomes_a_score_and_a_calibration_error(trained: Path, tiny_model: Path) -> None:
    rows, settings = examples(24, 900), EvaluateSettings(max_new_tokens=4)
    for folder in (trained / "model", tiny_model):
        results = measure("arm", folder, TASK, rows, settings)
        for row in results:
            confidence = row.scores["confidence"]
            assert confidence is not None
            assert 0 < confidence <= 1
            assert row.scores["brier"] == pytest.approx((confidence - (row.scores["exact"] or 0)) ** 2)
        table = tabulate(results, TASK.metrics, 0.95)
        assert table["ece"]["low"] <= table["ece"]["mean"] <= table["ece"]["high"]
        assert table["brier"]["n"] == table["ece"]["n"] == 24


def test_a_language_models_confidence_is_the_product_of_its_tokens(tiny_model: Path, tiny_tokenizer: Any) -> None:
    model = load_model(tiny_model)
    prompts = prompts_of(examples(3), tiny_tokenizer)
    fast = Generator(model, tiny_tokenizer, torch.float32)
    slow = Generator(model, tiny_tokenizer, torch.float32)
    slow.decoder = None
    for generator in (fast, slow):
        for index, [one] in generator.run(prompts, [0, 1, 2], 4, confidence=True):
            prompt = prompts[index]
            with torch.no_grad():
                every = model(torch.tensor([prompt + one.ids])).logits[0].double().log_softmax(-1)
            wanted = sum(float(every[len(prompt) - 1 + at, token]) for at, token in enumerate(one.ids))
            assert one.confidence == pytest.approx(math.exp(wanted), rel=1e-3)
    assert all(one.confidence is None for _, [one] in fast.run(prompts, [0, 1, 2], 4))


def test_two_runs_have_the_same_bytes(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    run(tiny_model, trained / "data", tmp_path)
    for name in ("model", "summary"):
        assert read_manifest(tmp_path / name) == read_manifest(trained / name)


def test_rows_beyond_the_probe_are_read_at_the_chosen_layer_only(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depths = []
    taken = Features.__call__

    def noted(self: Features, prompts: Sequence[list[int]]) -> torch.Tensor:
        depths.append((self.layers, len(self.decoder.layers) if self.decoder else 0, len(prompts)))
        return taken(self, prompts)

    monkeypatch.setattr(Features, "__call__", noted)
    run(base_model, splits(tmp_path / "data", examples(36), examples(6, 500)), tmp_path, layers=[1, 2], probe_rows=16)
    chosen = read_summary(tmp_path / "summary").details["candidates"][0]["layers"]
    deep = max(chosen)
    assert depths == [([1, 2], 2, 16), (chosen, deep, 16), (chosen, deep, 4), (chosen, deep, 6)]
    head = read_head(tmp_path / "model")
    assert head is not None
    assert head.layers == chosen


def test_a_killed_extraction_ends_with_the_same_bytes(
    trained: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo, work = tmp_path / "progress", tmp_path / "work"
    os.mkfifo(fifo)
    job = {"stage": "classifier", "settings": SETTINGS, "base": str(tiny_model), "data": str(trained / "data")}
    job |= {"output": str(tmp_path), "work": str(work), "progress": str(fifo)}
    one_core = {"ASSAY_CPUS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, train_step.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **one_core},
        text=True,
    )
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    pid = int(process.stdout.readline())
    seen = 0
    while seen < 3:  # the step waits at each line until somebody reads
        seen += sum(1 for _ in fifo.open())
    os.kill(pid, signal.SIGKILL)
    assert int(process.stdout.readline()) == -signal.SIGKILL
    process.communicate()
    shards = sorted((work / "features").glob("sft-*/manifest.json"))
    assert 3 <= len(shards) < 7
    # The oldest is damaged besides, as a disk might; and one is without its seal, as a kill leaves it.
    (shards[0].parent / extract.FILE).write_bytes(b"torn")
    shards[1].unlink()
    kept = shards[2].stat().st_mtime_ns
    run(tiny_model, trained / "data", tmp_path)
    assert shards[2].stat().st_mtime_ns == kept
    for name in ("model", "summary"):
        assert read_manifest(tmp_path / name) == read_manifest(trained / name)


def test_labels_that_cannot_be_learned_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    alike = [row.model_copy(update={"reference": "publish"}) for row in examples(9)]
    with pytest.raises(DataError, match=r"all rows have one label \(publish\)"):
        run(tiny_model, splits(tmp_path / "one", alike), tmp_path)
    rare = [*examples(9), example(99, "forbidden_claim", "lamp that heals")]
    with pytest.raises(DataError, match="1 of 4 labels stand in fewer than 2 rows, 'forbidden_claim' in 1"):
        run(tiny_model, splits(tmp_path / "rare", rare), tmp_path)
    odd = [example(7, "forbidden_claim", "lamp")]
    with pytest.raises(DataError, match="cannot be calibrated"):
        run(tiny_model, splits(tmp_path / "odd", held=odd), tmp_path)


def test_rows_that_are_too_long_or_unknown_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    long = example(98, "publish", "lamp " * 400)
    held = [*examples(9, 500), example(99, "forbidden_claim", "lamp")]
    run(tiny_model, splits(tmp_path / "data", [*examples(48), long], held), tmp_path, max_tokens=256)
    told = read_summary(tmp_path / "summary")
    assert told.details["dropped"] == {"too_long": 1, "unknown_label": 1}
    assert told.metrics["examples"] == 48


def test_labels_that_the_prompt_does_not_tell_fail_the_effect_check(tiny_model: Path, tmp_path: Path) -> None:
    rows = [example(n, list(WORDS)[n * 7919 % 97 % 2], f"lamp {n}") for n in range(40)]
    with pytest.raises(TrainingError, match="nothing was learned: the check 'better_than_shares' failed"):
        run(tiny_model, splits(tmp_path / "data", rows), tmp_path, l2=[1e-6])


def test_what_cannot_be_a_base_or_a_layer_is_refused(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="a classifier already"):
        run(trained / "model", trained / "data", tmp_path)
    with pytest.raises(TrainingError, match="layer 2 is not one of 1 to 1"):
        run(tiny_model, trained / "data", tmp_path, layers=[2])
    assert train.candidate_layers([], 30) == [10, 15, 20, 25]
    assert train.candidate_layers([], 2) == [1]


def test_the_served_classifier_repeats_the_trained_one(trained: Path, tmp_path: Path) -> None:
    from assay.components.deploy_model.parity import compare, served_answers, trained_answers

    rows = examples(3, 900)
    prompts = [row.prompt for row in rows]
    shutil.copytree(trained / "model", tmp_path / "registered")
    expected = trained_answers(trained / "model", prompts, 6)
    assert compare(rows, expected, served_answers(tmp_path / "registered", prompts, 6)) >= 6
    assert {answer.text for answer in expected} <= set(WORDS)


def test_every_stage_is_wired_by_the_names_of_its_recipe_section() -> None:
    from assay.components.contracts.recipe import GRAPHS, Recipe
    from assay.components.evaluate.component import evaluate
    from assay.components.write_report.component import write_report

    stages = GRAPHS["post_training"]
    assert "classifier" in stages
    assert Recipe(name="a", classifier=False).classifier is None
    for component, names in ((evaluate, stages), (write_report, [*stages, *(f"select_{name}" for name in stages)])):
        assert set(names) <= set(component.component_spec.inputs)
    assert isinstance(dsl.Model, type)
