"""What an image holds, what its name says, and what docker's errors mean; no daemon is asked."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from assay.components.contracts.errors import RunError
from assay.pipelines import cli
from assay.pipelines.images import build, commands, docker, roles

RECIPE = cli.RECIPES / "medication-directions.yaml"
COMPILE = """
import sys
from pathlib import Path
from assay.components.contracts.recipe import Recipe
from assay.pipelines.images.build import use_images_file
use_images_file(Path(sys.argv[1]))
from assay.pipelines.graphs import compile_recipe
compile_recipe(Recipe.load(sys.argv[2]), Path(sys.argv[3]))
"""


def listed(name: str) -> str:
    return (roles.root() / "containers" / "requirements" / f"{name}.txt").read_text()


# --- what is in an image ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", roles.ROLES)
def test_the_lists_are_what_the_steps_import_today(role) -> None:
    assert listed(role) == roles.requirements_file(role), "run `make images-lock`"


def test_every_component_has_its_image() -> None:
    known = [step for role in roles.ROLES for step in roles.steps(role)]
    found = [wire.parent.name for wire in (roles.root() / "components").glob("*/component.py")]
    assert sorted(known) == sorted(f"assay.components.{name}.component" for name in found)


def test_only_train_and_serve_hold_torch_and_no_image_holds_tools() -> None:
    assert ["\ntorch==" in listed(role) for role in roles.ROLES] == [False, True, True]
    assert "\nkfp==" in listed("data")
    assert not any(f"\n{tool}==" in listed(role) for tool in ("pytest", "mypy", "ruff") for role in roles.ROLES)


def test_the_cuda_list_belongs_to_the_locked_torch() -> None:
    pin = next(line for line in listed("train").splitlines() if line.startswith("torch=="))
    assert f"the CUDA build of {pin} requires" in listed("cuda")


def test_the_dockerfile_has_no_finding_of_hadolint_and_a_bad_one_has(tmp_path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    good = roles.root() / "containers" / "Dockerfile"
    assert subprocess.run([hadolint, good], capture_output=True, text=True).stdout == ""
    bad = tmp_path / "Dockerfile"
    bad.write_text(good.read_text() + "RUN sudo apt-get install vim\n")
    assert subprocess.run([hadolint, bad], capture_output=True).returncode == 1


def test_no_image_has_an_entrypoint_and_each_has_a_user() -> None:
    lines = (roles.root() / "containers" / "Dockerfile").read_text().splitlines()
    assert not any(line.startswith("ENTRYPOINT") for line in lines)
    assert lines.count("USER ${UID}") == len(roles.ROLES)


# --- what its name says -----------------------------------------------------------------------------------------------


def test_a_tag_tells_roles_bases_and_accelerators_apart() -> None:
    variants = [("data", "cpu", "a"), ("data", "cpu", "b"), ("train", "cpu", "a"), ("train", "cuda", "a")]
    assert len({roles.image_digest(*variant) for variant in variants}) == len(variants)
    assert roles.image_digest("data", "cuda", "a") == roles.image_digest("data", "cpu", "a")
    assert build.Build(accelerator="cuda").tag("train").endswith("-cuda")
    assert build.Build().tag("data").startswith("assay-data-python:")


@pytest.mark.parametrize("file", ["install.sh", "Dockerfile", "requirements/data.txt", "bin/serve"])
def test_a_tag_changes_with_each_file_that_makes_the_image(file, tmp_path, monkeypatch) -> None:
    for room in ("containers", "components"):
        shutil.copytree(roles.root() / room, tmp_path / room)
    monkeypatch.setattr(roles, "root", lambda: tmp_path)
    before = roles.image_digest("data", "cpu", "a")
    with (tmp_path / "containers" / file).open("a") as changed:
        changed.write("# more\n")
    assert roles.image_digest("data", "cpu", "a") != before


def test_a_graph_names_the_images_of_an_images_file(tmp_path) -> None:
    names = {role: f"host/assay-{role}-python@sha256:{role[0] * 64}" for role in roles.ROLES}
    file = tmp_path / "images.env"
    file.write_text("# pushed today\n\n" + build.images_file(names))
    path = tmp_path / "pipeline.yaml"
    subprocess.run([sys.executable, "-c", COMPILE, str(file), str(RECIPE), str(path)], check=True)
    ir = next(yaml.safe_load_all(path.read_text()))
    executors = ir["deploymentSpec"]["executors"].values()
    assert {executor["container"]["image"] for executor in executors} == set(names.values())


@pytest.mark.parametrize("line", ["ASSAY_IMAGE_DATA=", "ASSAY_IMAGE_NOBODY=x@sha256:1", "PATH=/tmp", "assay"])
def test_a_line_that_names_no_image_is_refused(line, tmp_path) -> None:
    file = tmp_path / "images.env"
    file.write_text(f"ASSAY_IMAGE_DATA=a\n{line}\n")
    with pytest.raises(RunError, match="images.env:2"):
        build.read_images_file(file)
    with pytest.raises(RunError, match="cannot be read"):
        build.read_images_file(tmp_path / "none")


# --- what goes wrong --------------------------------------------------------------------------------------------------


def client(folder: Path, version: str, *, says: str = "", plugin: bool = False) -> str:
    """Write a docker client that knows its version and fails with a message."""
    script = folder / "docker"
    script.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo 'Docker version {version}, build 1';;\n"
        f"buildx) exit {0 if plugin else 1};;\n*) echo '{says}' >&2; exit 1;; esac\n"
    )
    script.chmod(0o755)
    return str(script)


def test_without_docker_or_buildkit_it_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="no docker client"):
        docker.find_client()
    client(tmp_path, "28.2.2")
    with pytest.raises(RunError, match="no BuildKit"):
        docker.find_client()
    with_plugin = tmp_path / "other"
    with_plugin.mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{with_plugin}")
    able = client(with_plugin, "28.2.2", plugin=True)
    assert docker.find_client() == able
    old = client(tmp_path, "20.10.24+dfsg1")  # the first on the path, and BuildKit is part of it
    assert docker.find_client() == old


@pytest.mark.parametrize(
    ("says", "means"),
    [
        ("Cannot connect to the Docker daemon at unix:///x.sock. Is the docker daemon running?", "does not answer"),
        ("Got permission denied while trying to connect to the Docker daemon socket", "may not talk"),
        ("write /var/lib/docker/tmp/x: no space left on device", "disk is full"),
        ("ERROR: BuildKit is enabled but the buildx component is missing or broken.", "no BuildKit"),
        ("no basic auth credentials", "does not know you"),
        ("denied: requested access to the resource is denied", "does not know you"),
        ("name unknown: The repository with name x does not exist in the registry", "no such repository"),
        ("ERROR: failed to do request: Head https://host/v2/library/python/manifests/3.11: no such host", "base image"),
        ("pull access denied for x, repository does not exist or may require authorization", "base image"),
        ("#9 install.sh: this torch is built for cuda; give TORCH_INDEX or WHEELS", "no torch"),
        ("Get http://localhost:5000/v2/: dial tcp 127.0.0.1:5000: connect: connection refused", "cannot be reached"),
        ("something new", "failed: something new"),
    ],
)
def test_dockers_errors_are_said_in_a_users_words(says, means, tmp_path) -> None:
    with pytest.raises(RunError, match=means) as raised:
        docker.run(client(tmp_path, "20.10.24", says=says), ["push", "x"])
    assert says[-30:] in raised.value.what
    assert raised.value.fix


def test_wheels_of_no_folder_and_roles_of_no_name_are_refused(tmp_path) -> None:
    with pytest.raises(RunError, match="no such folder"):
        docker.import_folder("docker", tmp_path / "none", "x")
    result = CliRunner().invoke(commands.app, ["digest", "--role", "robot", "--registry", "host"])
    assert isinstance(result.exception, RunError)
    assert "no role 'robot'" in str(result.exception)
