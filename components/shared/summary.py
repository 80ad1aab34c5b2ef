"""The summary artifact of a step: scalars for the tracker, JSON for the report, seconds beside the seal."""

import json
from pathlib import Path
from typing import Any

from ..contracts.artifacts import Manifest, read_manifest, seal
from ..contracts.metrics import Summary

FILE = "summary.json"
TIMING = "timing.json"


def write_summary(
    output: Any, summary: Summary, *, seconds: float | None = None, parents: dict[str, Manifest] | None = None
) -> None:
    """Log the scalars and write the directory.

    Args:
        output: The step's `Output[Metrics]`.
        summary: What there is to tell; the same for two identical runs.
        seconds: Wall-clock time of the work; kept outside the seal.
        parents: Manifests of the step's inputs.
    """
    for name, value in summary.metrics.items():
        output.log_metric(name, value)
    folder = Path(output.path)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
    if seconds is not None:
        (folder / TIMING).write_text(json.dumps({"seconds": round(seconds, 3)}), encoding="utf-8")
    seal(folder, "summary", parents=parents)


def read_summary(folder: str | Path) -> Summary:
    """Read a step's summary.

    Raises:
        DataError: The folder is not a summary, or was changed.
    """
    read_manifest(folder, "summary")
    return Summary.model_validate_json((Path(folder) / FILE).read_bytes())


def read_seconds(folder: str | Path) -> float | None:
    """Return the seconds a step's work took, or None where they were not kept."""
    path = Path(folder) / TIMING
    return float(json.loads(path.read_text())["seconds"]) if path.is_file() else None
