import json
import multiprocessing
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from assay.components.contracts.artifacts import MANIFEST, seal
from assay.components.contracts.errors import RegistryError
from assay.components.shared import ledger, registry
from fixtures.shelf import Shelf

NAME = "directions"


pytestmark = pytest.mark.usefixtures("shelf")  # every test runs on a folder and on S3


def model(folder: Path, words: str) -> str:
    """Seal a folder as a model and return its content digest; the registry never loads one."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(words)
    return seal(folder, "model").content


def decision(folder: Path, candidate: str, champion: str | None = None, verdict: str = "promote") -> str:
    folder.mkdir(parents=True)
    record = {"schema": 1, "decision": verdict, "reason": f"because of {folder.name}", "candidate": candidate}
    (folder / "decision.json").write_text(json.dumps({**record, "champion": champion, "baseline": "b" * 64}))
    seal(folder, "decision")
    return registry.keep_decision(folder)


def add(tmp_path: Path, version: int, champion: str | None = None) -> str:
    """Register a new model as `version`, decided against `champion`; return its content digest."""
    content = model(tmp_path / f"model{version}", f"weights of {version}")
    registry.keep_model(tmp_path / f"model{version}")
    registry.register(NAME, version, content, decision(tmp_path / f"decision{version}", content, champion))
    return content


def three_champions(tmp_path: Path) -> list[str]:
    contents: list[str] = []
    for version in (1, 2, 3):
        contents.append(add(tmp_path, version, contents[-1] if contents else None))
        registry.promote(NAME, version)
    return contents


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_there_is_no_champion_before_the_first_promotion_and_asking_writes_nothing(shelf: Shelf) -> None:
    assert registry.champion(NAME) is None
    assert registry.history(NAME) == []
    assert shelf.keys() == []


def test_entries_are_chained_and_tell_who_when_and_why(tmp_path: Path) -> None:
    contents = three_champions(tmp_path)
    entries = registry.history(NAME)
    assert [entry.event for entry in entries] == ["registered", "promoted"] * 3
    assert [entry.replaces for entry in entries] == [0, 0, 0, 1, 0, 2]
    assert [entry.prev for entry in entries[1:]] == [entry.hash for entry in entries[:-1]]
    assert entries[-1].content == contents[-1]
    assert entries[-1].reason == "because of decision3"
    assert entries[-1].actor
    assert len(entries) == 6


ENTRIES, ACKNOWLEDGED = f"ledger/{NAME}/entries/", f"ledger/{NAME}/acknowledged/"


def lines_of(shelf: Shelf) -> list[bytes]:
    return [shelf.get(key) for key in shelf.keys(ENTRIES)]


def write_lines(shelf: Shelf, lines: list[bytes]) -> None:
    for key in shelf.keys(ENTRIES):
        shelf.delete(key)
    for number, line in enumerate(lines, start=1):
        shelf.put(f"{ENTRIES}{number:08d}.json", line)


@pytest.mark.parametrize(
    ("tamper", "number", "words"),
    [
        (lambda lines: [*lines[:2], lines[2].replace(b'"version":2', b'"version":7'), *lines[3:]], 3, "changed"),
        (lambda lines: [*lines[:2], lines[2].replace(b'":', b'": ', 1), *lines[3:]], 3, "changed"),
        (lambda lines: [*lines[:2], lines[2] + b"\n", *lines[3:]], 3, "changed"),
        (lambda lines: [*lines[:2], b"{}", *lines[3:]], 3, "not an entry"),
        (lambda lines: [*lines[:2], b"", *lines[3:]], 3, "not an entry"),
        (lambda lines: [*lines[:2], lines[2][:40], *lines[3:]], 3, "not an entry"),
        (lambda lines: [*lines[:5], lines[5][:50]], 6, "not an entry"),
        (lambda lines: [*lines[:2], *lines[3:]], 3, "does not follow"),
        (lambda lines: lines[1:], 1, "does not follow"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1, "does not follow"),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], 4, "does not follow"),
        (lambda lines: lines[:5], 6, "cut off"),
        (lambda lines: lines[:2], 3, "cut off"),
        (lambda lines: [], 1, "cut off"),
    ],
)
def test_any_change_is_refused_by_entry(tmp_path, shelf, tamper, number, words) -> None:
    three_champions(tmp_path)
    write_lines(shelf, tamper(lines_of(shelf)))
    for question in (registry.champion, registry.history):
        with pytest.raises(RegistryError, match=words) as error:
            question(NAME)
        assert error.value.where == f"{shelf.address}/{ENTRIES}{number:08d}.json"
    with pytest.raises(RegistryError):
        registry.promote(NAME, 1)


@pytest.mark.parametrize("gone", [1, 3, 5])
def test_an_object_that_was_removed_or_renamed_is_missed(tmp_path, shelf, gone) -> None:
    three_champions(tmp_path)
    key = f"{ENTRIES}{gone:08d}.json"
    line = shelf.get(key)
    shelf.delete(key)
    with pytest.raises(RegistryError, match="does not follow"):
        registry.history(NAME)
    shelf.put(f"{ENTRIES}{gone:07d}1.json", line)
    with pytest.raises(RegistryError, match="does not follow"):
        registry.history(NAME)


def test_an_entry_forged_with_a_good_hash_breaks_the_chain_after_it(tmp_path: Path, shelf: Shelf) -> None:
    three_champions(tmp_path)
    lines = lines_of(shelf)
    forged = ledger.Entry.model_validate_json(lines[3]).model_copy(update={"reason": "trust me"}).sealed()
    write_lines(shelf, [*lines[:3], forged.line(), *lines[4:]])
    with pytest.raises(RegistryError) as error:
        registry.history(NAME)
    assert error.value.where.endswith("00000005.json")


def test_a_forged_last_entry_is_not_the_one_that_was_acknowledged(tmp_path: Path, shelf: Shelf) -> None:
    three_champions(tmp_path)
    lines = lines_of(shelf)
    forged = ledger.Entry.model_validate_json(lines[-1]).model_copy(update={"reason": "trust me"}).sealed()
    write_lines(shelf, [*lines[:-1], forged.line()])
    with pytest.raises(RegistryError, match="not the one that was acknowledged"):
        registry.history(NAME)


def test_a_ledger_whose_acknowledgements_were_removed_is_refused(tmp_path: Path, shelf: Shelf) -> None:
    three_champions(tmp_path)
    for key in shelf.keys(ACKNOWLEDGED):
        shelf.delete(key)
    with pytest.raises(RegistryError, match="0 entries are acknowledged, 6 are there"):
        registry.champion(NAME)


def test_another_models_ledger_is_not_ours(tmp_path: Path, shelf: Shelf) -> None:
    three_champions(tmp_path)
    for key in shelf.keys("ledger/"):
        shelf.put(key.replace(NAME, "other"), shelf.get(key))
    with pytest.raises(RegistryError, match="does not follow"):
        registry.champion("other")


def test_a_crash_between_an_entry_and_its_acknowledgement_loses_nothing(tmp_path: Path, shelf: Shelf) -> None:
    three_champions(tmp_path)
    content = add(tmp_path, 4)
    shelf.delete(f"{ACKNOWLEDGED}00000007")
    assert registry.history(NAME)[-1].content == content
    add(tmp_path, 5)
    assert shelf.get(f"{ACKNOWLEDGED}00000007").decode() == registry.history(NAME)[6].hash
    assert len(registry.history(NAME)) == 8


def test_who_was_overtaken_decides_anew(tmp_path: Path, shelf: Shelf) -> None:
    """Another writer's entry comes between the look and the write: the rule sees it, and nothing is lost."""
    three_champions(tmp_path)
    seen: list[int] = []

    def rule(entries):
        seen.append(len(entries))
        if len(seen) == 1:
            add(tmp_path, 4)
        return ledger.Draft("held", 0, "c" * 64, "d" * 64, reason="after the other")

    entry = ledger.append(NAME, rule)
    assert seen == [6, 7]
    assert (entry.seq, entry.prev) == (8, registry.history(NAME)[6].hash)


