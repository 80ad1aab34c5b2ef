"""The registry beside a real MLflow server: its alias follows the ledger, and its own webhooks tell of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from assay.components.shared import announce, registry, tracking, verification
from fixtures.attempts import Attempt

NAME, SECRET = "hooked", "0123456789abcdef-secret"
START_SECONDS = 300
"""A loaded machine takes a minute for the server's imports and migrations."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "a"),
    ]
    allowed = {"MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true", "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https"}
    environment = {**os.environ, **allowed, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "server.log").open("w") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    for name in ("ASSAY_REGISTRY", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    try:
        _wait(url, child)
        yield url
    finally:
        os.killpg(child.pid, signal.SIGTERM)  # its workers are processes of their own
        child.wait()


def _wait(url: str, child: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and child.poll() is None:
        try:
            if httpx.get(f"{url}/health", trust_env=False).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise AssertionError("the MLflow server did not start")


@pytest.fixture
def told() -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    requests: list[tuple[dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{receiver.server_port}/", requests
    receiver.shutdown()
    receiver.server_close()


def test_mlflows_own_webhook_tells_of_a_promotion(server: str, told, tmp_path: Path) -> None:
    from mlflow.entities.webhook import WebhookAction, WebhookEntity, WebhookEvent

    url, requests = told
    with tracking.connected() as client:
        event = WebhookEvent(WebhookEntity.MODEL_VERSION_ALIAS, WebhookAction.CREATED)
        client.create_webhook(name="champion", url=url, events=[event], secret=SECRET)
    assert Attempt(tmp_path / "one", "weights").register(NAME) == 1
    registry.promote(NAME, 1)
    assert registry.sync_alias(NAME)["champion"] == (0, 1)
    until = time.monotonic() + 60
    while len(requests) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    said = [json.loads(body)["data"] for _, body in requests]
    aliases = sorted((data["alias"], int(data["version"])) for data in said)
    assert aliases == [("candidate", 1), ("champion", 1)]
    for headers, body in requests:  # one receiver can check both, ours and MLflow's: the scheme is the same
        given = [headers[f"X-MLflow-{part}"] for part in ("Delivery-Id", "Timestamp", "Signature")]
        assert announce.verify(SECRET, given[0], given[1], body, given[2])
    assert verification.is_sound(verification.verify(NAME))
    with tracking.connected() as client:
        client.delete_registered_model_alias(NAME, "champion")
    assert [finding.state for finding in verification.verify(NAME) if finding.state in verification.BAD] == ["repaired"]
