"""Layers that keep less compute what transformers' layers do, on the way there and back."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from assay.components.shared.lean import GatedProduct, _norm, use_lean_layers
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
    gate, up = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(2)).to(dtype).chunk(2)
    plain = gradients(lambda gate, up: torch.nn.functional.silu(gate) * up, gate, up)
    for one, other in zip(plain, gradients(GatedProduct.apply, gate, up), strict=True):
        assert torch.equal(one, other)


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
