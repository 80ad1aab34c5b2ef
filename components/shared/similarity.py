"""How near two texts are in meaning, by an encoder that needs no forward pass.

A text's vector is the mean of its tokens' static embeddings; two texts are as similar as the cosine of their vectors.
The embeddings are those of the package wordllama (32,000 tokens, 256 dimensions, 16 MB, trained for similarity); its
files are read as data and its code is not run. Word order has no part in it: two texts of the same words are equal.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..contracts.packages import package_folder

PACKAGE = "wordllama"
WEIGHTS, TENSOR = "weights/l2_supercat_256.safetensors", "embedding.weight"
TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"


class Encoder(NamedTuple):
    """Embeddings and the tokenizer that finds them."""

    embeddings: NDArray[np.float32]
    """[tokens, dimensions]."""
    tokenizer: Any


def similarity(one: str, other: str) -> float:
    """Return the cosine of two texts' vectors, in [0, 1]: below 0 counts as 0, and so does a text without tokens.

    Raises:
        RecipeError: The encoder's package is not installed.
    """
    return max(0.0, float(_vector(one) @ _vector(other)))


@cache
def load_encoder() -> Encoder:
    """Return the encoder, read once per process.

    Raises:
        RecipeError: Its package is not installed.
    """
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = package_folder(PACKAGE)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.no_padding()
    return Encoder(load_file(folder / WEIGHTS)[TENSOR].astype(np.float32), tokenizer)


@cache
def _vector(text: str) -> NDArray[np.float32]:
    """Return a text's vector of length 1; of length 0 where it has no tokens."""
    encoder = load_encoder()
    ids = encoder.tokenizer.encode(text, add_special_tokens=False).ids
    mean = encoder.embeddings[ids].mean(0) if ids else np.zeros(encoder.embeddings.shape[1], np.float32)
    length = float(np.linalg.norm(mean))
    return np.asarray(mean / length if length else mean, dtype=np.float32)
