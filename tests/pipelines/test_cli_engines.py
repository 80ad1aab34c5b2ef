"""The command line with an engine elsewhere: what a person or a CI job sees, and the exit codes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

FIXTURES = Path(__file__).parents[1] / "fixtures"
sys.path.insert(0, str(FIXTURES))
from kfp_server import Frame, serving

from assay.components.contracts.recipe import Recipe
from assay.pipelines import cli
from assay.pipelines.engines.outcome import Outcome

IMAGE = "registry.example.org/assay-{}@sha256:" + 64 * "a"
TOKEN = "very-secret-token"


@pytest.fixture
def kfp():
    with serving() as fake:
        fake.tokens = {TOKEN: {"team-a"}}
        yield fake


@pytest.fixture
def folder(tmp_path, kfp):
    """A folder with a recipe and a deploy profile."""
    recipe = Recipe(name="small", preference=None, rl=None)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    (tmp_path / "token").write_text(TOKEN)
    profile = {
        "host": kfp.url,
        "namespace": "team-a",
        "auth": {"token_file": str(tmp_path / "token")},
        "images": {role: IMAGE.format(role) for role in ("data", "train", "serve")},
        "volume": {"claim": "home"},
        "poll_seconds": 0.05,
    }
    (tmp_path / "deploy.yaml").write_text(yaml.safe_dump(profile))
    return tmp_path


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """Call the entry point in this process; return its exit code and all it printed."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))

    def called(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["assay", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        assert TOKEN not in printed.out + printed.err
        return code, printed.out + printed.err

    return called


THERE = ("small.yaml", "--engine", "kubeflow", "--deploy", "deploy.yaml")
DECISIONS = {"promote": {"deploy-model": "SUCCEEDED"}, "hold": {"hold-model": "SUCCEEDED"}, "": {"gate": "SUCCEEDED"}}


@pytest.mark.parametrize(
    ("frame", "code", "words"),
    [
        (Frame("SUCCEEDED", DECISIONS["promote"]), 0, "Promoted: small has a new champion."),
        (Frame("SUCCEEDED", DECISIONS["hold"]), 1, "Held: nothing was promoted."),
        (Frame("SUCCEEDED", DECISIONS[""]), 70, "its decision is not known"),
        (Frame("FAILED", {"judge": "FAILED"}, {"judge": "no memory"}), 70, "judge failed: no memory"),
        (Frame("CANCELED"), 130, "was cancelled"),
    ],
)
def test_the_exit_code_says_how_the_run_ended(kfp, call, frame, code, words):
    kfp.script = [Frame("RUNNING"), frame]
    ended, printed = call("run", *THERE)
    assert ended == code
    assert words in printed
    assert f"See:  {kfp.url}/#/runs/details/" in printed


def test_no_wait_submits_and_says_where_to_look(kfp, call):
    code, printed = call("run", *THERE, "--no-wait")
    assert (code, kfp.asked) == (0, {})
    (made,) = kfp.runs
    assert printed == f"Submitted: run {made}.\n  See:  {kfp.url}/#/runs/details/{made}\n"


def test_json_lines_end_with_the_result(kfp, call):
    kfp.script = [Frame("SUCCEEDED", DECISIONS["hold"])]
    code, printed = call("run", *THERE, "--json")
    lines = [json.loads(line) for line in printed.splitlines()]
    assert code == 1
    assert [lines[0]["kind"], lines[-2]["kind"]] == ["run_started", "run_finished"]
    result = lines[-1]
    assert (result["kind"], result["engine"], result["state"], result["decision"]) == (
        "result",
        "kubeflow",
        "SUCCEEDED",
        "hold",
    )


def test_a_schedule_says_what_is_scheduled(kfp, call):
    code, printed = call("schedule", *THERE, "--cron", "0 2 * * 1")
    assert code == 0
    assert printed.startswith(f"small runs at '0 0 2 * * 1' (seconds first, UTC) on {kfp.url}, version small-")
    assert call("schedule", *THERE, "--cron", "0 2 * * 1")[1].endswith(": unchanged\n")


def test_lint_exits_2_when_it_could_not_run_there(call):
    code, printed = call("lint", "small.yaml", "--engine", "kubeflow")
    assert code == 2
    assert printed.count("no registry is named") == 1  # three images, one row
    assert all(f"assay-{role}-python" in printed for role in ("data", "train", "serve"))
    code, printed = call("lint", *THERE, "--json")
    assert code == 0
    assert {json.loads(line)["level"] for line in printed.splitlines()} == {"warning", "note"}
    code, printed = call("lint", "small.yaml", "--engine", "local")
    assert code == 0
    assert "caching is off" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", *THERE[:3], "--deploy", "nope.yaml"), "nope.yaml: cannot be read"),
        (("run", *THERE, "--from", "gate"), "are of the local engine"),
        (("run", *THERE, "--no-cache"), "are of the local engine"),
        (("run", "small.yaml", "--deploy", "deploy.yaml"), "are of the distributed engines"),
        (("run", "small.yaml", "--no-wait"), "are of the distributed engines"),
        (("run", *THERE, "--data", "rows.jsonl"), "rows.jsonl is a path of this machine"),
        (("run", "small.yaml", "--engine", "airflow"), "airflow"),
        (("compile", "small.yaml", "--deploy", "deploy.yaml"), "the local engine has no deploy profile"),
        (("compile", *THERE, "-o", "/proc/nope/x.yaml"), "cannot be written"),
        (("schedule", *THERE, "--cron", "nightly"), "'nightly' has 1"),
        (("lint", *THERE[:3], "--deploy", "small.yaml"), "this is not a deploy profile for Kubeflow"),
    ],
)
def test_bad_input_is_named_and_exits_2(call, arguments, words):
    code, printed = call(*arguments)
    assert code == 2
    assert words in printed
    assert "Traceback" not in printed


def test_an_expired_token_is_one_sentence(kfp, call):
    kfp.tokens = {}
    code, printed = call("run", *THERE)
    assert code == 2
    assert "the login was refused: the token or cookie has expired" in printed
    assert len(printed.splitlines()) == 2


def listen_to_interrupts():
    """Undo what a shell does to the commands that it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_stops_the_waiting_and_not_the_run(kfp, folder):
    kfp.script = [Frame("RUNNING")]
    command = [sys.executable, "-m", "assay.pipelines.cli", "run", *THERE]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, preexec_fn=listen_to_interrupts, **pipes) as waiting:
        end = time.monotonic() + 60
        while not kfp.asked and time.monotonic() < end:
            time.sleep(0.05)
        waiting.send_signal(signal.SIGINT)
        _, error = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    assert "no longer waiting; what was submitted goes on" in error
    assert "Traceback" not in error
    assert [made.state for made in kfp.runs.values()] == ["RUNNING"]


def test_every_outcome_has_words_and_a_code():
    import typer

    from assay.pipelines.commands import runs

    codes = {}
    for state, decision in [("SUBMITTED", ""), ("SUCCEEDED", "inconclusive"), ("SUCCEEDED", "promote")]:
        with pytest.raises(typer.Exit) as ended:
            runs.finish_there(Outcome("sagemaker", "run", state, decision=decision), "small", as_json=False)
        codes[state, decision] = ended.value.exit_code
    assert codes == {("SUBMITTED", ""): 0, ("SUCCEEDED", "inconclusive"): 3, ("SUCCEEDED", "promote"): 0}
