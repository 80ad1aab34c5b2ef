"""Models behind a server as arms: against a real server on this machine."""

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from assay.components.contracts.errors import ModelError
from assay.components.contracts.recipe import EndpointSettings, EvaluateSettings, Recipe
from assay.components.contracts.rows import Message
from assay.components.shared import endpoint as work
from assay.components.shared.endpoint import Endpoint, seconds_to_wait
from fixtures.chat_server import ChatServer, completion, echo, serving

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setattr(work, "BACKOFF", 0.01)
    return tmp_path / "home"


def settings(server: ChatServer, **changes: Any) -> EndpointSettings:
    given = {"name": "large", "url": server.url, "model": "m", "key_variable": "TEST_KEY"}
    return EndpointSettings.model_validate(given | changes)


def questions(count: int) -> list[list[Message]]:
    return [[Message(role="system", content="shout"), Message(role="user", content=f"word {n}")] for n in range(count)]


def ask(server: ChatServer, count: int, **changes: Any) -> list[str]:
    return [reply.text for reply in Endpoint(settings(server, **changes), 32).ask(questions(count))]


def test_answers_come_in_the_order_of_the_questions_and_only_once() -> None:
    with serving(latency=0.01) as server:
        first = ask(server, 40)
        again = ask(server, 40)
        twice = Endpoint(settings(server), 32).ask([*questions(2), *questions(2)])
    assert first == again == [f"WORD {n}" for n in range(40)]
    assert [reply.text for reply in twice] == ["WORD 0", "WORD 1"] * 2
    assert twice[0].tokens == 10
    assert len(server.bodies) == 40
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert server.bodies[0] | {"messages": []} == {
        "model": "m",
        "max_completion_tokens": 32,
        "temperature": 0,
        "messages": [],
    }


def test_other_settings_of_a_request_are_other_questions() -> None:
    with serving() as server:
        ask(server, 2)
        ask(server, 2, body={"temperature": 1, "max_tokens": 5})
        ask(server, 2, concurrency=3)
    assert len(server.bodies) == 4
    assert server.bodies[3]["temperature"] == 1


def test_so_many_are_asked_at_a_time_and_no_more() -> None:
    with serving(latency=0.05) as server:
        ask(server, 60, concurrency=12)
    assert server.most == 12


def test_a_server_that_is_busy_is_asked_again_by_all_after_it_said() -> None:
    def busy_first(body: dict[str, Any]) -> Any:
        return (429, {"Retry-After": "1"}, {}) if len(server.bodies) <= 4 else echo(body)

    with serving(busy_first) as server:
        assert ask(server, 8, concurrency=4) == [f"WORD {n}" for n in range(8)]
    assert len(server.bodies) == 12
    assert server.at[4] - server.at[3] >= 0.95


def test_a_server_that_fails_is_asked_as_often_as_is_said() -> None:
    with serving(lambda body: (500, {}, {})) as server, pytest.raises(ModelError, match="3 attempts; .* HTTP 500"):
        ask(server, 1, attempts=3)
    assert len(server.bodies) == 3


def test_a_server_that_is_not_there_is_named() -> None:
    with serving() as server:
        gone = settings(server, attempts=2)
    with pytest.raises(ModelError, match="large .*2 attempts; the last ended with ConnectError"):
        Endpoint(gone, 8).ask(questions(1))


@pytest.mark.parametrize("status", [401, 404, 400])
def test_a_refusal_is_not_tried_again_and_tells_no_secret(status: int) -> None:
    with serving(lambda body: (status, {}, {"error": KEY})) as server, pytest.raises(ModelError) as caught:
        ask(server, 50, concurrency=2)
    assert len(server.bodies) <= 2
    assert f"HTTP {status}" in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_reply_that_is_none_is_refused() -> None:
    with serving(lambda body: (200, {}, {"choices": []})) as server, pytest.raises(ModelError, match="no OpenAI chat"):
        ask(server, 1)


def test_requests_keep_the_pace() -> None:
    with serving() as server:
        ask(server, 6, requests_per_minute=1200)
    assert server.at[-1] - server.at[0] > 0.2  # five times 0.05 s, less what the first connection took


@pytest.mark.parametrize(("limit", "most"), [({"max_requests": 10}, 10), ({"max_tokens": 100}, 13)])
def test_a_budget_stops_the_step_and_what_was_answered_is_kept(limit: dict[str, int], most: int) -> None:
    with serving(latency=0.01) as server:
        with pytest.raises(ModelError, match=r"the budget of \d+ \w+ is spent: 1[0-3] of 30 answered") as caught:
            ask(server, 30, concurrency=4, **limit)
        asked = len(server.bodies)
        assert 10 <= asked <= most  # tokens are known only afterwards: what was on its way comes on top
        with pytest.raises(ModelError, match="is spent"):
            ask(server, 30, concurrency=4, **limit)
        assert len(server.bodies) == asked  # the budget is the evaluation's, not the attempt's
        assert len(ask(server, 30, concurrency=4)) == 30
    assert len(server.bodies) == 30
    assert f"evaluate.endpoints.large.{next(iter(limit))}" in caught.value.fix


def test_failed_attempts_are_requests_too() -> None:
    with serving(lambda body: (500, {}, {})) as server, pytest.raises(ModelError, match="2 requests is spent: 0 of 10"):
        ask(server, 10, concurrency=1, attempts=3, max_requests=2)
    assert len(server.bodies) == 2


CHILD = """
import sys
from assay.components.contracts.recipe import EndpointSettings
from assay.components.contracts.rows import Message
from assay.components.shared.endpoint import Endpoint
given = EndpointSettings(name="large", url=sys.argv[1], model="m", concurrency=4)
print(len(Endpoint(given, 32).ask([[Message(role="user", content=f"word {n}")] for n in range(300)])))
"""


def test_after_a_kill_only_what_was_on_its_way_is_asked_again() -> None:
    with serving(latency=0.04) as server:
        command = [sys.executable, "-c", CHILD, server.url]
        child = subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(server.bodies) < 200 and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        asked = len(server.bodies)
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "300", done.stderr
        total = len(server.bodies)
    assert 200 <= asked < 300
    # Lost: the answers of the last second (100 at 4 in 0.04 s) and what was on its way, with room for a slow machine.
    assert 300 <= total <= 300 + 150


def test_retry_after_is_a_number_or_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 28 < seconds_to_wait(later) <= 30
    assert [seconds_to_wait(value) for value in ("2", "0.5", "", "soon", "-1")] == [2, 0.5, 0, 0, 0]


def test_an_arm_has_a_name_of_its_own() -> None:
    one = {"name": "large", "url": "http://x/v1", "model": "m"}
    with pytest.raises(ValueError, match="'large' is there already"):
        EvaluateSettings.model_validate({"endpoints": [one, one]})
    with pytest.raises(ValueError, match="'sft' is there already"):
        EvaluateSettings.model_validate({"endpoints": [one | {"name": "sft"}]})
    with pytest.raises(ValueError, match="arms are searches"):
        Recipe.model_validate({"name": "x", "graph": "retrieval", "evaluate": {"endpoints": [one]}})


def test_a_completion_without_text_is_an_empty_answer() -> None:
    with serving(lambda body: completion(None, 0)) as server:  # type: ignore[arg-type]
        assert ask(server, 1) == [""]
