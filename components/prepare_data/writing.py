"""The files and the summary of prepared data."""

import json
from pathlib import Path

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
    parts = ", ".join(f"{count:,} {name}" for name, count in rows.items())
    return Summary(
        step="prepare_data",
        headline=f"{sum(rows.values()):,} rows split into {parts}; {duplicates:,} duplicates and {conflicts:,} rows "
        "with conflicting references dropped; no group or prompt stands in two splits (checked).",
        metrics={f"rows_{name}": float(count) for name, count in rows.items()}
        | {"duplicates_dropped": float(duplicates), "conflicts": float(conflicts)},
        details={
            "splits": {name: {"rows": rows[name], "groups": prepared.groups[name]} for name in rows},
            "duplicates_dropped": duplicates,
            "conflicts": conflicts,
            "leaks": 0,
        },
    )