def test_an_entry_from_before_it_had_evidence_and_proof_is_still_whole(shelf: Shelf) -> None:
    """As the first release wrote it: a field that came later must not change the hash of what is there."""
    line = (
        '{"actor":"ann","content":"' + "c" * 64 + '","decision":"' + "d" * 64 + '","event":"held",'
        '"hash":"5297d4252c9a36b55924dea9cd2abcbfc98f2827ad1e1c58e3488c488bda5186","name":"directions",'
        '"prev":"c0839b295fd43bee44988a5be747efc6933a209aff61b842daa87f1788c3ed7d","reason":"hold: é","replaces":0,'
        '"seq":1,"time":"2026-01-02T03:04:05Z","version":0}'
    )
    shelf.put(f"{ENTRIES}00000001.json", line.encode())
    [entry] = registry.history(NAME)
    assert (entry.evidence, entry.proof) == ("", "")
    shelf.put(f"{ENTRIES}00000001.json", line.replace('"name"', '"evidence":"","name"').encode())
    with pytest.raises(RegistryError, match="changed"):
        registry.history(NAME)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "-x", "x" * 200, "a b", "a.jsonl"])
def test_a_name_cannot_leave_the_folder(name: str) -> None:
    with pytest.raises(RegistryError, match="cannot name"):
        registry.champion(name)


