"""OpenAI's protocol for chat and embeddings, as far as one small model can honour it: requests, errors, events.

What a request asks for and this server cannot do is refused, not ignored.
"""

import json
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from assay.components.contracts.rows import Message

MAX_BODY_BYTES = 1 << 20
DEFAULT_MAX_TOKENS = 256
MAX_INPUTS = 2048
"""Texts of one embeddings request: OpenAI's limit."""


class Refusal(Exception):
    """A request that gets an error in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        self.status, self.message, self.code, self.param = status, message, code, param
        super().__init__(message)

    def response(self) -> Response:
        """Return the error as JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else None
        return JSONResponse({"error": error}, self.status, headers)


class StreamOptions(BaseModel):
    """`stream_options` of a request."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The part of OpenAI's request that this server can honour; any other key is an error."""

    model_config = ConfigDict(extra="forbid")

    messages: list[Message] = Field(min_length=1)
    model: str = ""
    max_tokens: int = Field(0, ge=1)
    """0 stands for the default."""
    max_completion_tokens: int = Field(0, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    """0 is greedy decoding, which is what the gate measured; so it is the default here."""
    seed: int = Field(default_factory=lambda: secrets.randbits(31), ge=0)
    n: Literal[1] = 1
    top_p: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False
    """As in vLLM: `prompt_token_ids` and `token_ids` come with the answer."""
    user: str = ""
    """Accepted and not used."""

    @field_validator("messages", mode="before")
    @classmethod
    def _join_text_parts(cls, turns: Any) -> Any:
        """Let a turn's content be a list of text parts, as OpenAI's clients may write it."""
        return [_plain(turn) for turn in turns] if isinstance(turns, list) else turns

    @field_validator("messages")
    @classmethod
    def _ends_with_user(cls, turns: list[Message]) -> list[Message]:
        if turns[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return turns

    def limit(self, room: int) -> int:
        """Return the most tokens to generate, given the room that the prompt leaves in the context."""
        asked = self.max_completion_tokens or self.max_tokens
        if room < max(asked, 1):
            raise Refusal(
                400,
                f"the prompt leaves room for {max(room, 0)} tokens" + (f", {asked} were asked for" if asked else ""),
                code="context_length_exceeded",
                param="messages",
            )
        return asked or min(room, DEFAULT_MAX_TOKENS)


class EmbeddingRequest(BaseModel):
    """The part of OpenAI's embeddings request that this server can honour; any other key is an error."""

    model_config = ConfigDict(extra="forbid")

    input: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS)]
    model: str = ""
    encoding_format: Literal["float"] = "float"
    input_type: Literal["query", "passage"] = "passage"
    """Beyond OpenAI's, as other servers of retrieval models have it: a query gets the encoder's prefix."""
    user: str = ""
    """Accepted and not used."""

    @field_validator("input", mode="before")
    @classmethod
    def _make_a_list(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given


R = TypeVar("R", bound=BaseModel)


def parse(body: bytes) -> ChatRequest:
    """Read a chat request's body; as `parse_as`."""
    return parse_as(ChatRequest, body)


def parse_as(form: type[R], body: bytes) -> R:
    """Read a request's body.

    Raises:
        Refusal: It is not JSON, or not a request that can be honoured; names the parameter.
    """
    try:
        raw = json.loads(body)
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise Refusal(400, "the body is not JSON") from None
    if not isinstance(raw, dict):
        raise Refusal(400, "the body must be a JSON object")
    try:
        return form.model_validate({key: value for key, value in raw.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False)[0]
        param = ".".join(map(str, first["loc"]))
        unknown = first["type"] == "extra_forbidden"
        message = f"{param!r} is not supported" if unknown else f"{param}: {first['msg']}"
        raise Refusal(400, message, param=param, code="unsupported_parameter" if unknown else "invalid_value") from None


async def read_body(request: Request) -> bytes:
    """Return a request's body.

    Raises:
        Refusal: It is not announced as JSON (415), or too large (413).
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the content type must be application/json")  # and a web page's plain form is not
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
    return bytes(body)


async def events(completion: dict[str, Any], include_usage: bool) -> AsyncIterator[str]:
    """Yield a finished completion as the server-sent events of a streamed one."""
    choice = completion["choices"][0]
    head = {key: completion[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    deltas = [({"role": "assistant", "content": ""}, None), ({"content": choice["message"]["content"]}, None)]
    for delta, reason in [*deltas, ({}, choice["finish_reason"])]:
        yield _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})
    if include_usage:
        yield _event({**head, "choices": [], "usage": completion["usage"]})
    yield "data: [DONE]\n\n"


def _plain(turn: Any) -> Any:
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(content, list):
        return turn
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise ValueError("content parts must be text")
    return {**turn, "content": "".join(part["text"] for part in content)}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
