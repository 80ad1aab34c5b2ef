"""The last step with everything real: registry, MLflow on SQLite, the server as a process, a tiny random model."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from assay.components.contracts.artifacts import read_manifest, seal
from assay.components.contracts.errors import RegistryError
from assay.components.contracts.recipe import EvaluateSettings
from assay.components.contracts.rows import Example, Message, write_rows
from assay.components.deploy_model import deploy as deploying
from assay.components.deploy_model import parity
from assay.components.deploy_model.component import deploy_model
from assay.components.deploy_model.deploy import check_parity
from assay.components.deploy_model.parity import Answer, compare, golden_prompts
from assay.components.register_model.component import register_model
from assay.components.shared import registry, review, tracking, verification
from assay.components.shared.people import Person
from fixtures.attempts import RECIPE

SETTINGS = EvaluateSettings(golden_prompts=2, max_new_tokens=8)
SIGS = ("Take 2 tabs po q6h prn pain", "1 cap daily", "Instill 1 drop in each eye bid")


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_REGISTRY", str(tmp_path / "registry"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "splits"
    rows = [
        Example(id=f"{number:032d}", group=text, prompt=[Message(role="user", content=text)], reference="{}")
        for number, text in enumerate(SIGS)
    ]
    write_rows(folder / "test.parquet", rows[::-1], Example)
    seal(folder, "splits", counts={"test": len(rows)})
    return folder


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with every weight negated: it reads and writes the same, and answers otherwise."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("manifest.json"))
    weights = {name: -tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    seal(folder, "model")
    return folder


def decide(folder: Path, candidate: Path, champion: Path | None = None) -> Path:
    folder.mkdir()
    record = {
        "decision": "promote",
        "reason": f"exact rose in {folder.name}",
        "candidate": read_manifest(candidate).content,
        "champion": read_manifest(champion).content if champion else None,
        "baseline": "b" * 64,
        "arms": {"candidate": {"exact": {"mean": 0.9, "low": 0.8, "high": 0.95, "n": 3}}},
    }
    (folder / "decision.json").write_text(json.dumps(record))
    seal(folder, "decision")
    return folder


def register(candidate: Path, decision: Path, data: Path, tmp_path: Path, approvals: int = 0) -> int:
    results = tmp_path / "results"
    if not results.exists():
        results.mkdir()
        seal(results, "results")
    folders = {"candidate": candidate, "decision": decision, "data": data, "results": results}
    inputs = {name: dsl.Artifact(uri=str(folder)) for name, folder in folders.items()}
    recipe = {**RECIPE.model_dump(mode="json"), "approval": {"required": approvals}}
    version = register_model.python_func(name="directions", recipe=recipe, **inputs)
    assert isinstance(version, int)
    return version


def deploy(version: int, candidate: Path, data: Path) -> int:
    deployed = deploy_model.python_func(
        name="directions",
        version=version,
        settings={"golden_prompts": 2.0, "max_new_tokens": 8.0},  # as kfp hands a dict over
        task="medication_directions",
        candidate=dsl.Model(uri=str(candidate)),
        data=dsl.Dataset(uri=str(data)),
    )
    assert isinstance(deployed, int)
    return deployed


def test_from_registration_to_champion_and_back(
    tiny_model: Path, other_model: Path, data: Path, tmp_path: Path
) -> None:
    """One story: first champion, a repeat, a second champion, a rollback, and the server that follows the ledger."""
    first = decide(tmp_path / "first", tiny_model)
    assert register(tiny_model, first, data, tmp_path) == 1
    assert registry.champion("directions") is None
    assert deploy(1, tiny_model, data) == 1
    champion = registry.champion("directions")
    assert champion is not None
    assert (champion.version, champion.replaces) == (1, 0)
    record = registry.deployment("directions", 1)
    assert record is not None
    assert (record.prompts, record.content) == (2, champion.content)
    assert record.tokens > 0

    _repeat_is_cheap(tiny_model, data)
    assert len(registry.history("directions")) == 2

    second = decide(tmp_path / "second", other_model, tiny_model)
    assert register(other_model, second, data, tmp_path) == 2
    assert _aliases() == {"champion": 1, "candidate": 2}
    assert deploy(2, other_model, data) == 2
    assert _aliases() == {"champion": 2}

    registry.rollback("directions", "doses were wrong")
    assert _aliases() == {"champion": 1}
    _serves("directions", read_manifest(tiny_model).content)
    with pytest.raises(RegistryError, match="rolled back"):
        deploy(2, other_model, data)


def test_where_people_must_approve_the_alias_moves_after_check_and_approval(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_PERSON", "submitter")
    assert register(tiny_model, decide(tmp_path / "first", tiny_model), data, tmp_path, approvals=2) == 1
    assert deploy(1, tiny_model, data) == 0
    assert registry.champion("directions") is None
    assert _aliases() == {"candidate": 1}
    with monkeypatch.context() as patch:
        patch.setattr(deploying, "check_parity", None)  # the check is on record
        assert deploy(1, tiny_model, data) == 0
    [waiting] = review.queue("directions")
    assert (waiting.version, waiting.submitter) == (1, "submitter")
    review.approve("directions", 1, "fine", Person("ann"))
    assert _aliases() == {"candidate": 1}
    review.approve("directions", 1, "fine", Person("bob"))
    assert _aliases() == {"champion": 1}
    assert deploy(1, tiny_model, data) == 1
    assert verification.is_sound(verification.verify("directions"))


def _repeat_is_cheap(candidate: Path, data: Path) -> None:
    code = (
        "import sys, time; from kfp import dsl;"
        "from assay.components.deploy_model.component import deploy_model;"
        "start = time.process_time();"
        "version = deploy_model(name='directions', version=1, settings={}, task='medication_directions',"
        " candidate=dsl.Model(uri=sys.argv[1]), data=dsl.Dataset(uri=sys.argv[2]));"
        "assert version == 1; assert not {'mlflow', 'torch', 'uvicorn'} & set(sys.modules);"
        "spent = time.process_time() - start; assert spent < 0.5, spent"
    )
    in_a_step = {**os.environ, "_KFP_RUNTIME": "true"}
    subprocess.run([sys.executable, "-c", code, str(candidate), str(data)], check=True, env=in_a_step)


def _aliases() -> dict[str, int]:
    with tracking.connected() as client:
        return {name: int(version) for name, version in client.get_registered_model("directions").aliases.items()}


def _serves(name: str, content: str) -> None:
    command = [sys.executable, "-m", "assay.components.deploy_model.server", "--model", name, "--port", "0"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert child.stdout is not None
    ready: dict[str, Any] = json.loads(child.stdout.readline())
    child.terminate()
    child.communicate()
    assert (ready["model"], ready["content"]) == (name, content)


# --- refusals; none of them needs MLflow ------------------------------------------------------------------------------


def put(version: int, candidate: Path, decision: Path) -> str:
    content = read_manifest(candidate).content
    registry.keep_model(candidate)
    registry.register("directions", version, content, registry.keep_decision(decision))
    return content


def test_tampered_registered_bytes_are_refused(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    content = put(1, tiny_model, decide(tmp_path / "decision", tiny_model))
    weights = registry.model_folder(content) / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(RegistryError, match="was altered"):
        deploy(1, tiny_model, data)
    assert registry.champion("directions") is None


def test_a_version_of_another_model_is_refused(tiny_model: Path, other_model: Path, data: Path, tmp_path: Path) -> None:
    put(1, tiny_model, decide(tmp_path / "decision", tiny_model))
    with pytest.raises(RegistryError, match="is not the model that this run trained"):
        deploy(1, other_model, data)
    with pytest.raises(RegistryError, match="no version 7"):
        deploy(7, tiny_model, data)


def test_bytes_tampered_under_the_check_reach_no_server(
    tiny_model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(RegistryError, match="did not start"):
        check_parity(folder, SETTINGS, tiny_model, data)
    assert "sha256" in capfd.readouterr().err


def test_a_server_that_answers_otherwise_moves_nothing(
    tiny_model: Path, other_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(1, tiny_model, decide(tmp_path / "decision", tiny_model))
    monkeypatch.setattr(registry, "model_folder", lambda content: other_model)
    monkeypatch.setattr(registry, "read_model", lambda content: None)
    with pytest.raises(RegistryError, match="does not repeat the trained one") as error:
        deploy(1, tiny_model, data)
    assert error.value.where == f"example {0:032d}"
    monkeypatch.undo()
    monkeypatch.setenv("ASSAY_REGISTRY", str(tmp_path / "registry"))
    assert registry.champion("directions") is None
    assert registry.deployment("directions", 1) is None


def test_a_kill_after_the_promotion_is_repaired_by_the_next_attempt(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The promotion stands in the ledger, the record does not: the step is repeated and ends in the same state."""
    put(1, tiny_model, decide(tmp_path / "decision", tiny_model))
    registry.promote("directions", 1)
    synced: list[str] = []
    monkeypatch.setattr(registry, "sync_alias", synced.append)
    monkeypatch.setattr(deploying, "check_parity", lambda *arguments: (2, 16))
    assert deploy(1, tiny_model, data) == 1
    assert synced == ["directions"]
    assert registry.deployment("directions", 1) is not None
    assert len(registry.history("directions")) == 2


