"""The wire of `build_preferences`. The work is in `pairs.py` and `quality.py`."""

from typing import Any

from kfp.dsl import Dataset, Input, Metrics, Output

from ..runtime.step import step


@step("data")
def build_preferences(
    settings: dict[str, Any], candidates: Input[Dataset], pairs: Output[Dataset], summary: Output[Metrics]
) -> None:
    """Make preference pairs of scored candidates.

    Args:
        settings: `PairSettings`.
        candidates: `candidates.parquet`: answers with a score.
        pairs: `pairs.parquet`, and `dropped.parquet` with a reason for everything that gave no pair.
        summary: Pairs, drops by reason, and the pairs' quality.
    """
    import time
    from pathlib import Path

    from ..contracts.artifacts import read_manifest, seal
    from ..contracts.recipe import PairSettings
    from ..contracts.rows import Candidate, PreferencePair, read_table, write_rows
    from ..shared.summary import write_summary
    from .pairs import build_pairs, write_dropped
    from .quality import check_enough, summarise

    began = time.monotonic()
    chosen = PairSettings.model_validate(settings)
    parents = {"candidates": read_manifest(candidates.path, "candidates")}
    built = build_pairs(read_table(Path(candidates.path) / "candidates.parquet", Candidate), chosen)
    check_enough(built, chosen)
    folder = Path(pairs.path)
    counts = {
        "pairs": write_rows(folder / "pairs.parquet", built.pairs, PreferencePair),
        "dropped": write_dropped(folder / "dropped.parquet", built.dropped),
    }
    seal(folder, "pairs", parents=parents, counts=counts)
    write_summary(summary, summarise(built), seconds=time.monotonic() - began, parents=parents)
