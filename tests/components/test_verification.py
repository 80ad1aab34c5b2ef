"""`assay verify` finds each thing that somebody could alter: a real ledger, a real MLflow store, real manifests."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from assay.components.contracts.artifacts import read_manifest, seal
from assay.components.contracts.errors import RegistryError
from assay.components.shared import registry, tracking, verification
from assay.components.shared.dossier import read_dossier
from assay.components.shared.ledger import Entry
from assay.components.shared.registry import Deployment
from assay.components.shared.verification import Finding, verify
from assay.pipelines.cli import app
from fixtures.attempts import Attempt
from fixtures.shelf import Shelf

NAME = "directions"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two champions, one after the other, and the run that the second one came from."""
    home = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        _point(patch, home)
        first = Attempt(home / "one", "weights of one")
        second = Attempt(home / "runs" / "run" / "tasks" / "all" / "outputs", "weights of two", champion=first.content)
        rows = second.folder / "accepted"
        rows.mkdir()
        (rows / "rows.parquet").write_text("rows")
        parents = {"accepted": seal(rows, "rows", counts={"rows": 60})}
        data = seal(second.folder / "data", "splits", parents=parents, counts={"sft": 20, "test": 40})
        seal(second.folder / "model", "model", parents={"data": data})
        for version, attempt in ((1, first), (2, second)):
            assert attempt.register(NAME) == version
            registry.promote(NAME, version)
            record = Deployment(name=NAME, version=version, content=attempt.content, prompts=2, tokens=16, command="")
            registry.record_deployment(record)
        registry.sync_alias(NAME)
    return home


