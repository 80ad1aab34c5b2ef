"""The files and the summary of prepared data."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from ..contracts.metrics import Summary
from ..contracts.rows import Example, write_table
from .prepare import CONFLICT, DUPLICATE, Prepared


def write_splits(prepared: Prepared, folder: Path) -> dict[str, int]:
    """Write one Parquet file a split and `dropped.jsonl`; return rows by name."""
    counts = {name: write_table(folder / f"{name}.parquet", table, Example) for name, table in prepared.splits.items()}
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in prepared.dropped]
    (folder / "dropped.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return counts | {"dropped": len(lines)}


def summarise(prepared: Prepared) -> Summary:
    """Return the summary of the step."""
    rows = {name: table.num_rows for name, table in prepared.splits.items()}
    duplicates, conflicts = prepared.count(DUPLICATE), prepared.count(CONFLICT)
    held = prepared.contamination.counts
    seen = ", ".join(
        f"{name} {part['exact']:,} and {part['near']:,} of {part['rows']:,}" for name, part in held.items()
    )
    parts = ", ".join(f"{count:,} {name}" for name, count in rows.items())
    return Summary(
        step="prepare_data",
        headline=f"{sum(rows.values()):,} rows split into {parts}; {duplicates:,} duplicates and {conflicts:,} rows "
        "with conflicting references dropped; no group or prompt stands in two splits (checked). "
        f"Texts that training has too, equal and nearly: {seen}.",
        metrics={f"rows_{name}": float(count) for name, count in rows.items()}
        | {"duplicates_dropped": float(duplicates), "conflicts": float(conflicts)}
        | {f"contaminated_{name}": float(part["exact"] + part["near"]) for name, part in held.items()},
        details={
            "splits": {name: {"rows": rows[name], "groups": prepared.groups[name]} for name in rows},
            "duplicates_dropped": duplicates,
            "conflicts": conflicts,
            "leaks": 0,
            "contamination": {"counts": held, "examples": prepared.contamination.examples},
            "answers": describe_answers(prepared.splits["sft"]),
        },
    )


def describe_answers(table: pa.Table) -> dict[str, float]:
    """Return the shape of a split's answers, by which `assay advise` knows a small closed set or a reader's task.

    Returns:
        `distinct`: different answers; `rarest`: rows of the rarest; `read_off`: share of rows whose answer stands, case
        aside, in a turn before the question; `contexts`: different texts before the question, per row.
    """
    columns: Any = pl.from_arrow(table.select(["prompt", "reference"]))
    before = (
        pl.col("prompt").list.eval(pl.element().struct.field("content")).list.slice(0, pl.col("prompt").list.len() - 1)
    )
    texts = columns.select(pl.col("reference").str.to_lowercase(), before=before.list.join("\n").str.to_lowercase())
    counts = texts["reference"].value_counts()
    read_off = texts.select(pl.col("before").str.contains(pl.col("reference"), literal=True).mean()).item()
    return {
        "distinct": float(counts.height),
        "rarest": float(counts["count"].min()),
        "read_off": float(read_off),
        "contexts": texts["before"].n_unique() / max(1, texts.height),
    }
