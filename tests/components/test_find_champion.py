import json
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from assay.components.contracts.artifacts import digest_of, read_manifest
from assay.components.contracts.errors import RegistryError
from assay.components.find_champion.component import find_champion
from assay.components.shared import registry
from assay.components.shared.looks import HeldOut, level
from fixtures.attempts import MEASUREMENT, POLICY, RECIPE, Attempt


@pytest.fixture(autouse=True)
def _registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_REGISTRY", str(tmp_path / "registry"))


def find(attempt: Attempt, name: str, output: Path) -> int:
    version = find_champion.python_func(
        name=name,
        policy=POLICY,
        evaluation={},
        measurement=MEASUREMENT,
        champion=dsl.Model(uri=str(output)),
        looks=dsl.Artifact(uri=f"{output}-looks"),
        **attempt.inputs("candidate", "data"),
    )
    assert isinstance(version, int)
    return version


def looks(attempt: Attempt, name: str, output: Path, **changes: Any) -> list[bool]:
    """Return of each earlier look whether it promoted."""
    given: dict[str, Any] = {"policy": POLICY, "evaluation": {}, "measurement": MEASUREMENT} | changes
    folder = f"{output}-looks"
    made = {"champion": dsl.Model(uri=str(output)), "looks": dsl.Artifact(uri=folder)}
    find_champion.python_func(name=name, **given, **made, **attempt.inputs("candidate", "data"))
    assert read_manifest(folder, "looks").parents.keys() == {"data"}
    return [look["promoted"] for look in json.loads((Path(folder) / "looks.json").read_text())["earlier"]]


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


def test_every_decision_on_the_same_examples_is_a_look_and_the_same_question_is_none(tmp_path: Path) -> None:
    first = Attempt(tmp_path / "one", "weights", verdict="hold")
    assert looks(first, "asked", tmp_path / "a") == []
    first.hold_in_ledger("asked")
    assert looks(first, "asked", tmp_path / "b") == []  # a run that is repeated pays nothing
    second = Attempt(tmp_path / "two", "better weights")
    assert looks(second, "asked", tmp_path / "c") == [False]
    second.register_in_ledger("asked", 1)
    registry.promote("asked", 1)
    third = Attempt(tmp_path / "three", "other weights", champion=second.content, verdict="inconclusive")
    assert looks(third, "asked", tmp_path / "d") == [False, True]
    third.hold_in_ledger("asked")
    assert looks(second, "asked", tmp_path / "e") == [False]  # as when it was first asked, its promotion among it
    assert looks(first, "asked", tmp_path / "f") == [False, True, False]  # against a champion it is a new question
    assert looks(first, "another", tmp_path / "g") == []


def test_another_policy_is_another_question(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "one", "weights", verdict="hold")
    attempt.hold_in_ledger("lenient")
    assert looks(attempt, "lenient", tmp_path / "a", policy=POLICY | {"alpha": 0.2}) == [False]


def test_measured_otherwise_it_is_another_question_and_only_then(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "one", "weights", verdict="hold")
    attempt.hold_in_ledger("tried")
    for section, changes, earlier in (
        ("evaluate", {"batch_size": 8, "golden_prompts": 2}, []),
        ("evaluate", {"max_new_tokens": 97}, [False]),
        ("judge", {"model": "another"}, [False]),
    ):
        settings = getattr(RECIPE, section).model_copy(update=changes)
        changed = RECIPE.model_copy(update={section: settings}).measurement
        assert looks(attempt, "tried", tmp_path / f"{len(changes)}-{section}", measurement=changed) == earlier


def test_fresh_examples_begin_anew_and_mostly_old_ones_do_not(tmp_path: Path) -> None:
    Attempt(tmp_path / "one", "weights", verdict="hold").hold_in_ledger("grows")
    grown, fresh = (Attempt(tmp_path / f"from-{first}", "more weights", first=first) for first in (15, 25))
    assert looks(grown, "grows", tmp_path / "a") == [False]  # 25 of 40 were seen
    assert looks(fresh, "grows", tmp_path / "b") == []  # 15 of 40


def test_what_the_scores_had_no_say_in_is_no_look(tmp_path: Path) -> None:
    same = Attempt(tmp_path / "one", "weights", verdict="hold")
    Attempt(tmp_path / "two", "weights", champion=same.content, verdict="hold").hold_in_ledger("idle")
    assert looks(Attempt(tmp_path / "three", "other"), "idle", tmp_path / "a") == []


def test_the_looks_are_of_the_examples_that_are_measured(tmp_path: Path) -> None:
    looks(Attempt(tmp_path / "one", "weights"), "few", tmp_path / "a", evaluation={"max_rows": 8})
    held_out = HeldOut.model_validate(json.loads((tmp_path / "a-looks" / "looks.json").read_text())["held_out"])
    assert held_out == HeldOut.of(f"{place:032x}" for place in range(8))


def test_the_overlap_of_large_sets_is_told_from_their_smallest_ids() -> None:
    ids = [digest_of(place) for place in range(6000)]
    old, new = HeldOut.of(ids[:4000]), HeldOut.of(ids[1000:6000])
    assert new.share_in(old) == pytest.approx(3000 / 5000, abs=0.1)  # three standard errors of 256 ids
    assert old.share_in(new) == pytest.approx(3000 / 4000, abs=0.1)
    assert HeldOut.of(ids[:4000]).share_in(old) == 1
    assert HeldOut.of(ids[4000:]).share_in(old) == 0
    assert HeldOut.of(ids[:100]).share_in(old) == 1


def test_the_levels_of_all_looks_sum_to_alpha() -> None:
    assert level(0.05, 0, []) == pytest.approx(0.05 * 0.6079, abs=1e-5)
    open_end = sum(level(0.05, 0, [False] * k) for k in range(2000))
    assert 0.0499 < open_end < 0.05
    assert [level(0.05, 4, [False] * k) for k in range(6)] == [0.0125] * 4 + [0.0, 0.0]
    assert level(0.05, 1, []) == 0.05


def test_a_promotion_passes_its_level_on() -> None:
    assert level(0.05, 4, [True]) == pytest.approx(0.025)
    assert level(0.05, 4, [True, True, True, True, True]) == pytest.approx(0.05)
    assert level(0.05, 4, [True, False]) == pytest.approx(0.0125)
