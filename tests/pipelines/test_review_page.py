"""The review page over HTTP, from the real command in a process of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from assay.components.contracts.errors import RegistryError
from assay.components.shared import people, registry, review
from assay.pipelines.cli import app
from assay.pipelines.review import server
from fixtures.waiting import NAME, candidate

COMMAND = [sys.executable, "-m", "assay.pipelines.cli", "review", "--port", "0"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("ASSAY_REGISTRY", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", people.TOKEN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ASSAY_PERSON", "submitter")
    first = candidate(tmp_path / "home", 1, required=0)
    candidate(tmp_path / "home", 2, required=2, champion=first)
    return tmp_path / "home"


@pytest.fixture
def tokens(home: Path) -> dict[str, str]:
    return {name: people.add(name) for name in ("ann", "bob", "submitter")}


@pytest.fixture
def url(home: Path, tokens: dict[str, str]) -> Iterator[str]:
    child = subprocess.Popen([*COMMAND, "--home", str(home)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    yield json.loads(child.stdout.readline())["url"]
    child.terminate()
    child.communicate()


def client(url: str, token: str = "", **headers: str) -> httpx.Client:
    given = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=url, headers={**given, **headers}, trust_env=False, timeout=60)


def sign_in(url: str, token: str) -> httpx.Client:
    """Return a client with a session, as a browser has it."""
    browser = client(url)
    answer = browser.post("/login", data={"token": token}, headers={"Origin": url.rstrip("/")})
    assert answer.status_code == 303, answer.text
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    return browser


def form(page: str) -> dict[str, str]:
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page.partition("<main>")[2]))


def test_two_people_make_a_champion_in_the_browser(url: str, tokens: dict[str, str]) -> None:
    ann = sign_in(url, tokens["ann"])
    queue = ann.get("/").text
    assert "1 candidate awaits approval" in queue
    assert f'href="/{NAME}/2"' in queue
    page = ann.get(f"/{NAME}/2").text
    for words in ("The gate says promote", "0 of 2 approvals", "superiority to baseline", "312 tokens", "per_day"):
        assert words in page
    assert page.index("The candidate is worse: 1") < page.index("The candidate is better: 3")
    given = form(page)
    sent = {**given, "verdict": "approve", "reason": "I read the misses"}
    answer = ann.post(f"/{NAME}/2", data=sent, headers={"Origin": url.rstrip("/")})
    assert (answer.status_code, answer.headers["location"]) == (303, f"/{NAME}/2")
    assert "1 of 2 approvals" in ann.get(f"/{NAME}/2").text
    again = ann.post(f"/{NAME}/2", data=sent)
    assert again.status_code == 303
    champion = registry.champion(NAME)
    assert champion is not None
    assert champion.version == 1
    mine = client(url, tokens["submitter"]).post(f"/{NAME}/2", data={**sent, "evidence": given["evidence"]})
    assert mine.status_code == 409
    assert "needs two other people" in mine.text
    bob = sign_in(url, tokens["bob"])
    sent = {**form(bob.get(f"/{NAME}/2").text), "verdict": "approve", "reason": "so do I"}
    assert bob.post(f"/{NAME}/2", data=sent).headers["location"] == "/"
    champion = registry.champion(NAME)
    assert champion is not None
    assert (champion.version, champion.actor, champion.proof) == (2, "bob", "token")
    assert "No candidates await approval" in bob.get("/").text
    assert "so do I" in bob.get("/").text
    assert bob.get(f"/{NAME}/2").status_code == 404


def test_a_rejection_needs_a_reason_and_says_it(url: str, tokens: dict[str, str]) -> None:
    bob = client(url, tokens["bob"])
    given = form(bob.get(f"/{NAME}/2").text)
    assert bob.post(f"/{NAME}/2", data={**given, "verdict": "reject", "reason": " "}).status_code == 409
    assert bob.post(f"/{NAME}/2", data={**given, "verdict": "maybe", "reason": "x"}).status_code == 400
    assert len(review.queue()) == 1
    assert bob.post(f"/{NAME}/2", data={**given, "verdict": "reject", "reason": "one dose"}).status_code == 303
    assert review.queue() == []
    assert registry.history(NAME)[-1].reason == "one dose"


@pytest.mark.parametrize("path", ["/", f"/{NAME}/2", f"/{NAME}/2/report"])
def test_without_a_token_there_is_nothing_to_see(url: str, tokens: dict[str, str], path: str) -> None:
    strangers = [
        client(url),
        client(url, "ann:wrong"),
        client(url, tokens["ann"] + "x"),
        client(url, Authorization="Basic YW5uOng="),
        client(url, Cookie=f"{server.COOKIE}=guess"),
    ]
    for stranger in strangers:
        answer = stranger.get(path)
        assert answer.status_code == 401
        assert NAME not in answer.text
    for stranger in strangers:
        assert stranger.post(f"/{NAME}/2", data={"verdict": "approve", "reason": "x"}).status_code == 401
    assert client(url).post("/login", data={"token": "ann:wrong"}).status_code == 401
    assert len(review.queue()) == 1


def test_another_site_cannot_decide_in_a_persons_name(url: str, tokens: dict[str, str]) -> None:
    ann = sign_in(url, tokens["ann"])
    good = {**form(ann.get(f"/{NAME}/2").text), "verdict": "approve", "reason": "x"}
    here = {"Origin": url.rstrip("/")}
    assert ann.post(f"/{NAME}/2", data={**good, "key": "guess"}, headers=here).status_code == 403
    assert ann.post(f"/{NAME}/2", data={k: v for k, v in good.items() if k != "key"}, headers=here).status_code == 403
    assert ann.post(f"/{NAME}/2", data=good, headers={"Origin": "https://evil.example"}).status_code == 403
    assert ann.post(f"/{NAME}/2", data=good, headers={"Origin": "null"}).status_code == 403
    assert ann.post(f"/{NAME}/2", data=good, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert ann.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert (
        client(url).post("/login", data={"token": tokens["ann"]}, headers={"Host": "evil.example"}).status_code == 403
    )
    assert ann.get(f"/{NAME}/2", params={"verdict": "approve", "reason": "x"}).status_code == 200
    assert review.waiting(NAME, 2).approved == []


def test_an_old_tab_decides_nothing(url: str, tokens: dict[str, str]) -> None:
    ann = sign_in(url, tokens["ann"])
    given = form(ann.get(f"/{NAME}/2").text)
    record = registry.deployment(NAME, 2)
    assert record is not None
    registry.record_deployment(record.model_copy(update={"tokens": 1}))
    answer = ann.post(f"/{NAME}/2", data={**given, "verdict": "approve", "reason": "kept <b>words</b>"})
    assert answer.status_code == 409
    assert "not what you saw" in answer.text.replace("&#39;", "'")
    assert "kept &lt;b&gt;words&lt;/b&gt;" in answer.text  # what was written is not lost
    assert ann.post(f"/{NAME}/2", data={"key": given["key"], "verdict": "approve", "reason": "x"}).status_code == 400


def test_text_of_rows_and_models_is_inert(url: str, tokens: dict[str, str]) -> None:
    ann = client(url, tokens["ann"])
    for path in ("/", f"/{NAME}/2"):
        answer = ann.get(path)
        assert "<script" not in answer.text
        assert "<img" not in answer.text
        assert "&lt;script&gt;" in answer.text
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src" not in policy
        assert "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-store"
    report = ann.get(f"/{NAME}/2/report")
    assert "The report of version 2" in report.text
    assert report.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", ann.get(f"/{NAME}/2").text)


def test_a_session_ends_with_the_persons_place_on_the_list(url: str, tokens: dict[str, str]) -> None:
    ann, bob = sign_in(url, tokens["ann"]), sign_in(url, tokens["bob"])
    people.remove("ann")
    assert ann.get("/").status_code == 401
    key = re.search(r'name="key" value="([^"]+)"', bob.get("/").text)
    assert key is not None
    assert bob.post("/logout", data={"key": "guess"}).status_code == 403
    assert bob.post("/logout", data={"key": key[1]}).status_code == 303
    assert bob.get("/").status_code == 401


def test_too_much_and_nonsense_are_refused(url: str, tokens: dict[str, str]) -> None:
    ann = client(url, tokens["ann"])
    assert ann.post(f"/{NAME}/2", content=b"reason=" + b"x" * 100_000).status_code == 413
    assert ann.post(f"/{NAME}/2", content=b"\xff\xfe").status_code == 400
    for path in (f"/{NAME}/3", "/other/1", "/..%2f/1", "/nothing"):
        assert ann.get(path).status_code == 404


def test_examples_that_are_not_those_of_the_decision_are_not_shown(
    url: str, home: Path, tokens: dict[str, str]
) -> None:
    shutil.rmtree(home / "runs" / "run-1")  # it has the same answers, so they would be taken from there
    results = home / "runs" / "run-2" / "tasks" / "all" / "outputs" / "results" / "results.parquet"
    results.write_bytes(results.read_bytes()[:-1] + b"!")
    page = client(url, tokens["ann"]).get(f"/{NAME}/2").text
    assert "The answers are not on this machine" in page
    assert "per_day" not in page
    shutil.rmtree(home / "runs")
    assert client(url, tokens["ann"]).get(f"/{NAME}/2/report").status_code == 404


def test_without_people_it_does_not_start(home: Path) -> None:
    with pytest.raises(RegistryError, match="nobody may review"):
        server.serve(0)


def test_the_command_makes_and_voids_tokens(home: Path) -> None:
    runner, there = CliRunner(), ["--home", str(home)]
    token = runner.invoke(app, ["review", "--add-person", "cid", *there]).output.strip()
    found = people.by_token(token)
    assert found is not None
    assert found.name == "cid"
    assert runner.invoke(app, ["review", "--remove-person", "cid", *there]).exit_code == 0
    assert people.by_token(token) is None


def chromium(url: str, folder: Path, *more: str) -> str:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium on this machine")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", *more, url]
    environment: dict[str, Any] = {**os.environ, "HOME": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True).stdout


def test_a_browser_runs_nothing_of_it(url: str, tokens: dict[str, str], tmp_path: Path) -> None:
    """The page as it was sent, opened in a browser: its title would change if anything in it ran."""
    text = client(url, tokens["ann"]).get(f"/{NAME}/2").text.replace('href="/style.css"', "")
    page = tmp_path / "page.html"
    page.write_text(text)
    seen = chromium(page.as_uri(), tmp_path / "profile", "--dump-dom")
    assert "<title>directions 2" in seen
    assert "owned</title>" not in seen


def test_a_browser_draws_the_queue_and_the_evidence(url: str, tokens: dict[str, str], tmp_path: Path) -> None:
    """`ASSAY_SCREENSHOTS=FOLDER` keeps the pictures: one of them is `pipelines/review/candidate.png`."""
    ann = client(url, tokens["ann"])
    style = f"<style>{ann.get('/style.css').text}</style></head>"
    folder = Path(os.environ.get("ASSAY_SCREENSHOTS", tmp_path))
    for name, path in (("queue", "/"), ("candidate", f"/{NAME}/2")):
        page, picture = tmp_path / f"{name}.html", folder / f"{name}.png"
        page.write_text(ann.get(path).text.replace("</head>", style))
        size = "--window-size=1000,1100" if name == "candidate" else "--window-size=1000,420"
        chromium(page.as_uri(), tmp_path / "profile", "--hide-scrollbars", size, f"--screenshot={picture}")
        assert picture.stat().st_size > 15_000, "an empty page takes less"
