"""A Llama decoder for the CPU: the arithmetic of transformers' `LlamaForCausalLM`, laid out for sampling in batches.

What it does otherwise: query, key and value (and gate and up) are one product each; weights are packed once in oneDNN's
layout where that exists; keys and values live in preallocated slots; tokens that all prompts begin with are computed
and kept once and attended to as one matrix product; logits are computed for the last token only.
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
HIDDEN = -1e9
"""Score of a slot that may not be attended to; finite, so that a row of padding gives no NaN."""


@dataclass
class Layer:
    """The weights of one layer; `Tensor`s in plain or packed layout."""

    norm_attention: Tensor
    qkv: Tensor
    out: Tensor
    norm_mlp: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass
class Cache:
    """Keys and values per layer: a prefix that all rows share, and each row's own slots.

    Shapes: `prefix_*` [layers, heads, shared tokens, head size]; `own_*` a list over layers of
    [rows, heads, slots, head size]; `mask` [rows, slots], 0 where a slot may be attended to and `HIDDEN` elsewhere.
    """

    prefix_keys: Tensor
    prefix_values: Tensor
    own_keys: list[Tensor]
    own_values: list[Tensor]
    mask: Tensor

    @property
    def shared(self) -> int:
        """Number of shared tokens."""
        return int(self.prefix_keys.shape[2])

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
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
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
        self.layers = [self._layer(layer) for layer in plain.model.layers]
        self.norm = self._cast(plain.model.norm.weight)
        self.embedding = self._cast(_weight(plain.get_input_embeddings()))
        self.head = self._pack(_weight(plain.lm_head))
        self.rotary = plain.model.rotary_emb

    def _layer(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [_weight(attention.q_proj), _weight(attention.k_proj), _weight(attention.v_proj)]
        return Layer(
            self._cast(layer.input_layernorm.weight),
            self._pack(torch.cat(qkv)),
            self._pack(_weight(attention.o_proj)),
            self._cast(layer.post_attention_layernorm.weight),
            self._pack(torch.cat([_weight(mlp.gate_proj), _weight(mlp.up_proj)])),
            self._pack(_weight(mlp.down_proj)),
        )

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype)

    def _pack(self, weight: Tensor) -> Tensor:
        weight = self._cast(weight).contiguous()
        if not torch.backends.mkldnn.is_available():
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        return packed

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]], shared: list[int], slots: int) -> tuple[Cache, Tensor, Tensor]:
        """Read prompts.

        Args:
            prompts: Tokens of each prompt after the shared ones; none is empty. They are padded on the left.
            shared: Tokens that stand before every prompt.
            slots: Own slots per row: the longest prompt and what will be generated.

        Returns:
            The cache, the logits [rows, vocabulary] after each prompt, and each row's next position [rows].
        """
        length = max(map(len, prompts))
        padding = torch.tensor([length - len(prompt) for prompt in prompts])
        tokens = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
        steps = torch.arange(length)
        positions = (steps - padding[:, None]).clamp(min=0) + len(shared)
        mask = torch.zeros(len(prompts), slots)
        mask[:, :length].masked_fill_(steps < padding[:, None], HIDDEN)
        cache = self._empty(len(prompts), slots, mask)
        if shared:
            cache.prefix_keys, cache.prefix_values = self._read_shared(shared)
        logits = self._read(tokens, positions, cache)
        return cache, logits, torch.tensor([len(shared) + len(prompt) for prompt in prompts])

    def _empty(self, rows: int, slots: int, mask: Tensor) -> Cache:
        shape, depth = (rows, self.kv_heads, slots, self.head_size), len(self.layers)
        none = torch.zeros(depth, self.kv_heads, 0, self.head_size, dtype=self.dtype)
        keys, values = ([torch.zeros(shape, dtype=self.dtype) for _ in range(depth)] for _ in range(2))
        return Cache(none, none, keys, values, mask)

    def _read_shared(self, shared: list[int]) -> tuple[Tensor, Tensor]:
        cache = self._empty(1, len(shared), torch.zeros(1, len(shared)))
        self._read(torch.tensor([shared]), torch.arange(len(shared))[None], cache)
        return torch.cat(cache.own_keys), torch.cat(cache.own_values)

    def _read(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Pass prompts through in blocks of rows and of tokens; return the logits after the last token."""
        rows, length = tokens.shape
        width = min(length, PREFILL_TOKENS)
        height = max(1, PREFILL_TOKENS // width)
        logits = []
        for top in range(0, rows, height):
            block = cache.slice(top, top + height)
            for start in range(0, length, width):
                some = (slice(top, top + height), slice(start, start + width))
                hidden = self._layers(tokens[some], positions[some], block, start)
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
        return self._product(self._norm(hidden, self.norm), self.head)

    def _layers(self, tokens: Tensor, positions: Tensor, cache: Cache, start: int) -> Tensor:
        """Return hidden states [rows, tokens, size]; keys and values go to the slots from `start` on."""
        hidden = F.embedding(tokens, self.embedding)
        cos, sin = self.rotary(hidden, positions)
        rotation = cos[:, None], sin[:, None]
        seen = start + tokens.shape[1]
        causal = torch.full((tokens.shape[1], seen), HIDDEN).triu(start + 1)
        mask = (cache.mask[:, None, :seen] + causal)[:, None, None]
        for depth, layer in enumerate(self.layers):
            normed = self._norm(hidden, layer.norm_attention)
            mixed = self._attend(self._product(normed, layer.qkv), rotation, cache, depth, start, mask)
            hidden = hidden + self._product(mixed, layer.out)
            gate, up = self._product(self._norm(hidden, layer.norm_mlp), layer.gate_up).chunk(2, -1)
            hidden = hidden + self._product(F.silu(gate) * up, layer.down)
        return hidden

    def _attend(
        self, qkv: Tensor, rotation: tuple[Tensor, Tensor], cache: Cache, depth: int, start: int, mask: Tensor
    ) -> Tensor:
        """Attention of new tokens over the shared prefix and the row's own slots; one softmax over both."""
        rows, tokens, _ = qkv.shape
        heads, size = self.kv_heads, self.head_size
        group, seen = self.heads // heads, start + tokens
        query, key, value = qkv.view(rows, tokens, -1, size).transpose(1, 2).split([self.heads, heads, heads], 1)
        query = _rotate(query, *rotation) * size**-0.5
        cache.own_keys[depth][:, :, start:seen] = _rotate(key, *rotation)
        cache.own_values[depth][:, :, start:seen] = value
        keys, values = cache.own_keys[depth][:, :, :seen], cache.own_values[depth][:, :, :seen]
        own = query.reshape(rows, heads, group * tokens, size)
        scores = torch.matmul(own, keys.transpose(-1, -2)).view(rows, heads, group, tokens, seen).float() + mask
        if not cache.shared:
            weights = scores.softmax(-1).to(qkv.dtype).view(rows, heads, group * tokens, seen)
            return self._join(torch.matmul(weights, values), rows, tokens)
        # All rows ask the same keys: one product per head instead of one per row.
        asked = own.transpose(0, 1).reshape(heads, rows * group * tokens, size)
        common = torch.matmul(asked, cache.prefix_keys[depth].transpose(-1, -2)).float()
        common = common.view(heads, rows, group, tokens, cache.shared).transpose(0, 1)
        weights = torch.cat([common, scores], -1).softmax(-1).to(qkv.dtype)
        first, second = weights.split([cache.shared, seen], -1)
        first = first.transpose(0, 1).reshape(heads, rows * group * tokens, cache.shared)
        mixed = torch.matmul(first, cache.prefix_values[depth]).view(heads, rows, group * tokens, size).transpose(0, 1)
        mixed = mixed + torch.matmul(second.reshape(rows, heads, group * tokens, seen), values)
        return self._join(mixed, rows, tokens)

    def _join(self, mixed: Tensor, rows: int, tokens: int) -> Tensor:
        """[rows, kv heads, group · tokens, size] to [rows, tokens, heads · size]."""
        return mixed.reshape(rows, self.heads, tokens, self.head_size).transpose(1, 2).reshape(rows, tokens, -1)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.epsilon)

    def _product(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if weight.is_mkldnn:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")
            return product
        return F.linear(hidden, weight)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the halves layout of Llama."""
    half = states.shape[-1] // 2
    return states * cos + torch.cat((-states[..., half:], states[..., :half]), -1) * sin


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
