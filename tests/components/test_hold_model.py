from pathlib import Path

import pytest

from assay.components.contracts.errors import RegistryError
from assay.components.hold_model.component import hold_model
from assay.components.shared import registry
from fixtures.attempts import Attempt


@pytest.fixture(autouse=True)
def _registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_REGISTRY", str(tmp_path / "registry"))


def hold(attempt: Attempt) -> int:
    version = hold_model.python_func(name="hold", **attempt.inputs("candidate", "decision"))
    assert isinstance(version, int)
    return version


def test_held_attempts_stand_in_the_ledger_once(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "one", "weights", verdict="inconclusive")
    assert hold(attempt) == hold(attempt) == 0
    [entry] = registry.history("hold")
    assert (entry.event, entry.version, entry.content) == ("held", 0, attempt.content)
    assert entry.reason == "inconclusive: exact rose with weights"
    assert registry.champion("hold") is None
    with pytest.raises(RegistryError, match="not an attempt to hold"):
        hold(Attempt(tmp_path / "two", "other"))


def test_a_decision_about_another_model_is_refused(tmp_path: Path) -> None:
    one, two = (Attempt(tmp_path / words, words, verdict="hold") for words in ("one", "two"))
    with pytest.raises(RegistryError, match="about another model"):
        hold_model.python_func(name="hold", **one.inputs("candidate"), **two.inputs("decision"))
    assert registry.history("hold") == []
