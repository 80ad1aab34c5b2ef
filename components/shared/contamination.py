"""Whether evaluation rows were seen in training: equal texts, and texts that share long runs of words.

A row's text is its turns without the answer, and without a system turn that many rows have. Two texts are

* `exact`        equal once Unicode width, case and white space are folded;
* `near`         not that, but at least `NEAR` of the evaluation text's words stand in runs of `N` words that some
                 training text has too (Llama 2's rule, Touvron et al. 2023, arXiv:2307.09288, A.6);
* `overlapping`  neither, but with one such run (GPT-3's rule, Brown et al. 2020, arXiv:2005.14165, C).

A text of fewer words is a run by itself, which a training row has if it says no more, and a document of a corpus if it
says it anywhere (from `FEWEST` words on). Runs that stand often among the evaluation texts are the form's, not a
question's, and do not count. Words are compared by 64-bit hashes, all of a column at a time: a million rows take
seconds (`tests/benchmarks/contamination_speed.py`); equal texts are compared as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

TRAINING, EVALUATION = ("sft", "preference", "rl"), ("validation", "test")
N = 13
"""Words of a run, as in GPT-3's analysis."""
FEWEST = 3
"""Words of the shortest question that is looked for inside a document; two stand side by side by chance."""
NEAR = 0.8
COMMON = 10
"""A run that stands more often than this among the evaluation texts is of the form; so is a system turn."""
BLOCK = 30_000_000
"""Characters of training texts whose runs are in memory at once."""
SHOWN = 20
"""Examples that are listed."""

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]


class Runs(NamedTuple):
    """Hashes of all runs of some texts."""

    hashes: Hashes
    row: Places
    """Which text a run is of."""
    start: Places
    """Its first word, counted over all texts."""
    length: Places
    """Words of the run."""
    words: Places
    """Words of each text."""


class Contamination(NamedTuple):
    """What evaluation rows have in common with training rows."""

    counts: dict[str, dict[str, int]]
    """Evaluation split to `rows`, `exact`, `near` and `overlapping`."""
    examples: list[dict[str, Any]]
    """Some of them, the worst first: split, id, kind, covered share, and the training row's split and id."""

    def share(self, split: str) -> float:
        """Return the share of a split's rows that training has exactly."""
        found = self.counts[split]
        return found["exact"] / found["rows"] if found["rows"] else 0.0


def find_contamination(splits: Mapping[Any, pa.Table], evaluation: Sequence[str] = EVALUATION) -> Contamination:
    """Compare every evaluation row with all training rows.

    Args:
        splits: Tables of `Example`, by name.
        evaluation: Names of those that are evaluated on.
    """
    held = {name: splits[name] for name in evaluation if name in splits}
    common = _common_systems(held.values())
    seen = pl.concat([_texts(splits[name], name, common) for name in TRAINING if name in splits])
    asked = pl.concat([_texts(table, name, common) for name, table in held.items()])
    source, covered = _cover(asked, seen)
    first = seen.with_row_index("at").unique("normal", keep="first", maintain_order=True).select("normal", same="at")
    exact = asked.select("normal").join(first, on="normal", how="left", maintain_order="left")["same"].to_numpy()
    known = ~np.isnan(exact.astype(np.float64))
    source = np.where(known, np.nan_to_num(exact.astype(np.float64)), source).astype(np.int64)
    covered = np.where(known, 1.0, covered)
    kind = np.select([known, covered >= NEAR, covered > 0], ["exact", "near", "overlapping"], "")
    table = asked.select("split", "id").with_columns(kind=pl.Series(kind), covered=pl.Series(covered))
    table = table.with_columns(source=pl.Series(source))
    return Contamination(
        counts={
            name: {"rows": held[name].num_rows}
            | {one: table.filter(split=name, kind=one).height for one in ("exact", "near", "overlapping")}
            for name in held
        },
        examples=_examples(table, seen),
    )


def contaminated(documents: Sequence[str], splits: Mapping[Any, pa.Table]) -> list[bool]:
    """Tell which documents have a part in an evaluation row that is equal or near to what all of them say together.

    Args:
        documents: A corpus; a document may hold a question among other text.
        splits: Tables of `Example`, the evaluation splits among them.
    """
    held = {name: splits[name] for name in EVALUATION if name in splits}
    common = _common_systems(held.values())
    asked = pl.concat([_texts(table, name, common) for name, table in held.items()])
    texts = _normal(pl.Series("text", list(documents), dtype=pl.String))
    runs = _runs(asked["normal"])
    sizes = [size for size in np.unique(runs.length).tolist() if FEWEST <= size < N] + [N]
    _, covered = _cover(asked, pl.DataFrame({"normal": texts}), sizes)
    dirty = np.unique(runs.hashes[(covered[runs.row] >= NEAR) & ~_often(runs)])
    found = np.zeros(len(texts), dtype=np.bool_)
    for offset, block in _blocks(texts):
        for part in (_runs(block, size) for size in sizes):
            found[offset + part.row[np.isin(part.hashes, dirty)]] = True
    return list(found.tolist())


def _examples(table: pl.DataFrame, seen: pl.DataFrame) -> list[dict[str, Any]]:
    order = pl.col("kind").replace_strict({"exact": 0, "near": 1, "overlapping": 2}, return_dtype=pl.Int8)
    found = table.filter(pl.col("kind") != "").with_columns(order=order)
    worst = found.sort("order", -pl.col("covered"), "split", "id").head(SHOWN)
    rows = seen[worst["source"].to_list()].select(training_split="split", training_id="id")
    listed = worst.select("split", "id", "kind", pl.col("covered").round(3)).hstack(rows)
    return list(listed.to_dicts())