# --- the comparison ---------------------------------------------------------------------------------------------------


def answer(tokens: Sequence[int], prompt: Sequence[int] = (1, 2), text: str = "x") -> Answer:
    return Answer(list(prompt), list(tokens), text)


@pytest.mark.parametrize(
    ("served", "words"),
    [
        (answer([5, 6, 8]), "other tokens, from token 3"),
        (answer([5, 6]), "other tokens, from token 3"),
        (answer([5, 6, 7, 2]), "other tokens, from token 4"),
        (answer([5, 6, 7], prompt=(1, 3)), "written with other tokens, from token 2"),
        (answer([5, 6, 7], text="y"), "another text"),
    ],
)
def test_any_difference_is_an_error(served: Answer, words: str) -> None:
    example = Example(id="a", group="g", prompt=[Message(role="user", content="x")], reference="{}")
    trained = answer([5, 6, 7])
    assert compare([example, example], [trained, trained], [trained, trained]) == 6
    with pytest.raises(RegistryError, match=words):
        compare([example, example], [trained, trained], [trained, served])


def test_golden_prompts_are_the_first_by_id(data: Path) -> None:
    assert [row.prompt[0].content for row in golden_prompts(data, 2)] == list(SIGS[:2])
    assert len(golden_prompts(data, 99)) == len(SIGS)


def test_a_server_that_hangs_at_start_is_given_up(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "START_SECONDS", 0.01)
    with pytest.raises(RegistryError, match="did not start"), parity.running_server(tiny_model):
        pass
