"""A Llama decoder for the CPU: the arithmetic of transformers' `LlamaForCausalLM`, laid out for sampling in batches.

What it does otherwise: query, key and value (and gate and up) are one product each, which takes the norm's weights and
the scale of the scores into its own; weights are packed once in oneDNN's layout where that exists; keys and values live
in preallocated slots, keys transposed as the product with them wants them; tokens that all prompts begin with are
computed once, and where they are many also kept once and attended to as one matrix product; logits are computed for the
last token only.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PREFILL_TOKENS = 1024
"""Tokens that pass through the layers at once while prompts are read: bounds the memory of activations."""
PACKED_ROWS = 64
"""Rows of a product that the packed layout is best for."""
COPIED_TOKENS = 32
"""Shared tokens that are copied into every row's slots: so few are quicker read again than computed apart."""
STEP = 8
"""Of the lengths of batches whose states are read: few shapes, for each of which oneDNN keeps a program."""
HIDDEN = -1e9
"""Score of a slot that may not be attended to; finite, so that a row of padding gives no NaN."""


@dataclass
class Layer:
    """The weights of one layer; `Tensor`s in plain or packed layout."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass
class Cache:
    """Keys and values per layer: a prefix that all rows share, and each row's own slots.

    Shapes: `prefix_keys` [layers, heads, head size, shared tokens]; `own_keys` a list over layers of
    [rows, heads, head size, slots]; the values with the last two places exchanged; `mask` [rows, slots], 0 where a slot
    may be attended to and `HIDDEN` elsewhere.
    """

    prefix_keys: Tensor
    prefix_values: Tensor
    own_keys: list[Tensor]
    own_values: list[Tensor]
    mask: Tensor

    @property
    def shared(self) -> int:
        """Number of shared tokens."""
        return int(self.prefix_keys.shape[-1])

    def take(self, rows: Tensor) -> "Cache":
        """Return the cache of some rows, by index; an index may stand more than once."""
        return Cache(
            self.prefix_keys,
            self.prefix_values,
            [keys[rows] for keys in self.own_keys],
            [values[rows] for values in self.own_values],
            self.mask[rows],
        )

    def slice(self, start: int, end: int) -> "Cache":
        """Return a view of neighbouring rows; writing into it writes here."""
        return Cache(
            self.prefix_keys,
            self.prefix_values,
            [keys[start:end] for keys in self.own_keys],
            [values[start:end] for values in self.own_values],
            self.mask[start:end],
        )


def is_supported(model: Any) -> bool:
    """Return whether this decoder computes what `model` does."""
    plain = _plain(model)
    config = plain.config
    return (
        type(plain).__name__ == "LlamaForCausalLM"
        and plain.device.type == "cpu"
        and config.hidden_act == "silu"
        and not config.attention_bias
        and not config.mlp_bias
        and config.rope_parameters.get("rope_type", "default") in ("default", "linear", "llama3")
    )


class LlamaDecoder:
    """Computes next-token logits of a Llama.

    Args:
        model: A transformers model on the CPU, also with LoRA adapters (they are merged into the copy).
        dtype: Of weights and arithmetic; softmax and norms as transformers does them.
        depth: Lowest layers to compute, where only their states are wanted; None means all.
    """

    def __init__(self, model: Any, dtype: torch.dtype, depth: int | None = None) -> None:
        self.model, self.dtype, self.depth = model, dtype, depth
        config = _plain(model).config
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_size: int = config.head_dim
        self.epsilon: float = config.rms_norm_eps
        self.layers: list[Layer] = []
        self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """Take over the model's weights; call it after they have changed."""
        plain = _plain(self.model)
        self.layers = [self._layer(layer) for layer in plain.model.layers[: self.depth]]
        self.embedding = _weight(plain.get_input_embeddings()).detach().to(self.dtype)
        self.head = self._pack(_weight(plain.lm_head), plain.model.norm)
        self.rotary = plain.model.rotary_emb

    def _layer(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        query = _weight(attention.q_proj) * self.head_size**-0.5
        qkv = [query, _weight(attention.k_proj), _weight(attention.v_proj)]
        return Layer(
            self._pack(torch.cat(qkv), layer.input_layernorm),
            self._pack(_weight(attention.o_proj)),
            self._pack(torch.cat([_weight(mlp.gate_proj), _weight(mlp.up_proj)]), layer.post_attention_layernorm),
            self._pack(_weight(mlp.down_proj)),
        )

    def _pack(self, weight: Tensor, norm: Any = None) -> Tensor:
        """Lay a product's weights out; `norm` is the one before it, whose weights they take in."""
        weight = weight if norm is None else weight * norm.weight
        weight = weight.detach().to(self.dtype).contiguous()
        if not torch.backends.mkldnn.is_available():
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        return packed

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]], shared: list[int], new: int) -> tuple[Cache, Tensor, Tensor, int]:
        """Read prompts.

        Args:
            prompts: Tokens of each prompt after the shared ones; none is empty. They are padded on the left.
            shared: Tokens that stand before every prompt.
            new: Tokens that will be generated.

        Returns:
            The cache, the logits [rows, vocabulary] after each prompt, each row's next position [rows], and the next
            slot.
        """
        copied = len(shared) if len(shared) <= COPIED_TOKENS else 0
        tokens, padded = _pad(prompts)
        length = tokens.shape[1]
        positions = _positions(padded) + len(shared)
        mask = torch.zeros(len(prompts), copied + length + new, dtype=self.dtype)
        mask[:, copied : copied + length].masked_fill_(padded, HIDDEN)
        cache = self._empty(len(prompts), mask)
        if shared:
            keys, values = self.read_shared(shared)
            if copied:
                for depth in range(len(self.layers)):
                    cache.own_keys[depth][..., :copied] = keys[depth]
                    cache.own_values[depth][:, :, :copied] = values[depth]
            else:
                cache.prefix_keys, cache.prefix_values = keys, values
        logits = self._read(tokens, positions, cache, copied)
        return cache, logits, torch.tensor([len(shared) + len(prompt) for prompt in prompts]), copied + length

    def _empty(self, rows: int, mask: Tensor) -> Cache:
        heads, size, slots, depth = self.kv_heads, self.head_size, mask.shape[1], len(self.layers)
        keys = [torch.zeros(rows, heads, size, slots, dtype=self.dtype) for _ in range(depth)]
        values = [torch.zeros(rows, heads, slots, size, dtype=self.dtype) for _ in range(depth)]
        none = torch.zeros(depth, heads, size, 0, dtype=self.dtype)
        return Cache(none, none.transpose(-1, -2), keys, values, mask)

    @torch.no_grad()
    def states(
        self, prompts: list[list[int]], layers: list[int], shared: tuple[Tensor, Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Return what the prompts' tokens become after some layers, normed as the next layer's products take it.

        Args:
            prompts: Tokens of each prompt after the shared ones; none is empty. All pass through at once.
            layers: How many layers they have passed; from 1 on.
            shared: Of `read_shared`, for the tokens that stand before every prompt.

        Returns:
            Hidden states [rows, tokens, size] for each of `layers`, and where they are padding [rows, tokens]: on the
            left.
        """
        tokens, padded = _pad(prompts, STEP)
        mask = torch.zeros(tokens.shape, dtype=self.dtype).masked_fill_(padded, HIDDEN)
        cache = self._empty(len(prompts), mask)
        if shared:
            cache.prefix_keys, cache.prefix_values = shared
        kept: list[Tensor] = []
        self._layers(tokens, _positions(padded) + cache.shared, cache, 0, kept)
        return [self._norm(kept[layer - 1]) for layer in layers], padded

    @torch.no_grad()
    def read_shared(self, shared: list[int]) -> tuple[Tensor, Tensor]:
        """Return keys and values of tokens that stand before every prompt, as `Cache` holds them."""
        cache = self._empty(1, torch.zeros(1, len(shared), dtype=self.dtype))
        self._read(torch.tensor([shared]), torch.arange(len(shared))[None], cache, 0)
        return torch.cat(cache.own_keys), torch.cat(cache.own_values)

    def _read(self, tokens: Tensor, positions: Tensor, cache: Cache, slot: int) -> Tensor:
        """Pass prompts through in blocks of rows and of tokens; return the logits after the last token."""
        rows, length = tokens.shape
        width = min(length, PREFILL_TOKENS)
        height = max(1, PREFILL_TOKENS // width)
        logits = []
        for top in range(0, rows, height):
            block = cache.slice(top, top + height)
            for start in range(0, length, width):
                some = (slice(top, top + height), slice(start, start + width))
                hidden = self._layers(tokens[some], positions[some], block, slot + start)
            logits.append(self._logits(hidden[:, -1]))
        return torch.cat(logits)

    @torch.no_grad()
    def step(self, tokens: Tensor, positions: Tensor, cache: Cache, slot: int) -> Tensor:
        """Read one more token per row and return the logits after it.

        Args:
            tokens: [rows].
            positions: [rows].
            cache: Its slot `slot` is written.
            slot: Where the token is kept.
        """
        return self._logits(self._layers(tokens[:, None], positions[:, None], cache, slot)[:, -1])

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._product(self._norm(hidden), self.head)

    def _layers(
        self, tokens: Tensor, positions: Tensor, cache: Cache, start: int, kept: list[Tensor] | None = None
    ) -> Tensor:
        """Return hidden states [rows, tokens, size]; keys and values go to the slots from `start` on.

        Those after each layer go to `kept`, where it is given.
        """
        hidden = F.embedding(tokens, self.embedding)
        cos, sin = self.rotary(hidden, positions)
        half = self.head_size // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        rotation = cos[:, :, None], sin[:, :, None]
        seen = start + tokens.shape[1]
        mask = cache.mask[:, None, :seen]
        if tokens.shape[1] > 1:
            mask = mask + torch.full((tokens.shape[1], seen), HIDDEN, dtype=self.dtype).triu(start + 1)
        mask = mask[:, None, None]
        for depth, layer in enumerate(self.layers):
            mixed = self._attend(self._product(self._norm(hidden), layer.qkv), rotation, cache, depth, start, mask)
            hidden = self._product(mixed, layer.out, hidden)
            gate, up = self._product(self._norm(hidden), layer.gate_up).chunk(2, -1)
            hidden = self._product(F.silu(gate).mul_(up), layer.down, hidden)
            if kept is not None:
                kept.append(hidden)
        return hidden

    def _attend(
        self, qkv: Tensor, rotation: tuple[Tensor, Tensor], cache: Cache, depth: int, start: int, mask: Tensor
    ) -> Tensor:
        """Attention of new tokens over the shared prefix and the row's own slots; one softmax over both."""
        rows, tokens, _ = qkv.shape
        heads, size = self.kv_heads, self.head_size
        group, seen = self.heads // heads, start + tokens
        asking, value = qkv.view(rows, tokens, -1, size).split([self.heads + heads, heads], 2)
        query, key = _rotate(asking, *rotation).split([self.heads, heads], 2)
        cache.own_keys[depth][..., start:seen] = key.permute(0, 2, 3, 1)
        cache.own_values[depth][:, :, start:seen] = value.transpose(1, 2)
        keys, values = cache.own_keys[depth][..., :seen], cache.own_values[depth][:, :, :seen]
        own = query.transpose(1, 2).reshape(rows, heads, group * tokens, size)
        scores = torch.matmul(own, keys).view(rows, heads, group, tokens, seen) + mask
        if not cache.shared:
            weights = scores.softmax(-1).view(rows, heads, group * tokens, seen)
            return self._join(torch.matmul(weights, values), rows, tokens)
        # All rows ask the same keys: one product per head instead of one per row.
        asked = own.transpose(0, 1).reshape(heads, rows * group * tokens, size)
        common = torch.matmul(asked, cache.prefix_keys[depth])
        common = common.view(heads, rows, group, tokens, cache.shared).transpose(0, 1)
        weights = torch.cat([common, scores], -1).softmax(-1)
        first, second = weights.split([cache.shared, seen], -1)
        first = first.transpose(0, 1).reshape(heads, rows * group * tokens, cache.shared)
        mixed = torch.matmul(first, cache.prefix_values[depth]).view(heads, rows, group * tokens, size).transpose(0, 1)
        mixed = mixed + torch.matmul(second.reshape(rows, heads, group * tokens, seen), values)
        return self._join(mixed, rows, tokens)

    def _join(self, mixed: Tensor, rows: int, tokens: int) -> Tensor:
        """[rows, kv heads, group · tokens, size] to [rows, tokens, heads · size]."""
        return mixed.reshape(rows, self.heads, tokens, self.head_size).transpose(1, 2).reshape(rows, tokens, -1)

    def _norm(self, hidden: Tensor) -> Tensor:
        """Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467) without its weights."""
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        scale = length.square_().div_(hidden.shape[-1]).add_(self.epsilon).rsqrt_()
        return torch.mul(hidden, scale, out=torch.empty_like(hidden))

    def _product(self, hidden: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
        """Return `hidden` times the weights' transpose, `plus` something of that shape."""
        if weight.is_mkldnn:
            product: Tensor
            if plus is None:
                product = torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")
            else:
                product = torch.ops.mkldnn._linear_pointwise.binary(hidden, plus, weight, None, "add")
            return product
        return F.linear(hidden, weight) if plus is None else F.linear(hidden, weight) + plus


def _pad(prompts: list[list[int]], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Return tokens [rows, length], padded on the left, and where the padding is; the length is a multiple."""
    length = -(-max(map(len, prompts)) // multiple) * multiple
    padding = torch.tensor([length - len(prompt) for prompt in prompts])
    tokens = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    return tokens, torch.arange(length) < padding[:, None]


def _positions(padded: Tensor) -> Tensor:
    """Return each token's place in its row, 0 on the padding before it."""
    return ((~padded).cumsum(1) - 1).clamp(min=0)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the halves layout of Llama.

    Args:
        states: [rows, tokens, heads, head size].
        cos: [rows, tokens, 1, head size].
        sin: As `cos`, its first half negated.
    """
    return (states * cos).addcmul_(states.roll(states.shape[-1] // 2, -1), sin)


def _plain(model: Any) -> Any:
    """Return the transformers model inside a PEFT one, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _weight(module: Any) -> Tensor:
    """Return a linear layer's weight, with its active LoRA adapters merged in."""
    if not hasattr(module, "get_delta_weight"):
        weight: Tensor = module.weight
        return weight
    merged: Tensor = module.base_layer.weight
    if not module.disable_adapters and not module.merged:
        for adapter in module.active_adapters:
            merged = merged + module.get_delta_weight(adapter)
    return merged
