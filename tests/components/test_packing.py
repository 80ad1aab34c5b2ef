"""Sequences that begin alike are computed once, and nothing else about them changes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.components.shared import training
from assay.components.shared.models import load_model
from assay.components.shared.packing import TreeAttention, pack


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
    packed = pack(ids, mask, block_tokens=5)
    seen: list[list[int]] = []
    for block in packed.blocks:
        assert block.start == len(seen)
        seen += [block.seen[row == 0].tolist() for row in block.mask[:, 0]]
    assert len(seen) == len(packed.ids)
    beginnings = {tuple(tokens[:end]) for tokens in sequences for end in range(1, len(tokens) + 1)}
    assert len(packed.ids) == len(beginnings), "each beginning stands once"
    for row, tokens in enumerate(sequences):
        places = packed.place[row][mask[row].bool()].tolist()
        assert packed.ids[places].tolist() == tokens
        assert packed.positions[places].tolist() == list(range(len(tokens)))
        for depth, place in enumerate(places):
            assert seen[place] == places[: depth + 1]


def test_a_block_reads_no_more_than_it_sees() -> None:
    packed = pack(*batch([[1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 3, 4, 5], [9, 9]]), block_tokens=5)
    assert packed.ids.tolist() == [1, 2, 3, 4, 5, 6, 9, 9]
    first, second = packed.blocks
    assert first.seen.tolist() == [0, 1, 2, 3, 4]
    assert second.seen.tolist() == [0, 1, 2, 5, 6, 7]


@pytest.mark.parametrize("block_tokens", [512, 20])
def test_a_group_gives_the_log_probabilities_and_gradients_it_gave_without(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, block_tokens: int
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
            patch.setattr(training, "pack", lambda *given: pack(*given, block_tokens=block_tokens))
            training.score_answers_only(SimpleNamespace(args=SimpleNamespace(use_cpu=True, bf16=False), model=model))
            out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        (out.log_probs * weights).sum().backward()
        found.append((out, [weight.grad for weight in model.parameters()]))
    (packed, its), (plain, theirs) = found
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(getattr(packed, name), getattr(plain, name), atol=1e-5, rtol=1e-5)
    for one, other in zip(its, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block_tokens", [64, 16])
def test_in_bf16_attention_is_as_exact_as_torchs_fused_one(block_tokens: int) -> None:
    heads, shared, size, tokens = 6, 2, 16, 50
    draw = torch.Generator().manual_seed(7)
    states = (2 * torch.randn(tokens, heads + 2 * shared, size, generator=draw)).bfloat16()
    slope = torch.randn(tokens, heads * size, generator=draw).bfloat16()
    angles = torch.randn(tokens, size // 2, generator=draw).repeat(1, 2)
    packed = pack(torch.arange(tokens)[None], torch.ones(1, tokens), block_tokens)

    def plain(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        wide = states.to(torch.float32 if dtype == torch.bfloat16 else dtype)
        query, key, value = wide.split([heads, shared, shared], 1)
        turned = [
            one * angles.cos()[:, None]
            + torch.cat([-one[..., size // 2 :], one[..., : size // 2]], -1) * angles.sin()[:, None]
            for one in (query, key)
        ]
        parts = [one.to(dtype).transpose(0, 1)[None] for one in (*turned, value)]
        found = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=0.25, enable_gqa=True)
        return found[0].transpose(0, 1).reshape(tokens, -1)

    def ours(states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = TreeAttention.apply(states, heads, (angles.cos(), angles.sin()), 0.25, packed.blocks)
        return found

    found = []
    for attend, dtype in ((lambda x: plain(x, torch.float64), torch.float64), (ours, torch.float32)):
        given = states.to(dtype).requires_grad_()
        made = attend(given)
        made.backward(slope.to(dtype))
        found.append((made.detach().double(), given.grad.double()))
    for exact, one in zip(*found, strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-5, atol=1e-5)
    exact = found[0]
    errors = []
    for attend in (ours, lambda x: plain(x, torch.bfloat16)):
        given = states.clone().requires_grad_()
        made = attend(given)
        made.backward(slope)
        errors.append(
            [
                float((one.detach().double() - other).norm())
                for one, other in zip((made, given.grad), exact, strict=True)
            ]
        )
    for mine, torchs in zip(*errors, strict=True):
        assert mine < 1.1 * torchs
