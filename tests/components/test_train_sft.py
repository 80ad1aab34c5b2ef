"""SFT: the loss is on the answer alone, and what is saved is what was trained."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

import train_step
from train_step import SETTINGS, examples

from assay.components.contracts.artifacts import read_manifest
from assay.components.contracts.errors import DataError, TrainingError
from assay.components.contracts.recipe import Recipe, SFTSettings
from assay.components.contracts.rows import Message
from assay.components.shared import training
from assay.components.shared.models import load_model
from assay.components.shared.summary import read_seconds, read_summary
from assay.components.train_sft import sft

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
TINY = SFTSettings(**SETTINGS["sft"], precision="fp32")


pytestmark = pytest.mark.usefixtures("task")


def trainer_on(base: Path, settings: SFTSettings, count: int = 4) -> tuple[Any, Any, list[dict[str, list[int]]]]:
    model, tokenizer = training.load_trainable(base, settings)
    rows, _ = sft.tokenize(examples(count), tokenizer, settings.max_tokens)
    return sft.make_trainer(model, tokenizer, rows, settings, seed=0)[0], tokenizer, rows


def test_the_loss_is_on_the_answers_tokens_alone(tiny_model: Path) -> None:
    trainer, tokenizer, rows = trainer_on(tiny_model, TINY)
    wanted = {(*tokenizer(row.reference)["input_ids"], tokenizer.eos_token_id) for row in examples(4)}
    seen = set()
    for batch in trainer.get_train_dataloader():
        for ids, labels, attention in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            learned = labels != training.IGNORED
            answer = tuple(labels[learned].tolist())
            seen.add(answer)
            end = int(attention.sum())
            assert torch.equal(learned.nonzero().flatten(), torch.arange(end - len(answer), end))  # nothing but the end
            assert torch.equal(ids[learned], labels[learned])
            assert tokenizer.decode(ids[: end - len(answer)]).endswith("<|im_start|>assistant\n")
    assert seen == wanted
    assert len(rows) == 4


@pytest.mark.parametrize("place", [0, -1])
def test_labels_that_deviate_by_one_token_are_refused(place: int, tiny_model: Path) -> None:
    trainer, _, rows = trainer_on(tiny_model, TINY)
    training.check_labels(rows, trainer.train_dataset)
    made = [dict(row) for row in trainer.train_dataset]
    made[2]["labels"][place] = training.IGNORED if place else made[2]["input_ids"][0]
    with pytest.raises(TrainingError, match="tokens to be learned alone"):
        training.check_labels(rows, made)


def test_a_run_learns_saves_and_tells(tiny_model: Path, tmp_path: Path) -> None:
    long = examples(9)[-1].model_copy(update={"prompt": [Message(role="user", content="take one " * 300)]})
    data = train_step.data_for("sft", tmp_path / "data", [*examples(8), long])
    train_step.run("sft", {**SETTINGS["sft"], "frozen_layers": 1}, str(tiny_model), str(data), str(tmp_path))
    told = read_summary(tmp_path / "summary")
    assert told.metrics["loss_last"] < told.metrics["loss_first"]
    assert told.metrics["weight_change"] > training.MIN_WEIGHT_CHANGE
    assert told.metrics["tokens"] == sum(
        len(row["input_ids"]) for row in sft.tokenize(examples(8), training.load_tokenizer(tiny_model), 256)[0]
    )
    assert told.details["dropped"] == {"too_long": 1}
    assert told.details["examples"] == 8
    assert told.details["effect"]["ok"]
    assert told.details["effect"]["checks"] == {"finite": True, "loss_fell": True, "weights_changed": True}
    assert [point["step"] for point in told.details["curve"]] == list(range(1, 9))
    assert {"loss", "learning_rate", "token_accuracy"} <= told.details["curve"][0].keys()
    assert read_seconds(tmp_path / "summary")
    manifest = read_manifest(tmp_path / "model", "model")
    base = read_manifest(tiny_model, "model")
    assert manifest.parents == {"base": base.digest}
    assert manifest.metadata == {"reference": "tiny", "stage": "sft", "task": "medication_directions"}
    assert load_model(tmp_path / "model").num_parameters() == load_model(tiny_model).num_parameters()
    before, after = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert any(name.startswith("model.layers.1.") for name in changed)
    assert not any(name.startswith(("model.layers.0.", "model.embed_tokens")) for name in changed)


def test_a_merged_adapter_answers_as_the_adapter_did(tiny_model: Path, tmp_path: Path) -> None:
    settings = TINY.model_copy(update={"method": "lora", "lora_rank": 4, "max_steps": 4})
    trainer, tokenizer, _ = trainer_on(tiny_model, settings)
    training.train(trainer, training.Watcher([]))
    ids = torch.tensor([tokenizer("Take 2 tabs po q6h prn pain")["input_ids"]])
    with torch.no_grad():
        adapted = trainer.model.eval()(input_ids=ids).logits
        with trainer.model.disable_adapter():
            plain = trainer.model(input_ids=ids).logits
        base = read_manifest(tiny_model, "model")
        training.save(trainer, tokenizer, settings, tmp_path / "model", base, {"stage": "sft"})
        merged = trainer.model.get_base_model()(input_ids=ids).logits
        saved = load_model(tmp_path / "model")(input_ids=ids).logits
    assert (adapted - plain).abs().max() > 1e-3  # it did learn something
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(saved, adapted, atol=0.05, rtol=0.05)  # bf16
    keys = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert keys == load_file(tiny_model / "model.safetensors").keys()
    assert not (tmp_path / "model" / "adapter_config.json").exists()


def test_adapters_on_weights_of_four_bits_are_merged_into_whole_ones(tiny_model: Path) -> None:
    """What QLoRA does at the end, with weights that were never quantized: the same adapters, the same answers."""
    trainer, tokenizer, _ = trainer_on(tiny_model, TINY.model_copy(update={"method": "lora", "max_steps": 4}))
    training.train(trainer, training.Watcher([]))
    ids = torch.tensor([tokenizer("Take 2 tabs po q6h prn pain")["input_ids"]])
    with torch.no_grad():
        adapted = trainer.model.eval()(input_ids=ids).logits
        whole = training.on_whole_weights(trainer.model).eval().merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(whole, adapted, atol=1e-4, rtol=1e-4)


def test_four_bits_want_a_gpu_and_are_papers(tiny_model: Path) -> None:
    with pytest.raises(TrainingError, match="on a GPU only"):
        training.load_trainable(tiny_model, SFTSettings(method="qlora", device="cpu"))
    config = training.four_bits()
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert training.adapter(SFTSettings(method="qlora")).target_modules == "all-linear"


@pytest.mark.parametrize(
    ("asked", "package"), [({"fused_kernels": True}, "liger_kernel"), ({"flash_attention": True}, "flash_attn")]
)
def test_kernels_of_a_gpu_are_asked_for_and_refused_where_they_are_not(
    asked: dict[str, bool], package: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SFTSettings(**asked)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="on a GPU only") as error:
        training.load_trainable(tiny_model, settings)
    assert error.value.where == f"{next(iter(asked))}: true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(TrainingError, match=f"{package} is not installed"):
        training.load_trainable(tiny_model, settings)
    monkeypatch.setattr(training, "find_spec", lambda name: True)
    if "flash_attention" in asked:  # transformers itself is asked for it, and finds that it is not there
        with pytest.raises(ImportError, match="FlashAttention2"):
            training.load_trainable(tiny_model, settings)
    else:
        arguments = training.arguments(settings, 0)
        assert arguments["use_liger_kernel"]
        assert arguments["liger_kernel_config"] == {"fused_linear_cross_entropy": False}


def test_the_gpu_profile_asks_for_them_and_packs() -> None:
    sft = Recipe.load(RECIPES / "medication-directions.yaml", "gpu").sft
    assert sft is not None
    assert (sft.fused_kernels, sft.flash_attention, sft.packing) == (True, True, True)
    with pytest.raises(ValueError, match="say flash_attention: true"):
        SFTSettings(packing=True)


def test_no_example_that_fits_is_an_error(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="none of the 3 examples fits into 20 tokens"):
        sft.tokenize(examples(3), tiny_tokenizer, 20)


def test_the_recipe_reaches_trl(tiny_model: Path) -> None:
    settings = TINY.model_copy(update={"method": "lora", "gradient_checkpointing": True})
    trainer, _, _ = trainer_on(tiny_model, settings)
    assert trainer.args.gradient_checkpointing
    assert trainer.args.max_length == 256
    assert trainer.model.peft_config["default"].r == settings.lora_rank
    assert (trainer.args.bf16, trainer.args.use_cpu) == (False, True)
