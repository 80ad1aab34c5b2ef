"""Sequences that begin alike, computed once: a batch as one prefix tree, for training.

The rows of a training batch repeat themselves: all begin with the system turn, the answers of a pair or of a group with
one prompt, and often with the same first tokens. A causal model gives equal prefixes equal hidden states, so each is
computed once. A batch is a tree of tokens (one for each first token) without padding: a token attends to itself and its
ancestors, and its position is its depth. The gradient of a shared token is the sum over the sequences that share it, as
it would be without packing.

Tokens stand in preorder: what is below a token stands right behind it. So neighbouring tokens are attended from
together, and of all that stands before them they see only the ancestors of the first. Torch's own fused attention knows
no trees: on the 16 sequences of 8 pairs (1,328 places; the tree has 751), 9 heads of 64 in bf16, it takes 25 ms
there and back, and this one, with the rotary embedding, 12 (two cores of Zen 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from .lean import products

BLOCK_TOKENS = 96
"""Tokens whose attention is computed together: of fewer the products are too small, of more most scores are hidden."""
HIDDEN = -1e9
"""Score of a token that may not be attended to."""


@dataclass(frozen=True)
class Block:
    """Neighbouring tokens, and those they may attend to."""

    start: int
    end: int
    seen: Tensor
    """[ancestors + tokens]: of the first token, and the block's own."""
    mask: Tensor
    """[tokens, 1, ancestors + tokens]: what is added to the scores."""


@dataclass(frozen=True)
class Packed:
    """A batch as a tree."""

    ids: Tensor
    """[tokens]."""
    positions: Tensor
    """[tokens]: depth in the tree."""
    place: Tensor
    """[sequences, length]: which token an input token is; 0 for padding."""
    blocks: Sequence[Block]


def pack(input_ids: Tensor, attention_mask: Tensor, block_tokens: int = BLOCK_TOKENS) -> Packed:
    """Return a padded batch as a prefix tree.

    Args:
        input_ids: [sequences, length].
        attention_mask: [sequences, length], 1 on tokens and 0 on padding, which may stand on either side.
        block_tokens: Tokens of a block.
    """
    real = attention_mask.bool()
    sequences = [ids[some].tolist() for ids, some in zip(input_ids, real, strict=True)]
    place = torch.zeros(input_ids.shape, dtype=torch.long)
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []  # of each token, where what is below it ends
    path: list[int] = []
    for index in sorted(range(len(sequences)), key=sequences.__getitem__):
        # In sorted order, what a sequence shares with the tree it shares with the sequence before it.
        tokens = sequences[index]
        shared = _common(tokens, [ids[node] for node in path])
        for node in path[shared:]:
            ends[node] = len(ids)
        path = path[:shared] + list(range(len(ids), len(ids) + len(tokens) - shared))
        ids += tokens[shared:]
        positions += range(shared, len(tokens))
        ends += [0] * (len(tokens) - shared)
        place[index, real[index]] = torch.tensor(path, dtype=torch.long)
    for node in path:
        ends[node] = len(ids)
    until = torch.tensor(ends)
    blocks = [_block(until, start, min(start + block_tokens, len(ids))) for start in range(0, len(ids), block_tokens)]
    return Packed(torch.tensor(ids), torch.tensor(positions), place, blocks)


def _block(until: Tensor, start: int, end: int) -> Block:
    """Return some tokens' block; `until` [tokens] is where what is below each token ends."""
    before = (until[:start] > start).nonzero()[:, 0]
    tokens = torch.arange(start, end)
    seen = torch.cat([before, tokens])
    hidden = (seen > tokens[:, None]) | (until[seen] <= tokens[:, None])
    return Block(start, end, seen, torch.zeros(hidden.shape).masked_fill_(hidden, HIDDEN)[:, None])


