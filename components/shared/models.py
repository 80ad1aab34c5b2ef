"""Load and save language models, the one way every component does.

A model folder holds `config.json`, `model.safetensors` (or shards), the tokenizer's files, `chat_template.jinja` and
`generation_config.json`: what transformers, vLLM and TGI read. Weights are safetensors only; nothing is unpickled and
no code of a model's author is run.
"""

import json
from pathlib import Path
from typing import Any, Literal

from ..contracts.artifacts import MANIFEST, digest_of, read_manifest, sha256_file
from ..contracts.errors import ModelError
from ..runtime.context import cpus

WEIGHTS = "model.safetensors"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "classifier.json",  # of a model that answers by its features; its weights are safetensors
)
"""Patterns of the files that make a model; what else lies in a folder (code, pickles, images) is left where it is."""
MACHINE_KEYS = ("is_local", "local_files_only", "name_or_path")
"""Keys that transformers writes into `tokenizer_config.json` and that say where it was loaded, not what it is."""


def set_threads() -> int:
    """Give torch the cores this task may use, and return their number."""
    import torch

    torch.set_num_threads(cpus())
    return cpus()


def multiplies_bf16() -> bool:
    """Return whether this machine's matrix products are quicker in bf16 than in fp32: a GPU, and two kinds of CPU.

    AMX multiplies tiles of bf16. Of the CPUs that have only AVX-512's dot product of bf16, AMD's (since Zen 4) do it at
    twice the rate of fp32: 576 × 3072 by 400 rows on two cores of Zen 4, 410 and 210 GFLOP/s. On Intel's without AMX
    it is no quicker: all products of one token of SmolLM2-135M, 64 rows, 140 ms in bf16 and 99 ms in fp32.
    """
    import torch

    if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported():
        return True
    info = Path("/proc/cpuinfo")
    return info.is_file() and {"AuthenticAMD", "avx512_bf16"} <= set(info.read_text(encoding="utf-8").split())


def load_model(
    folder: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    attention: str | None = None,
) -> Any:
    """Return a causal language model in evaluation mode.

    Args:
        folder: A model folder.
        dtype: Of the weights and of the arithmetic.
        device: `cpu` or `cuda`.
        attention: transformers' name of an implementation; None leaves it to transformers.

    Raises:
        ModelError: The folder is not a model, or transformers cannot read it.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    folder = check_model(folder)
    quiet()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"transformers cannot read this model: {first_line(error)}",
            where=str(folder),
            fix="check that it is a causal language model whose weights are complete and need no code of their own",
        ) from error
    return model.to(device).eval()


def load_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer, with a pad token and a chat template.

    Raises:
        ModelError: There is no tokenizer, no chat template, or no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the tokenizer cannot be read: {first_line(error)}",
            where=str(folder),
            fix="put the model's tokenizer.json and tokenizer_config.json beside its weights",
        ) from error
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template, so a conversation cannot be written as tokens",
            where=str(folder),
            fix="use an instruction-tuned model, or add chat_template.jinja to the folder",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-sequence token", where=str(folder))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_model(model: Any, tokenizer: Any, folder: str | Path, *, dithered: bool = False) -> None:
    """Write a model folder; equal weights give equal bytes.

    Args:
        model: Its weights are written as bf16, tied weights once; the model itself is not changed.
        tokenizer: Written with its chat template.
        folder: Made if it is missing.
        dithered: Round by `dither`, of which changes smaller than bf16's steps survive as a whole; else to the nearest.
    """
    from copy import deepcopy

    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_weights(model, dithered), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    config = deepcopy(model.config)
    config.dtype, config._name_or_path = "bfloat16", ""
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write a tokenizer and its chat template, without a trace of where it was loaded from."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in settings.items() if name not in MACHINE_KEYS}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def check_model(folder: str | Path) -> Path:
    """Return the folder if it holds a model that may be loaded.

    Raises:
        ModelError: It does not exist, has no config.json, or its weights are missing or pickled.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError("there is no such folder", where=str(folder), fix="give the folder of a model")
    if not (folder / "config.json").is_file():
        raise ModelError(
            "there is no config.json, so this is not a model folder",
            where=str(folder),
            fix="give the folder that holds config.json and model.safetensors",
        )
    if any(folder.glob("*.safetensors")):
        return folder
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise ModelError(
            f"the weights are pickled ({pickles[0]}), and a pickle can run any code when it is read",
            where=str(folder),
            fix="convert them to safetensors: `model.save_pretrained(folder)` in an environment you trust",
        )
    raise ModelError("there are no weights (*.safetensors)", where=str(folder), fix="copy the whole model folder")


def count_parameters(folder: str | Path) -> int:
    """Return the number of weights, from the headers of the safetensors files; tied weights count once."""
    from math import prod

    from safetensors import safe_open

    total = 0
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (not a mapping: it cannot be iterated)
    return total


def model_digest(folder: str | Path) -> str:
    """Return the content digest of a model folder: the manifest's where there is one, else of its model files."""
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return read_manifest(folder, "model", verify=False).content
    return digest_of({path.name: sha256_file(path) for path in model_files(folder)})


def model_files(folder: str | Path) -> list[Path]:
    """Return the files of a folder that make its model, by name."""
    return sorted({path for pattern in MODEL_FILES for path in Path(folder).glob(pattern) if path.is_file()})


def dither(weights: Any, generator: Any) -> None:
    """Move weights at random, uniformly, by less than half a step of bf16.

    Rounded to bf16, a weight that was a bf16 number before is that number again, and one that lies a share x of a step
    above one is rounded up with probability x: stochastic rounding (Gupta et al. 2015, arXiv:1502.02551). A model that
    is stored in bf16 and trained at a low rate needs it: its weights lie on bf16's grid, where to round to the nearest
    undoes every change below half a step, a 512th of the weight.

    Args:
        weights: fp32, of any shape, contiguous; changed in place, but for zeros.
        generator: Of the random numbers, on the CPU.
    """
    import torch

    bits = weights.detach().view(torch.int32)
    moved = torch.randint(-(2**15) + 1, 2**15, bits.shape, generator=generator, dtype=torch.int32).to(bits.device)
    bits += moved.masked_fill_(weights.detach() == 0, 0)


def _weights(model: Any, dithered: bool) -> dict[str, Any]:
    """Return contiguous bf16 copies by name; of tied weights only the first name, as transformers expects."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Any] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        bf16 = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        if dithered and tensor.dtype == torch.float32:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            dither(tensor, generator)
        weights[name] = tensor.detach().to("cpu", bf16).contiguous()
    return weights


def quiet() -> None:
    """Keep transformers' progress bars and warnings out of the step's log."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, cut at 300 characters."""
    return str(error).strip().partition("\n")[0][:300]
