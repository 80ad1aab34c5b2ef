"""Where the local engine lets its steps look for registry and tracking."""

from pathlib import Path

import pytest

from assay.pipelines.engines.local.engine import _environment


def test_a_folder_brings_its_embedded_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASSAY_REGISTRY", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = _environment(tmp_path)
    assert found["ASSAY_REGISTRY"] == str(tmp_path / "registry")
    assert found["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/registry/mlflow.db"


def test_s3_has_none_so_a_step_that_needs_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_REGISTRY", "s3://bucket/registry")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "MLFLOW_TRACKING_URI" not in _environment(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
    assert _environment(tmp_path)["MLFLOW_TRACKING_URI"] == "https://mlflow.example.com"
