"""What tests of several steps share."""

from pathlib import Path

import pytest


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What an engine gives a task: one core, a work folder, and nobody who reads its progress."""
    monkeypatch.setenv("ASSAY_CPUS", "1")
    monkeypatch.setenv("ASSAY_WORK", str(tmp_path / "work"))
    monkeypatch.delenv("ASSAY_PROGRESS", raising=False)
