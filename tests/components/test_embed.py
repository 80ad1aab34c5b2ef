"""Vectors: the same in a batch as alone, of length 1, cached, and those of transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assay.components.contracts.artifacts import is_encoder
from assay.components.contracts.errors import ModelError
from assay.components.runtime.context import cache_folder
from assay.components.shared import embed as work
from assay.components.shared.embed import Encoding, embed, plan, read_encoding, write_encoding
from assay.components.shared.models import load_model, load_tokenizer

TEXTS = ["short", "Store Velmorin (brand Axilto) below 25 °C.", "a" * 300, "one two three four five", "Short"]


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))


def encoding(**changes: Any) -> Encoding:
    plain = {"pooling": "mean", "query_prefix": "", "lowercase": False, "layers": 2, "dimensions": 64}
    return Encoding(**{**plain, **changes})


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_text_has_the_same_vector_in_a_batch_as_alone(
    pooling: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = embed(tiny_model, TEXTS, encoding(pooling=pooling))
    alone = np.concatenate([embed(tiny_model, [text], encoding(pooling=pooling)) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(("pooling", "layers"), [("mean", 2), ("last", 2), ("mean", 1)])
def test_vectors_are_those_of_transformers(pooling: str, layers: int, tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    model.model.layers = model.model.layers[:layers]
    ids = tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]
    ids += [tokenizer.eos_token_id] if pooling == "last" else []
    with torch.no_grad():
        states = model.model(torch.tensor([ids])).last_hidden_state[0]
    wanted = states[-1] if pooling == "last" else states.mean(0)
    found = embed(tiny_model, [TEXTS[1]], encoding(pooling=pooling, layers=layers))[0]
    np.testing.assert_allclose(found, (wanted / wanted.norm()).numpy(), atol=2e-6)


def test_case_counts_unless_it_is_folded(tiny_model: Path) -> None:
    plain, folded = embed(tiny_model, TEXTS, encoding()), embed(tiny_model, TEXTS, encoding(lowercase=True))
    assert not np.allclose(plain[0], plain[4])
    np.testing.assert_array_equal(folded[0], folded[4])


def test_batches_hold_every_text_once_and_no_more_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "BATCH_TOKENS", 12)
    ids = [[0] * length for length in (5, 1, 30, 4, 4, 2)]
    batches = list(plan(ids))
    assert sorted(place for batch in batches for place in batch) == list(range(6))
    assert all(len(batch) * max(len(ids[p]) for p in batch) <= 12 for batch in batches if len(batch) > 1)
    assert batches[-1] == [2]


def test_what_was_asked_before_is_not_computed_again(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = embed(tiny_model, TEXTS, encoding())
    with monkeypatch.context() as patch:
        patch.setattr(work, "load_encoder", lambda *_: pytest.fail("the model was loaded"))
        np.testing.assert_array_equal(embed(tiny_model, TEXTS, encoding()), first)
    (kept,) = cache_folder("vectors").iterdir()
    kept.write_bytes(b"damaged")
    np.testing.assert_array_equal(embed(tiny_model, TEXTS, encoding()), first)
    assert not np.array_equal(embed(tiny_model, TEXTS, encoding(pooling="last")), first)


def test_a_text_longer_than_the_context_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="tokens and the model reads 2048"):
        embed(tiny_model, ["word " * 3000], encoding())


def test_a_folder_says_how_it_is_used(tmp_path: Path) -> None:
    assert not is_encoder(tmp_path)
    with pytest.raises(ModelError, match=r"no embedding\.json that can be read"):
        read_encoding(tmp_path)
    write_encoding(tmp_path, encoding(query_prefix="q: "))
    assert is_encoder(tmp_path)
    assert read_encoding(tmp_path) == encoding(query_prefix="q: ")
