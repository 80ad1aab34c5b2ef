"""A Llama's norms and products with less memory between forward and backward pass, and fewer numbers to write.

transformers writes norms and gated products as chains of small operations, each of which keeps its input for the way
back. Of a token and layer of SmolLM2-135M in bf16 that is 27 kB of 50; what is needed is 16. And autocast keeps every
weight that it rounded until its gradient is there: 257 MB of that model, half of all that a small batch keeps.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, silu

ROWS = 128
"""States whose logits are in memory at once, 25 MB at a vocabulary of 49k; the head is read once for each such part."""
KEPT = 1024
"""States of a batch whose logits are kept for the way back, 100 MB at 49k in bf16; of more, and in fp32, they are
computed again."""


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


class Linear(torch.autograd.Function):  # type: ignore[misc]
    """Product with a weight that is rounded for it, and again on the way back; the same numbers as under autocast."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `hidden` [..., inputs] · `weight`ᵀ [outputs, inputs] as `dtype`."""
        rounded = hidden.to(dtype)
        ctx.save_for_backward(rounded if ctx.needs_input_grad[1] else hidden.new_empty(0), weight)
        ctx.given = hidden.dtype
        return linear(rounded, weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of `hidden` and of `weight`."""
        hidden, weight = ctx.saved_tensors
        below = (gradient @ weight.to(gradient.dtype)).to(ctx.given) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return below, None, None
        return below, (gradient.flatten(0, -2).t() @ hidden.flatten(0, -2)).to(weight.dtype), None


class Scores(NamedTuple):
    """What a model says of the tokens it is asked about, one value each."""

    log_probs: Tensor
    entropy: Tensor
    """Of the distribution before the token, in nats."""
    mean: Tensor
    """Of its logits."""
    likeliest: Tensor
    """Whether the token is the likeliest."""


def score_tokens(states: Tensor, head: torch.nn.Linear, which: Tensor, tokens: Tensor, temperature: float) -> Scores:
    """Score tokens without ever holding all their logits; gradients flow through `log_probs` alone.

    Args:
        states: [places, size]: hidden states before the tokens, each once.
        head: Without a bias.
        which: [asked]: place of each token's state.
        tokens: [asked]: ids.
        temperature: By which logits are divided.
    """
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    return Scores(*TokenScores.apply(states, head.weight, which, tokens, temperature, dtype))


class TokenScores(torch.autograd.Function):  # type: ignore[misc]
    """`score_tokens`, `ROWS` states at a time; of the first `KEPT` a product's rounded logits are kept.

    Of a vocabulary of 49k, the logits of 150 tokens are 29 MB in fp32, and all at once they take five times that.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, which: Tensor, tokens: Tensor, temperature: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the fields of `Scores`."""
        rounded, head = states.to(dtype), weight.to(dtype)
        found = [states.new_empty(len(tokens), dtype=torch.float32) for _ in range(3)]
        likeliest = torch.zeros(len(tokens), dtype=torch.bool, device=states.device)
        normaliser = states.new_empty(len(states), 1, dtype=torch.float32)
        kept = []
        for start, mine, row in _parts(len(states), which):
            made = linear(rounded[start : start + ROWS], head)
            if start < KEPT and made.dtype != torch.float32:  # else twice the memory
                kept.append(made)
            logits = _logits(made, temperature)
            mean, best = logits.mean(-1), logits.argmax(-1)
            chosen = logits[row, tokens[mine]]
            normal = normaliser[start : start + ROWS] = logits.logsumexp(-1, keepdim=True)
            every = logits.sub_(normal)
            entropy = -(every.exp() * every).sum(-1)
            for place, values in enumerate((chosen - normal[row, 0], entropy[row], mean[row])):
                found[place][mine] = values
            likeliest[mine] = best[row] == tokens[mine]
        ctx.save_for_backward(rounded, weight, which, tokens, normaliser, *kept)
        ctx.temperature, ctx.given = temperature, states.dtype
        ctx.mark_non_differentiable(found[1], found[2], likeliest)
        return found[0], found[1], found[2], likeliest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `states` and of `weight`."""
        rounded, weight, which, tokens, normaliser, *kept = ctx.saved_tensors
        head = weight.to(rounded.dtype)
        below = torch.empty_like(rounded)
        weights = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start, mine, row in _parts(len(rounded), which):
            part = rounded[start : start + ROWS]
            worth = gradient[mine]
            place = start // ROWS
            made = kept[place] if place < len(kept) else linear(part, head)
            slope = _logits(made, ctx.temperature).sub_(normaliser[start : start + ROWS]).exp_()
            slope.mul_(-worth.new_zeros(len(part)).index_add_(0, row, worth)[:, None])
            slope.index_put_((row, tokens[mine]), worth, accumulate=True)
            slope = slope.div_(ctx.temperature).to(rounded.dtype)
            below[start : start + ROWS] = slope @ head
            if weights is not None:
                weights += slope.t() @ part
        return below.to(ctx.given) if ctx.needs_input_grad[0] else None, weights, None, None, None, None


def _parts(count: int, which: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield where each part of the states begins, which tokens are asked of it, and of which of its rows."""
    for start in range(0, count, ROWS):
        mine = ((which >= start) & (which < start + ROWS)).nonzero()[:, 0]
        yield start, mine, which[mine] - start


def _logits(made: Tensor, temperature: float) -> Tensor:
    logits = made.float()
    return logits.div_(temperature) if temperature != 1 else logits


def use_lean_layers(model: Any) -> None:
    """Let the layers of a transformers Llama (`llama.is_supported`) compute as they do, and keep less."""
    for product in model.model.layers.modules():
        if type(product) is torch.nn.Linear and product.bias is None:
            product.forward = partial(_linear, product)
    for layer in model.model.layers:
        layer.mlp.forward = partial(_mlp, layer.mlp)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = partial(_norm, norm)


def round_embeddings(model: Any) -> None:
    """Keep embeddings that do not train in bf16 where that is what they were stored in: half the memory, and no cast.

    States stay fp32. Embeddings that bf16 would change stay as they are.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = embeddings.weight
    rounded = weight.detach().bfloat16()
    if weight.requires_grad or weight is not head.weight or not torch.equal(rounded.float(), weight):
        return
    weight.data = rounded
    embeddings.forward = lambda ids: embedding(ids, weight).float()
    head.forward = lambda hidden: linear(hidden, weight.to(hidden.dtype))


def _linear(product: torch.nn.Linear, hidden: Tensor) -> Tensor:
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or not torch.is_grad_enabled():
        return linear(hidden, product.weight)
    answer: Tensor = Linear.apply(hidden, product.weight, torch.get_autocast_dtype(kind))
    return answer


def _mlp(mlp: Any, hidden: Tensor) -> Tensor:
    product: Tensor = mlp.down_proj(GatedProduct.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
    return product


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    normed: Tensor = RMSNorm.apply(hidden, norm.weight, norm.variance_epsilon, dtype)
    return normed
