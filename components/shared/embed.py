"""Text to vectors with a decoder language model as encoder, the one way training, evaluation and serving do it.

A folder that is an encoder holds `embedding.json` beside the weights; it says how the weights are to be used. A text's
tokens go through the model once; its vector is the mean of their last states, or the state of an end-of-text token put
behind them, at length 1, so that a dot product is a cosine.

Arithmetic is fp32, also where bf16 is quicker: an index is made in large batches and asked one question at a time, and
in bf16 a text would have another vector in each.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from ..contracts.artifacts import ENCODING, digest_of
from ..contracts.errors import ModelError
from ..runtime.context import cache_folder
from .models import load_model, load_tokenizer, model_digest, set_threads

VERSION = 1
"""Part of the cache's key: raise it when a vector could change."""
BATCH_TOKENS = 8192
"""Tokens of a batch, padding included: bounds the memory of activations."""

Vectors = NDArray[np.float32]
"""[texts, dimensions], each of length 1."""
Progress = Callable[[int, int], None]
"""Called with (texts done, texts in all)."""


class Encoding(BaseModel):
    """`embedding.json`: how a model folder is used as an encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pooling: Literal["mean", "last"]
    query_prefix: str
    """Stands before a question; a passage has none."""
    lowercase: bool
    """Texts are folded to lower case."""
    layers: int
    """Lowest layers of the model that are used."""
    dimensions: int
    """Of a vector."""


class Encoder:
    """A loaded model that returns vectors.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        encoding: How it is used.
    """

    def __init__(self, model: Any, tokenizer: Any, encoding: Encoding) -> None:
        self.model, self.tokenizer, self.encoding = model, tokenizer, encoding

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text, prefix included, as the model reads them.

        Raises:
            ModelError: It is longer than the model's context.
        """
        ids = text_ids(self.tokenizer, text, self.encoding)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit and len(ids) > limit:
            raise ModelError(
                f"a text has {len(ids)} tokens and the model reads {limit}",
                where=f"{text[:40]!r}",
                fix="cut the documents into shorter passages",
            )
        return ids

    def encode(self, ids: Sequence[list[int]], progress: Progress | None = None) -> Vectors:
        """Return the vectors of tokenised texts, in their order; neighbours in length are computed together."""
        vectors = np.zeros((len(ids), self.encoding.dimensions), dtype=np.float32)
        done = 0
        for batch in plan(ids):
            vectors[batch] = self._batch([ids[place] for place in batch])
            done += len(batch)
            if progress:
                progress(done, len(ids))
        return vectors

    @torch.no_grad()
    def _batch(self, ids: list[list[int]]) -> Vectors:
        tokens, mask = pad(ids, self.tokenizer.pad_token_id)
        device = self.model.device
        hidden = self.model.base_model(tokens.to(device), attention_mask=mask.to(device), use_cache=False)
        vectors: Vectors = pool(hidden.last_hidden_state, mask.to(device), self.encoding.pooling).cpu().numpy()
        return vectors


def text_ids(tokenizer: Any, text: str, encoding: Encoding) -> list[int]:
    """Return a text's tokens; for pooling by the last one, an end-of-text token stands behind them."""
    folded = text.lower() if encoding.lowercase else text
    ids: list[int] = tokenizer(folded, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if encoding.pooling == "last" or not ids else ids


def keep_layers(model: Any, count: int) -> None:
    """Leave a transformers model its lowest layers."""
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]


def pad(ids: Sequence[list[int]], token: int) -> tuple[Tensor, Tensor]:
    """Return texts as [texts, tokens] and their mask, padded on the right: a causal model never looks there."""
    length = max(map(len, ids))
    tokens = torch.tensor([one + [token] * (length - len(one)) for one in ids])
    return tokens, torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in ids])


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return one vector of length 1 per text.

    Args:
        hidden: [texts, tokens, size].
        mask: [texts, tokens]; 1 on tokens, which stand before the padding.
        pooling: `mean` or `last`.
    """
    if pooling == "last":
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1].float()
    else:
        vectors = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(vectors, dim=-1)


def plan(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the places of the texts by batch: from short to long, as many as memory allows."""
    batch: list[int] = []
    for place in sorted(range(len(ids)), key=lambda place: (len(ids[place]), place)):
        if batch and (len(batch) + 1) * len(ids[place]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def read_encoding(folder: str | Path) -> Encoding:
    """Return what an encoder's folder says of its use.

    Raises:
        ModelError: The folder is no encoder, or its file cannot be read.
    """
    path = Path(folder) / ENCODING
    try:
        return Encoding.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ModelError(
            f"there is no {ENCODING} that can be read, so this is not an encoder",
            where=str(path),
            fix="give the model that train_embedding wrote",
        ) from error


def write_encoding(folder: str | Path, encoding: Encoding) -> None:
    """Mark a model folder as an encoder; do it before the folder is sealed."""
    path = Path(folder) / ENCODING
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(encoding.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_encoder(folder: str | Path, encoding: Encoding | None = None) -> Encoder:
    """Return the encoder of a folder, on a GPU where there is one.

    Args:
        folder: A model folder.
        encoding: How to use it; the folder's own `embedding.json` when left out.
    """
    encoding = encoding or read_encoding(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(folder, device=device)
    keep_layers(model, encoding.layers)
    return Encoder(model, load_tokenizer(folder), encoding)


def embed(
    folder: str | Path, texts: Sequence[str], encoding: Encoding | None = None, progress: Progress | None = None
) -> Vectors:
    """Return the vectors of texts under a model folder; what was asked before comes from a cache.

    Args:
        folder: A model folder; its content digest is part of the cache's key.
        texts: Each with its prefix.
        encoding: As for `load_encoder`.
        progress: Told after each batch.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    encoding = encoding or read_encoding(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    key = digest_of([VERSION, model_digest(folder), encoding.model_dump(mode="json"), device, list(texts)])
    path = cache_folder("vectors") / f"{key}.safetensors"
    if path.is_file():
        try:
            return load_file(path)["vectors"]
        except SafetensorError:  # a cache: a damaged file is made again
            path.unlink()
    set_threads()
    encoder = load_encoder(folder, encoding)
    vectors = encoder.encode([encoder.tokens(text) for text in texts], progress)
    part = path.with_suffix(".part")
    save_file({"vectors": vectors}, part)
    part.replace(path)
    return vectors