def test_time_never_runs_backwards_in_the_ledger(tmp_path, monkeypatch) -> None:
    three_champions(tmp_path)

    class Yesterday(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(days=1)

    monkeypatch.setattr(ledger, "datetime", Yesterday)
    add(tmp_path, 4)
    entries = registry.history(NAME)
    assert entries[-1].time == entries[-2].time


# --- promotion --------------------------------------------------------------------------------------------------------


def test_champion_at_an_earlier_time(tmp_path: Path) -> None:
    three_champions(tmp_path)
    promoted = [entry for entry in registry.history(NAME) if entry.event == "promoted"]
    assert registry.champion(NAME, at=promoted[0].time - timedelta(microseconds=1)) is None
    for entry in promoted:
        assert registry.champion(NAME, at=entry.time) == entry
    naive = promoted[1].time.astimezone(UTC).replace(tzinfo=None)
    found = registry.champion(NAME, at=naive)
    assert found is not None
    assert found.version == 2


def test_promotion_needs_a_registration(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no version 1"):
        registry.promote(NAME, 1)


@pytest.mark.parametrize("verdict", ["hold", "inconclusive", "PROMOTE", ""])
def test_registration_needs_a_decision_to_promote(tmp_path, verdict) -> None:
    content = model(tmp_path / "model", "weights")
    with pytest.raises(RegistryError, match="not 'promote'"):
        registry.register(NAME, 1, content, decision(tmp_path / "decision", content, verdict=verdict))
    assert registry.history(NAME) == []


def test_registration_needs_a_decision_about_exactly_this_model(tmp_path: Path) -> None:
    content = model(tmp_path / "model", "weights")
    with pytest.raises(RegistryError, match="another model"):
        registry.register(NAME, 1, content, decision(tmp_path / "decision", "a" * 64))
    with pytest.raises(RegistryError, match="is missing"):
        registry.register(NAME, 1, content, "f" * 64)


def test_a_version_number_stands_for_one_content_for_ever(tmp_path: Path) -> None:
    add(tmp_path, 1)
    other = model(tmp_path / "other", "other weights")
    with pytest.raises(RegistryError, match="is another model"):
        registry.register(NAME, 1, other, decision(tmp_path / "decision", other))


def test_an_altered_decision_record_promotes_nothing(tmp_path: Path, shelf: Shelf) -> None:
    add(tmp_path, 1)
    (record,) = shelf.keys("decisions/")
    shelf.put(record, shelf.get(record).replace(b"because", b"BECAUSE"))
    with pytest.raises(RegistryError, match="decision record was altered"):
        registry.promote(NAME, 1)
    assert registry.champion(NAME) is None


def test_altered_model_bytes_are_not_promoted(tmp_path: Path, shelf: Shelf) -> None:
    content = add(tmp_path, 1)
    shelf.put(f"models/{content}/model.safetensors", b"weights of X")
    with pytest.raises(RegistryError, match="was altered") as error:
        registry.promote(NAME, 1)
    assert "remove" in error.value.fix
    assert registry.champion(NAME) is None


def test_promoting_the_champion_again_adds_nothing(tmp_path: Path) -> None:
    add(tmp_path, 1)
    assert registry.promote(NAME, 1) == registry.promote(NAME, 1)
    assert len(registry.history(NAME)) == 2


def test_a_decision_against_an_older_champion_is_stale(tmp_path: Path) -> None:
    first = add(tmp_path, 1)
    registry.promote(NAME, 1)
    add(tmp_path, 2, first)
    add(tmp_path, 3, first)
    registry.promote(NAME, 2)
    with pytest.raises(RegistryError, match="another champion"):
        registry.promote(NAME, 3)
    assert [entry.version for entry in registry.history(NAME) if entry.event == "promoted"] == [1, 2]


def _promote(version: int, start: float, outcome: "multiprocessing.Queue[str]") -> None:
    time.sleep(max(0.0, start - time.time()))
    try:
        outcome.put(f"won {registry.promote(NAME, version).version}")
    except RegistryError as error:
        outcome.put(f"told {error.what}")


def test_of_promotions_at_once_exactly_one_wins_and_the_others_are_told(tmp_path: Path) -> None:
    for version in (1, 2, 3, 4):
        add(tmp_path, version)
    context = multiprocessing.get_context("fork")
    outcome = context.Queue()
    start = time.time() + 0.2
    workers = [context.Process(target=_promote, args=(version, start, outcome)) for version in (1, 2, 3, 4)]
    for worker in workers:
        worker.start()
    said = sorted(outcome.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert [line.startswith("won") for line in said] == [False, False, False, True]
    assert all("another run was faster" in line for line in said[:3])
    assert sum(entry.event == "promoted" for entry in registry.history(NAME)) == 1


# --- rollback ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollback's last step is MLflow's view; test_register_model.py has it with the real one."""
    monkeypatch.setattr(registry, "sync_alias", lambda name: {})


@pytest.mark.usefixtures("_no_mlflow")
def test_rollback_goes_back_step_by_step_and_never_forth(tmp_path: Path) -> None:
    three_champions(tmp_path)
    assert registry.rollback(NAME, "doses were wrong").version == 2
    entry = registry.champion(NAME)
    assert entry is not None
    assert (entry.event, entry.version, entry.replaces, entry.reason) == ("rolled_back", 2, 3, "doses were wrong")
    assert registry.rollback(NAME, "still wrong").version == 1
    with pytest.raises(RegistryError, match="no earlier champion"):
        registry.rollback(NAME, "again")


@pytest.mark.usefixtures("_no_mlflow")
def test_rollback_to_a_version_that_was_champion(tmp_path: Path) -> None:
    contents = three_champions(tmp_path)
    add(tmp_path, 4, contents[-1])
    assert registry.rollback(NAME, "back to the first", to=1).version == 1
    assert registry.rollback(NAME, "it was fine after all", to=3).version == 3
    for version, words in ((4, "never champion"), (9, "never champion"), (3, "is the champion")):
        with pytest.raises(RegistryError, match=words):
            registry.rollback(NAME, "no", to=version)


def test_rollback_needs_a_reason_and_a_champion(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="needs a reason"):
        registry.rollback(NAME, "  ")
    with pytest.raises(RegistryError, match="has no champion"):
        registry.rollback(NAME, "why not")


@pytest.mark.usefixtures("_no_mlflow")
def test_a_run_does_not_undo_a_rollback(tmp_path: Path) -> None:
    contents = three_champions(tmp_path)
    registry.rollback(NAME, "harmful")
    registry.register(NAME, 3, contents[2], decision(tmp_path / "again", contents[2], contents[1]))
    with pytest.raises(RegistryError, match="rolled back on .* \\(harmful\\)"):
        registry.promote(NAME, 3)
    registry.rollback(NAME, "found harmless", to=3)
    assert registry.promote(NAME, 3).version == 3


@pytest.mark.usefixtures("_no_mlflow")
def test_rollback_refuses_altered_bytes(tmp_path: Path, shelf: Shelf) -> None:
    contents = three_champions(tmp_path)
    shelf.delete(f"models/{contents[1]}/model.safetensors")
    with pytest.raises(RegistryError, match="was altered"):
        registry.rollback(NAME, "doses were wrong")
    current = registry.champion(NAME)
    assert current is not None
    assert current.version == 3


def test_a_rollback_stands_although_mlflow_is_down(tmp_path, monkeypatch, caplog) -> None:
    three_champions(tmp_path)

    def down(name: str) -> None:
        raise OSError("connection refused")

    monkeypatch.setattr(registry, "sync_alias", down)
    assert registry.rollback(NAME, "doses were wrong").version == 2
    assert "connection refused" in caplog.text


# --- the registry's own copy ------------------------------------------------------------------------------------------


def test_the_copy_shares_no_bytes_with_the_run(tmp_path: Path) -> None:
    content = model(tmp_path / "model", "weights")
    (tmp_path / "model" / "timing.json").write_text("{}")
    kept = registry.keep_model(tmp_path / "model")
    assert registry.keep_model(tmp_path / "model") == kept
    (tmp_path / "model" / "model.safetensors").write_text("spoiled")
    assert registry.read_model(content).content == content
    assert sorted(path.name for path in kept.iterdir()) == ["config.json", MANIFEST, "model.safetensors"]
    assert not any(path.stat().st_mode & 0o222 for path in kept.iterdir())


def test_spoiled_bytes_never_enter(tmp_path: Path, shelf: Shelf) -> None:
    model(tmp_path / "model", "weights")
    (tmp_path / "model" / "model.safetensors").write_text("spoiled")
    with pytest.raises(Exception, match="not the one that was sealed"):
        registry.keep_model(tmp_path / "model")
    assert shelf.keys() == []


def test_a_model_under_another_ones_digest_is_refused(tmp_path: Path, shelf: Shelf) -> None:
    content = model(tmp_path / "model", "weights")
    registry.keep_model(tmp_path / "model")
    for key in shelf.keys("models/"):
        shelf.put(key.replace(content, "0" * 64), shelf.get(key))
    with pytest.raises(RegistryError, match="another one than its digest says"):
        registry.read_model("0" * 64)


def test_a_file_that_was_added_to_a_kept_model_is_refused(tmp_path: Path, shelf: Shelf) -> None:
    content = model(tmp_path / "model", "weights")
    registry.keep_model(tmp_path / "model")
    shelf.put(f"models/{content}/code.py", b"import os")
    with pytest.raises(RegistryError, match="was added after sealing"):
        registry.read_model(content)


def test_another_machine_finds_the_model_by_its_digest(tmp_path, shelf, monkeypatch) -> None:
    content = model(tmp_path / "model", "weights")
    registry.keep_model(tmp_path / "model")
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "another"))
    folder = registry.model_folder(content)
    assert (folder / "model.safetensors").read_text() == "weights"
    shelf.put(f"models/{content}/model.safetensors", b"spoiled")
    with pytest.raises(RegistryError, match="was altered"):
        registry.read_model(content)


def test_the_cheap_paths_import_neither_mlflow_nor_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    three_champions(tmp_path)
    code = (
        "import sys; from assay.components.shared import registry;"
        f"assert registry.champion({NAME!r}).version == 3; assert len(registry.history({NAME!r})) == 6;"
        f"registry.promote({NAME!r}, 3); assert not {{'mlflow', 'torch'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
