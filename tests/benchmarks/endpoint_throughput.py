"""Answers per second from an endpoint: our client, which stores, budgets and retries, beside a bare asynchronous one.

    python tests/benchmarks/endpoint_throughput.py [questions] [concurrency] [seconds of latency]

A local server in a process of its own answers after the latency. Both clients are httpx's, with as many connections;
the bare one has a semaphore and keeps nothing. Best of three of each, in turn; the ceiling is concurrency / latency.
"""

import asyncio
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
from assay.components.contracts.recipe import EndpointSettings
from assay.components.contracts.rows import Message
from assay.components.shared.endpoint import Endpoint
from fixtures.chat_server import serve_forever


async def bare(url: str, questions: list[list[Message]], concurrency: int) -> list[str]:
    """Return the answers, by the shortest code that keeps so many requests on their way."""
    free = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)

    async def one(client: httpx.AsyncClient, turns: list[Message]) -> str:
        async with free:
            body = json.dumps({"model": "m", "messages": [turn.model_dump() for turn in turns]}).encode()
            response = await client.post(f"{url}/chat/completions", content=body)
            return str(response.json()["choices"][0]["message"]["content"])

    async with httpx.AsyncClient(limits=limits, timeout=60) as client:
        return list(await asyncio.gather(*(one(client, turns) for turns in questions)))


def ours(url: str, questions: list[list[Message]], concurrency: int) -> list[str]:
    """Return the answers of our client, from an empty store."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["ASSAY_HOME"] = home
        given = EndpointSettings(name="bench", url=url, model="m", concurrency=concurrency)
        return [reply.text for reply in Endpoint(given, 64).ask(questions)]


def main(count: int = 3000, concurrency: int = 64, latency: float = 0.2) -> None:
    """Print both throughputs and their ratio."""
    receive, announce = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=serve_forever, args=(latency, announce), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{receive.recv()}/v1"
    questions = [[Message(role="user", content=f"{'word ' * 100}{place}")] for place in range(count)]
    best = {"bare": 0.0, "ours": 0.0}
    for _ in range(3):
        for name in best:
            start = time.perf_counter()
            found = (
                asyncio.run(bare(url, questions, concurrency)) if name == "bare" else ours(url, questions, concurrency)
            )
            best[name] = max(best[name], count / (time.perf_counter() - start))
            assert len(found) == count
    server.kill()
    print(f"{count:,} questions, {concurrency} at a time, {latency:g} s each; ceiling {concurrency / latency:.0f}/s")
    for name, rate in best.items():
        print(f"{name:5} {rate:7.1f} answers a second")
    print(f"ratio {best['ours'] / best['bare']:.3f}")


if __name__ == "__main__":
    main(*(int(one) for one in sys.argv[1:3]), *(float(one) for one in sys.argv[3:]))
