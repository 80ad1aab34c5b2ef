"""Push to a real registry on this machine: what `digest` prints is what the registry serves."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from assay.components.contracts.errors import RunError
from assay.pipelines.images import build, commands, docker
from fixtures.containers import free_port

pytestmark = pytest.mark.docker

CONFIG = """
version: 0.1
storage: {{filesystem: {{rootdirectory: {folder}/blobs}}}}
http: {{addr: "127.0.0.1:{port}"}}
{auth}
"""
LOCKED = "auth: {{htpasswd: {{realm: assay, path: {folder}/users}}}}"


@contextmanager
def registry(folder: Path, auth: str = "") -> Iterator[str]:
    """Run Debian's docker-registry on a free port and give its address."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("there is no docker-registry on the path (on Debian: apt-get install docker-registry)")
    port = free_port()
    (folder / "users").touch()
    (folder / "config.yml").write_text(CONFIG.format(folder=folder, port=port, auth=auth.format(folder=folder)))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=log, stderr=log)
        try:
            _wait(f"http://127.0.0.1:{port}/v2/", process, folder / "log")
            yield f"127.0.0.1:{port}/assay"
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture
def settings(daemon: str, tmp_path: Path) -> Iterator[build.Build]:
    """Settings whose data image is one small file: pushing does not ask what is inside."""
    settings = build.Build(base=f"test-{os.getpid()}")
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "file").write_text("data")
    with subprocess.Popen(["tar", "-C", tmp_path / "content", "-cf", "-", "."], stdout=subprocess.PIPE) as packing:
        subprocess.run([daemon, "import", "-", settings.tag("data")], stdin=packing.stdout, check=True)
    yield settings
    made = docker.run(daemon, ["image", "inspect", "--format", "{{.Id}}", settings.tag("data")])
    subprocess.run([daemon, "image", "rm", "--force", made], check=True)


def test_what_is_pushed_is_named_by_the_registrys_digest(settings, daemon, tmp_path) -> None:
    with registry(tmp_path) as prefix:
        with pytest.raises(RunError, match="no such image"):
            build.reference("data", settings, prefix)
        given = [
            "--registry",
            prefix,
            "--role",
            "data",
            "--base",
            settings.base,
            "--output",
            str(tmp_path / "images.env"),
        ]
        pushed = CliRunner().invoke(commands.app, ["push", *given], catch_exceptions=False)
        told = CliRunner().invoke(commands.app, ["digest", *given], catch_exceptions=False)
        line = pushed.stdout.splitlines()[-1]
        assert line.startswith(f"ASSAY_IMAGE_DATA={prefix}/assay-data-python@sha256:")
        assert told.stdout.splitlines() == [line]
        assert build.read_images_file(tmp_path / "images.env") == dict([line.split("=", 1)])
        reference = line.partition("=")[2]
        digest = reference.partition("@")[2]
        served = httpx.get(
            f"http://{prefix.partition('/')[0]}/v2/assay/assay-data-python/manifests/{digest}", trust_env=False
        )
        assert served.status_code == 200
        subprocess.run([daemon, "image", "rm", "--force", reference, f"{prefix}/{settings.tag('data')}"], check=True)
        subprocess.run([daemon, "pull", reference], check=True)
        subprocess.run([daemon, "image", "rm", "--force", reference], check=True)


def test_a_registry_that_does_not_know_you_and_one_that_is_not_there(settings, tmp_path) -> None:
    with registry(tmp_path, LOCKED) as prefix, pytest.raises(RunError, match="does not know you") as refused:
        build.push("data", settings, prefix)
    assert "docker login" in refused.value.fix
    with pytest.raises(RunError, match="cannot be reached"):
        build.push("data", settings, f"127.0.0.1:{free_port()}/assay")


def test_an_image_on_this_machines_own_base_is_not_pushed(images) -> None:
    if not images.base.startswith("assay-local-base"):
        pytest.skip("this run's base is a shipped one")
    images.of("data")
    with pytest.raises(RunError, match="made for this machine only"):
        build.push("data", images.settings(), "127.0.0.1:1/assay")


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            httpx.get(url, trust_env=False)
        except httpx.TransportError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(log.read_text())
