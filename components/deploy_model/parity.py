"""Does the served model answer as the trained one did? Through the server that users get.

A language model's answers are compared token by token, an encoder's vectors number by number.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

import httpx

from assay.components.contracts.errors import RegistryError
from assay.components.contracts.rows import Example, Message, read_rows
from assay.components.runtime.context import progress

START_SECONDS = 600.0
"""A loaded machine takes minutes to import torch; a server that takes longer than this has failed."""
ANSWER_SECONDS = 600.0
VECTOR_ROUNDING = 1e-6
"""Largest difference of two numbers of a vector of length 1; fp32 rounds at 1e-7."""


class Answer(NamedTuple):
    """One greedy answer."""

    prompt: list[int]
    """Tokens of the prompt, as the answering side wrote it."""
    tokens: list[int]
    text: str


def golden_prompts(data: str | Path, number: int) -> list[Example]:
    """Return held-out examples, the same for equal data: the first ones by id."""
    rows = read_rows(Path(data) / "test.parquet", Example)
    return sorted(rows, key=lambda row: row.id)[:number]


def trained_answers(folder: str | Path, prompts: Sequence[list[Message]], max_new_tokens: int) -> list[Answer]:
    """Return what the model of a folder answers in this process, one prompt at a time."""
    from assay.components.shared.chat import prompt_ids
    from assay.components.shared.generate import open_generator
    from assay.components.shared.models import load_model, load_tokenizer

    from .server import set_threads

    set_threads()  # as many as the server has: sums are rounded in the same order
    tokenizer = load_tokenizer(folder)
    generator = open_generator(folder, load_model(folder), tokenizer)
    answers = []
    for number, messages in enumerate(prompts, start=1):
        prompt = prompt_ids(tokenizer, messages)
        answer = generator.generate([prompt], max_new_tokens=max_new_tokens, batch_size=1)[0][0]
        answers.append(Answer(prompt, list(answer.ids), answer.text))
        progress(number, len(prompts), "answers")
    return answers


def served_answers(folder: str | Path, prompts: Sequence[list[Message]], max_new_tokens: int) -> list[Answer]:
    """Return what the same prompts get from the server that users get, started on a folder's files.

    Raises:
        RegistryError: The server does not start, or refuses a prompt.
    """
    with running_server(folder) as url, _client(url) as client:
        return [_ask(client, messages, max_new_tokens) for messages in prompts]


def compare(examples: Sequence[Example], trained: Sequence[Answer], served: Sequence[Answer]) -> int:
    """Return the number of generated tokens, all of which agree.

    Raises:
        RegistryError: An answer differs; names the example and the token.
    """
    for example, one, other in zip(examples, trained, served, strict=True):
        if one.prompt != other.prompt:
            raise _differs(example, "the prompt is written with other tokens", one.prompt, other.prompt)
        if one.tokens != other.tokens:
            raise _differs(example, "the answer has other tokens", one.tokens, other.tokens)
        if one.text != other.text:
            raise RegistryError(
                "the served model's answer has the same tokens and another text", where=f"example {example.id}"
            )
    return sum(len(answer.tokens) for answer in trained)


def compare_vectors(registered: Path, candidate: str | Path, examples: Sequence[Example]) -> int:
    """Return the tokens of the questions and passages whose vectors, served and computed here, are the same.

    Raises:
        RegistryError: The server does not start, or a vector differs by more than rounding.
    """
    import numpy as np

    from assay.components.shared.embed import load_encoder
    from assay.components.shared.retrieval import passage, question

    from .server import set_threads

    set_threads()  # as many as the server has: sums are rounded in the same order
    encoder, tokens = load_encoder(candidate), 0
    with (
        running_server(registered) as url,
        httpx.Client(base_url=url, timeout=ANSWER_SECONDS, trust_env=False) as client,
    ):
        for number, example in enumerate(examples, start=1):
            for kind, text in (("query", question(example)), ("passage", passage(example))):
                ids = encoder.tokens((encoder.encoding.query_prefix if kind == "query" else "") + text)
                served = _post(client, "/v1/embeddings", {"input": text, "input_type": kind})["data"][0]["embedding"]
                if not np.allclose(served, encoder.encode([ids])[0], rtol=0, atol=VECTOR_ROUNDING):
                    raise RegistryError(
                        f"the served encoder has another vector for the {kind} than the trained one",
                        where=f"example {example.id}",
                        fix="the champion stays; serve with the library versions that evaluation ran with",
                    )
                tokens += len(ids)
            progress(number, len(examples), "vectors")
    return tokens


@contextmanager
def running_server(folder: str | Path) -> Iterator[str]:
    """Run the server on a free loopback port as a process of its own, and give its address.

    It ends with this block, and with this process: it watches its standard input, which the kernel closes.

    Raises:
        RegistryError: It does not start.
    """
    command = [sys.executable, "-m", "assay.components.deploy_model.server"]
    command += ["--model", str(folder), "--port", "0", "--stop-on-eof"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    timer = Timer(START_SECONDS, process.kill)
    timer.start()
    try:
        line = process.stdout.readline() if process.stdout else ""
        timer.cancel()
        if not line:
            raise RegistryError(
                f"the server did not start on the registered model (exit code {process.wait()})",
                where=str(folder),
                fix=f"see its message above, or try: {' '.join(command[:-1])}",
            )
        yield f"http://127.0.0.1:{json.loads(line)['port']}"
    finally:
        timer.cancel()
        process.terminate()
        process.communicate()


def _client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=ANSWER_SECONDS, trust_env=False)


def _ask(client: httpx.Client, messages: list[Message], max_new_tokens: int) -> Answer:
    body = {
        "messages": [message.model_dump() for message in messages],
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "return_token_ids": True,
    }
    answer = _post(client, "/v1/chat/completions", body)
    choice = answer["choices"][0]
    return Answer(answer["prompt_token_ids"], choice["token_ids"], choice["message"]["content"])


def _post(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    try:
        response = client.post(path, json=body)
    except httpx.HTTPError as error:
        raise RegistryError(f"the served model does not answer: {error}", where=str(client.base_url)) from error
    answer: dict[str, Any] = response.json()
    if response.status_code != httpx.codes.OK:
        raise RegistryError(f"the served model refuses a held-out prompt: {answer['error']['message']}")
    return answer


def _differs(example: Example, what: str, trained: list[int], served: list[int]) -> RegistryError:
    pairs = zip(trained, served, strict=False)
    place = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(trained), len(served)))
    return RegistryError(
        f"the served model does not repeat the trained one: {what}, from token {place + 1} on",
        where=f"example {example.id}",
        fix="the champion stays; serve with the library versions that evaluation ran with",
    )
