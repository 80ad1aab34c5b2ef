"""A Docker daemon, a base image and the built images; where no daemon can be started the tests are skipped, aloud."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from assay.components.contracts.errors import RunError
from assay.pipelines.images import docker, roles
from fixtures.containers import Images

BASE = "assay-local-base:bookworm"
START_SECONDS = 60


def pytest_terminal_summary(terminalreporter) -> None:
    skipped = [report for report in terminalreporter.getreports("skipped") if "containers/" in report.nodeid]
    if skipped:
        terminalreporter.section("CONTAINERS WERE NOT TESTED", yellow=True, bold=True)
        for reason in sorted({str(report.longrepr[2]) for report in skipped}):
            terminalreporter.write_line(reason.removeprefix("Skipped: "))


@pytest.fixture(scope="session")
def client() -> str:
    """A docker client with BuildKit."""
    try:
        return docker.find_client()
    except RunError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def daemon(client: str) -> Iterator[str]:
    """A client whose daemon answers: the machine's, or one that is started here and ends with the tests."""
    if _answers(client):
        yield client
        return
    if shutil.which("dockerd") is None or os.geteuid():
        pytest.skip("no Docker daemon answers, and none can be started here (that needs root and dockerd)")
    folder = Path(tempfile.mkdtemp(prefix="assay-docker-"))
    with (folder / "log").open("w") as log, pytest.MonkeyPatch.context() as patch:
        process = subprocess.Popen(_dockerd(folder), stdout=log, stderr=log)
        patch.setenv("DOCKER_HOST", f"unix://{folder}/socket")
        try:
            if not _answers(client, process, START_SECONDS):
                pytest.skip(f"the Docker daemon does not start: {(folder / 'log').read_text().splitlines()[-1]}")
            yield client
        finally:
            _remove_containers(client)  # an interrupted test leaves its own
            process.terminate()
            process.wait(timeout=60)
            for mount in (folder / "run" / "netns").glob("*"):  # which it leaves, and which could not be removed
                subprocess.run(["umount", "--lazy", mount], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def base(daemon: str) -> str:
    """The base that ASSAY_IMAGE_BASE names; else this machine's own, made once a daemon."""
    given = os.environ.get("ASSAY_IMAGE_BASE", "")
    if given or subprocess.run([daemon, "image", "inspect", BASE], capture_output=True).returncode == 0:
        return given or BASE
    if shutil.which("debootstrap") is None or os.geteuid():
        pytest.skip("no base image: name one by ASSAY_IMAGE_BASE, or install debootstrap and be root")
    script = str(roles.root() / "containers" / "local-base.sh")
    if subprocess.run([script, BASE], env={**os.environ, "DOCKER": daemon}).returncode:
        pytest.skip(f"no base image: {script} failed (it needs Debian's packages); name one by ASSAY_IMAGE_BASE")
    return BASE


@pytest.fixture(scope="session")
def images(daemon: str, base: str) -> Images:
    """Builds the image of a role when a test first asks for it."""
    return Images(daemon, base)


def _dockerd(folder: Path) -> list[str]:
    """Return a daemon's command line that touches nothing outside of `folder`."""
    places = {"data-root": "data", "exec-root": "run", "pidfile": "pid"}
    return ["dockerd", f"--host=unix://{folder}/socket", *(f"--{key}={folder}/{name}" for key, name in places.items())]


def _remove_containers(client: str) -> None:
    listed = subprocess.run([client, "ps", "--all", "--quiet"], capture_output=True, text=True).stdout.split()
    if listed:
        subprocess.run([client, "rm", "--force", *listed], capture_output=True)


def _answers(client: str, process: "subprocess.Popen[bytes] | None" = None, seconds: float = 0) -> bool:
    """Ask the daemon until it answers, its process ends, or the time is up."""
    end = time.monotonic() + seconds
    while True:
        asked = subprocess.run([client, "version", "--format", "{{.Server.Version}}"], capture_output=True)
        if asked.returncode == 0:
            return True
        if time.monotonic() > end or process is None or process.poll() is not None:
            return False
        time.sleep(0.5)