def _common(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class TreeAttention(torch.autograd.Function):  # type: ignore[misc]
    """Attention of a tree's tokens, with the rotary position embedding (Su et al. 2021, arXiv:2104.09864) before it.

    Queries that share a key's head (Ainslie et al. 2023, arXiv:2305.13245) are one product with it. The precision is
    FlashAttention's (Dao 2023, arXiv:2307.08691): scores, softmax and the slope of the softmax are fp32 (bf16 would
    round a score of 16 by up to 0.06), and what is multiplied with them is as the model has it.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, heads: int, rotation: tuple[Tensor, Tensor], scaling: float, blocks: Sequence[Block]
    ) -> Tensor:
        """Return what the tokens found [tokens, heads · size].

        Args:
            ctx: What the way back needs.
            states: [tokens, heads + 2 · shared heads, size]: queries, keys and values.
            heads: Of the queries.
            rotation: Cosine and sine of each token's angles [tokens, size], both halves alike.
            scaling: By which scores are multiplied.
            blocks: Of the tree.
        """
        tokens, every, size = states.shape
        (cos, sin), shared, dtype = rotation, (every - heads) // 2, states.dtype
        query, key, value = states.split([heads, shared, shared], 1)
        with torch.autocast(states.device.type, enabled=False):
            asked = _turn(_by_head(query, shared), cos * scaling, sin * scaling).view(shared, -1, size)
            keys = _turn(_by_head(key, shared), cos, sin).view(shared, -1, size)
            values = _by_head(value, shared).reshape(shared, -1, size)
            found = states.new_empty(tokens, shared, heads // shared * size)
            kept = []
            for block in blocks:
                length = block.end - block.start
                scores = torch.bmm(_asking(asked, block, tokens), _seen(keys, block).transpose(1, 2))
                weights = scores.view(shared, length, -1, scores.shape[-1]).add_(block.mask).softmax(-1)
                weights = weights.view(scores.shape).to(dtype)
                mixed = torch.bmm(weights, _seen(values, block))
                found[block.start : block.end] = mixed.view(shared, length, -1).transpose(0, 1)
                if ctx.needs_input_grad[0]:
                    kept.append(weights)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(asked.to(dtype), keys.to(dtype), values, cos, sin, *kept)
            ctx.heads, ctx.scaling, ctx.blocks = heads, scaling, blocks
        return found.view(tokens, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of `states`."""
        asked, keys, values, cos, sin, *kept = ctx.saved_tensors
        shared, tokens, size = keys.shape
        dtype = keys.dtype
        below = _by_head(gradient.reshape(tokens, -1, size), shared).reshape(asked.shape)
        wide, wide_values = below.float(), values.float()
        of_asked, of_keys, of_values = (torch.zeros_like(one, dtype=torch.float32) for one in (asked, keys, values))
        for block, weights in zip(ctx.blocks, kept, strict=True):
            slope = torch.bmm(_asking(wide, block, tokens), _seen(wide_values, block).transpose(1, 2))
            slope = torch.ops.aten._softmax_backward_data(slope, weights.float(), -1, slope.dtype).to(dtype)
            _asking(of_asked, block, tokens).copy_(torch.bmm(slope, _seen(keys, block)))
            _add(of_keys, block, torch.bmm(slope.transpose(1, 2), _asking(asked, block, tokens)))
            _add(of_values, block, torch.bmm(weights.transpose(1, 2), _asking(below, block, tokens)))
        every = gradient.new_empty(tokens, ctx.heads + 2 * shared, size)
        query, key, value = (_by_head(part, shared) for part in every.split([ctx.heads, shared, shared], 1))
        query.copy_(_turn(of_asked.view(query.shape), cos * ctx.scaling, sin * -ctx.scaling))
        key.copy_(_turn(of_keys.view(key.shape), cos, -sin))
        value.copy_(of_values.view(value.shape))
        return every, None, None, None, None


def _by_head(states: Tensor, shared: int) -> Tensor:
    """Return a view [shared heads, tokens, heads that share one, size] of states [tokens, heads, size]."""
    return states.unflatten(1, (shared, -1)).transpose(0, 1)


def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return states [shared heads, tokens, heads that share one, size] turned by their tokens' angles, in fp32."""
    half = states.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.mul(states, cos, out=torch.empty(states.shape))
    turned[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return turned


def _asking(states: Tensor, block: Block, tokens: int) -> Tensor:
    """Return a view of a block's own rows of states [shared heads, tokens · heads that share one, size]."""
    each = states.shape[1] // tokens
    return states[:, block.start * each : block.end * each]


def _seen(states: Tensor, block: Block) -> Tensor:
    """Return keys or values [shared heads, tokens, size] of the tokens that a block may attend to."""
    return states[:, block.seen] if len(block.seen) > block.end - block.start else states[:, block.start : block.end]


def _add(states: Tensor, block: Block, more: Tensor) -> None:
    """Add to what `_seen` returned."""
    before = more.shape[1] - (block.end - block.start)
    states[:, block.start : block.end] += more[:, before:]
    states.index_add_(1, block.seen[:before], more[:, :before].to(states.dtype))


def use_tree_attention(model: Any) -> None:
    """Let a transformers Llama (`llama.is_supported`) take a `tree` beside its other arguments.

    Tokens are then a batch of one [1, tokens], in the order of the tree. Other calls stay as they were.
    """
    for layer in model.base_model.layers:
        attention = layer.self_attn
        attention.forward = partial(_attend, attention, attention.forward)


def run_packed(model: Any, packed: Packed, **named: Any) -> Tensor:
    """Return the last hidden states [tokens, size] of a tree, of a model that `use_tree_attention` has seen."""
    unused = torch.zeros(1, 1, 1, 1)  # else transformers makes a mask of its own, of all tokens by all
    more = {"attention_mask": unused, "position_ids": packed.positions[None], "tree": packed.blocks}
    states: Tensor = model.base_model(packed.ids[None], **more, **named).last_hidden_state[0]
    return states


def _attend(
    attention: Any, plain: Any, hidden_states: Tensor, *, tree: Sequence[Block] | None = None, **named: Any
) -> tuple[Tensor, None]:
    if tree is None:
        return plain(hidden_states=hidden_states, **named)  # type: ignore[no-any-return]
    cos, sin = named["position_embeddings"]
    every = products((attention.q_proj, attention.k_proj, attention.v_proj), hidden_states)
    states = every[0].unflatten(-1, (-1, attention.head_dim))
    heads = attention.config.num_attention_heads
    found = TreeAttention.apply(states, heads, (cos[0], sin[0]), attention.scaling, tree)
    return attention.o_proj(found[None]), None
