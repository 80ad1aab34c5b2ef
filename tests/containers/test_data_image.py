"""The data image: all that its steps need and no torch, run as engines run it."""

import json
from pathlib import Path

import pytest

from assay.components.contracts.artifacts import read_manifest
from assay.components.contracts.errors import RunError
from assay.components.runtime.digest import code_digest, reach
from assay.pipelines.images import docker, roles
from fixtures.containers import Images, Launcher, open_to_all, write_task

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]

IMPORT = """
import importlib, json, sys
from importlib import metadata
from assay.components.runtime.digest import code_digest
steps, libraries = json.loads(sys.argv[1])
for name in [*steps, *libraries]:
    importlib.import_module(name)
print(json.dumps({step: code_digest(step) for step in steps}))
"""


@pytest.fixture(scope="module")
def image(images: Images) -> str:
    return images.of("data")


def test_it_can_import_all_that_its_steps_import_and_holds_the_code_that_the_graph_names(images, image) -> None:
    steps = roles.steps("data")
    libraries = sorted(set().union(*(reach(step)[1] for step in steps)))
    done = images.run(image, "python", "-c", IMPORT, json.dumps([steps, libraries]))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {step: code_digest(step) for step in steps}


@pytest.mark.parametrize("module", ["torch", "transformers", "pip", "pytest"])
def test_it_has_nothing_that_no_step_needs(images, image, module) -> None:
    done = images.run(image, "python", "-c", f"import {module}")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_it_runs_as_nobody_special_and_says_what_it_is(images, image) -> None:
    config = images.inspect(image)["Config"]
    assert config["Entrypoint"] is None
    assert config["User"] == "10001"
    labels = config["Labels"]
    assert labels["assay.role"] == "data"
    assert labels["assay.code-digest"].startswith(image.partition(":")[2])
    assert labels["org.opencontainers.image.base.name"] == images.base
    assert images.run(image, "id", "-u").stdout.strip() == "10001"
    assert images.run(image, "touch", "/opt/venv/x", hardened=False).returncode != 0


def test_a_chain_of_steps_by_the_launchers_rules_gives_the_bytes_that_this_machine_gives(images, tmp_path) -> None:
    launcher = Launcher(images, tmp_path / "bucket")
    values = {**launcher.constants("generate-data"), "rows": 60}
    done = launcher.launch("data", "generate-data", values)
    assert done.returncode == 0, done.stderr
    given = {"raw": "gs://bucket/generate-data/raw"}
    done = launcher.launch("data", "validate-data", launcher.constants("validate-data"), given)
    assert done.returncode == 0, done.stderr
    made = [launcher.folder / "generate-data" / "raw", launcher.folder / "validate-data" / "accepted"]
    assert [read_manifest(folder).content for folder in made] == _made_here(tmp_path, launcher)


def test_a_users_error_is_exit_2_with_a_report(images, tmp_path) -> None:
    launcher = Launcher(images, tmp_path / "bucket")
    values = {**launcher.constants("generate-data"), "task": "no_such_task", "rows": 60}
    done = launcher.launch("data", "generate-data", values)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "no_such_task" in json.loads((launcher.folder / "generate-data" / "error.json").read_text())["what"]


def test_a_step_by_sagemakers_processing_contract(images, image, tmp_path) -> None:
    from assay.components.runtime import sagemaker as shim

    write_task(
        tmp_path / "processing" / "input" / "task",
        component="assay.components.generate_data.component:generate_data",
        parameters={
            "task": {"type": "STRING", "value": "medication_directions"},
            "rows": {"type": "NUMBER_INTEGER", "argument": True},
            "seed": {"type": "NUMBER_INTEGER", "value": 0},
        },
        outputs={"artifacts": {"raw": "system.Dataset"}},
    )
    (tmp_path / "processing" / "output" / "raw").mkdir(parents=True)
    open_to_all(tmp_path)
    command = ["python", "-m", shim.__name__, "--parameter"]
    done = images.run(image, *command, "rows=40", mounts={tmp_path: "/opt/ml"})
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "processing" / "output" / "raw", "raw").counts["rows"] == 40
    done = images.run(image, *command, "rows=many", mounts={tmp_path: "/opt/ml"})
    assert done.returncode == 2, done.stderr
    assert "rows" in (tmp_path / "output" / "message").read_text()


def test_a_failing_container_is_failing_every_time(images, image) -> None:
    """kfp.local's runner lets Docker remove the container and then reports success when it comes too late to ask."""
    failures = 0
    for _ in range(20):
        try:
            docker.run(images.client, ["run", "--rm", "--network=none", image, "false"])
        except RunError:
            failures += 1
    assert failures == 20


def _made_here(folder: Path, launcher: Launcher) -> list[str]:
    """Return the content digests of the same two artifacts, made by this process."""
    from kfp import dsl

    from assay.components.generate_data.component import generate_data
    from assay.components.validate_data.component import validate_data

    raw, accepted = dsl.Dataset(uri=str(folder / "raw")), dsl.Dataset(uri=str(folder / "accepted"))
    generate_data.python_func(**{**launcher.constants("generate-data"), "rows": 60}, raw=raw)
    others = {name: dsl.Artifact(uri=str(folder / name)) for name in ("quarantine", "docs")}
    validate_data.python_func(
        **launcher.constants("validate-data"),
        raw=raw,
        accepted=accepted,
        summary=dsl.Metrics(uri=str(folder / "summary")),
        **others,
    )
    return [read_manifest(artifact.path).content for artifact in (raw, accepted)]
