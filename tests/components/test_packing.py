"""Sequences that begin alike are computed once, and nothing else about them changes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.components.shared import training
from assay.components.shared.models import load_model
from assay.components.shared.packing import pack


def batch(sequences: list[list[int]], left: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right, and the first `left` sequences on the left."""
    length = max(map(len, sequences))
    ids, mask = torch.zeros(len(sequences), length, dtype=torch.long), torch.zeros(len(sequences), length)
    for row, tokens in enumerate(sequences):
        start = length - len(tokens) if row < left else 0
        ids[row, start : start + len(tokens)] = torch.tensor(tokens)
        mask[row, start : start + len(tokens)] = 1
    return ids, mask


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=8), min_size=1, max_size=8), st.integers(0, 8))
@settings(max_examples=200, deadline=None)
def test_each_token_sees_what_stood_before_it_and_nothing_else(sequences: list[list[int]], left: int) -> None:
    ids, mask = batch(sequences, left)
    packed = pack(ids, mask, row_tokens=12)
    width = packed.ids.shape[1]
    assert width <= 12
    assert packed.mask.any(-1).all(), "a place that attends to nothing would give NaN"
    for row, tokens in enumerate(sequences):
        places = packed.place[row][mask[row].bool()]
        assert packed.ids.flatten()[places].tolist() == tokens
        assert packed.positions.flatten()[places].tolist() == list(range(len(tokens)))
        for depth, place in enumerate(places.tolist()):
            seen = packed.mask[place // width, 0, place % width].nonzero()[:, 0] + place // width * width
            assert seen.tolist() == sorted(places[: depth + 1].tolist())


def test_equal_beginnings_stand_once_and_long_sequences_alone() -> None:
    group = [[1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 3, 4, 5], [9, 9]]
    assert pack(*batch(group)).ids.tolist() == [[1, 2, 3, 4, 5, 6, 9, 9]]
    rows = pack(*batch([[1, 2, 3, 4, 5], [1, 2, 3, 6, 7], [1, 8]]), row_tokens=6)
    assert rows.ids.tolist() == [[1, 2, 3, 4, 5, 0], [1, 2, 3, 6, 7, 8]]


@pytest.mark.parametrize("row_tokens", [512, 20])
def test_a_group_gives_the_log_probabilities_and_gradients_it_gave_without(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, row_tokens: int
) -> None:
    torch.manual_seed(0)
    prompts = torch.randint(3, 1000, (2, 7)).tolist()
    answers = torch.randint(3, 1000, (8, 9)).tolist()
    answers[1] = answers[0]  # a sample drawn twice
    answers[2][:4] = answers[0][:4]
    sequences = [prompts[row // 4] + answer for row, answer in enumerate(answers)]
    ids, mask = batch(sequences)
    labels = ids.clone()
    labels[:, :7] = -100
    weights = torch.randn(8, ids.shape[1] - 1)
    found = []
    for packs in (True, False):
        model = load_model(tiny_model)
        with monkeypatch.context() as patch:
            patch.setattr(training, "is_supported", lambda model, packs=packs: packs)
            patch.setattr(training, "pack", lambda *given: pack(*given, row_tokens=row_tokens))
            training.score_answers_only(SimpleNamespace(args=SimpleNamespace(use_cpu=True, bf16=False), model=model))
            out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        (out.log_probs * weights).sum().backward()
        found.append((out, [weight.grad for weight in model.parameters()]))
    (packed, its), (plain, theirs) = found
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(getattr(packed, name), getattr(plain, name), atol=1e-5, rtol=1e-5)
    for one, other in zip(its, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
