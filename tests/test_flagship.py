"""The flagship recipe as a user runs it: `make test-heavy`, a quarter of an hour on two cores."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def assay(home: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, "-m", "assay.pipelines.cli", *words, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "ASSAY_HOME": str(home)},
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.heavy
@pytest.mark.timeout(7200)
def test_medication_directions_climbs_is_promoted_and_is_cached(tmp_path: Path):
    code, events = assay(tmp_path, "run", "medication-directions")
    result = events[-1]
    assert (code, result["decision"], result["version"]) == (0, "promote", 1), result
    record = json.loads(next(tmp_path.glob("runs/*/tasks/gate/outputs/decision/decision.json")).read_text())
    arms = record["arms"]
    assert record["examples"] >= 400
    assert arms["baseline"]["exact"]["high"] < arms["sft"]["exact"]["low"]
    assert arms["candidate"]["exact"]["mean"] > arms["sft"]["exact"]["mean"]

    started = time.monotonic()
    code, events = assay(tmp_path, "run", "medication-directions")
    assert (code, events[-1]["decision"], events[-1]["version"]) == (0, "promote", 1)
    assert time.monotonic() - started < 5.0
