"""Accepted rows into splits: duplicates and contradictions out, every group on one side only.

A group's side depends on nothing but its key and the shares: sha256(key) is a point in [0, 1), and the splits lie there
side by side. New rows therefore never move an old one, and a model trained before the data grew has not seen the new
run's test rows.
"""

import hashlib
from typing import Any, Literal, NamedTuple, get_args

import polars as pl
import pyarrow as pa

from ..contracts.errors import DataError
from ..contracts.recipe import DataSettings
from ..shared.contamination import EVALUATION, Contamination, find_contamination

Split = Literal["sft", "preference", "rl", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
"""In the order in which they lie in [0, 1)."""
ALWAYS_NEEDED = ("sft", "validation", "test")
CONFLICT, DUPLICATE = "conflicting reference", "duplicate"


class Prepared(NamedTuple):
    """The splits of a table of examples, and what was left out."""

    splits: dict[Split, pa.Table]
    """Rows of each split, by id."""
    groups: dict[Split, int]
    """Groups in each split."""
    dropped: list[dict[str, str]]
    """id, group, source and reason of every row left out."""
    contamination: Contamination
    """What evaluation rows have in common with training rows, though no group and no prompt stands on both sides."""

    def count(self, reason: str) -> int:
        """Return the number of rows left out for a reason."""
        return sum(row["reason"] == reason for row in self.dropped)


def prepare(table: pa.Table, settings: DataSettings) -> Prepared:
    """Split examples.

    Args:
        table: Columns of `Example`, in any order of rows.
        settings: Shares of the splits and the fewest rows the test split may have.

    Raises:
        DataError: A split that a later step needs is empty, too few rows are held out, or too many of them have the
            text of a training row.
    """
    keys = find_drops(row_keys(table))
    kept = keys.filter(pl.col("reason").is_null())
    kept = kept.join(split_of_groups(kept["group"], settings), on="group", how="left", maintain_order="left")
    check_leaks(kept)
    splits = {name: table.take(kept.filter(split=name)["row"].to_arrow()) for name in SPLITS}
    _check_sizes(splits, settings)
    contamination = find_contamination(splits)
    _check_contamination(contamination, settings)
    return Prepared(
        splits=splits,
        groups={name: kept.filter(split=name)["group"].n_unique() for name in SPLITS},
        dropped=keys.filter(pl.col("reason").is_not_null()).select("id", "group", "source", "reason").to_dicts(),
        contamination=contamination,
    )


def row_keys(table: pa.Table) -> pl.DataFrame:
    """Return what decides about a row (its number, id, group, prompt, source), in an order of content, not of arrival.

    The prompt is its turns as JSON: equal prompts have equal texts.
    """
    columns: Any = pl.from_arrow(table.select(["id", "group", "prompt", "reference", "source"]))
    turns = pl.col("prompt").list.eval(pl.element().struct.json_encode()).list.join("\n")
    return columns.with_columns(prompt=turns).with_row_index("row").sort("id", "source", "group", "row")


def find_drops(keys: pl.DataFrame) -> pl.DataFrame:
    """Add the column `reason`: null for a row that stays.

    Of equal rows the first stays. Where one prompt has different references none stays: nothing says which is right.
    """
    conflict = pl.col("reference").n_unique().over("prompt") > 1
    repeat = ~pl.struct("prompt", "reference").is_first_distinct()
    reason = pl.when(conflict).then(pl.lit(CONFLICT)).when(repeat).then(pl.lit(DUPLICATE))
    return keys.with_columns(reason=reason)


def split_of_groups(groups: pl.Series, settings: DataSettings) -> pl.DataFrame:
    """Return each group once with its split."""
    unique = groups.unique().sort().to_list()
    sides = [split_of(group, settings) for group in unique]
    return pl.DataFrame({"group": unique, "split": sides}, schema={"group": pl.String, "split": pl.String})


def split_of(group: str, settings: DataSettings) -> Split:
    """Return the split of a group: where sha256 of its key falls among the shares."""
    point = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8]) / 2**64
    edge = 0.0
    used = [name for name in SPLITS if settings.shares.get(name, 0) > 0]
    for name in used:
        edge += settings.shares[name]
        if point < edge:
            return name
    return used[-1]  # the shares may sum to a hair less than 1


def check_leaks(kept: pl.DataFrame) -> None:
    """Prove by semi-joins that no group and no prompt stands in two splits."""
    parts = [kept.filter(split=name) for name in SPLITS]
    for at, one in enumerate(parts):
        for other in parts[at + 1 :]:
            for key in ("group", "prompt"):
                shared = one.join(other, on=key, how="semi")
                if shared.height:
                    raise DataError(
                        f"{shared.height} rows of two splits have the same {key}",
                        where=f"row {shared['id'][0]}",
                        fix="give rows with equal prompts the same group",
                    )


def _check_sizes(splits: dict[Split, pa.Table], settings: DataSettings) -> None:
    total = sum(table.num_rows for table in splits.values())
    for name, table in splits.items():
        needed = name in ALWAYS_NEEDED or settings.shares.get(name, 0) > 0
        if needed and not table.num_rows:
            raise DataError(
                f"the split {name!r} is empty ({total} rows in all)",
                where="data.shares",
                fix=f"give more rows, or a larger share to {name!r}",
            )
    held_out = splits["test"].num_rows
    if held_out < settings.min_test_rows:
        wanted = -(-settings.min_test_rows * total // held_out)
        raise DataError(
            f"{held_out} rows are held out for the test; {settings.min_test_rows} are needed to decide anything",
            where="data.min_test_rows",
            fix=f"give about {wanted} rows in all, or a larger test share",
        )


def _check_contamination(found: Contamination, settings: DataSettings) -> None:
    for name in EVALUATION:
        if found.share(name) > settings.max_contamination:
            counts = found.counts[name]
            listed = [one for one in found.examples if one["split"] == name]
            row = listed[0] if listed else found.examples[0]  # the list is short, and the other split may fill it
            raise DataError(
                f"{counts['exact']} of {counts['rows']} rows of {name} have a training row's text, in another group",
                where=f"row {row['id']} ({row['training_split']}: row {row['training_id']})",
                fix="give rows with equal texts the same group, or raise data.max_contamination",
            )
