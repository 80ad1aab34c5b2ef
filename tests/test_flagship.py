"""The flagship recipe as a user runs it: `make test-heavy`, twelve minutes on two cores."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_notebooks import NOTEBOOKS, cells

from assay.components.contracts.rows import Result, read_rows
from assay.components.shared.statistics import Interval, paired_difference


def assay(home: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, "-m", "assay.pipelines.cli", *words, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "ASSAY_HOME": str(home)},
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def paired(results: Path, metric: str) -> Interval:
    """Return the candidate's paired difference to SFT, with its 95 % interval."""
    arms: dict[str, dict[str, Result]] = {}
    for row in read_rows(results, Result):
        arms.setdefault(row.arm, {})[row.example_id] = row
    pairs = [(row.scores[metric], arms["sft"][key].scores[metric]) for key, row in arms["candidate"].items()]
    known = [(new, old) for new, old in pairs if new is not None and old is not None]
    return paired_difference([new for new, _ in known], [old for _, old in known], 0.95)


@pytest.mark.heavy
@pytest.mark.timeout(7200)
def test_medication_directions_climbs_is_promoted_and_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code, events = assay(tmp_path, "run", "medication-directions")
    result = events[-1]
    assert (code, result["decision"], result["version"]) == (0, "promote", 1), result
    record = json.loads(next(tmp_path.glob("runs/*/tasks/gate/outputs/decision/decision.json")).read_text())
    arms = record["arms"]
    assert record["examples"] >= 400
    assert arms["baseline"]["exact"]["high"] < arms["sft"]["exact"]["low"]
    results = next(tmp_path.glob("runs/*/tasks/evaluate/outputs/results/*.parquet"))
    assert paired(results, "near_miss").high < 0, "fewer unsafe directions pass than after SFT"
    assert paired(results, "exact").low > -0.05, "at no fewer exact matches, beyond the gate's margin"

    monkeypatch.setenv("ASSAY_HOME", str(tmp_path))
    for notebook in NOTEBOOKS:
        names: dict[str, Any] = {}
        for cell in cells(notebook):
            exec(cell, names)

    started = time.monotonic()
    code, events = assay(tmp_path, "run", "medication-directions")
    assert (code, events[-1]["decision"], events[-1]["version"]) == (0, "promote", 1)
    assert time.monotonic() - started < 5.0
