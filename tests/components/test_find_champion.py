from pathlib import Path

import pytest
from kfp import dsl

from assay.components.contracts.artifacts import read_manifest
from assay.components.contracts.errors import RegistryError
from assay.components.find_champion.component import find_champion
from assay.components.shared import registry
from fixtures.attempts import Attempt


@pytest.fixture(autouse=True)
def _registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_REGISTRY", str(tmp_path / "registry"))


def find(attempt: Attempt, name: str, output: Path) -> int:
    champion = dsl.Model(uri=str(output))
    version = find_champion.python_func(name=name, champion=champion, **attempt.inputs("candidate"))
    assert isinstance(version, int)
    return version


def test_the_champion_is_found_and_its_own_candidate_meets_its_predecessor(tmp_path: Path) -> None:
    first = Attempt(tmp_path / "one", "weights")
    assert find(first, "find", tmp_path / "none") == 0
    assert read_manifest(tmp_path / "none").kind == "none"
    first.register_in_ledger("find", 1)
    assert find(first, "find", tmp_path / "registered") == 0  # registered is not yet champion
    registry.promote("find", 1)
    assert find(first, "find", tmp_path / "itself") == 0
    second = Attempt(tmp_path / "two", "better weights", champion=first.content)
    assert find(second, "find", tmp_path / "first") == 1
    assert read_manifest(tmp_path / "first", "model").content == first.content
    second.register_in_ledger("find", 2)
    registry.promote("find", 2)
    assert find(second, "find", tmp_path / "again") == 1
    assert find(first, "find", tmp_path / "second") == 2


def test_an_altered_champion_is_not_handed_out(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "one", "weights of a champion")
    attempt.register_in_ledger("spoiled", 1)
    registry.promote("spoiled", 1)
    weights = registry.model_folder(attempt.content) / "model.safetensors"
    weights.chmod(0o644)
    weights.write_text("spoiled")
    with pytest.raises(RegistryError, match="was altered"):
        find(Attempt(tmp_path / "two", "new"), "spoiled", tmp_path / "champion")


def test_it_links_and_does_not_copy(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "one", "weights")
    attempt.register_in_ledger("links", 1)
    registry.promote("links", 1)
    find(Attempt(tmp_path / "two", "new"), "links", tmp_path / "champion")
    kept = registry.model_folder(attempt.content)
    assert (tmp_path / "champion" / "model.safetensors").samefile(kept / "model.safetensors")
