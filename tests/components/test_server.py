"""The real server over HTTP on a tiny random model, and what it refuses before it loads one."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from assay.components.contracts.errors import DataError, RegistryError, RunError
from assay.components.contracts.rows import Message
from assay.components.deploy_model import protocol, server
from assay.components.deploy_model.parity import running_server
from assay.components.deploy_model.protocol import MAX_BODY_BYTES, ChatRequest, Refusal, parse

SECRET = "correct horse battery staple"
ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Take 2 tabs daily"}],
    "max_tokens": 8,
    "return_token_ids": True,
}


@pytest.fixture(scope="module")
def client(tiny_model: Path) -> Iterator[httpx.Client]:
    with running_server(tiny_model) as url, httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def test_health_and_models(client: httpx.Client, tiny_model: Path) -> None:
    from assay.components.contracts.artifacts import read_manifest

    assert client.get("/ping").status_code == 200
    [model] = client.get("/v1/models").json()["data"]
    assert model["id"] == tiny_model.name
    assert model["content_digest"] == read_manifest(tiny_model).content


def test_a_greedy_answer_is_the_generators(client: httpx.Client, tiny_model: Path) -> None:
    from assay.components.shared.chat import prompt_ids
    from assay.components.shared.generate import Generator
    from assay.components.shared.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    prompt = prompt_ids(tokenizer, [Message(role="user", content="Take 2 tabs daily")])
    wanted = Generator(load_model(tiny_model), tokenizer).generate([prompt], max_new_tokens=8, batch_size=1)[0][0]
    answer = client.post("/v1/chat/completions", json=ASK).json()
    choice = answer["choices"][0]
    assert answer["prompt_token_ids"] == prompt
    assert choice["token_ids"] == list(wanted.ids)
    assert choice["message"] == {"role": "assistant", "content": wanted.text}
    assert choice["finish_reason"] == ("stop" if wanted.finished else "length")
    used = answer["usage"]
    assert (used["prompt_tokens"], used["completion_tokens"]) == (len(prompt), len(wanted.ids))
    assert used["total_tokens"] == len(prompt) + len(wanted.ids)
    assert client.post("/invocations", json=ASK).json()["choices"] == answer["choices"]


def test_a_seed_repeats_a_sampled_answer(client: httpx.Client) -> None:
    asked = {**ASK, "temperature": 1.5, "seed": 7}
    one, two = (client.post("/v1/chat/completions", json=asked).json()["choices"][0]["token_ids"] for _ in "12")
    other = client.post("/v1/chat/completions", json={**asked, "seed": 8}).json()["choices"][0]["token_ids"]
    assert one == two != other


def test_a_streamed_answer_is_the_same_answer(client: httpx.Client) -> None:
    whole = client.post("/v1/chat/completions", json=ASK).json()
    asked = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert events[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert events[-1]["usage"] == whole["usage"]


def test_requests_at_once_do_not_mix(client: httpx.Client) -> None:
    async def ask_all() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=120, trust_env=False) as many:
            bodies = [{**ASK, "messages": [{"role": "user", "content": text}]} for text in "abcabc"]
            answers = await asyncio.gather(*(many.post("/v1/chat/completions", json=body) for body in bodies))
        return [answer.json()["choices"][0] for answer in answers]

    answers = asyncio.run(ask_all())
    assert answers[:3] == answers[3:]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": None}, 400, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
        ({"messages": "x"}, 400, "messages"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10**9}, 400, "messages"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": float("1e400")}, 400, "temperature"),
        ({"n": 2}, 400, "n"),
        ({"tools": []}, 400, "tools"),
        ({"stop": ["x"]}, 400, "stop"),
        ({"model": "gpt-4"}, 404, None),
    ],
)
def test_what_it_cannot_do_it_refuses_in_openais_shape(client, change, status, param) -> None:
    body = json.dumps({**ASK, **change})
    response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert error_of(response)["param"] == param


def test_bodies_that_are_not_requests(client: httpx.Client) -> None:
    as_json = {"content-type": "application/json"}
    for body in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'"x"'):
        assert client.post("/v1/chat/completions", content=body, headers=as_json).status_code == 400
    form = client.post("/v1/chat/completions", content=json.dumps(ASK), headers={"content-type": "text/plain"})
    assert form.status_code == 415
    large = client.post("/v1/chat/completions", content=b" " * (MAX_BODY_BYTES + 1), headers=as_json)
    assert large.status_code == 413
    assert error_of(large)["code"] == "body_too_large"
    assert client.get("/v1/chat/completions").status_code == 405
    assert error_of(client.get("/nowhere"))["type"] == "invalid_request_error"


def test_a_prompt_longer_than_the_context_is_refused(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "dose " * 3000}]})
    assert response.status_code == 400
    assert error_of(response)["code"] == "context_length_exceeded"


def test_a_web_page_cannot_reach_a_loopback_server_by_another_host_name(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json=ASK, headers={"host": "evil.example"})
    assert response.status_code == 403


def test_text_parts_and_nulls_are_understood() -> None:
    parts = [{"type": "text", "text": "Take "}, {"type": "text", "text": "2"}]
    asked = parse(json.dumps({"messages": [{"role": "user", "content": parts}], "stop": None}).encode())
    assert asked.messages == [Message(role="user", content="Take 2")]
    with pytest.raises(Refusal, match="must be text"):
        parse(b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}')


def test_the_limit_is_what_was_asked_or_the_default_within_the_context() -> None:
    asked = ChatRequest(messages=[Message(role="user", content="x")])
    assert asked.limit(4000) == protocol.DEFAULT_MAX_TOKENS
    assert asked.limit(10) == 10
    assert asked.model_copy(update={"max_completion_tokens": 5, "max_tokens": 9}).limit(10) == 5
    for room, tokens in ((0, 0), (-5, 0), (3, 4)):
        with pytest.raises(Refusal):
            asked.model_copy(update={"max_tokens": tokens}).limit(room)


# --- addresses and tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_no_network_without_a_token(host: str) -> None:
    with pytest.raises(RunError, match="needs a bearer token"):
        server.check_address(host, None)
    server.check_address(host, SECRET)


def test_behind_something_that_checks_callers_no_token_is_needed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(server.TOKEN_VARIABLE, raising=False)
    with pytest.raises(RunError, match="needs a bearer token"):
        server.serve(tmp_path, host="0.0.0.0", port=0)
    with pytest.raises(DataError, match=r"no manifest\.json"):  # it went on to read the model
        server.serve(tmp_path, host="0.0.0.0", port=0, is_open=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    server.check_address(host, None)


def test_the_command_refuses_before_it_loads(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "assay.components.deploy_model.server", "--model", str(tiny_model)]
    environment = {name: value for name, value in os.environ.items() if name != server.TOKEN_VARIABLE}
    result = subprocess.run([*command, "--host", "0.0.0.0"], capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert "needs a bearer token" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_a_clear_error() -> None:
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"port {port}: Address already in use"):
            server.listen("127.0.0.1", port)
    with pytest.raises(RunError, match="cannot listen"):
        server.listen("203.0.113.1", 0)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(server.TOKEN_VARIABLE, raising=False)
    assert server.read_token(None) is None
    monkeypatch.setenv(server.TOKEN_VARIABLE, " from-environment ")
    assert server.read_token(None) == "from-environment"
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert server.read_token(file) == "from-file"
    file.write_text("\n")
    with pytest.raises(RunError, match="empty"):
        server.read_token(file)
    with pytest.raises(RunError, match="cannot be read"):
        server.read_token(tmp_path / "none")


def test_every_route_but_ping_wants_the_token(tiny_model: Path) -> None:
    from starlette.testclient import TestClient

    service = server.load(tiny_model, name="expert", token=SECRET)
    web = TestClient(service.application())
    assert web.get("/ping").status_code == 200
    for headers in ({}, {"authorization": SECRET}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer "}):
        response = web.post("/v1/chat/completions", json=ASK, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert web.get("/v1/models", headers=headers).status_code == 401
    allowed = {"authorization": f"Bearer {SECRET}"}
    assert web.post("/invocations", json=ASK, headers=allowed).json()["model"] == "expert"


def test_a_bug_answers_500_and_logs_no_prompt(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    from starlette.testclient import TestClient

    service = server.load(tiny_model)

    def broken(prompts: list[list[int]], **settings: object) -> None:
        raise ValueError(ASK["messages"][0]["content"])

    service.generator.generate = broken
    response = TestClient(service.application()).post("/v1/chat/completions", json=ASK)
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "ValueError" in caplog.text
    assert "Take 2" not in caplog.text + response.text


# --- what it serves ---------------------------------------------------------------------------------------------------


def test_altered_files_are_not_served(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match="sha256"):
        server.load(folder)


def test_a_name_without_champion_is_not_served(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ASSAY_REGISTRY", str(tmp_path))
    for name in ("nobody", "../up"):
        with pytest.raises(RegistryError, match="no champion to serve"):
            server.load(name)


def test_it_ends_with_its_parent(tiny_model: Path) -> None:
    """A parent that is killed closes the pipe; nothing is left listening."""
    command = [sys.executable, "-m", "assay.components.deploy_model.server", "--model", str(tiny_model)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child = subprocess.Popen([*command, "--port", "0", "--stop-on-eof"], **pipes)
    assert child.stdin is not None
    assert child.stdout is not None
    ready = json.loads(child.stdout.readline())
    assert set(ready) == {"host", "port", "model", "content"}
    child.stdin.close()
    assert child.wait(timeout=60) == 0
    child.stdout.close()


def test_sigterm_ends_it(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "assay.components.deploy_model.server", "--model", str(tiny_model), "--port", "0"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) in (0, -signal.SIGTERM)
    child.stdout.close()


# --- an encoder -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from assay.components.contracts.artifacts import link_tree, seal
    from assay.components.shared.embed import Encoding, write_encoding

    folder = tmp_path_factory.mktemp("encoder") / "model"
    link_tree(tiny_model, folder)
    write_encoding(folder, Encoding(pooling="mean", query_prefix="Q: ", lowercase=True, layers=1, dimensions=64))
    seal(folder, "model")
    return folder


@pytest.fixture(scope="module")
def encoder(encoder_model: Path) -> Iterator[httpx.Client]:
    with running_server(encoder_model) as url, httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        yield client


def test_served_vectors_are_the_encoders(encoder: httpx.Client, encoder_model: Path, monkeypatch, tmp_path) -> None:
    import numpy as np

    from assay.components.shared.embed import embed

    monkeypatch.setenv("ASSAY_HOME", str(tmp_path))
    texts = ["How warm may it get?", "Store it below 25 °C, and dry."]
    answer = encoder.post("/v1/embeddings", json={"input": texts, "encoding_format": "float"}).json()
    assert answer["object"] == "list"
    assert [(one["object"], one["index"]) for one in answer["data"]] == [("embedding", 0), ("embedding", 1)]
    served = np.array([one["embedding"] for one in answer["data"]])
    np.testing.assert_allclose(served, embed(encoder_model, texts), atol=2e-6)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > len(texts)
    one = encoder.post("/invocations", json={"input": texts[0]}).json()["data"]
    np.testing.assert_allclose(one[0]["embedding"], served[0], atol=2e-6)
    query = encoder.post("/v1/embeddings", json={"input": texts[0], "input_type": "query"}).json()["data"]
    np.testing.assert_allclose(query[0]["embedding"], embed(encoder_model, ["Q: " + texts[0]])[0], atol=2e-6)
    assert not np.allclose(query[0]["embedding"], served[0], atol=1e-3)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({"input": ["fine", ""]}, 400, "input.1"),
        ({"input": "x", "encoding_format": "base64"}, 400, "encoding_format"),
        ({"input": "x", "dimensions": 8}, 400, "dimensions"),
        ({"input": "x " * 5000}, 400, "input"),
        ({"input": "x", "model": "other"}, 404, None),
    ],
)
def test_an_encoder_refuses_what_it_cannot_do(encoder: httpx.Client, body, status, param) -> None:
    response = encoder.post("/v1/embeddings", json=body)
    assert response.status_code == status
    assert error_of(response)["param"] == param


def test_an_encoder_does_not_chat_and_a_chat_model_does_not_embed(encoder: httpx.Client, client: httpx.Client) -> None:
    assert encoder.post("/v1/chat/completions", json=ASK).status_code == 404
    assert client.post("/v1/embeddings", json={"input": "x"}).status_code == 404


def test_the_parity_check_of_an_encoder_compares_its_vectors(encoder_model: Path, tmp_path: Path) -> None:
    from assay.components.contracts.artifacts import link_tree, seal
    from assay.components.contracts.rows import Example
    from assay.components.deploy_model.parity import compare_vectors
    from assay.components.shared.embed import read_encoding, write_encoding

    prompt = [Message(role="system", content="Keep it cold."), Message(role="user", content="how cold?")]
    examples = [Example(id="a", group="g", prompt=prompt, reference="cold")]
    assert compare_vectors(encoder_model, encoder_model, examples) > 4
    link_tree(encoder_model, tmp_path / "other")
    (tmp_path / "other" / "embedding.json").unlink()
    write_encoding(tmp_path / "other", read_encoding(encoder_model).model_copy(update={"pooling": "last"}))
    seal(tmp_path / "other", "model")
    with pytest.raises(RegistryError, match="another vector for the query than the trained one"):
        compare_vectors(encoder_model, tmp_path / "other", examples)
