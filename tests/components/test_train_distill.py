"""Distillation: the divergences against numpy, the teacher's own tokens as targets, and what it refuses."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

import train_step
from train_step import SETTINGS, examples

from assay.components.contracts.artifacts import read_manifest, seal
from assay.components.contracts.errors import DataError, ModelError, TrainingError
from assay.components.contracts.recipe import DistillSettings
from assay.components.contracts.rows import Example, write_rows
from assay.components.shared import training
from assay.components.shared.chat import completion_ids, prompt_ids
from assay.components.shared.generate import load_generator
from assay.components.shared.models import load_model, load_tokenizer, save_model
from assay.components.shared.summary import read_summary
from assay.components.train_distill import distill, losses

TINY = DistillSettings(**SETTINGS["distill"], precision="fp32")
KINDS = ("forward", "reverse", "js")


pytestmark = pytest.mark.usefixtures("task")


@pytest.fixture(scope="module")
def teacher(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_step.make_teacher(tiny_model, tmp_path_factory.mktemp("terse") / "model")


def oracle(student: Any, teacher: Any, kind: str, temperature: float) -> Any:
    """The textbook formulas on probabilities, in float64."""

    def softmax(logits: Any) -> Any:
        raised = np.exp(logits / temperature - (logits / temperature).max(-1, keepdims=True))
        return raised / raised.sum(-1, keepdims=True)

    def kl(one: Any, other: Any) -> Any:
        return (one * np.log(one / other)).sum(-1)

    q, p = softmax(student), softmax(teacher)
    middle = (p + q) / 2
    found = {"forward": kl(p, q), "reverse": kl(q, p), "js": (kl(p, middle) + kl(q, middle)) / 2}[kind]
    return temperature**2 * found


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_the_textbooks(kind: Any, temperature: float) -> None:
    draw = np.random.default_rng(0)
    one, other = 3 * draw.normal(size=(5, 200)), 3 * draw.normal(size=(5, 200))
    wanted = oracle(one, other, kind, temperature)
    found = losses.divergence(torch.tensor(one), torch.tensor(other), kind, temperature)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9)
    single = losses.divergence(torch.tensor(one).float(), torch.tensor(other).float(), kind, temperature)
    np.testing.assert_allclose(single.numpy(), wanted, rtol=1e-5)


def test_the_divergences_differ_in_what_they_punish() -> None:
    """A student that misses one of the teacher's two peaks, and one that adds a peak the teacher has not."""
    narrow, wide = torch.tensor([[8.0, 0.0, 0.0]]).double(), torch.tensor([[8.0, 8.0, 0.0]]).double()
    missed = [float(losses.divergence(narrow, wide, kind)) for kind in ("forward", "reverse")]
    added = [float(losses.divergence(wide, narrow, kind)) for kind in ("forward", "reverse")]
    assert missed[0] > 4 * missed[1]
    assert added[1] > 4 * added[0]
    assert float(losses.divergence(narrow, -narrow, "js")) <= np.log(2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_softmax_arithmetic_and_zero_at_the_teacher(kind: Any) -> None:
    torch.manual_seed(0)
    theirs, ours = torch.randn(4, 50).double(), torch.randn(4, 50).double().requires_grad_(True)
    losses.divergence(ours, theirs, kind, 2.0).sum().backward()
    assert ours.grad is not None
    if kind == "forward":  # T² · (1/T) (q − p)
        wanted = 2.0 * ((ours / 2).softmax(-1) - (theirs / 2).softmax(-1))
        torch.testing.assert_close(ours.grad, wanted.detach())
    assert ours.grad.abs().max() > 1e-3
    same = theirs.clone().requires_grad_(True)
    value = losses.divergence(same, theirs, kind, 2.0)
    value.sum().backward()
    assert value.abs().max() < 1e-12
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-12


def trainer_on(base: Path, teacher: Path, settings: DistillSettings, count: int = 4) -> Any:
    model, tokenizer = training.load_trainable(base, settings)
    pairs = [(row, completion_ids(tokenizer, row.reference)) for row in examples(count)]
    rows, _ = distill.tokenize(pairs, tokenizer, settings.max_tokens)
    return distill.make_trainer(model, tokenizer, rows, settings, 0, load_model(teacher))[0]


def batch_of(trainer: Any) -> dict[str, torch.Tensor]:
    return dict(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_mixture_over_the_answers_tokens(kind: Any, tiny_model: Path, teacher: Path) -> None:
    settings = TINY.model_copy(update={"kind": "logit", "divergence": kind, "temperature": 1.7, "weight": 0.3})
    trainer = trainer_on(tiny_model, teacher, settings)
    batch = batch_of(trainer)
    found = float(trainer.compute_loss(trainer.model, batch).detach())
    models = {"student": load_model(tiny_model), "teacher": load_model(teacher)}  # plain forward passes, no packing
    divergences, surprises = [], []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        count = int(mask.sum())
        with torch.no_grad():
            logits = {name: model(ids[None, :count]).logits[0].double().numpy() for name, model in models.items()}
        for place in range(count - 1):
            if labels[place + 1] == training.IGNORED:
                continue
            ours, theirs = logits["student"][place : place + 1], logits["teacher"][place : place + 1]
            divergences.append(oracle(ours, theirs, kind, 1.7)[0])
            surprises.append(np.logaddexp.reduce(ours[0]) - ours[0][labels[place + 1]])
    assert len(divergences) == int((batch["labels"] != training.IGNORED).sum())
    assert found == pytest.approx(0.3 * np.mean(divergences) + 0.7 * np.mean(surprises), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_gets_no_gradient(kind: Any, tiny_model: Path) -> None:
    settings = TINY.model_copy(update={"kind": "logit", "divergence": kind, "weight": 1.0})
    trainer = trainer_on(tiny_model, tiny_model, settings)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    gradients = [weight.grad.abs().max() for weight in trainer.model.parameters() if weight.grad is not None]
    assert gradients
    assert max(map(float, gradients)) < 1e-6
    assert all(weight.grad is None for weight in trainer.teacher.parameters())


def test_on_a_gpu_the_same_logits_come_from_a_plain_forward_pass(tiny_model: Path, teacher: Path) -> None:
    trainer = trainer_on(tiny_model, teacher, TINY.model_copy(update={"kind": "logit"}))
    batch = batch_of(trainer)
    with torch.no_grad():
        quick = training.answer_logits(trainer, trainer.model, batch)
        trainer.args.use_cpu = False  # what a GPU's trainer says
        plain = training.answer_logits(trainer, load_model(tiny_model), batch)
    assert len(quick) == int((batch["labels"] != training.IGNORED).sum())
    torch.testing.assert_close(quick, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("warm", [0.0, 1.0])
def test_the_targets_are_the_teachers_own_tokens(warm: float, tiny_model: Path, teacher: Path) -> None:
    settings = TINY.model_copy(update={"sample_temperature": warm, "samples": 2 if warm else 1, "max_new_tokens": 40})
    rows = examples(6)
    answers, dropped = distill.find_answers(settings, "medication_directions", 5, tiny_model, teacher, rows, True)
    generator = load_generator(teacher)
    prompts = [prompt_ids(generator.tokenizer, row.prompt) for row in rows]
    made = generator.generate(prompts, max_new_tokens=40, temperature=warm, samples=settings.samples, seed=5)
    wanted = [(row, one.ids) for row, some in zip(rows, made, strict=True) for one in some if one.finished]
    assert answers == wanted
    assert wanted
    assert dropped == {"unfinished": 6 * settings.samples - len(wanted), "wrong": 0}
    tokenizer = load_tokenizer(tiny_model)
    tokens, _ = distill.tokenize(answers, tokenizer, 256)
    model, _ = training.load_trainable(tiny_model, settings)
    prepared = distill.make_trainer(model, tokenizer, tokens, settings, 0)[0].train_dataset
    for made_row, (row, ids) in zip(prepared, wanted, strict=True):
        prompt = prompt_ids(tokenizer, row.prompt)
        assert list(made_row["input_ids"]) == prompt + ids
        assert list(made_row["labels"]) == [training.IGNORED] * len(prompt) + ids
        assert ids[-1] == tokenizer.eos_token_id


def test_answers_that_the_verifier_rejects_can_be_left_out(
    tiny_model: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Picky:
        def reward(self, response: str, reference: str, finished: bool = True) -> float:
            assert finished
            return 1.0 if reference in right else 0.9

    rows = examples(6)
    right = {row.reference for row in rows[:3]}
    monkeypatch.setattr(distill, "get_task", lambda name: Picky())
    every, before = distill.find_answers(TINY, "any", 0, tiny_model, teacher, rows, True)
    only = TINY.model_copy(update={"only_right": True})
    kept, dropped = distill.find_answers(only, "any", 0, tiny_model, teacher, rows, True)
    assert kept == [(row, ids) for row, ids in every if row.reference in right]
    assert dropped == {"unfinished": before["unfinished"], "wrong": len(every) - len(kept)}
    assert 0 < len(kept) < len(every)


def test_another_vocabulary_is_retokenised_by_sequence_and_refused_by_logit(
    tiny_model: Path, teacher: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(teacher)
    tokenizer.add_tokens(["<other>"])
    model = load_model(teacher)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    save_model(model, tokenizer, tmp_path / "other")
    assert distill.same_vocabulary(tiny_model, teacher)
    assert not distill.same_vocabulary(tiny_model, tmp_path / "other")
    with pytest.raises(ModelError, match=r"different vocabularies \(49,153 and 49,152 logits\)"):
        distill.check_vocabulary(tiny_model, tmp_path / "other", same=False)
    rows, work = examples(6), "medication_directions"
    answers, _ = distill.find_answers(TINY, work, 0, tiny_model, tmp_path / "other", rows, False)
    generator = load_generator(tmp_path / "other")
    prompts = [prompt_ids(generator.tokenizer, row.prompt) for row in rows]
    made = [some[0] for some in generator.generate(prompts, max_new_tokens=TINY.max_new_tokens)]
    student = load_tokenizer(tiny_model)
    assert [ids for _, ids in answers] == [completion_ids(student, one.text) for one in made if one.finished]


def test_equal_tokens_over_more_logits_are_refused_too(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model)
    model.resize_token_embeddings(49_280, mean_resizing=False)
    save_model(model, load_tokenizer(tiny_model), tmp_path / "padded")
    with pytest.raises(ModelError, match=r"49,280 and 49,152 logits"):
        distill.check_vocabulary(tiny_model, tmp_path / "padded", same=True)


LOGIT = {"kind": "logit", "batch_size": 8, "weight": 1.0}


@pytest.mark.parametrize("more", [{}, {**LOGIT, "temperature": 2.0}, {**LOGIT, "method": "lora"}])
def test_a_run_learns_saves_and_tells(more: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    data = train_step.data_for("distill", tmp_path / "data")
    train_step.run("distill", {**SETTINGS["distill"], **more}, str(tiny_model), str(data), str(tmp_path))
    told = read_summary(tmp_path / "summary")
    assert told.metrics["loss_last"] < told.metrics["loss_first"]
    assert told.metrics["prompts"] == 8
    dropped = told.details["dropped"]
    assert isinstance(dropped, dict)
    assert told.details["examples"] == 8 - sum(dropped.values())
    assert dropped.keys() == {"unfinished", "wrong", "too_long"}
    curve = told.details["curve"]
    assert isinstance(curve, list)
    assert ("divergence" in curve[0]) == ("divergence_last" in told.metrics) == ("kind" in more)
    if "kind" in more:
        assert told.metrics["divergence_last"] < told.metrics["divergence_first"]
    manifest = read_manifest(tmp_path / "model", "model")
    assert manifest.metadata["stage"] == "distill"
    assert read_manifest(tmp_path / "summary").parents.keys() == {"base", "teacher", "data"}


def test_a_students_own_teacher_teaches_nothing_and_that_fails(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "make_teacher", lambda base, folder: base)
    data = train_step.data_for("distill", tmp_path / "data")
    settings = {**SETTINGS["distill"], "kind": "logit", "answers": "reference", "weight": 1.0, "precision": "fp32"}
    with pytest.raises(TrainingError, match="nothing was learned") as error:
        train_step.run("distill", settings, str(tiny_model), str(data), str(tmp_path))
    assert "teacher that is another model" in error.value.fix


def test_prompts_of_several_splits_are_asked(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_rows(data / "sft.parquet", examples(8)[:3], Example)
    write_rows(data / "rl.parquet", examples(8)[3:], Example)
    seal(data, "splits")
    train_step.run(
        "distill", {**SETTINGS["distill"], "splits": ["sft", "rl"]}, str(tiny_model), str(data), str(tmp_path)
    )
    assert read_summary(tmp_path / "summary").metrics["prompts"] == 8


def test_no_answer_that_can_be_learned_is_an_error_with_the_counts(tiny_model: Path, tmp_path: Path) -> None:
    data = train_step.data_for("distill", tmp_path / "data")
    with pytest.raises(DataError, match=r"none of the teacher's answers to 8 prompts.*'unfinished': 1.*'too_long': 7"):
        train_step.run("distill", {**SETTINGS["distill"], "max_tokens": 20}, str(tiny_model), str(data), str(tmp_path))


def test_settings_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="several samples need a sample_temperature"):
        DistillSettings(teacher="a", samples=2)
    with pytest.raises(ValueError, match="cross-entropy on reference answers is sft"):
        DistillSettings(teacher="a", answers="reference")
