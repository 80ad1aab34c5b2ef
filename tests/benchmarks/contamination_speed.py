"""How long it takes to compare evaluation rows with a million training rows, and the memory that it needs.

    python tests/benchmarks/contamination_speed.py [training rows] [words a row]

CPU seconds of this process and its peak resident memory, beside Python sets of 13-word runs on a tenth of the rows.
"""

import random
import resource
import sys
import time

import pyarrow as pa

from assay.components.contracts.rows import Example
from assay.components.shared.contamination import N, find_contamination


def table(texts: list[str], name: str) -> pa.Table:
    """Return rows of one user turn."""
    ids = [f"{name}{place}" for place in range(len(texts))]
    prompts = [[{"role": "user", "content": text}] for text in texts]
    columns = {"id": ids, "group": ids, "prompt": prompts, "reference": ids, "slices": [[]] * len(ids), "source": ids}
    return pa.Table.from_pydict(columns, schema=Example.SCHEMA)


def plain_sets(training: list[str], test: list[str]) -> int:
    """Return the evaluation texts that share a run with training, as one would write it first."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[at : at + N]) for at in range(max(1, len(words) - N + 1))}

    known = {run for text in training for run in runs(text)}
    return sum(not known.isdisjoint(runs(text)) for text in test)


def main(rows: int = 1_000_000, words: int = 30) -> None:
    """Print the table."""
    rng = random.Random(0)
    vocabulary = [f"w{place}" for place in range(20_000)]
    training = [" ".join(rng.choices(vocabulary, k=words)) for _ in range(rows)]
    test = [" ".join(rng.choices(vocabulary, k=words)) for _ in range(rows // 20)]
    test[: rows // 200] = [f"{one} too" for one in training[: rows // 200]]
    splits = {"sft": table(training, "s"), "test": table(test, "t")}
    before, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = find_contamination(splits)
    seconds, after = time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert found.counts["test"]["near"] == rows // 200, found.counts
    print(f"columns: {rows:,} training and {len(test):,} test rows of {words} words: {seconds:.1f} CPU s")
    print(f"         peak memory +{(after - peak) / 1024:,.0f} MB; {found.counts['test']}")
    before = time.process_time()
    shared = plain_sets(training[: rows // 10], test[: rows // 10])
    slow = time.process_time() - before
    print(f"sets:    {rows // 10:,} training rows: {slow:.1f} CPU s ({shared} found)")
    print(f"ratio per training row: {10 * slow / seconds:.1f}")


if __name__ == "__main__":
    main(*(int(one) for one in sys.argv[1:]))
