"""Serve one model: OpenAI's routes and SageMaker's /ping and /invocations, from the registry's own files.

    POST /v1/chat/completions    also as server-sent events with "stream": true
    POST /v1/embeddings          in its place, where the folder is an encoder (`embedding.json`)
    POST /invocations            the same body and answer
    GET  /v1/models, GET /ping

Answers come from the code that evaluation uses, one at a time, greedy unless a temperature is asked for. A streamed
answer is sent when it is complete: the events are for clients that know no other form. Prompts and answers are never
logged.
"""

import argparse
import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from traceback import format_tb
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from assay.components.contracts.artifacts import is_encoder, read_manifest
from assay.components.contracts.errors import AssayError, ModelError, RegistryError, RunError
from assay.components.runtime.context import cpus
from assay.components.shared import registry
from assay.components.shared.ledger import NAME

from .protocol import ChatRequest, EmbeddingRequest, Refusal, events, parse, parse_as, read_body

TOKEN_VARIABLE = "ASSAY_SERVE_TOKEN"
MAX_CONNECTIONS = 128
"""Beyond these, uvicorn answers 503 at once."""

log = logging.getLogger(__name__)


@dataclass
class Service:
    """One loaded model behind the routes."""

    name: str
    content: str
    """Content digest of the files it was loaded from."""
    tokenizer: Any
    generator: Any
    context: int
    """Tokens of prompt and answer together."""
    encoder: Any = None
    """In place of the generator, where the model is an encoder."""
    token: str | None = None
    hosts: frozenset[str] | None = None
    """Host names a request may give; None means any. Keeps a web page from reaching a loopback server by DNS tricks."""
    started: int = field(default_factory=lambda: int(time.time()))
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def application(self) -> Starlette:
        """Return the routes."""
        answer = self._guarded(self.embeddings if self.encoder else self.chat)
        path = "/v1/embeddings" if self.encoder else "/v1/chat/completions"
        return Starlette(
            routes=[
                Route("/ping", self.ping, methods=["GET"]),
                Route("/v1/models", self._guarded(self.models), methods=["GET"]),
                Route(path, answer, methods=["POST"]),
                Route("/invocations", answer, methods=["POST"]),
            ],
            exception_handlers={Refusal: _refuse, HTTPException: _refuse_http},
        )

    async def ping(self, request: Request) -> Response:
        """Answer a health check; it needs no token and tells nothing."""
        return JSONResponse({"status": "healthy"})

    async def models(self, request: Request) -> Response:
        """List the one model."""
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "assay"}
        return JSONResponse({"object": "list", "data": [{**model, "content_digest": self.content}]})

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        asked = parse(await read_body(request))
        self._check_name(asked.model)
        prompt, answer = await self._answer(asked)
        completion = self._completion(asked, prompt, answer)
        if asked.stream:
            stream = events(completion, asked.stream_options.include_usage)
            return StreamingResponse(stream, media_type="text/event-stream")
        return JSONResponse(completion)

    async def embeddings(self, request: Request) -> Response:
        """Answer with the vectors of some texts."""
        asked = parse_as(EmbeddingRequest, await read_body(request))
        self._check_name(asked.model)
        prefix = self.encoder.encoding.query_prefix if asked.input_type == "query" else ""
        try:
            ids = [self.encoder.tokens(prefix + text) for text in asked.input]
        except ModelError as error:
            raise Refusal(400, error.what, code="context_length_exceeded", param="input") from None
        async with self.lock:
            vectors = await run_in_threadpool(self.encoder.encode, ids)
        used = sum(map(len, ids))
        return JSONResponse(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": vector.tolist()}
                    for index, vector in enumerate(vectors)
                ],
                "model": self.name,
                "usage": {"prompt_tokens": used, "total_tokens": used},
            }
        )

    def _check_name(self, model: str) -> None:
        if model not in ("", self.name):
            raise Refusal(404, f"there is no model {model!r}; this is {self.name!r}", code="model_not_found")

    async def _answer(self, asked: ChatRequest) -> tuple[list[int], Any]:
        from assay.components.shared.chat import prompt_ids

        prompt = prompt_ids(self.tokenizer, asked.messages)
        limit = asked.limit(self.context - len(prompt))
        async with self.lock:
            answers = await run_in_threadpool(
                self.generator.generate,
                [prompt],
                max_new_tokens=limit,
                temperature=asked.temperature,
                seed=asked.seed,
                batch_size=1,
            )
        return prompt, answers[0][0]

    def _completion(self, asked: ChatRequest, prompt: list[int], answer: Any) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": "stop" if answer.finished else "length",
        }
        ids = {"token_ids": list(answer.ids)} if asked.return_token_ids else {}
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": [{**choice, **ids}],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(answer.ids),
                "total_tokens": len(prompt) + len(answer.ids),
            },
            **({"prompt_token_ids": prompt} if asked.return_token_ids else {}),
        }

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            if self.hosts is not None and (request.url.hostname or "") not in self.hosts:
                raise Refusal(403, "this server answers to loopback names only", code="forbidden_host")
            if self.token is not None and not _same(_bearer(request), self.token):
                raise Refusal(401, "wrong or missing bearer token", code="invalid_api_key")
            try:
                return await handler(request)
            except (Refusal, ClientDisconnect):
                raise
            except Exception as error:  # ours; its message could quote the prompt, so only the frames are logged
                log.error("%s: %s\n%s", request.url.path, type(error).__name__, "".join(format_tb(error.__traceback__)))
                raise Refusal(500, "the server failed to answer") from None

        return guarded


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    token_file: Path | None = None,
    name: str = "",
    stop_on_eof: bool = False,
    is_open: bool = False,
) -> None:
    """Serve a champion, or a sealed model folder, until the process is told to stop.

    Prints one JSON line when requests are answered: host, port, model and content digest.

    Args:
        model: A registered model's name, or a folder.
        host: Address to listen on; other than loopback needs a token, or `is_open`.
        port: 0 takes a free one.
        token_file: Holds the bearer token; the variable ASSAY_SERVE_TOKEN does when left out.
        name: What the model is called in answers; the registered name or the folder's when left out.
        stop_on_eof: Stop when standard input ends, as it does when the parent process dies.
        is_open: Something in front checks who asks, as SageMaker does for its containers.

    Raises:
        RunError: The address may not or cannot be used.
        RegistryError: There is no such champion, or its files were altered.
    """
    token = read_token(token_file)
    if not is_open:
        check_address(host, token)
    with listen(host, port) as listener:
        service = load(model, name=name, token=token)
        if _is_loopback(host) and token is None:
            service.hosts = frozenset({"127.0.0.1", "localhost", "::1", host})
        config = uvicorn.Config(
            service.application(),
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
        )
        server = uvicorn.Server(config)
        if stop_on_eof:
            threading.Thread(target=_stop_on_eof, args=(server,), daemon=True).start()
        ready = {"host": host, "port": listener.getsockname()[1], "model": service.name, "content": service.content}
        sys.stdout.write(json.dumps(ready) + "\n")
        sys.stdout.flush()
        server.run(sockets=[listener])