def _point(patch: pytest.MonkeyPatch, home: Path) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        patch.delenv(name, raising=False)
    patch.setenv("ASSAY_HOME", str(home))
    patch.setenv("ASSAY_REGISTRY", str(home / "registry"))


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give it to spoil, and put it back; MLflow holds its database open, so that stays where it is."""
    kept = ("registry/ledger", "registry/decisions", "registry/dossiers", "registry/lineage", "registry/models")
    kept += ("registry/deployments", "registry/artifacts", "runs")
    for name in kept:
        shutil.copytree(made / name, tmp_path / "kept" / name)
    _point(monkeypatch, made)
    yield made
    for name in kept:
        shutil.rmtree(made / name, ignore_errors=True)
        shutil.copytree(tmp_path / "kept" / name, made / name)
    with tracking.connected() as client:
        client.set_model_version_tag(NAME, "2", "content", _content(2))


@pytest.fixture
def shelf(home: Path) -> Shelf:
    return Shelf(str(home / "registry"))


def bad(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.state in verification.BAD]


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, and leave its size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_what_was_not_touched_is_sound_down_to_the_rows(home: Path) -> None:
    findings = verify(NAME)
    assert bad(findings) == []
    said = "\n".join(finding.what for finding in findings)
    assert "4 entries, each chained" in said
    assert "version 2 is champion since" in said
    assert "aliases say what the ledger says" in said
    assert "version 2: lineage of 5 artifacts, 5 of them hashed again, down to rows, splits" in said
    assert "version 1: manifests are kept, files are not on this machine: candidate, decision, results, data" in said


def test_the_dossier_says_what_a_version_was_made_from(home: Path) -> None:
    entry = registry.registered(NAME, version=2)
    assert entry is not None
    dossier = read_dossier(entry.evidence)
    outputs = home / "runs" / "run" / "tasks" / "all" / "outputs"
    assert dossier.manifests["data"] == read_manifest(outputs / "data").digest
    assert dossier.recipe["name"] == NAME
    assert dossier.approvals == 0


def test_what_is_gone_is_told_and_proves_nothing_wrong(home: Path) -> None:
    shutil.rmtree(home / "runs")
    findings = verify(NAME)
    assert bad(findings) == []
    gone = [finding.what for finding in findings if finding.state == "gone"]
    assert any("version 2" in what and "data/accepted" in what for what in gone)


def test_a_manifest_that_was_never_kept_is_named_as_gone(home: Path, shelf: Shelf) -> None:
    shutil.rmtree(home / "runs")
    rows = next(
        key for key in shelf.keys("lineage/") if b'"rows"' in shelf.get(key) and b"accepted" not in shelf.get(key)
    )
    shelf.delete(rows)
    gone = [finding for finding in verify(NAME) if finding.state == "gone"]
    assert any("accepted is not on this machine" in finding.what for finding in gone)


def _decision_key(version: int) -> str:
    entry = registry.registered(NAME, version=version)
    assert entry is not None
    return f"decisions/{entry.decision}.json"


def _content(version: int) -> str:
    entry = registry.registered(NAME, version=version)
    assert entry is not None
    return entry.content


def _flip_the_model(home: Path) -> None:
    flip(home / "registry" / "models" / _content(2) / "model.safetensors")


def _flip_the_decision(home: Path) -> None:
    flip(home / "registry" / _decision_key(2))


def _flip_the_dossier(home: Path) -> None:
    flip(next(iter(sorted((home / "registry" / "dossiers").iterdir()))))


def _swap_the_champions_folder(home: Path) -> None:
    one, two = (home / "registry" / "models" / _content(version) for version in (1, 2))
    one.rename(home / "swapped")
    two.rename(one)
    (home / "swapped").rename(two)


def _add_a_file(home: Path) -> None:
    (home / "registry" / "models" / _content(2) / "modeling.py").write_text("import os")


def _remove_the_model(home: Path) -> None:
    shutil.rmtree(home / "registry" / "models" / _content(2))


def _flip_the_rows(home: Path) -> None:
    flip(home / "runs" / "run" / "tasks" / "all" / "outputs" / "accepted" / "rows.parquet")


def _change_a_kept_manifest(home: Path) -> None:
    shutil.rmtree(home / "runs")
    for path in (home / "registry" / "lineage").iterdir():
        if b'"kind":"splits"' in path.read_bytes().replace(b" ", b""):
            path.write_bytes(path.read_bytes().replace(b'"test": 40', b'"test": 41'))


def _write_on_the_card(home: Path) -> None:
    for path in (home / "registry" / "artifacts").rglob("README.md"):
        path.write_text(path.read_text() + "\nIt may be used for anything.\n")


def _exchange_mlflows_weights(home: Path) -> None:
    for path in (home / "registry" / "artifacts").rglob("model.safetensors"):
        path.unlink()
        path.write_text("other weights")


def _retag(home: Path) -> None:
    with tracking.connected() as client:
        client.set_model_version_tag(NAME, "2", "content", "0" * 64)


def _check_of_another_model(home: Path) -> None:
    record = Deployment(name=NAME, version=2, content="0" * 64, prompts=2, tokens=16, command="")
    registry.record_deployment(record)


@pytest.mark.parametrize(
    ("tamper", "words", "where"),
    [
        (_flip_the_model, "sha256 differs", "model.safetensors"),
        (_flip_the_decision, "decision record was altered", "decisions/"),
        (_flip_the_dossier, "dossier was altered", "dossiers/"),
        (_swap_the_champions_folder, "another one than its digest says", "models/"),
        (_add_a_file, "was added after sealing", "modeling.py"),
        (_remove_the_model, "there is no manifest.json", "models/"),
        (_flip_the_rows, "data/accepted was changed", "rows.parquet"),
        (_change_a_kept_manifest, "data was changed", "lineage/"),
        (_write_on_the_card, "MLflow's copy of a file", "README.md"),
        (_exchange_mlflows_weights, "MLflow's copy of a file", "model.safetensors"),
        (_retag, "MLflow says that version 2 has content 000", "models:/directions/2"),
        (_check_of_another_model, "was checked is of another model", ""),
    ],
)
def test_each_change_is_found_and_placed(home: Path, tamper: Callable[[Path], None], words: str, where: str) -> None:
    tamper(home)
    findings = bad(verify(NAME))
    assert any(words in finding.what and where in finding.where for finding in findings), findings
    assert all(finding.fix for finding in findings)


def _cut(lines: list[bytes]) -> list[bytes]:
    return lines[:-1]


def _flip_entry(lines: list[bytes]) -> list[bytes]:
    return [*lines[:1], lines[1].replace(b"because", b"becausE").replace(b"rose", b"r0se"), *lines[2:]]


def _forge_the_end(lines: list[bytes]) -> list[bytes]:
    last = Entry.model_validate_json(lines[-1]).model_copy(update={"actor": "nobody"}).sealed()
    return [*lines[:-1], last.line()]


@pytest.mark.parametrize(
    "tamper",
    [
        _flip_entry,
        _cut,
        _forge_the_end,
        lambda lines: [*lines[:1], *lines[2:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:2], lines[1], *lines[2:]],
    ],
)
def test_an_entry_changed_cut_off_forged_removed_reordered_or_inserted(home: Path, shelf: Shelf, tamper) -> None:
    keys = shelf.keys(f"ledger/{NAME}/entries/")
    lines = tamper([shelf.get(key) for key in keys])
    for key in keys:
        shelf.delete(key)
    for number, line in enumerate(lines, start=1):
        shelf.put(f"ledger/{NAME}/entries/{number:08d}.json", line)
    [finding] = verify(NAME)  # nothing else can be believed then
    assert finding.state == "altered"
    assert f"ledger/{NAME}/entries/" in finding.where


def test_an_alias_that_was_moved_by_hand_is_set_back_and_told(home: Path) -> None:
    with tracking.connected() as client:
        client.set_registered_model_alias(NAME, "champion", "1")
    [finding] = bad(verify(NAME))
    assert finding.state == "repaired"
    assert "'champion' was at version 1, and the ledger says version 2" in finding.what
    with tracking.connected() as client:
        assert client.get_model_version_by_alias(NAME, "champion").version in (2, "2")
    assert bad(verify(NAME)) == []


def test_a_tracking_server_that_is_down_alters_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "set_aliases", _down)
    findings = verify(NAME)
    assert bad(findings) == []
    assert any("MLflow was not compared" in finding.what for finding in findings if finding.state == "note")


def _down(name: str, wanted: dict[str, int]) -> dict[str, tuple[int, int]]:
    raise OSError("connection refused")


def test_the_command_says_it_with_its_exit_code(home: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["verify", NAME, "--home", str(home)])
    assert good.exit_code == 0, good.output
    assert "nothing was altered" in good.output
    _flip_the_model(home)
    found = runner.invoke(app, ["verify", NAME, "--json", "--home", str(home)])
    assert found.exit_code == 1
    told = json.loads(found.output)
    assert told["sound"] is False
    assert any(finding["state"] == "altered" for finding in told["findings"])


def test_a_name_without_a_history_is_no_proof(home: Path) -> None:
    with pytest.raises(RegistryError, match="no history"):
        verify("unheard-of")
