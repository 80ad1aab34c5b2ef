"""Preference pairs from scored answers.

Answers to one prompt are compared inside a channel only, because scores of different channels have different scales:

* verified  sampled and reference answers, scored by the task's verifier
* edited    a person's edit against the original, of one rater
* rated     ratings of one rater, as z-scores over everything that rater rated

In each channel the best finished answer is matched with the worst one, the second best with the second worst, and so
on, while the margin lasts and the guards hold. Nothing depends on the order of the candidates: ties are broken by hash.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import islice, zip_longest
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple
from unicodedata import normalize

import pyarrow as pa
import pyarrow.parquet as pq

from ..contracts.recipe import PairSettings
from ..contracts.rows import PreferencePair

DROPPED = pa.schema([("prompt_id", pa.string()), ("reason", pa.string())])
MAX_PARTNERS = 16
"""Rejected answers tried for one chosen answer before it is given up: keeps a prompt with many answers linear."""
CHANNELS = {
    "sampled": "verified",
    "reference": "verified",
    "edit": "edited",
    "original": "edited",
    "rating": "rated",
}
ORDER = ("edit>original", "rating>rating", "sampled>sampled", "reference>sampled")
"""Sources by trust: people first. Decides which pairs stay under the cap per prompt."""


class Answer(NamedTuple):
    """One candidate, ready to be compared."""

    text: str
    key: str
    """Its text in normal form: answers of one key are one answer."""
    score: float
    source: str
    finished: bool


class Built(NamedTuple):
    """The pairs, and a reason for everything that gave none."""

    pairs: list[PreferencePair]
    dropped: list[tuple[str, str]]
    """(prompt_id, reason), sorted."""


def build_pairs(candidates: pa.Table, settings: PairSettings) -> Built:
    """Return pairs, at most `max_pairs`, by prompt.

    Args:
        candidates: Columns of `Candidate`, in any order of rows.
        settings: Margins, guards and caps.
    """
    dropped: list[tuple[str, str]] = []
    pairs: list[PreferencePair] = []
    for rows in _by_prompt(_standardised(_usable(candidates.to_pylist(), dropped), dropped)):
        found: list[PreferencePair] = []
        for channel in _channels(rows):
            matched, reason = match(channel, settings)
            found += [_pair(rows[0], chosen, rejected) for chosen, rejected in matched]
            dropped += [(rows[0]["prompt_id"], reason)] if reason else []
        pairs += settle(found, settings, dropped)
    kept = _capped(pairs, settings, dropped)
    return Built(sorted(kept, key=lambda pair: (pair.prompt_id, _hash(pair))), sorted(dropped))


def normalise(text: str) -> str:
    """Return the text with Unicode width (NFKC) and runs of white space folded."""
    return " ".join(normalize("NFKC", text).split())


def match(answers: list[Answer], settings: PairSettings) -> tuple[list[tuple[Answer, Answer]], str]:
    """Return (chosen, rejected) pairs of one channel of one prompt, or none and the reason.

    An answer stands in one pair at most.
    """
    answers = distinct(answers)
    if len(answers) < 2:
        return [], "single answer"
    losers = [answer for answer in reversed(answers) if answer.source not in ("edit", "reference")]
    winners = _winners(answers)
    if not winners:
        return [], "no finished answer to choose"
    pairs: list[tuple[Answer, Answer]] = []
    reasons: list[str] = []
    used: set[str] = set()
    for chosen in winners:
        if len(pairs) == settings.max_pairs_per_prompt:
            break
        rejected = None if chosen.key in used else _partner(chosen, losers, used, settings, reasons)
        if rejected:
            pairs.append((chosen, rejected))
            used |= {chosen.key, rejected.key}
    return pairs, "" if pairs else next(iter(reasons), "no answer to reject")


def distinct(answers: Iterable[Answer]) -> list[Answer]:
    """Return answers of different text, best first.

    Of one text the finished copies count, with their mean score; a sampled copy is preferred to the reference.
    """
    copies: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        copies[answer.key].append(answer)
    merged = []
    for same in copies.values():
        ended = [answer for answer in same if answer.finished] or same
        first = min(ended, key=lambda answer: (answer.source == "reference", answer.source, answer.text))
        merged.append(first._replace(score=fmean(sorted(answer.score for answer in ended))))
    return sorted(merged, key=lambda answer: (-answer.score, answer.source == "reference", _digest(answer.key)))


def _winners(answers: list[Answer]) -> list[Answer]:
    """Return the answers that may be chosen: the reference only if no sample is as good."""
    ended = [answer for answer in answers if answer.finished and answer.source != "original"]
    own = max((answer.score for answer in ended if answer.source == "sampled"), default=-math.inf)
    return [answer for answer in ended if answer.source != "reference" or answer.score > own]


def _partner(
    chosen: Answer, losers: list[Answer], used: set[str], settings: PairSettings, reasons: list[str]
) -> Answer | None:
    """Return the worst answer that makes a fair pair with `chosen`; add to `reasons` why others did not."""
    free = (answer for answer in losers if answer.key not in used and answer.key != chosen.key)
    for rejected in islice(free, MAX_PARTNERS):
        reason = _objection(chosen, rejected, settings)
        if not reason:
            return rejected
        reasons.append(reason)
    return None


def _objection(chosen: Answer, rejected: Answer, settings: PairSettings) -> str:
    margin = chosen.score - rejected.score
    if margin <= 0:
        return "tie" if margin == 0 else "chosen answer scored lower"
    if margin < settings.min_margin:
        return "margin below min_margin"
    if len(chosen.text) > settings.max_length_ratio * len(rejected.text):
        return "chosen answer too long"
    return ""


def _usable(rows: Iterable[dict[str, Any]], dropped: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield the rows whose score is a number and whose answer is not empty."""
    for row in rows:
        if row["score"] is None or not math.isfinite(row["score"]):
            dropped.append((row["prompt_id"], "score is not a number"))
        elif not normalise(row["response"]):
            dropped.append((row["prompt_id"], "empty answer"))
        else:
            yield row