def load(model: str | Path, *, name: str = "", token: str | None = None) -> Service:
    """Return the service of a champion or of a sealed folder, every file hashed before it is read.

    Raises:
        RegistryError: There is no such champion, or its files were altered.
        DataError: The folder is not a sealed model, or was altered.
    """
    folder, called, content = _find(model)

    from assay.components.shared.embed import load_encoder
    from assay.components.shared.generate import open_generator
    from assay.components.shared.models import load_model, load_tokenizer

    set_threads()
    if is_encoder(folder):
        encoder = load_encoder(folder)
        return Service(
            name=name or called,
            content=content,
            tokenizer=encoder.tokenizer,
            generator=None,
            context=0,
            encoder=encoder,
            token=token,
        )
    loaded, tokenizer = load_model(folder), load_tokenizer(folder)
    context = int(getattr(loaded.config, "max_position_embeddings", 0) or 2048)
    return Service(
        name=name or called,
        content=content,
        tokenizer=tokenizer,
        generator=open_generator(folder, loaded, tokenizer),
        context=context,
        token=token,
    )


def set_threads() -> None:
    """Give torch all cores but one.

    One answer at a time is many small steps; on a machine that also does other work, threads that wait for each other
    after every step made an answer up to ten times slower (measured on two cores).
    """
    import torch

    torch.set_num_threads(max(1, cpus() - 1))


def read_token(token_file: Path | None) -> str | None:
    """Return the bearer token of a file or of the environment; None when there is none.

    Raises:
        RunError: The file cannot be read, or is empty.
    """
    if token_file is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip() or None
    try:
        token = token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"the token file cannot be read: {error}", where=str(token_file)) from error
    if not token:
        raise RunError("the token file is empty", where=str(token_file), fix="write a long random token into it")
    return token


def check_address(host: str, token: str | None) -> None:
    """Refuse to answer the network without a token.

    Raises:
        RunError: The address is not loopback and there is no token.
    """
    if token is None and not _is_loopback(host):
        raise RunError(
            f"serving on {host} lets the whole network ask; that needs a bearer token",
            fix=f"set {TOKEN_VARIABLE} or --token-file, or listen on 127.0.0.1",
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        RunError: The port is in use, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise RunError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            fix="choose another port with --port; 0 takes a free one",
        ) from error
    return listener


def _find(model: str | Path) -> tuple[Path, str, str]:
    """Return folder, name and content digest of a folder or of a registered model's champion."""
    champion = registry.champion(str(model)) if NAME.fullmatch(str(model)) else None
    if champion is not None:
        registry.read_model(champion.content)
        return registry.model_folder(champion.content), champion.name, champion.content
    if Path(model).is_dir():
        folder = Path(model).absolute()
        return folder, folder.name, read_manifest(folder, "model").content
    raise RegistryError(f"{str(model)!r} has no champion to serve", fix="run its recipe until the gate promotes one")


def _bearer(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _same(one: str, other: str) -> bool:
    """Compare in constant time; the digests make the length no clue either."""
    return hmac.compare_digest(hashlib.sha256(one.encode()).digest(), hashlib.sha256(other.encode()).digest())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()


def _stop_on_eof(server: uvicorn.Server) -> None:
    while sys.stdin.buffer.read(1024):
        pass
    server.should_exit = True


def main(argv: list[str] | None = None) -> int:
    """Serve from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m assay.components.deploy_model.server", description=__doc__)
    parser.add_argument("--model", required=True, help="a registered model's name, or the folder of a sealed model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    parser.add_argument("--token-file", type=Path, help=f"holds the bearer token (or set {TOKEN_VARIABLE})")
    parser.add_argument("--name", default="", help="what the model is called in answers")
    parser.add_argument("--open", action="store_true", help="something in front checks who asks: no token is needed")
    parser.add_argument("--stop-on-eof", action="store_true", help="stop when standard input ends")
    given = parser.parse_args(argv)
    try:
        serve(
            given.model,
            host=given.host,
            port=given.port,
            token_file=given.token_file,
            name=given.name,
            stop_on_eof=given.stop_on_eof,
            is_open=given.open,
        )
    except AssayError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
