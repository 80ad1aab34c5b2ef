"""A model folder is read and written with nothing lost and nothing pickled."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from assay.components.contracts.artifacts import read_manifest
from assay.components.contracts.errors import ModelError
from assay.components.shared.models import (
    check_model,
    count_parameters,
    dither,
    load_model,
    load_tokenizer,
    model_digest,
    multiplies_bf16,
    save_model,
    set_threads,
)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    target = tmp_path / "model"
    shutil.copytree(tiny_model, target)
    (target / "manifest.json").unlink()
    return target


def test_what_is_loaded_is_saved_as_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    save_model(model, tokenizer, tmp_path)
    assert model.dtype is torch.float32
    assert model_digest(tmp_path) == read_manifest(tiny_model).content


def test_weights_are_bf16_and_tied_ones_stand_once(tiny_model: Path) -> None:
    model = load_model(tiny_model, dtype="bfloat16")
    assert model.dtype is torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert count_parameters(tiny_model) == sum(weight.numel() for weight in model.parameters())
    assert json.loads((tiny_model / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_tokenizer_says_nothing_of_where_it_was(tiny_model: Path) -> None:
    settings = json.loads((tiny_model / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "name_or_path"} & settings.keys()
    tokenizer = load_tokenizer(tiny_model)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id is not None


def test_changed_weights_change_the_digest(tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = load_model(tiny_model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    save_model(model, tiny_tokenizer, tmp_path)
    assert model_digest(tmp_path) != model_digest(tiny_model)


def test_dither_leaves_what_bf16_holds_and_rounds_the_rest_in_proportion() -> None:
    held = torch.randn(4096, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    held[:3] = torch.tensor([0.0, -1.0, 2.0**-100])
    moved = held.clone()
    dither(moved, torch.Generator().manual_seed(0))
    assert torch.equal(moved.bfloat16().float(), held)
    assert (moved != held).float().mean() > 0.99
    quarter = torch.full((100_000,), 1 + 2**-7 / 4)  # a quarter of the way from 1 to the next number of bf16
    dither(quarter, torch.Generator().manual_seed(0))
    up = (quarter.bfloat16() > 1).float().mean().item()
    assert up == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 100_000) ** 0.5)


def test_a_change_below_bf16s_steps_is_saved_in_the_mean(tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    means = {}
    before = load_model(tiny_model).model.layers[0].mlp.up_proj.weight
    for dithered in (False, True):
        model = load_model(tiny_model)
        model.model.layers[0].mlp.up_proj.weight.data *= 1 + 2**-11
        save_model(model, tiny_tokenizer, tmp_path / str(dithered), dithered=dithered)
        saved = load_model(tmp_path / str(dithered)).model.layers[0].mlp.up_proj.weight
        means[dithered] = float((saved.detach().abs().sum() / before.detach().abs().sum() - 1) * 2**11)
    assert means[False] == 0, "rounded to the nearest, nothing of it is left"
    assert means[True] == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "there are no weights"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "are pickled"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(folder: Path, spoil: Any, said: str) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=said) as caught:
        check_model(folder)
    assert caught.value.where == str(folder)
    assert caught.value.fix


def test_truncated_weights_are_the_inputs_fault(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="transformers cannot read this model"):
        load_model(folder)


def test_a_model_that_wants_its_own_code_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ModelError):
        load_model(folder)


def test_no_chat_template_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(folder)


def test_no_tokenizer_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    with pytest.raises(ModelError):
        load_tokenizer(folder)


def test_threads_follow_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("ASSAY_CPUS", "1")
    assert set_threads() == torch.get_num_threads() == 1
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("amx", "cpu", "wanted"),
    [
        (True, "vendor_id : GenuineIntel flags : avx512_bf16", True),
        (False, "vendor_id : GenuineIntel flags : avx512_bf16", False),
        (False, "vendor_id\t: AuthenticAMD\nflags\t: avx2 avx512_bf16 sse4a", True),
        (False, "vendor_id\t: AuthenticAMD\nflags\t: avx2 sse4a", False),
    ],
)
def test_bf16_is_taken_where_it_is_quicker(amx: bool, cpu: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: cpu)
    assert multiplies_bf16() == wanted
