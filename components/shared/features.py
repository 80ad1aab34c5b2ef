"""A frozen language model as a reader: every prompt becomes one vector of its hidden states.

A prompt's features depend on its own tokens alone, and on neither its neighbours in a batch nor on how it was computed:

* `last`  state of the last token, which has read all others
* `mean`  of the states of the tokens after the rubric
* `max`   the largest value that each feature has among these: a word that is wrong somewhere leaves its mark here

States are normed as the layer above takes them (without its weights), so that no token and no feature outweighs the
others, and rounded to fp16. The rubric is what all training prompts begin with. Its keys and values are computed once;
where a prompt begins otherwise, it is read whole and the same number of its first tokens is left out of mean and max.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .llama import PREFILL_TOKENS, STEP, LlamaDecoder, is_supported

POOLINGS = ("last", "mean", "max")


class Features:
    """Computes features with one model.

    On a CPU a Llama is read by the quick decoder, up to the deepest layer that is asked for; other models, and all on a
    GPU, by transformers.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        layers: After which layers, from 1 to one less than the model has.
        rubric: Tokens that prompts begin with.
        dtype: Arithmetic of the CPU decoder.
    """

    def __init__(self, model: Any, layers: Sequence[int], rubric: Sequence[int], dtype: torch.dtype) -> None:
        self.model, self.layers, self.rubric = model, list(layers), list(rubric)
        self.decoder = LlamaDecoder(model, dtype, max(layers)) if is_supported(model) else None
        self.shared = self.decoder.read_shared(self.rubric) if self.decoder and self.rubric else None

    def __call__(self, prompts: Sequence[list[int]]) -> Tensor:
        """Return fp16 features [prompts, layers, poolings, size], in the order of the prompts.

        Args:
            prompts: Token ids; none is empty.
        """
        found: dict[int, Tensor] = {}
        for batch, begins in self._plan(prompts):
            some = [prompts[index] for index in batch]
            pooled = self._decode(some, begins) if self.decoder else self._transformers(some)
            found |= dict(zip(batch, pooled, strict=True))
        return torch.stack([found[index] for index in range(len(prompts))])

    def _plan(self, prompts: Sequence[list[int]]) -> list[tuple[list[int], bool]]:
        """Return indices by batch, neighbours in length together, and whether the batch begins with the rubric."""
        rubric = len(self.rubric)
        begins = [self._begins(prompt) for prompt in prompts]
        read = [len(prompt) - rubric * begin for prompt, begin in zip(prompts, begins, strict=True)]
        batches: list[tuple[list[int], bool]] = []
        for index in sorted(range(len(prompts)), key=lambda index: (begins[index], read[index], index)):
            width = -(-read[index] // STEP) * STEP
            full = batches and (len(batches[-1][0]) + 1) * width > PREFILL_TOKENS
            if not batches or full or batches[-1][1] != begins[index]:
                batches.append(([], begins[index]))
            batches[-1][0].append(index)
        return batches

    def _begins(self, prompt: list[int]) -> bool:
        return self.shared is not None and len(prompt) > len(self.rubric) and prompt[: len(self.rubric)] == self.rubric

    def _decode(self, prompts: Sequence[list[int]], begins: bool) -> Tensor:
        assert self.decoder
        own = [prompt[len(self.rubric) * begins :] for prompt in prompts]
        states, padded = self.decoder.states(own, self.layers, self.shared if begins else None)
        places = torch.arange(padded.shape[1]) - padded.sum(1, keepdim=True)
        kept = ~padded if begins else places >= len(self.rubric)
        last = torch.full((len(prompts),), padded.shape[1] - 1)
        return torch.stack([_pool(one, kept, last) for one in states], 1)

    @torch.no_grad()
    def _transformers(self, prompts: Sequence[list[int]]) -> Tensor:
        length = max(map(len, prompts))
        device = self.model.device
        tokens = torch.tensor([prompt + [0] * (length - len(prompt)) for prompt in prompts], device=device)
        ends = torch.tensor([len(prompt) for prompt in prompts], device=device)
        places = torch.arange(length, device=device)
        real = places < ends[:, None]
        every = self.model.base_model(
            tokens, attention_mask=real.long(), output_hidden_states=True, use_cache=False
        ).hidden_states
        kept = real & (places >= len(self.rubric))
        return torch.stack([_pool(self._norm(every[layer]), kept, ends - 1) for layer in self.layers], 1).cpu()

    def _norm(self, hidden: Tensor) -> Tensor:
        """Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467) without weights, as the decoder's."""
        wide = hidden.float()
        epsilon = getattr(self.model.config, "rms_norm_eps", 1e-5)
        return wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def _pool(states: Tensor, kept: Tensor, last: Tensor) -> Tensor:
    """Return [rows, poolings, size] of states [rows, tokens, size].

    Args:
        states: Hidden states.
        kept: Which tokens count [rows, tokens]; of a row without any the last does.
        last: Index of each row's last token.
    """
    rows = torch.arange(len(states), device=states.device)
    kept = kept.clone()
    kept[rows, last] = True
    wide = states.float()
    mean = (wide * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
    most = wide.masked_fill(~kept[..., None], -torch.inf).amax(1)
    return torch.stack([wide[rows, last], mean, most], 1).half()
