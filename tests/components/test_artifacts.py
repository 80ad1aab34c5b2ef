"""Sealing, reading and verifying artifacts."""

import json

import pytest

from assay.components.contracts import artifacts
from assay.components.contracts.artifacts import digest_of, link_tree, read_manifest, seal, write_atomically
from assay.components.contracts.errors import DataError


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "artifact"
    (path / "deep").mkdir(parents=True)
    (path / "rows.jsonl").write_text("one\ntwo\n")
    (path / "deep" / "more.txt").write_text("more")
    (path / "timing.json").write_text('{"seconds": 1}')
    seal(path, "rows", counts={"rows": 2}, metadata={"by": "test"})
    return path


def test_what_is_sealed_can_be_read(folder):
    manifest = read_manifest(folder, "model", "rows")
    assert manifest.kind == "rows"
    assert manifest.counts == {"rows": 2}
    assert manifest.metadata == {"by": "test"}
    assert sorted(manifest.files) == ["deep/more.txt", "rows.jsonl"]
    assert manifest.files["rows.jsonl"].size == 8


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: (path / "rows.jsonl").write_text("one\ntoo\n"), "sha256 differs"),
        (lambda path: (path / "rows.jsonl").write_text("one"), "sha256 differs"),
        (lambda path: (path / "rows.jsonl").unlink(), "is missing"),
        (lambda path: (path / "deep" / "new.txt").write_text(""), "was added after sealing"),
        (lambda path: (path / "manifest.json").unlink(), "not a finished artifact"),
        (lambda path: (path / "manifest.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text('{"kind": "rows", "files": {}, "x": 1}'), "cannot be read"),
    ],
)
def test_a_spoilt_artifact_is_refused_with_its_place(folder, spoil, words):
    spoil(folder)
    with pytest.raises(DataError, match=words) as caught:
        read_manifest(folder)
    assert str(folder) in caught.value.where
    assert caught.value.fix


def test_another_kind_is_refused(folder):
    with pytest.raises(DataError, match="'rows' artifact; wanted 'model' or 'pairs'"):
        read_manifest(folder, "model", "pairs")


def test_without_verification_a_changed_file_passes(folder):
    (folder / "rows.jsonl").write_text("changed")
    assert read_manifest(folder, "rows", verify=False).kind == "rows"


def test_unsealed_files_and_folders_may_change(folder):
    before = read_manifest(folder).digest
    (folder / "timing.json").write_text('{"seconds": 99}')
    (folder / "site").mkdir()
    (folder / "site" / "index.html").write_text("made at noon")
    assert read_manifest(folder).digest == before
    (folder / "deep" / "site").mkdir()  # only at the top is it a site
    (folder / "deep" / "site" / "index.html").write_text("")
    with pytest.raises(DataError, match="added"):
        read_manifest(folder)


def test_digests_do_not_depend_on_place_or_order(tmp_path):
    manifests = []
    for number, names in enumerate((["a", "b"], ["b", "a"])):
        for name in names:
            write_atomically(tmp_path / str(number) / name, name)
        manifests.append(seal(tmp_path / str(number), "rows"))
    assert manifests[0].digest == manifests[1].digest
    assert manifests[0].content == manifests[1].content
    one, other = tmp_path / "0" / "manifest.json", tmp_path / "1" / "manifest.json"
    assert one.read_bytes() == other.read_bytes()


def test_parents_change_the_digest_and_not_the_content(folder):
    plain = read_manifest(folder)
    child = seal(folder, "rows", parents={"raw": plain}, counts=plain.counts, metadata=plain.metadata)
    assert child.parents == {"raw": plain.digest}
    assert child.content == plain.content
    assert child.digest != plain.digest


def test_the_digest_of_a_value_is_canonical_and_fixed():
    assert digest_of({"b": 1, "a": "é"}) == digest_of({"a": "é", "b": 1})
    assert digest_of([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"  # sha256 of "[]"


def test_write_atomically_replaces_and_leaves_no_part(tmp_path):
    path = tmp_path / "new" / "value.json"
    write_atomically(path, "old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["value.json"]


def test_link_tree_shares_bytes_and_survives_the_loss_of_its_source(folder, tmp_path):
    target = tmp_path / "copy"
    link_tree(folder, target)
    assert (target / "rows.jsonl").stat().st_ino == (folder / "rows.jsonl").stat().st_ino
    (folder / "rows.jsonl").unlink()
    assert read_manifest(target).counts == {"rows": 2}


def test_link_tree_copies_where_links_are_refused(folder, tmp_path, monkeypatch):
    def refuse(*names):
        raise OSError("cross-device link")

    monkeypatch.setattr(artifacts.os, "link", refuse)
    link_tree(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "rows.jsonl").stat().st_ino != (folder / "rows.jsonl").stat().st_ino
    assert read_manifest(tmp_path / "copy").digest == read_manifest(folder).digest


def test_the_manifest_is_plain_json(folder):
    value = json.loads((folder / "manifest.json").read_text())
    assert value["schema_version"] == 1
    assert value["files"]["deep/more.txt"]["size"] == 4
