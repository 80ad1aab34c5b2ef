"""A Llama's norms and products with less memory between forward and backward pass, and fewer numbers to write.

transformers writes norms and gated products as chains of small operations, each of which keeps its input for the way
back. Of a token and layer of SmolLM2-135M in bf16 that is 27 kB of 50; what is needed is 16. And autocast keeps every
weight that it rounded until its gradient is there: 257 MB of that model, half of all that a small batch keeps.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, silu

ROWS = 256
"""States whose logits are in memory at once, 25 MB at a vocabulary of 49k in bf16; of fewer the product is slower: in
GFLOP/s, of 64, 128 and 256 states, 258, 320 and 377 (two cores of Zen 4)."""
CACHED = 8
"""States whose logits are gone over together, 1.6 MB: they fit the cache, and only the first pass reads memory."""
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
        both = wide * unit
        weights = both.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, weights, None, None
        along = (both @ weight.float())[..., None] / len(weight)
        wide = wide * weight
        return wide.addcmul_(unit, along, value=-1).mul_(scale).to(hidden.dtype), weights, None, None


class GatedProduct(torch.autograd.Function):  # type: ignore[misc]
    """silu(gate) · up; the first factor is computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        """Return the product [..., size] of gate and up, which stand beside each other [..., 2 · size]."""
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient of gate and up."""
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        below = torch.empty_like(both)
        of_gate, of_up = below.chunk(2, -1)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        torch.mul(silu(gate), gradient, out=of_up)
        return below


class Linear(torch.autograd.Function):  # type: ignore[misc]
    """Product with weights that are rounded for it, and again on the way back, which autocast would keep."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        """Return `hidden` [..., inputs] · each weightᵀ [outputs, inputs], beside each other, as `dtype`."""
        rounded = hidden.to(dtype)
        ctx.save_for_backward(rounded if any(ctx.needs_input_grad[2:]) else hidden.new_empty(0), *weights)
        ctx.given = hidden.dtype
        return linear(rounded, _joined(weights, dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `hidden` and of each weight."""
        hidden, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        below = (gradient @ _joined(weights, gradient.dtype)).to(ctx.given) if ctx.needs_input_grad[0] else None
        if not any(wanted):
            return below, None, *(None for _ in weights)
        slopes = (gradient.flatten(0, -2).t() @ hidden.flatten(0, -2)).split([len(weight) for weight in weights])
        every = zip(slopes, weights, wanted, strict=True)
        return below, None, *(slope.to(weight.dtype) if asked else None for slope, weight, asked in every)


def products(layers: Sequence[torch.nn.Module], hidden: Tensor) -> Tensor:
    """Return what linear layers make of the same states [..., inputs], side by side; one product, where it can be."""
    kind = hidden.device.type
    plain = all(type(layer) is torch.nn.Linear and layer.bias is None for layer in layers)
    if not plain or not torch.is_autocast_enabled(kind):
        return torch.cat([layer(hidden) for layer in layers], -1)
    answer: Tensor = Linear.apply(hidden, torch.get_autocast_dtype(kind), *(layer.weight for layer in layers))
    return answer


def _joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if len(weights) == 1:
        return weights[0].to(dtype)
    joined = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1], dtype=dtype)
    for mine, weight in zip(joined.split([len(weight) for weight in weights]), weights, strict=True):
        mine.copy_(weight)
    return joined


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
        normaliser, entropy, mean = (states.new_empty(len(states), dtype=torch.float32) for _ in range(3))
        likeliest = torch.empty(len(states), dtype=torch.long, device=states.device)
        log_probs = states.new_empty(len(tokens), dtype=torch.float32)
        kept = []
        rows = _rows(len(states))
        for start in range(0, len(states), rows):
            made = linear(rounded[start : start + rows], head)
            if start < KEPT and made.dtype != torch.float32:  # else twice the memory
                kept.append(made)
            for part, mine, row in _parts(start, len(made), which):
                logits = _logits(made[part.start - start : part.stop - start], temperature)
                log_probs[mine] = logits[row, tokens[mine]]
                mean[part] = logits.mean(-1)
                most, likeliest[part] = logits.max(-1)
                shifted = logits.sub_(most[:, None])
                likelihood = shifted.exp()
                total = likelihood.sum(-1)
                spread = total.log()
                normaliser[part] = most + spread
                entropy[part] = spread - likelihood.mul_(shifted).sum(-1) / total
        log_probs -= normaliser[which]
        ctx.save_for_backward(rounded, weight, which, tokens, normaliser, *kept)
        ctx.temperature, ctx.given = temperature, states.dtype
        found = entropy[which], mean[which], likeliest[which] == tokens
        ctx.mark_non_differentiable(*found)
        return log_probs, *found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `states` and of `weight`."""
        rounded, weight, which, tokens, normaliser, *kept = ctx.saved_tensors
        head = weight.to(rounded.dtype)
        below = torch.empty_like(rounded)
        weights = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        gradient = gradient / ctx.temperature
        worth = gradient.new_zeros(len(rounded)).index_add_(0, which, gradient)[:, None]
        rows = _rows(len(rounded))
        for start in range(0, len(rounded), rows):
            states = rounded[start : start + rows]
            place = start // rows
            made = kept[place] if place < len(kept) else linear(states, head)
            slope = torch.empty_like(made) if place < len(kept) else made
            for part, mine, row in _parts(start, len(made), which):
                own = slice(part.start - start, part.stop - start)
                likelihood = _logits(made[own], ctx.temperature).sub_(normaliser[part, None]).exp_()
                likelihood.mul_(-worth[part])
                slope[own] = likelihood.index_put_((row, tokens[mine]), gradient[mine], accumulate=True)
            below[start : start + rows] = slope @ head
            if weights is not None:
                weights += slope.t() @ states
        return below.to(ctx.given) if ctx.needs_input_grad[0] else None, weights, None, None, None, None


def _rows(count: int) -> int:
    """Return how many of some states are a part: no more than `ROWS`, and all parts alike."""
    return -(-count // max(1, -(-count // ROWS))) or 1


def _parts(start: int, count: int, which: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield `CACHED` neighbouring states at a time, which tokens are asked of them, and of which of them."""
    for first in range(start, start + count, CACHED):
        last = min(first + CACHED, start + count)
        mine = ((which >= first) & (which < last)).nonzero()[:, 0]
        yield slice(first, last), mine, which[mine] - first


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
    if not torch.is_autocast_enabled(kind):
        return linear(hidden, product.weight)
    answer: Tensor = Linear.apply(hidden, torch.get_autocast_dtype(kind), product.weight)
    return answer


def _mlp(mlp: Any, hidden: Tensor) -> Tensor:
    product: Tensor = mlp.down_proj(GatedProduct.apply(products((mlp.gate_proj, mlp.up_proj), hidden)))
    return product


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    normed: Tensor = RMSNorm.apply(hidden, norm.weight, norm.variance_epsilon, dtype)
    return normed
