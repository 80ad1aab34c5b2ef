"""The serve image: SageMaker's and OpenAI's contracts on a real model, healthy only when it answers."""

import json
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fixtures.containers import HARDENED, Images

pytestmark = [pytest.mark.docker, pytest.mark.heavy, pytest.mark.timeout(3600)]

ASK = {"messages": [{"role": "user", "content": "Take 2 tabs daily"}], "max_tokens": 8}
START_SECONDS = 300


@pytest.fixture(scope="module")
def image(images: Images) -> str:
    return images.of("serve")


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Path:
    """The tiny model, as another user may read it."""
    for path in [tiny_model, *tiny_model.parents[:2], *tiny_model.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tiny_model


@contextmanager
def serving(images: Images, image: str, model: Path, *environment: str) -> Iterator[str]:
    """Run `docker run IMAGE serve` as SageMaker does, and give the container's name once it listens."""
    name = f"assay-test-{uuid.uuid4().hex[:8]}"
    hardened = [option for option in HARDENED if not option.startswith("--network")]
    options = [*hardened, f"--volume={model}:/opt/ml/model:ro", "--publish=127.0.0.1:0:8080", "--health-interval=2s"]
    options += [f"--env={setting}" for setting in environment]
    subprocess.run(
        [images.client, "run", "--detach", "--name", name, *options, image, "serve"], check=True, stdout=subprocess.PIPE
    )
    try:
        yield name
    finally:
        subprocess.run([images.client, "rm", "--force", name], check=True, stdout=subprocess.PIPE)


def state(images: Images, name: str) -> dict[str, Any]:
    told = subprocess.run([images.client, "inspect", name], check=True, capture_output=True)
    return json.loads(told.stdout)[0]


def wait_for(images: Images, name: str, health: str) -> None:
    end = time.monotonic() + START_SECONDS
    while (now := state(images, name)["State"])["Health"]["Status"] != health:
        assert now["Running"], subprocess.run([images.client, "logs", name], capture_output=True, text=True).stderr
        assert time.monotonic() < end, now
        time.sleep(1)


def address(images: Images, name: str) -> str:
    port = state(images, name)["NetworkSettings"]["Ports"]["8080/tcp"][0]["HostPort"]
    return f"http://127.0.0.1:{port}"


def test_it_becomes_healthy_and_answers_both_protocols_alike_and_ends_on_sigterm(images, image, model) -> None:
    with serving(images, image, model, "ASSAY_SERVE_OPEN=1") as name:
        assert state(images, name)["State"]["Health"]["Status"] == "starting"
        wait_for(images, name, "healthy")
        with httpx.Client(base_url=address(images, name), timeout=120, trust_env=False) as web:
            assert web.get("/ping").status_code == 200
            answers = [web.post(path, json=ASK) for path in ("/invocations", "/v1/chat/completions")]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].json()["choices"] == answers[1].json()["choices"]
        assert answers[0].json()["usage"]["completion_tokens"] > 0
        subprocess.run([images.client, "stop", "--time", "30", name], check=True, stdout=subprocess.PIPE)
        assert state(images, name)["State"]["ExitCode"] in (0, 143)  # 137 would be Docker's kill after 30 s


def test_with_a_token_it_wants_the_token(images, image, model) -> None:
    with serving(images, image, model, "ASSAY_SERVE_TOKEN=let-me-in") as name:
        wait_for(images, name, "healthy")
        with httpx.Client(base_url=address(images, name), timeout=120, trust_env=False) as web:
            assert web.post("/invocations", json=ASK).status_code == 401
            allowed = {"authorization": "Bearer let-me-in"}
            assert web.post("/invocations", json=ASK, headers=allowed).status_code == 200


def test_with_neither_token_nor_leave_it_refuses_to_start(images, image, model) -> None:
    done = images.run(image, "serve", mounts={model: "/opt/ml/model"})
    assert done.returncode == 2
    assert "needs a bearer token" in done.stderr


def test_it_can_import_all_that_its_steps_and_its_server_import(images, image) -> None:
    from assay.components.runtime.digest import reach
    from assay.pipelines.images import roles

    libraries = sorted(set().union(*(reach(module)[1] for module in [*roles.steps("serve"), roles.SERVER])))
    done = images.run(image, "python", "-c", f"import {', '.join([*roles.steps('serve'), roles.SERVER, *libraries])}")
    assert done.returncode == 0, done.stderr
