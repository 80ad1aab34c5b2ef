"""Layers that keep less compute what transformers' layers do, on the way there and back."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from assay.components.shared import lean as lean_module
from assay.components.shared.lean import (
    ROWS,
    GatedProduct,
    Linear,
    _norm,
    products,
    round_embeddings,
    score_tokens,
    use_lean_layers,
)
from assay.components.shared.models import load_model


def gradients(function: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    made = function(*leaves)
    made.backward(torch.linspace(-1, 1, made.numel(), dtype=made.dtype).view(made.shape))
    return [made.detach(), *(one.grad for one in leaves)]  # type: ignore[list-item]


def test_the_norm_is_transformers(tiny_model: Path) -> None:
    theirs = LlamaRMSNorm(48)
    torch.nn.init.normal_(theirs.weight)
    hidden = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        return torch.func.functional_call(theirs, {"weight": weight}, (hidden,))

    def lean(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        return torch.func.functional_call(ours, {"weight": weight}, (hidden,))

    ours = deepcopy(theirs)
    ours.forward = lambda hidden: _norm(ours, hidden)  # type: ignore[method-assign]
    for one, other in zip(gradients(plain, hidden, theirs.weight), gradients(lean, hidden, theirs.weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_product_is_torchs_to_the_bit(dtype: torch.dtype) -> None:
    both = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    plain = gradients(lambda both: torch.nn.functional.silu(both[..., :32]) * both[..., 32:], both)
    for one, other in zip(plain, gradients(GatedProduct.apply, both), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_product_is_autocasts_to_the_bit(frozen: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(2, 7, 32, generator=draw), torch.randn(24, 32, generator=draw)

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.linear(hidden, weight)

    def lean(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = Linear.apply(hidden, torch.bfloat16, weight)
        return answer

    if frozen:
        found = [gradients(lambda hidden: made(hidden, weight), hidden) for made in (plain, lean)]  # noqa: B023
    else:
        found = [gradients(made, hidden, weight) for made in (plain, lean)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("frozen", [(False, False), (True, False), (True, True)])
def test_products_of_the_same_states_are_one_and_keep_their_numbers(frozen: tuple[bool, bool]) -> None:
    draw = torch.Generator().manual_seed(3)
    layers = [torch.nn.Linear(32, size, bias=False) for size in (24, 8)]
    for layer, still in zip(layers, frozen, strict=True):
        layer.weight.data = torch.randn(layer.weight.shape, generator=draw)
        layer.weight.requires_grad_(not still)
    found = []
    for whole in (True, False):
        hidden = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(4)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            made = products(layers, hidden) if whole else torch.cat([layer(hidden) for layer in layers], -1)
        made.backward(torch.linspace(-1, 1, made.numel(), dtype=made.dtype).view(made.shape))
        found.append((made, hidden.grad, [layer.weight.grad for layer in layers]))
        for layer in layers:
            layer.weight.grad = None
    (one, below, slopes), (other, wanted, theirs) = found
    assert torch.equal(one, other)
    assert below is not None
    torch.testing.assert_close(below, wanted, rtol=0.02, atol=0.02)  # one sum in fp32, where autocast adds two in bf16
    assert [slope is None for slope in slopes] == list(frozen)
    for slope, same in zip(slopes, theirs, strict=True):
        assert slope is same is None or torch.equal(slope, same)  # type: ignore[arg-type]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_of_lean_layers_gives_the_same_logits_and_gradients(tiny_model: Path, bf16: bool) -> None:
    plain, lean = load_model(tiny_model), load_model(tiny_model)
    use_lean_layers(lean)
    ids = torch.arange(40).view(2, 20)
    found = []
    for model in (plain, lean):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        found.append((loss.item(), {name: weight.grad for name, weight in model.named_parameters()}))
    (wanted, gradient), (loss, others) = found
    assert loss == pytest.approx(wanted, rel=1e-3 if bf16 else 1e-6)
    for name, one in gradient.items():
        apart = (one - others[name]).norm() / one.norm()
        assert apart < (0.03 if bf16 else 1e-5), name


def test_frozen_norms_get_no_gradient_and_pass_it_on(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    use_lean_layers(model)
    for layer in model.model.layers:
        layer.input_layernorm.weight.requires_grad_(False)
    model(torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    assert model.model.layers[0].input_layernorm.weight.grad is None
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_scores_of_tokens_are_those_of_a_log_softmax() -> None:
    draw = torch.Generator().manual_seed(4)
    states, weight = torch.randn(2 * ROWS + 3, 16, generator=draw), torch.randn(50, 16, generator=draw)
    which = torch.randint(0, len(states), (90,), generator=draw)  # a state may be asked about several tokens, or none
    tokens = torch.randint(0, 50, (90,), generator=draw)
    worth = torch.linspace(-1, 1, 90)
    found = []
    for ours in (False, True):
        head = torch.nn.Linear(16, 50, bias=False)
        head.weight.data = weight.clone()
        given = states.clone().requires_grad_()
        if ours:
            told = score_tokens(given, head, which, tokens, 0.7)
        else:
            logits = head(given) / 0.7
            every = logits.log_softmax(-1)
            entropy = -(every.exp() * every).sum(-1)[which]
            told = (every[which, tokens], entropy, logits.mean(-1)[which], (logits.argmax(-1)[which] == tokens).float())
        (told[0] * worth).sum().backward()
        found.append([*(one.detach().float() for one in told), given.grad, head.weight.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_logits_that_were_kept_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(4)
    states, weight = torch.randn(3 * ROWS, 16, generator=draw), torch.randn(50, 16, generator=draw)
    which, tokens = (torch.randint(0, many, (90,), generator=draw) for many in (len(states), 50))
    found = []
    for kept in (0, ROWS, 8 * ROWS):
        monkeypatch.setattr(lean_module, "KEPT", kept)
        head = torch.nn.Linear(16, 50, bias=False)
        head.weight.data = weight.clone()
        given = states.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            told = score_tokens(given, head, which, tokens, 0.7)
        bytes_kept = sum(one.nbytes for one in told.log_probs.grad_fn.saved_tensors if one.shape[-1:] == (50,))
        assert bytes_kept == min(kept, len(states)) * 50 * 2
        (told.log_probs * torch.linspace(-1, 1, 90)).sum().backward()
        found.append([told.log_probs.detach(), given.grad, head.weight.grad])
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], one, strict=True))


def test_embeddings_in_bf16_change_no_bit_of_a_bf16_step(tiny_model: Path) -> None:
    found = []
    for rounded in (False, True):
        model = load_model(tiny_model)
        model.get_input_embeddings().weight.requires_grad_(False)
        if rounded:
            round_embeddings(model)
            assert model.get_input_embeddings().weight.dtype == torch.bfloat16
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        ids = torch.arange(20)[None]
        with torch.autocast("cpu", torch.bfloat16):
            made = model(ids, labels=ids)
        made.loss.backward()
        found.append([made.logits.detach(), *(one.grad for one in model.parameters() if one.requires_grad)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("change", ["train", "fp32"])
def test_embeddings_that_train_or_that_bf16_would_change_stay(tiny_model: Path, change: str) -> None:
    model = load_model(tiny_model)
    weight = model.get_input_embeddings().weight
    weight.requires_grad_(change == "train")
    if change == "fp32":
        weight.data[3, 5] = 1 / 3
    round_embeddings(model)
    assert weight.dtype == torch.float32
