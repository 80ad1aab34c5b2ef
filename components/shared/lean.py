"""A Llama's norms and gated products with less memory between forward and backward pass, and fewer of them to write.

transformers writes both as chains of small operations, each of which keeps its input for the way back. Of a token and
layer of SmolLM2-135M in bf16 that is 27 kB of 50; what is needed is 16.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


class RMSNorm(torch.autograd.Function):  # type: ignore[misc]
    """Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467), rounded once, to what the products take.

    Left to autocast, each of the products behind it would round it anew and keep a copy.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        """Return the norm of `hidden` [..., size] as `dtype`; `weight` is [size]."""
        wide = hidden.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden, weight, scale)
        return (wide * scale).to(hidden.dtype).mul(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of `hidden` and of `weight`."""
        hidden, weight, scale = ctx.saved_tensors
        unit = hidden.float() * scale
        wide = gradient.float()
        weights = (wide * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, weights, None, None
        wide = wide * weight
        along = (wide * unit).mean(-1, keepdim=True)
        return torch.addcmul(wide, unit, along, value=-1).mul_(scale).to(hidden.dtype), weights, None, None


class GatedProduct(torch.autograd.Function):  # type: ignore[misc]
    """silu(gate) · up; the first factor is computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Return the product, of the shape of both."""
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of `gate` and of `up`."""
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), silu(gate).mul_(gradient)


def use_lean_layers(model: Any) -> None:
    """Let the layers of a transformers Llama (`llama.is_supported`) compute as they do, and keep less."""
    for layer in model.model.layers:
        layer.mlp.forward = partial(_mlp, layer.mlp)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = partial(_norm, norm)


def _mlp(mlp: Any, hidden: Tensor) -> Tensor:
    product: Tensor = mlp.down_proj(GatedProduct.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
    return product


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    normed: Tensor = RMSNorm.apply(hidden, norm.weight, norm.variance_epsilon, dtype)
    return normed