def _standardised(rows: Iterable[dict[str, Any]], dropped: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield the rows with ratings as z-scores of their rater; a rater who gives one score only says nothing."""
    rows = list(rows)
    ratings: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["source"] == "rating":
            ratings[row["rater"]].append(row["score"])
    scale = {rater: (fmean(sorted(scores)), pstdev(sorted(scores))) for rater, scores in ratings.items()}
    for row in rows:
        if row["source"] != "rating":
            yield row
            continue
        mean, spread = scale[row["rater"]]
        if spread > 0:
            yield {**row, "score": (row["score"] - mean) / spread}
        else:
            dropped.append((row["prompt_id"], "rater gives one score only"))


def _by_prompt(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    prompts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        prompts[row["prompt_id"]].append(row)
    yield from (prompts[key] for key in sorted(prompts))


def _channels(rows: list[dict[str, Any]]) -> Iterator[list[Answer]]:
    channels: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for row in rows:
        channel, rater = CHANNELS[row["source"]], row["rater"] or ""
        text = row["response"]
        answer = Answer(text, normalise(text), row["score"], row["source"], row["finished"] is not False)
        channels[channel, "" if channel == "verified" else rater].append(answer)
    yield from (channels[key] for key in sorted(channels))


def _pair(row: dict[str, Any], chosen: Answer, rejected: Answer) -> PreferencePair:
    return PreferencePair(
        prompt_id=row["prompt_id"],
        group=row["group"],
        prompt=row["prompt"],
        chosen=chosen.text,
        rejected=rejected.text,
        margin=chosen.score - rejected.score,
        source=f"{chosen.source}>{rejected.source}",
    )


def settle(pairs: list[PreferencePair], settings: PairSettings, dropped: list[tuple[str, str]]) -> list[PreferencePair]:
    """Return the pairs of one prompt without contradictions (A>B and B>A), repeats, and those over its cap."""
    keys = {(normalise(pair.chosen), normalise(pair.rejected)) for pair in pairs}
    kept: dict[tuple[str, str], PreferencePair] = {}
    for pair in sorted(pairs, key=lambda pair: (ORDER.index(pair.source), -pair.margin, _hash(pair))):
        key = (normalise(pair.chosen), normalise(pair.rejected))
        reason = ""
        if key[::-1] in keys:
            reason = "contradiction"
        elif key in kept:
            reason = "repeat"
        elif len(kept) == settings.max_pairs_per_prompt:
            reason = "over max_pairs_per_prompt"
        else:
            kept[key] = pair
        dropped += [(pair.prompt_id, reason)] if reason else []
    return list(kept.values())


def _capped(
    pairs: list[PreferencePair], settings: PairSettings, dropped: list[tuple[str, str]]
) -> list[PreferencePair]:
    """Return `max_pairs` pairs picked by hash, in turn from those whose chosen answer is longer and from the others.

    A model that learns that the longer answer wins has learned the wrong thing (Singhal et al. 2023, arXiv:2310.03716).
    """
    ranked = sorted(pairs, key=_hash)
    longer = [pair for pair in ranked if len(pair.chosen) > len(pair.rejected)]
    others = [pair for pair in ranked if len(pair.chosen) <= len(pair.rejected)]
    mixed = [pair for both in zip_longest(longer, others) for pair in both if pair]
    dropped += [(pair.prompt_id, "over max_pairs") for pair in mixed[settings.max_pairs :]]
    return mixed[: settings.max_pairs]


def write_dropped(path: Path, dropped: list[tuple[str, str]]) -> int:
    """Write (prompt_id, reason) rows as Parquet and return their number."""
    columns = {name: [row[at] for row in dropped] for at, name in enumerate(DROPPED.names)}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pydict(columns, schema=DROPPED), path, compression="zstd")
    return len(dropped)


def _hash(pair: PreferencePair) -> str:
    return _digest("\0".join((pair.prompt_id, pair.chosen, pair.rejected)))


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()
