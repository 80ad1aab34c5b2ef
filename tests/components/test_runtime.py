"""The entry point of every step, and the digest of its code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from assay.components.runtime import context, digest

STEPS = """
import time
from pathlib import Path

from assay.components.contracts.errors import DataError
from assay.components.runtime.context import Stopped, progress


def refuse():
    raise DataError("two rows are bad", where="rows.jsonl:3", fix="correct them")


def wait():
    progress(1, 4, "steps", loss=0.5)
    Path("started").touch()
    try:
        time.sleep(60)
    except Stopped:
        Path("saved").touch()
        raise


def answer() -> int:
    progress(1, 2)
    progress(2, 2, "rows")
    return 42
"""


def start(folder: Path, name: str, *, in_file: bool = False) -> "subprocess.Popen[str]":
    (folder / "my_steps.py").write_text(STEPS)
    given = json.dumps({"inputs": {}, "outputs": {"outputFile": str(folder / "out" / "executor_output.json")}})
    if in_file:
        (folder / "input.json").write_text(given)
        given = f"@{folder / 'input.json'}"
    line = [sys.executable, "-m", "assay.components.runtime", "--component", f"my_steps:{name}"]
    return subprocess.Popen(
        [*line, "--executor_input", given],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "ASSAY_PROGRESS": str(folder / "progress.jsonl")},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_users_error_exits_2_with_a_report_and_no_traceback(tmp_path):
    process = start(tmp_path, "refuse")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: rows.jsonl:3: two rows are bad" in errors
    assert "Traceback" not in errors
    report = json.loads((tmp_path / "out" / "error.json").read_text())
    assert report == {"type": "DataError", "what": "two rows are bad", "where": "rows.jsonl:3", "fix": "correct them"}


def test_sigterm_lets_the_step_save_and_exits_75(tmp_path):
    process = start(tmp_path, "wait")
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == context.RESUME_EXIT == 75
    assert (tmp_path / "saved").exists()
    assert "Traceback" not in errors
    (line,) = (tmp_path / "progress.jsonl").read_text().splitlines()
    report = json.loads(line)
    assert abs(report.pop("time") - time.time()) < 120
    assert report == {"done": 1, "total": 4, "unit": "steps", "loss": 0.5}


def test_a_step_that_ends_well_writes_what_a_launcher_reads(tmp_path):
    process = start(tmp_path, "answer", in_file=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    output = json.loads((tmp_path / "out" / "executor_output.json").read_text())
    assert output["parameterValues"] == {"Output": 42}
    assert len((tmp_path / "progress.jsonl").read_text().splitlines()) == 2


def test_stopped_passes_what_catches_exceptions():
    assert not issubclass(context.Stopped, Exception)


def test_outside_an_engine_progress_is_silent_and_work_has_a_place(monkeypatch, tmp_path):
    for name in ("ASSAY_PROGRESS", "ASSAY_WORK", "ASSAY_REGISTRY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path))
    monkeypatch.setenv("ASSAY_CPUS", "0.5")
    context.progress(1, 2)
    assert context.work_folder() == context.work_folder()
    assert context.registry_address() == str(tmp_path / "registry")
    assert context.cache_folder("models").is_dir()
    assert context.cpus() == 1


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small copy of the layout: a step, what it reaches late and relatively, and a stranger."""
    folder = tmp_path / "components"
    files = {
        "__init__.py": "",
        "step/__init__.py": "",
        "step/component.py": "import json\n\ndef run():\n    from .work import go\n    import yaml\n",
        "step/work.py": "from ..shared import helper\n\ndef go():\n    return helper\n",
        "step/page.html.j2": "<html>",
        "step/table.json": "{}",
        "shared/__init__.py": "",
        "shared/helper.py": "ONE = 1\n",
        "shared/stranger.py": "TWO = 2\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(digest, "_room", lambda room: tmp_path / room if (tmp_path / room).is_dir() else None)
    return folder


def code_digest() -> str:
    """Take the digest as a new process would."""
    for cached in (digest._source, digest._imports, digest._version):
        cached.cache_clear()
    return digest.code_digest("assay.components.step.component")


@pytest.fixture(autouse=True)
def forget():
    """Leave no small package in the caches of this process."""
    yield
    digest._source.cache_clear()
    digest._imports.cache_clear()


@pytest.mark.parametrize(
    "name", ["step/component.py", "step/work.py", "shared/helper.py", "step/page.html.j2", "step/table.json"]
)
def test_the_digest_changes_with_what_a_step_reaches(package, name):
    before = code_digest()
    path = package / name
    path.write_text(path.read_text() + "\n")
    assert code_digest() != before


def test_the_digest_ignores_what_a_step_does_not_reach(package):
    before = code_digest()
    (package / "shared" / "stranger.py").write_text("TWO = 3\n")
    (package / "shared" / "new.py").write_text("")
    assert code_digest() == before


def test_the_digest_changes_with_the_version_of_a_library(package, monkeypatch):
    before = code_digest()
    monkeypatch.setattr(digest.importlib.metadata, "version", lambda name: "0.0.1")
    assert code_digest() != before
    digest._version.cache_clear()