def _common_systems(tables: Any) -> pl.Series:
    """Return the system turns that many evaluation rows have."""
    turns = pl.concat([pl.DataFrame({"prompt": pl.from_arrow(table["prompt"])}) for table in tables])
    system = turns.select(_system().alias("text")).filter(pl.col("text").is_not_null())
    return system["text"].value_counts().filter(pl.col("count") > COMMON)["text"]


def _system() -> pl.Expr:
    first = pl.col("prompt").list.first()
    return pl.when(first.struct.field("role") == "system").then(first.struct.field("content"))


def _texts(table: pa.Table, split: str, common: pl.Series) -> pl.DataFrame:
    """Return split, id and normal form of each row's text."""
    columns: Any = pl.from_arrow(table.select(["id", "prompt"]))
    turns = pl.col("prompt").list.eval(pl.element().struct.field("content"))
    known = _system().is_in(common.to_list()).fill_null(False)
    text = pl.when(known).then(turns.list.slice(1)).otherwise(turns).list.join("\n")
    texts = columns.select(pl.lit(split).alias("split"), "id", normal=text)
    return texts.with_columns(_normal(texts["normal"]))


def _normal(texts: pl.Series) -> pl.Series:
    return texts.str.normalize("NFKC").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()


def _cover(asked: pl.DataFrame, seen: pl.DataFrame, sizes: Sequence[int] = (N,)) -> tuple[Places, NDArray[np.float64]]:
    """Return for each evaluation text a training text that shares a run (−1: none), and the share of words in such.

    Training texts are read in runs of each of `sizes` words.
    """
    runs = _runs(asked["normal"])
    unique, place = np.unique(runs.hashes, return_inverse=True)
    first = np.full(len(unique), -1, dtype=np.int64)
    for offset, part in ((offset, _runs(block, size)) for offset, block in _blocks(seen["normal"]) for size in sizes):
        at = np.minimum(np.searchsorted(unique, part.hashes), max(len(unique) - 1, 0))
        hit = np.flatnonzero(unique[at] == part.hashes) if len(unique) else np.empty(0, dtype=np.int64)
        hit = hit[first[at[hit]] < 0]
        first[at[hit[::-1]]] = part.row[hit[::-1]] + offset  # of several the first stays
    taken = first[place]
    taken[_often(runs)] = -1
    hits = np.flatnonzero(taken >= 0)
    edges = np.zeros(int(runs.words.sum()) + 1, dtype=np.int64)
    np.add.at(edges, runs.start[hits], 1)
    np.add.at(edges, runs.start[hits] + runs.length[hits], -1)
    inside = np.concatenate([[0], np.cumsum(np.cumsum(edges[:-1]) > 0)])
    ends = np.cumsum(runs.words)
    covered = (inside[ends] - inside[ends - runs.words]) / np.maximum(runs.words, 1)
    source = np.full(len(asked), -1, dtype=np.int64)
    source[runs.row[hits[::-1]]] = taken[hits[::-1]]
    return source, covered


def _often(runs: Runs) -> NDArray[np.bool_]:
    """Tell which runs are of the form: they stand often, and are no text by themselves."""
    _, place, counts = np.unique(runs.hashes, return_inverse=True, return_counts=True)
    return np.asarray((counts[place] > COMMON) & (runs.length < runs.words[runs.row]))


def _blocks(texts: pl.Series) -> Iterator[tuple[int, pl.Series]]:
    block = texts.str.len_chars().cast(pl.Int64).cum_sum() // BLOCK
    sizes = block.value_counts().sort(by=block.name)["count"].to_list()
    for end, size in zip(np.cumsum(sizes).tolist(), sizes, strict=True):
        yield end - size, texts[end - size : end]


def _runs(texts: pl.Series, size: int = N) -> Runs:
    """Return the hashes of every run of `size` words, and of every shorter text as a whole.

    With B odd and all sums modulo 2^64, S[i] = Σ_{k<i} word[k]·B^−k gives the run from i to j as (S[j] − S[i])·B^i: the
    same wherever it stands, for any length, without a loop over words.
    """
    lists = texts.str.extract_all(r"[\p{L}\p{N}]+")
    words = lists.list.len().to_numpy().astype(np.int64)
    hashes = lists.list.explode(keep_nulls=False, empty_as_null=False).hash().to_numpy().astype(np.uint64)
    total = len(hashes)
    powers, inverse = _powers(0x9E3779B97F4A7C15, total), _powers(pow(0x9E3779B97F4A7C15, -1, 2**64), total)
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(hashes * inverse, dtype=np.uint64)])
    lengths = np.minimum(words, size)
    each = np.where(words > 0, words - lengths + 1, 0)
    row = np.repeat(np.arange(len(words)), each)
    begins = np.cumsum(words) - words
    start = begins[row] + np.arange(len(row)) - np.repeat(np.cumsum(each) - each, each)
    length = lengths[row]
    mixed = (sums[start + length] - sums[start]) * powers[start]
    # A multiplication and a shift spread the bits of sums of few terms; the length is part of the key.
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93) + length.astype(np.uint64)
    return Runs(mixed, row, start, length, words)


def _powers(base: int, count: int) -> Hashes:
    """Return base^0 … base^(count − 1) modulo 2^64."""
    steps = np.full(count, base, dtype=np.uint64)
    steps[:1] = 1
    return np.cumprod(steps, dtype=np.uint64)
