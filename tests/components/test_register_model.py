"""Against a real MLflow store on SQLite, one for the whole module: its first use runs the migrations."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow
import pytest

from assay.components.contracts.artifacts import read_manifest, sha256_file
from assay.components.contracts.errors import DataError, RegistryError
from assay.components.register_model import register
from assay.components.register_model.register import flatten, metrics_of
from assay.components.shared import registry, tracking
from assay.components.shared.dossier import read_dossier
from fixtures.attempts import RECIPE, Attempt


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(autouse=True)
def _environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_REGISTRY", str(home))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def client() -> Iterator[Any]:
    with tracking.connected() as connected:
        yield connected


def aliases(name: str) -> dict[str, int]:
    with tracking.connected() as client:
        found = client.get_registered_model(name).aliases
    return {alias: int(version) for alias, version in found.items()}


def test_a_version_carries_its_files_and_all_of_its_evidence(tmp_path: Path, client: Any) -> None:
    attempt = Attempt(tmp_path, "weights")
    assert attempt.register("full") == 1
    version = client.get_model_version("full", "1")
    assert version.tags["content"] == attempt.content
    assert version.tags["decision"] == registry.history("full")[0].decision
    assert version.tags["data"] == read_manifest(tmp_path / "data").digest
    assert version.tags["results"] == read_manifest(tmp_path / "results").digest
    assert version.tags["base_model"] == "b" * 64
    assert version.description == "exact rose with weights"
    assert aliases("full") == {"candidate": 1}

    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.status == "READY"
    run = client.get_run(model.source_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["candidate/exact"] == 0.9
    assert run.data.metrics["baseline/exact_low"] == 0.05
    assert run.data.params["recipe.sft.learning_rate"] == "0.0003"
    assert {metric.key for metric in model.metrics} == set(run.data.metrics)

    folder = Path(mlflow.artifacts.download_artifacts("models:/full@candidate", dst_path=str(tmp_path / "download")))
    assert (folder / "model.safetensors").read_text() == "weights"
    card = (folder / "README.md").read_text()
    headings = ("Intended use", "Data", "Evaluation", "Limits", "Licence", "How to verify", "Lineage")
    assert all(f"\n## {heading}" in card for heading in headings)
    for words in (
        "not clinical advice",
        "assay verify directions",
        "| candidate | exact | 0.9 | [0.8, 0.95] | 40 |",
        "| test | 40 |",
        "passed",
    ):
        assert words in card
    signature = mlflow.models.get_model_info("models:/full/1").signature
    assert "messages" in signature.inputs.input_names()
    assert registry.read_model(attempt.content).content == attempt.content


def test_the_bill_of_materials_names_files_data_and_libraries(tmp_path: Path, home: Path) -> None:
    attempt = Attempt(tmp_path, "weights with a bill")
    attempt.register("bill")
    [path] = (home / "artifacts" / "bill").rglob("sbom.cdx.json")
    bill = json.loads(path.read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    model = bill["metadata"]["component"]
    assert (model["type"], model["version"]) == ("machine-learning-model", attempt.content)
    candidate = read_manifest(tmp_path / "model")
    hashes = {file["name"]: file["hashes"][0]["content"] for file in model["components"]}
    assert hashes == {name: entry.sha256 for name, entry in candidate.files.items()}
    by_ref = {part["bom-ref"]: part for part in bill["components"]}
    assert by_ref["data"]["version"] == read_manifest(tmp_path / "data").digest
    assert by_ref["data"]["data"] == [
        {"type": "dataset", "name": "sft (20 rows)"},
        {"type": "dataset", "name": "test (40 rows)"},
    ]
    assert f"pkg:pypi/torch@{installed('torch')}" in by_ref
    assert f"pkg:pypi/numpy@{installed('numpy')}" in by_ref
    assert not any(ref.startswith("pkg:pypi/pytest@") for ref in by_ref)  # of no use to a model
    assert set(bill["dependencies"][0]["dependsOn"]) == set(by_ref)
    assert len(by_ref) == len(bill["components"])
    rate = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][1]
    assert rate["confidenceInterval"] == {"lowerBound": "0.8", "upperBound": "0.95"}
    again = Attempt(tmp_path / "again", "weights with a bill")
    again.register("bill-again")
    [other] = (home / "artifacts" / "bill-again").rglob("sbom.cdx.json")
    assert other.read_bytes() == path.read_bytes()
    entry = registry.registered("bill", version=1)
    assert entry is not None
    assert read_dossier(entry.evidence).files["sbom.cdx.json"] == sha256_file(path)


def test_the_bill_of_materials_fits_the_specification(tmp_path: Path, home: Path) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json", reason="cyclonedx-python-lib holds the schema")
    from cyclonedx.schema import SchemaVersion

    Attempt(tmp_path, "weights that fit").register("fits")
    [path] = (home / "artifacts" / "fits").rglob("sbom.cdx.json")
    validator = validation.JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(path.read_text()) is None


def test_the_embedded_store_has_a_write_ahead_log_and_no_second_copy(tmp_path: Path, home: Path) -> None:
    attempt = Attempt(tmp_path, "weights of one copy")
    attempt.register("once")
    import sqlite3

    with sqlite3.connect(home / "mlflow.db") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    kept = registry.model_folder(attempt.content) / "model.safetensors"
    [logged] = (home / "artifacts" / "once").rglob("model.safetensors")
    assert logged.samefile(kept)
    assert not kept.samefile(tmp_path / "model" / "model.safetensors")


def test_files_are_uploaded_where_the_store_is_no_folder_of_this_machine(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(register, "_local_folder", lambda location: None)
    attempt = Attempt(tmp_path, "weights to upload")
    attempt.register("upload")
    kept = registry.model_folder(attempt.content)
    [logged] = (home / "artifacts" / "upload").rglob("model.safetensors")
    assert not logged.samefile(kept / "model.safetensors")
    names = {path.name for path in logged.parent.iterdir()}
    assert names == {path.name for path in kept.iterdir()} | {"README.md", "MLmodel", "decision.json", "sbom.cdx.json"}


def test_the_same_bytes_are_the_same_version_without_mlflow(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "one", "weights")
    assert attempt.register("same") == 1
    code = (
        "import json, sys; from kfp import dsl;"
        "from assay.components.register_model.component import register_model;"
        "inputs = {name: dsl.Artifact(uri=uri) for name, uri in json.loads(sys.argv[1]).items()};"
        "recipe = json.loads(sys.argv[2]);"
        "assert register_model(name='same', recipe=recipe, **inputs) == 1;"
        "assert not {'mlflow', 'torch'} & set(sys.modules)"
    )
    inputs = attempt.inputs("candidate", "decision", "data", "results")
    uris = json.dumps({name: artifact.uri for name, artifact in inputs.items()})
    in_a_step = {**os.environ, "_KFP_RUNTIME": "true"}
    subprocess.run([sys.executable, "-c", code, uris, RECIPE.model_dump_json()], check=True, env=in_a_step)
    assert len(registry.history("same")) == 1
    assert Attempt(tmp_path / "two", "weights").register("same") == 1
    assert Attempt(tmp_path / "three", "other weights").register("same") == 2


def test_a_killed_registration_finds_its_version_again(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Attempt(tmp_path, "weights")

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry, "register", killed)
        with pytest.raises(KeyboardInterrupt):
            attempt.register("killed")
    assert registry.history("killed") == []
    assert attempt.register("killed") == 1
    assert len(client.search_model_versions("name = 'killed'")) == 1


def test_the_engines_run_is_used_and_left_open(tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = client.create_experiment("engine", artifact_location=tmp_path.as_uri())
    run = client.create_run(experiment)
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    Attempt(tmp_path, "weights").register("engine")
    found = client.get_run(run.info.run_id)
    assert found.info.status == "RUNNING"
    assert found.data.metrics["candidate/exact_high"] == 0.95


@pytest.mark.parametrize("verdict", ["hold", "inconclusive"])
def test_what_the_gate_held_is_not_registered(tmp_path: Path, verdict: str) -> None:
    with pytest.raises(RegistryError, match="not 'promote'"):
        Attempt(tmp_path, "weights", verdict=verdict).register("held")
    assert registry.history("held") == []


def test_another_models_decision_registers_nothing(tmp_path: Path) -> None:
    attempt, other = Attempt(tmp_path / "one", "weights"), Attempt(tmp_path / "two", "other weights")
    (tmp_path / "one" / "decision").rename(tmp_path / "gone")
    (tmp_path / "two" / "decision").rename(tmp_path / "one" / "decision")
    with pytest.raises(RegistryError, match="about another model"):
        attempt.register("swapped")
    assert other.content != attempt.content


def test_an_altered_decision_registers_nothing(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, "weights", verdict="hold")
    path = tmp_path / "decision" / "decision.json"
    path.write_text(path.read_text().replace('"hold"', '"promote"'))
    with pytest.raises(DataError, match="sha256"):
        attempt.register("forged")


def test_altered_weights_are_not_registered(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, "weights that change")
    (tmp_path / "model" / "model.safetensors").write_text("weights that CHANGE")
    with pytest.raises(DataError, match="sha256"):
        attempt.register("altered")
    assert registry.history("altered") == []


def test_a_drifted_alias_is_repaired_from_the_ledger(tmp_path: Path, client: Any) -> None:
    first = Attempt(tmp_path / "one", "weights")
    first.register("drift")
    registry.promote("drift", 1)
    assert registry.sync_alias("drift") == {"champion": (0, 1), "candidate": (1, 0)}
    Attempt(tmp_path / "two", "better weights", champion=first.content).register("drift")
    assert aliases("drift") == {"champion": 1, "candidate": 2}
    client.set_registered_model_alias("drift", "champion", "2")  # by hand, past the ledger
    assert registry.sync_alias("drift") == {"champion": (2, 1)}
    assert registry.sync_alias("drift") == {}
    registry.promote("drift", 2)
    registry.sync_alias("drift")
    assert aliases("drift") == {"champion": 2}
    registry.rollback("drift", "worse after all")
    assert aliases("drift") == {"champion": 1}


def test_a_reset_mlflow_store_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Attempt(tmp_path / "one", "weights")
    first.register("reset")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    with tracking.connected() as other:
        other.create_registered_model("reset")
    registry.promote("reset", 1)
    with pytest.raises(RegistryError, match="cannot set the aliases"):
        registry.sync_alias("reset")


def test_a_registry_on_s3_beside_a_tracking_store_of_the_team(
    tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ASSAY_REGISTRY", f"s3://{s3_bucket}/registry")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/team.db")
    with tracking.connected() as team:
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", team.create_experiment("s3", (tmp_path / "artifacts").as_uri()))
    attempt = Attempt(tmp_path / "one", "weights")
    assert attempt.register("s3") == attempt.register("s3") == 1
    assert registry.promote("s3", 1).version == 1
    registry.sync_alias("s3")
    assert aliases("s3") == {"champion": 1}
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "another machine"))
    assert (registry.model_folder(attempt.content) / "model.safetensors").read_text() == "weights"
    assert len(registry.history("s3")) == 2


def test_two_runs_that_register_the_same_bytes_at_once_get_one_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Attempt(tmp_path / "one", "weights"), Attempt(tmp_path / "two", "weights")
    make = register._mlflow_version

    def overtaken(*arguments: Any) -> int:
        monkeypatch.setattr(register, "_mlflow_version", make)
        assert first.register("race") == 1
        return 2  # as if MLflow had given this run a number of its own

    monkeypatch.setattr(register, "_mlflow_version", overtaken)
    assert second.register("race") == 1
    assert [entry.version for entry in registry.history("race")] == [1]


def test_metrics_and_params_are_what_mlflow_takes() -> None:
    assert metrics_of({"arms": {"a": {"m": {"mean": 1, "low": float("nan"), "high": None, "n": 3}}}}) == {"a/m": 1.0}
    flat = flatten({"a": {"b": 1, "c": None}, "d": ["x"], "e": "text"}, "recipe")
    assert flat == {"recipe.a.b": "1", "recipe.a.c": "null", "recipe.d": '["x"]', "recipe.e": "text"}
