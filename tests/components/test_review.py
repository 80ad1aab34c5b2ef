"""Approval: a candidate waits for people, who see exactly this evidence; on a folder and on S3."""

import json
import multiprocessing
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from assay.components.contracts.errors import RegistryError
from assay.components.contracts.recipe import ApprovalSettings
from assay.components.register_model.register import Evidence
from assay.components.shared import people, registry, review, verification
from assay.components.shared.people import Person
from assay.components.shared.registry import Deployment
from assay.pipelines.cli import app
from fixtures.attempts import RECIPE, Attempt
from fixtures.shelf import Shelf

NAME = "directions"
ANN, BOB, CID = Person("ann"), Person("bob"), Person("cid")
pytestmark = pytest.mark.usefixtures("shelf", "_no_mlflow")


@pytest.fixture
def _no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alias is the last step; test_deploy_model.py has it with the real one."""
    monkeypatch.setattr(registry, "sync_alias", lambda name: {})
    monkeypatch.setenv("ASSAY_PERSON", "submitter")
    monkeypatch.delenv(people.TOKEN, raising=False)


def wait(folder: Path, version: int, required: int, champion: str | None = None) -> str:
    """Bring a candidate as far as a run does: registered, checked, in the queue. Return its content."""
    attempt = Attempt(folder / str(version), f"weights of {version}", champion=champion)
    recipe = RECIPE.model_copy(update={"approval": ApprovalSettings(required=required)})
    inputs = [attempt.folder / name for name in ("model", "decision", "data", "results")]
    evidence = Evidence.read(recipe, *inputs)
    registry.keep_model(evidence.folder)
    registry.register(NAME, version, attempt.content, evidence.decision_digest, evidence.keep())
    check(version, attempt.content)
    review.submit(NAME, version)
    return attempt.content


def check(version: int, content: str, tokens: int = 16) -> None:
    record = Deployment(name=NAME, version=version, content=content, prompts=2, tokens=tokens, command="")
    registry.record_deployment(record)


def events() -> list[str]:
    return [entry.event for entry in registry.history(NAME)]


def test_one_approval_makes_the_champion_and_says_who_and_why(tmp_path: Path) -> None:
    content = wait(tmp_path, 1, required=1)
    [waiting] = review.queue()
    assert (waiting.version, waiting.required, waiting.approved, waiting.submitter) == (1, 1, [], "submitter")
    assert registry.champion(NAME) is None
    entry = review.approve(NAME, 1, "the misses are harmless", ANN)
    assert (entry.event, entry.actor, entry.content) == ("promoted", "ann", content)
    assert registry.champion(NAME) == entry
    approved = registry.history(NAME)[-2]
    assert (approved.event, approved.reason, approved.evidence) == (
        "approved",
        "the misses are harmless",
        waiting.evidence,
    )
    assert review.queue() == []
    assert events() == ["registered", "awaiting", "approved", "promoted"]


def test_a_run_alone_promotes_nothing_that_people_must_approve(tmp_path: Path) -> None:
    wait(tmp_path, 1, required=2)
    with pytest.raises(RegistryError, match="needs 2 approvals, and 2 are missing"):
        registry.promote(NAME, 1)
    review.approve(NAME, 1, "fine", ANN)
    with pytest.raises(RegistryError, match="1 are missing"):
        registry.promote(NAME, 1)
    assert registry.champion(NAME) is None


def test_two_are_two_people_and_neither_submitted_it(tmp_path: Path) -> None:
    wait(tmp_path, 1, required=2)
    assert review.approve(NAME, 1, "fine", ANN).event == "approved"
    assert review.approve(NAME, 1, "fine again", ANN).event == "approved"
    assert events().count("approved") == 1
    with pytest.raises(RegistryError, match="submitter submitted version 1"):
        review.approve(NAME, 1, "mine is good", Person("submitter"))
    assert review.waiting(NAME, 1).approved == ["ann"]
    assert review.approve(NAME, 1, "fine too", BOB).event == "promoted"


def test_submitting_again_adds_nothing(tmp_path: Path) -> None:
    wait(tmp_path, 1, required=1)
    assert review.submit(NAME, 1) == review.submit(NAME, 1)
    assert events() == ["registered", "awaiting"]


def test_what_was_not_checked_does_not_come_into_the_queue(tmp_path: Path, shelf: Shelf) -> None:
    wait(tmp_path, 1, required=1)
    shelf.delete(f"deployments/{NAME}/1.json")
    with pytest.raises(RegistryError, match="was not checked"):
        review.submit(NAME, 1)
    with pytest.raises(RegistryError, match="not what you saw"):
        review.approve(NAME, 1, "fine", ANN, evidence=registry.history(NAME)[-1].evidence)


def test_a_rejection_is_final_for_the_decision(tmp_path: Path) -> None:
    content = wait(tmp_path, 1, required=2)
    review.approve(NAME, 1, "fine", ANN)
    assert review.reject(NAME, 1, "one dose is wrong", BOB).actor == "bob"
    assert review.queue() == []
    with pytest.raises(RegistryError, match="awaits no approval"):
        review.approve(NAME, 1, "fine", CID)
    for act in (registry.promote, registry.check_promotion, review.submit):
        with pytest.raises(RegistryError, match=r"rejected on .* by bob \(one dose is wrong\)"):
            act(NAME, 1)
    recipe = RECIPE.model_copy(update={"approval": ApprovalSettings(required=0)})
    inputs = [tmp_path / "1" / name for name in ("model", "decision", "data", "results")]
    evidence = Evidence.read(recipe, *inputs)
    registry.register(NAME, 1, content, evidence.decision_digest, evidence.keep())
    with pytest.raises(RegistryError, match="rejected"):
        registry.promote(NAME, 1)


@pytest.mark.parametrize("reason", ["", "  "])
def test_who_decides_says_why(tmp_path: Path, reason: str) -> None:
    wait(tmp_path, 1, required=1)
    with pytest.raises(RegistryError, match="needs a reason"):
        review.approve(NAME, 1, reason, ANN)
    with pytest.raises(RegistryError, match="needs a reason"):
        review.reject(NAME, 1, reason, ANN)
    assert events() == ["registered", "awaiting"]


def test_only_what_is_in_the_queue_is_approved(tmp_path: Path) -> None:
    wait(tmp_path, 1, required=1)
    with pytest.raises(RegistryError, match="has no version 2"):
        review.approve(NAME, 2, "fine", ANN)
    review.approve(NAME, 1, "fine", ANN)
    with pytest.raises(RegistryError, match="awaits no approval"):
        review.approve(NAME, 1, "fine", BOB)


def test_bytes_or_a_decision_that_were_altered_are_not_approved(tmp_path: Path, shelf: Shelf) -> None:
    content = wait(tmp_path, 1, required=1)
    good = shelf.get(f"models/{content}/model.safetensors")
    shelf.put(f"models/{content}/model.safetensors", b"weights of X")
    with pytest.raises(RegistryError, match="was altered"):
        review.approve(NAME, 1, "fine", ANN)
    shelf.put(f"models/{content}/model.safetensors", good)
    [decision] = shelf.keys("decisions/")
    shelf.put(decision, shelf.get(decision).replace(b"rose", b"r0se"))
    with pytest.raises(RegistryError, match="decision record was altered"):
        review.approve(NAME, 1, "fine", ANN)
    assert events() == ["registered", "awaiting"]


def test_an_approval_of_other_evidence_does_not_count(tmp_path: Path) -> None:
    content = wait(tmp_path, 1, required=2)
    seen = review.waiting(NAME, 1).evidence
    review.approve(NAME, 1, "fine", ANN, evidence=seen)
    check(1, content, tokens=99)  # the check was made anew
    assert review.waiting(NAME, 1).approved == []
    with pytest.raises(RegistryError, match="not what you saw"):
        review.approve(NAME, 1, "fine", BOB, evidence=seen)
    assert review.approve(NAME, 1, "fine", BOB).event == "approved"
    assert review.approve(NAME, 1, "seen again", ANN).event == "promoted"


def test_another_champion_meanwhile_makes_approvals_stale(tmp_path: Path) -> None:
    wait(tmp_path, 1, required=2)
    wait(tmp_path, 2, required=2)
    review.approve(NAME, 1, "fine", ANN)
    review.approve(NAME, 2, "fine", ANN)
    assert review.approve(NAME, 2, "fine", BOB).event == "promoted"
    waiting = review.waiting(NAME, 1)
    assert waiting.stale
    assert waiting.approved == []
    with pytest.raises(RegistryError, match="compared with another champion") as error:
        review.approve(NAME, 1, "fine", BOB)
    assert "--acknowledge-champion" in error.value.fix
    assert review.approve(NAME, 1, "I know", BOB, acknowledge=True).event == "approved"
    assert review.approve(NAME, 1, "I know too", ANN, acknowledge=True).event == "promoted"
    champion = registry.champion(NAME)
    assert champion is not None
    assert (champion.version, champion.replaces) == (1, 2)


def test_a_recipe_cannot_ask_for_fewer_people_than_the_champion_needed(tmp_path: Path) -> None:
    first = wait(tmp_path, 1, required=2)
    review.approve(NAME, 1, "fine", ANN)
    review.approve(NAME, 1, "fine", BOB)
    wait(tmp_path, 2, required=0, champion=first)
    assert review.waiting(NAME, 2).required == 2
    with pytest.raises(RegistryError, match="2 are missing"):
        registry.promote(NAME, 2)
    review.approve(NAME, 2, "fine", ANN)
    assert review.approve(NAME, 2, "fewer from now on", BOB).event == "promoted"
    second = registry.champion(NAME)
    assert second is not None
    attempt = Attempt(tmp_path / "3", "weights of 3", champion=second.content)
    attempt.register_in_ledger(NAME, 3)
    assert registry.promote(NAME, 3).version == 3


def test_a_kill_between_approval_and_promotion_is_made_good_by_either(tmp_path: Path, monkeypatch) -> None:
    wait(tmp_path, 1, required=1)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry, "promote", killed)
        with pytest.raises(KeyboardInterrupt):
            review.approve(NAME, 1, "fine", ANN)
    assert events() == ["registered", "awaiting", "approved"]
    assert review.approve(NAME, 1, "fine", ANN).event == "promoted"
    assert events() == ["registered", "awaiting", "approved", "promoted"]


def _approve(person: str, version: int, start: float, outcome: "multiprocessing.Queue[str]") -> None:
    time.sleep(max(0.0, start - time.time()))
    try:
        outcome.put(review.approve(NAME, version, "fine", Person(person)).event)
    except RegistryError as error:
        outcome.put(error.what)


def test_of_two_candidates_approved_at_once_one_is_champion_and_the_other_is_told(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        wait(tmp_path, version, required=1)
    context = multiprocessing.get_context("fork")
    outcome, start = context.Queue(), time.time() + 0.2
    workers = [context.Process(target=_approve, args=(f"p{number}", number, start, outcome)) for number in (1, 2, 3)]
    for worker in workers:
        worker.start()
    said = sorted(outcome.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert said.count("promoted") == 1
    assert events().count("promoted") == 1
    others = [line for line in said if line != "promoted"]
    assert all("another champion" in line or "are missing" in line or line == "approved" for line in others)


def test_two_people_at_once_make_one_champion(tmp_path: Path) -> None:
    wait(tmp_path, 1, required=2)
    context = multiprocessing.get_context("fork")
    outcome, start = context.Queue(), time.time() + 0.2
    workers = [context.Process(target=_approve, args=(person, 1, start, outcome)) for person in ("ann", "bob")]
    for worker in workers:
        worker.start()
    said = {outcome.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert said <= {"approved", "promoted"}
    assert events() == ["registered", "awaiting", "approved", "approved", "promoted"]


# --- who it is --------------------------------------------------------------------------------------------------------


def test_without_a_list_the_name_is_believed_and_nothing_claims_more(tmp_path, monkeypatch) -> None:
    assert people.who("ann") == Person("ann", "")
    assert people.who() == Person("submitter", "")
    wait(tmp_path, 1, required=1)
    review.approve(NAME, 1, "fine", people.who("ann"))
    assert registry.history(NAME)[-2].proof == ""


def test_with_a_list_only_a_token_decides(tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    wait(tmp_path, 1, required=2)
    review.approve(NAME, 1, "before there was a list", ANN)
    tokens = {name: people.add(name) for name in ("ann", "bob")}
    assert review.waiting(NAME, 1).approved == []
    with pytest.raises(RegistryError, match="must show a token"):
        people.who("ann")
    monkeypatch.setenv(people.TOKEN, tokens["ann"])
    with pytest.raises(RegistryError, match="must show a token"):
        people.who("bob")
    assert people.who() == Person("ann", "token")
    review.approve(NAME, 1, "fine", people.who())
    monkeypatch.setenv(people.TOKEN, tokens["bob"])
    assert review.approve(NAME, 1, "fine", people.who("bob")).proof == "token"
    stored = b"".join(shelf.get(key) for key in shelf.keys(""))
    assert not any(token.partition(":")[2].encode() in stored for token in tokens.values())


def test_a_token_that_was_replaced_or_taken_away_is_nobodys(shelf: Shelf) -> None:
    old = people.add("ann")
    new = people.add("ann")
    assert people.by_token(old) is None
    assert people.by_token(new) == Person("ann", "token")
    assert people.by_token(new + "x") is None
    assert people.by_token("bob:" + new.partition(":")[2]) is None
    for wrong in ("", "ann", "ann:", ":", "../ann:x", "ann:" + "x" * 5000):
        assert people.by_token(wrong) is None
    people.remove("ann")
    assert people.by_token(new) is None
    with pytest.raises(RegistryError, match="must show a token"):
        people.who("ann")


@pytest.mark.parametrize("name", ["", "../ann", "a b", "a:b", "-a"])
def test_a_person_needs_a_name_that_is_one(shelf: Shelf, name: str) -> None:
    with pytest.raises(RegistryError, match="cannot name a person"):
        people.add(name)


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_queue_is_worked_off_on_the_command_line(tmp_path: Path) -> None:
    runner, home = CliRunner(), ["--home", str(tmp_path / "home")]
    assert "Nothing awaits approval" in runner.invoke(app, ["queue", *home]).output
    first = wait(tmp_path, 1, required=2)
    [line] = runner.invoke(app, ["queue", NAME, "--json", *home]).output.splitlines()
    assert json.loads(line)["version"] == 1
    assert "0 of 2" in runner.invoke(app, ["queue", *home]).output

    def act(command: str, version: int, person: str, *more: str) -> str:
        words = [command, NAME, "--version", str(version), "--reason", "fine", "--as", person, *more, *home]
        done = runner.invoke(app, words)
        return done.output if done.exit_code == 0 else str(done.exception)

    assert "has 1 of 2 approvals" in act("approve", 1, "ann")
    assert "needs two other people" in act("approve", 1, "submitter")
    assert "version 1 is champion, approved by bob" in act("approve", 1, "bob")
    wait(tmp_path, 2, required=2, champion=first)
    assert "version 2 was rejected by ann" in act("reject", 2, "ann")
    assert "awaits no approval" in act("approve", 2, "bob")
    history = runner.invoke(app, ["history", NAME, *home]).output
    assert "rejected" in history
    assert "ann" in history


def test_verify_counts_the_approvals_again(tmp_path: Path, shelf: Shelf) -> None:
    content = wait(tmp_path, 1, required=2)
    review.approve(NAME, 1, "fine", ANN)
    review.approve(NAME, 1, "fine", BOB)

    def said() -> list[verification.Finding]:
        return [finding for finding in verification.verify(NAME) if "approv" in finding.what]

    [good] = said()
    assert (good.state, "ann and bob" in good.what) == ("ok", True)
    check(1, content, tokens=99)  # not the check that they saw
    [bad] = said()
    assert bad.state == "altered"
    assert "needed 2 approvals of what is there now; 0 are" in bad.what
