"""One run on one page: what was decided, what speaks for it, and where it came from."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..contracts.artifacts import Manifest, digest_of, read_manifest
from ..contracts.errors import DataError
from ..contracts.metrics import Metric, Summary
from ..contracts.recipe import GRADES, Kind, Recipe
from ..contracts.rows import Example, Result, read_rows
from ..shared.advice import Cost, advise, read_facts
from ..shared.summary import read_seconds, read_summary
from . import cases, figures
from .words import AFTER, BEFORE, NOTHING, cell, duration, gain, number, p_value, percent, plain, points, signed

SERIES = {
    "loss": "Loss",
    "reward": "Mean reward",
    "exact": "Right answers sampled",
    "token_accuracy": "Answer tokens foreseen",
    "accuracy": "Pairs ranked right",
    "margin": "Reward margin",
    "divergence": "Distance to the teacher",
    "kl": "KL from the start, nats per token",
    "value_loss": "Value loss",
    "informative_groups": "Groups with a gradient",
}
"""Numbers of a training curve that are worth a figure, by name."""
SCORE = Metric(
    name="judge_score",
    title="Judge score",
    better="higher",
    unit="points",
    low=GRADES[0],
    high=GRADES[-1],
    definition="The judge's grade by its rubric, 1 to 5, on examples it was shown; a reply without one is left out. "
    "Where it is marked as advisory, the grades' agreement with labels is below the floor, and they decide nothing.",
)
OWN_SERIES = {"embedding": {"accuracy": "Questions with their passage first in the batch"}}
"""Where a stage's number of that name is another one."""
LIGHT = ("validation", "splits", "pairs")
"""Steps that are of the kind `light`; those of a stage are `train`, any other `generate`."""
SIDE = {"lower": "below", "higher": "above"}
"""Of a bound, on which a metric is right."""
ERROR_RATES = Path(__file__).parent / "error_rates.json"
"""What `tests/benchmarks/gate_error_rates.py` measured."""
RULES = {
    "point ≥": "Not below",
    "point >": "Above",
    "drop ≤ 1 pp": "Drop within 1 point",
    "unpaired": "Unpaired intervals",
    "McNemar": "McNemar at α",
    "McNemar, spent": "McNemar at the gate's level",
    "gate, looks: 1": "This gate, one look",
    "gate, default": "This gate",
}
"""Rules that promote, by the names that the benchmark gives them, with what heads their columns."""
DRAWN = {"point ≥": "dotted", "drop ≤ 1 pp": "dashed", "McNemar": "thin", "gate, default": "own"}
"""Rules of the figures by examples, with their lines."""
LATER = {"point ≥": "dotted", "gate, α each time": "thin", "gate, default": "own"}
"""Those of the figure over retrains: one metric at α each time is McNemar's test each time."""
EFFECTS = {"-0.05": "Five points worse", "+0": "Unchanged", "+0.05": "Five points better"}
"""How good the candidate truly is, by the names that the benchmark gives it."""
STATES = {True: "pass", False: "fail", None: "open"}
VERDICTS = {"pass": "Pass", "fail": "Fail", "open": "Open"}
SLICE_VERDICTS = {"pass": "No worse", "fail": "Worse", "open": "Either"}


@dataclass(frozen=True)
class Run:
    """Everything that the page shows, read and verified."""

    recipe: Recipe
    version: int
    decision: dict[str, Any]
    results: dict[str, dict[str, Result]]
    """By arm and example."""
    examples: dict[str, Example]
    summaries: dict[str, Summary]
    """By the names of `Run.steps`; a stage that the recipe leaves out is absent."""
    seconds: dict[str, float | None]
    manifests: dict[str, Manifest]

    @classmethod
    def read(
        cls,
        recipe: Recipe,
        version: int,
        decision: str | Path,
        results: str | Path,
        data: str | Path,
        summaries: Mapping[str, str | Path],
    ) -> "Run":
        """Read the artifacts of a run.

        Args:
            recipe: What the run was compiled from.
            version: 0 when nothing was promoted.
            decision: Folder of the gate's decision.
            results: Folder of `Result` rows.
            data: Folder of the splits.
            summaries: Folder of each step's summary, by the names of `Run.steps`.

        Raises:
            DataError: An artifact is missing, of another kind, or was changed.
        """
        manifests = {
            "data": read_manifest(data, "splits"),
            "results": read_manifest(results, "results"),
            "decision": read_manifest(decision, "decision"),
        }
        manifests |= {name: read_manifest(folder, "summary") for name, folder in summaries.items()}
        rows: dict[str, dict[str, Result]] = {}
        for row in read_rows(Path(results) / "results.parquet", Result):
            rows.setdefault(row.arm, {})[row.example_id] = row
        return cls(
            recipe=recipe,
            version=version,
            decision=json.loads((Path(decision) / "decision.json").read_bytes(), parse_constant=lambda _: None),
            results=rows,
            examples={row.id: row for row in read_rows(Path(data) / "test.parquet", Example)},
            summaries={name: read_summary(folder) for name, folder in summaries.items()},
            seconds={name: read_seconds(folder) for name, folder in summaries.items()},
            manifests=manifests,
        )

    def details(self, name: str) -> dict[str, Any]:
        """Return the tables of a step's summary; empty where the step did not run."""
        return dict(self.summaries[name].details) if name in self.summaries else {}

    @property
    def titles(self) -> dict[str, str]:
        """Arm to its title, in the order of the climb."""
        return BEFORE | self.recipe.stages | AFTER

    @property
    def trained(self) -> dict[str, str]:
        """Training step to its title: the stages, and before RL the reward model that it maximises."""
        stages = dict(self.recipe.stages)
        last = {"rl": stages.pop("rl")} if "rl" in stages else {}
        return stages | ({"reward_model": "reward model"} if self.recipe.reward_model else {}) | last

    @property
    def steps(self) -> dict[str, str]:
        """Step to its title, in the order of the graph."""
        steps = {"validation": "Validate data", "splits": "Prepare data"}
        for stage, title in self.trained.items():
            if stage in ("preference", "reward_model"):
                steps |= {"candidates": "Sample candidates", "pairs": "Build preference pairs"}
            steps |= {stage: f"Train {title}"}
            if stage in self.recipe.stages:
                steps |= {f"select_{stage}": f"Select after {title}"}
        asked = {"benchmarking": "Ask benchmarks"} if "benchmarking" in self.summaries else {}
        return steps | {"evaluation": "Evaluate every arm"} | asked | {"judging": "Judge"}

    @property
    def metrics(self) -> list[Metric]:
        """The task's metrics, the primary one first.

        Raises:
            DataError: The evaluation names none.
        """
        metrics = [Metric.model_validate(metric) for metric in self.details("evaluation").get("metrics") or []]
        if not metrics:
            raise DataError("the evaluation's summary names no metric", where="evaluation: details.metrics")
        return metrics

    @property
    def harm(self) -> Metric | None:
        """The metric to look at beside the primary one.

        The policy's first critical one; without one the first of which lower is better, else the second.
        """
        others = self.metrics[1:]
        critical = [one.metric for one in self.recipe.gate.criteria if one.tier == "critical"]
        named = [metric for name in critical for metric in others if metric.name == name]
        if named:
            return named[0]
        return next((metric for metric in others if metric.better == "lower"), next(iter(others), None))

    @property
    def digests(self) -> dict[str, str]:
        """Arm to the content digest of its model."""
        return dict(self.manifests["results"].metadata.get("arms") or {})

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """Arm to its table of metrics, in the order of the climb."""
        tables = self.details("evaluation").get("arms") or self.decision.get("arms") or {}
        return {
            arm: tables[arm] for arm in [*self.titles, *sorted(tables.keys() - self.titles.keys())] if arm in tables
        }


def render(run: Run) -> str:
    """Return the page: the same bytes for the same artifacts."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "duration": duration, "percent": percent}
    page = environment.get_template("report.html.j2").render(
        recipe=run.recipe,
        banner=banner(run),
        keys=key_numbers(run),
        climb=climb(run),
        benchmarks=benchmarks(run),
        stages=stages(run),
        advice=advice(run),
        gate=gate(run),
        judge=judge(run),
        slices=slices(run),
        training=training(run),
        cases=compare(run),
        missed=missed(run),
        data=data(run),
        lineage=lineage(run),
        task=run.recipe.task,
        recipe_text=yaml.safe_dump(run.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )
    return page + "\n"


def banner(run: Run) -> dict[str, str]:
    """Return the decision in a few words, its state, and the gate's reason."""
    verdict, needed = run.decision["decision"], run.decision.get("needed")
    if verdict == "promote":
        waits = "Passed the gate, awaits approval" if run.recipe.approval.required else "Passed the gate"
        words = f"Promoted as version {run.version}" if run.version else waits
        state, mark = "pass", "✓"
    elif verdict == "hold":
        words, state, mark = "Held", "fail", "✕"
    else:
        more = max(0, int(needed) - int(run.decision.get("examples") or 0)) if needed else 0
        words = f"Inconclusive, needs {more:,} more held-out examples" if more else "Inconclusive"
        state, mark = "open", "?"
    reason = str(run.decision.get("reason") or "")
    # The banner says the verdict in its own words; the gate's sentence need not begin with it again.
    said, _, rest = reason.partition(": ")
    reason = rest[:1].upper() + rest[1:] if rest and said.lower() == verdict else reason
    return {"words": words, "state": state, "mark": mark, "reason": reason}


def key_numbers(run: Run) -> list[dict[str, Any]]:
    """Return base → candidate on the two metrics to look at first."""
    arms, shown = run.arms, []
    for metric in [run.metrics[0], run.harm]:
        if metric is None or "candidate" not in arms or "baseline" not in arms:
            continue
        before, after = cell(arms["baseline"], metric), cell(arms["candidate"], metric)
        if before["mean"] is None or after["mean"] is None:
            continue
        change = _oriented(metric, after["mean"] - before["mean"])
        champion = cell(arms["champion"], metric) if "champion" in arms else None
        shown.append(
            {
                "metric": metric,
                "before": before,
                "after": after,
                "champion": champion,
                "change": gain(metric, after["mean"] - before["mean"]),
                "unit": "points" if metric.unit == "share" else metric.unit,
                "good": change > 0,
                "bad": change < 0,
            }
        )
    return shown


def climb(run: Run) -> dict[str, Any]:
    """Return a dot plot for each metric, and the table behind them."""
    arms, metrics = run.arms, run.metrics
    same = _same_as_candidate(run)
    charts = []
    for metric in metrics:
        dots = [
            figures.Dot(run.titles.get(arm, arm), found["mean"], found["low"], found["high"], strong=arm == "candidate")
            for arm, found in ((arm, cell(table, metric)) for arm, table in arms.items())
        ]
        title = f"{metric.title} by arm, {metric.better} is better"
        charts.append({"metric": metric, "svg": figures.dot_plot(title, dots, number(metric), metric.high)})
    graded = run.details("judging").get("grades") or {}
    scores = graded.get("arms") or {}
    rows = [
        {
            "arm": run.titles.get(arm, arm),
            "strong": arm == "candidate",
            "same": same if arm == "candidate" else "",
            "cells": [
                *(cell(table, metric) for metric in metrics),
                *([cell({SCORE.name: scores.get(arm)}, SCORE)] if scores else []),
            ],
        }
        for arm, table in arms.items()
    ]
    return {
        "charts": charts,
        "metrics": [*metrics, *([SCORE] if scores else [])],
        "advisory": {SCORE.name} if scores and not graded.get("may_decide") else set(),
        "rows": rows,
        "same": same,
        "champion": "champion" in arms,
        "confidence": percent(run.recipe.evaluate.confidence),
    }


def benchmarks(run: Run) -> dict[str, Any]:
    """Return the table of third-party benchmarks, arm by metric; empty where none was asked."""
    told = run.details("benchmarking")
    arms, seen = told.get("arms") or {}, told.get("contamination") or {}
    dirty = sum(counts["exact"] + counts["near"] for counts in seen.values())
    return {
        "metrics": (metrics := _benchmark_metrics(run)),
        "rows": [
            {
                "arm": run.titles.get(arm, arm),
                "strong": arm == "candidate",
                "cells": [cell(arms[arm], metric) for metric in metrics],
            }
            for arm in run.titles
            if arm in arms
        ],
        "questions": sum(counts["rows"] for counts in seen.values()),
        "dirty": dirty,
        "confidence": percent(run.recipe.benchmarks.confidence) if run.recipe.benchmarks else "",
    }


def _benchmark_metrics(run: Run) -> list[Metric]:
    return [Metric.model_validate(metric) for metric in run.details("benchmarking").get("metrics") or []]


def _same_as_candidate(run: Run) -> str:
    """Return the stage whose model the candidate is, by content digest."""
    digests = run.digests
    mine = digests.get("candidate")
    found = [title for arm, title in run.recipe.stages.items() if mine and digests.get(arm) == mine]
    if found:
        return found[-1]
    return "the base model" if mine and digests.get("baseline") == mine else ""


def stages(run: Run) -> list[dict[str, Any]]:
    """Return for each stage whether its model replaced its input, and why."""
    by_name, rows = {metric.name: metric for metric in run.metrics}, []
    for stage, title in run.recipe.stages.items():
        chosen = run.details(f"select_{stage}")
        row: dict[str, Any] = {"title": title, "state": "absent", "verdict": "Not in this run", "reason": ""}
        if chosen:
            kept = chosen.get("chosen") == "challenger"
            row |= {"state": "pass" if kept else "fail", "verdict": "Kept" if kept else "Left out"}
            row["reason"] = str(chosen.get("reason") or "")
            metric = by_name.get(str(chosen.get("metric")))
            row |= _measured(chosen, metric) if metric else {}  # a stage may go by something that is not of the task
        elif stage in run.summaries and len(run.recipe.stages) == 1:
            row |= {"state": "pass", "verdict": "The candidate", "reason": "There is no other stage; the gate decides."}
        elif stage in run.summaries:
            row |= {"state": "open", "verdict": "Trained, not compared"}
        rows.append(row)
    return rows


def _measured(chosen: Mapping[str, Any], metric: Metric) -> dict[str, Any]:
    difference = chosen.get("difference") or {}
    ends = [gain(metric, difference.get(end)) for end in ("low", "high")]
    return {
        "metric": metric.title,
        "before": cell(chosen.get("incumbent") or {}, metric)["text"],
        "after": cell(chosen.get("challenger") or {}, metric)["text"],
        "difference": gain(metric, difference.get("mean")),
        "interval": "" if NOTHING in ends else f"{ends[0]} to {ends[1]}",
    }


def advice(run: Run) -> str:
    """Return in a few sentences the lowest rung that suffices; nothing where the run has no evaluation or splits."""
    if not {"evaluation", "splits"} <= run.summaries.keys():
        return ""
    selections = {
        stage: run.summaries[f"select_{stage}"] for stage in run.trained if f"select_{stage}" in run.summaries
    }
    costs = {}
    for stage in run.recipe.stages:
        made = {"preference": ("candidates", "pairs"), "rl": ("reward_model",)}.get(stage, ())
        known = [run.seconds.get(name) for name in (*made, stage, f"select_{stage}")]
        if run.seconds.get(stage):
            costs[stage] = Cost(sum(one for one in known if one), "as it took in this run")
    facts = read_facts(run.recipe, run.summaries["splits"], run.summaries["evaluation"], selections, costs)
    return advise(facts).words()


def gate(run: Run) -> dict[str, Any]:
    """Return the criteria with a forest plot for each reference; gains are to the right for every metric."""
    by_name = {metric.name: metric for metric in [*_benchmark_metrics(run), *run.metrics]}
    found = [_criterion(one, by_name) for name in ("criteria", "slices") for one in run.decision.get(name) or []]
    policy, alpha = run.decision.get("policy") or {}, run.decision.get("alpha")
    level = run.decision.get("level") or alpha  # a record of old has no level, and one without any α left has 0
    return {
        "groups": [
            _forest(title, [one for one in found if one["against"] == title])
            for title in dict.fromkeys(one["against"] for one in found)
        ],
        "level": None if level is None else percent(1 - 2 * level),
        "slice_level": None if alpha is None else percent(1 - 2 * alpha),
        "policy": policy,
        "policy_text": yaml.safe_dump(policy, sort_keys=False, allow_unicode=True),
        "alpha": alpha,
        "look": run.decision.get("look"),
        "spent": points(run.decision.get("level") or 0),
        "examples": run.decision.get("examples"),
        "needed": run.decision.get("needed"),
        "wrong": error_rates(run.decision.get("examples")),
    }


def error_rates(examples: int | None) -> dict[str, Any]:
    """Return how often the gate is wrong, as it was measured once, beside the rules that others use.

    Args:
        examples: Held-out examples of this run, to be marked in the figures.
    """
    told = json.loads(ERROR_RATES.read_bytes())
    sizes, later = told["sizes"], told["retrains"]
    charts = []
    for effect, title in EFFECTS.items():
        lines = {name: [rates[rule] for rates in told["rates"][effect]] for rule, name in DRAWN.items()}
        spoken = f"{title}: share promoted, by held-out examples"
        charts.append({"title": title, "svg": figures.curves(spoken, sizes, lines, percent, examples)})
    lines = {name: later["rates"][rule] for rule, name in LATER.items()}
    spoken = "Unchanged retrains: promoted at least once, by their number"
    drawn = figures.curves(spoken, range(1, len(lines["own"]) + 1), lines, percent)
    charts.append({"title": "Unchanged, k retrains", "svg": drawn})
    return {
        **{name: told[name] for name in ("alpha", "first", "worst")},
        "repetitions": f"{told['repetitions']:,}",
        "right": percent(told["accuracy"]),
        "flipped": percent(told["flipped"]),
        "retrained": later["n"],
        "charts": charts,
        "legend": [(figures.sample(name), RULES[rule]) for rule, name in DRAWN.items()],
        "rules": list(RULES.values()),
        "rows": [
            {"title": title, "n": n, "cells": [percent(rates[rule]) for rule in RULES]}
            for effect, title in EFFECTS.items()
            for n, rates in zip(sizes, told["rates"][effect], strict=True)
        ],
    }


def _forest(title: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the criteria, or the slices, against one reference on a scale of their own."""
    ends = [one[name] for one in found for name in ("gain", "low", "high", "threshold")]
    scale = _scale([0.0, *(end for end in ends if end is not None)])
    rows = []
    for one in found:
        dot = figures.Dot("", one["gain"], one["low"], one["high"])
        spoken = f"{one['metric'].title} {one['slice']} against the {one['versus']}: "
        spoken += f"gain {one['gain_text']}, interval {one['interval']}"
        rows.append(one | {"svg": figures.strip(spoken, dot, scale, one["threshold"], one["state"])})
    shares = all(one["metric"].unit == "share" for one in found)
    axis = figures.strip_axis(scale, _tick(shares))
    return {"title": title, "versus": found[0]["versus"], "rows": rows, "shares": shares, "axis": axis}


def _tick(shares: bool) -> Callable[[float], str]:
    """Return what writes a gain on the axis: of shares in points, with a sign."""
    return lambda value: signed(f"{100 * value if shares else value:+.3g}")


def _scale(values: Sequence[float]) -> figures.Scale:
    """Return the scale of the forest plot: all intervals, a little air, never empty."""
    low, high = min(values, default=-0.1), max(values, default=0.1)
    air = max((high - low) * 0.06, 0.01)
    return figures.Scale(low - air, high + air, 6, 234)


def _criterion(one: Mapping[str, Any], by_name: Mapping[str, Metric]) -> dict[str, Any]:
    """Return a criterion with its numbers as text; its difference is a gain: above 0 the candidate is better."""
    name = str(one["metric"])
    metric = by_name.get(name) or Metric(name=name, title=plain(name).capitalize(), better="higher", definition="")
    worth, low, high = one.get("difference"), one.get("low"), one.get("high")
    margin = float(one.get("margin") or 0)
    lower, bound = one.get("test") == "non_inferiority", one.get("test") == "bound"
    ends = (NOTHING if low is None else gain(metric, low), NOTHING if high is None else gain(metric, high))
    passed, part = one.get("passed"), str(one.get("slice") or "")
    versus = "bound" if bound else (BEFORE | AFTER).get(str(one.get("versus")), str(one.get("versus"))).lower()
    state = STATES.get(passed, "open")
    return {
        "metric": metric,
        "tier": str(one.get("tier") or ""),
        "slice": f"where {part}" if part else "",
        "versus": versus,
        "against": f"Slices against the {versus}" if part else f"Against the {versus}",
        "test": SIDE[metric.better] if bound else _wanted(metric, margin, lower),
        "threshold": -margin if lower else margin,
        "n": one.get("n"),
        "candidate": cell({name: {"mean": one.get("candidate")}}, metric)["text"],
        "reference": cell({name: {"mean": one.get("reference")}}, metric)["text"],
        "gain": worth,
        "low": low,
        "high": high,
        "gain_text": gain(metric, worth),
        "interval": "" if low is None and high is None else f"{ends[0]} to {ends[1]}",
        "p_value": p_value(one.get("p_value")),
        "state": state,
        "verdict": (SLICE_VERDICTS if part else VERDICTS)[state],
        "note": str(one.get("note") or ""),
        "needed": one.get("needed"),
    }


def _wanted(metric: Metric, margin: float, lower: bool) -> str:
    """Return what a criterion asks, so that a reference can follow it."""
    amount = gain(metric, margin).lstrip("+") + (" points" if metric.unit == "share" else "")
    if lower:
        return f"less than {amount} worse than" if margin else "no worse than"
    return f"more than {amount} better than" if margin else "better than"


def _oriented(metric: Metric, value: float) -> float:
    return value if metric.better == "higher" else -value


def judge(run: Run) -> dict[str, Any]:
    """Return the judge's card: its verdicts, and how far it may be believed."""
    card = run.details("judging") or dict(run.decision.get("judge") or {})
    rate, agreement, floor = card.get("win_rate") or {}, card.get("agreement") or {}, card.get("floor")
    scale = figures.Scale(0, 1, 6, 234)

    def bar(title: str, found: Mapping[str, Any], threshold: float, state: str) -> Any:
        dot = figures.Dot("", found["mean"], found.get("low"), found.get("high"))
        return figures.strip(title, dot, scale, threshold, state)

    may = bool(card.get("may_decide"))
    # Every row: title, what stands under it, number, figure.
    wanted = [
        ("Win rate", "dashed at one half", rate, 0.5, "open"),
        ("Win rate, corrected", "by labels of a part", _corrected(card), 0.5, "open"),
        ("Agreement with labels", f"dashed at the floor, {percent(floor or 0)}", agreement, floor or 0, STATES[may]),
    ]
    return {
        "headline": run.summaries["judging"].headline if "judging" in run.summaries else "",
        "present": bool(card.get("n")),
        "backend": card.get("backend") or run.recipe.judge.backend,
        "card": card,
        "may_decide": may,
        "rows": [
            {
                "title": title,
                "sub": sub,
                "text": _share(found),
                "svg": bar(title, found, line, state) if found.get("mean") is not None else "",
            }
            for title, sub, found, line, state in wanted
            if found
        ],
        "axis": figures.strip_axis(scale, percent),
        "compared": [run.titles.get(str(arm), str(arm)) for arm in card.get("compared") or ["candidate", "baseline"]],
        "rubric": card.get("rubric") or {},
        "facts": _reliability(card),
        "grades": _grades(run, card.get("grades") or {}),
    }


def _corrected(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the corrected win rate; nothing where there are labels of all, for it is theirs alone then."""
    found: dict[str, Any] = card.get("win_rate_corrected") or {}
    return found if found.get("predicted") else {}


def _reliability(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what else speaks for and against believing the judge, each with its title."""
    labels, alpha = card.get("labels") or {}, card.get("alpha")
    return [
        ("Same verdict when swapped", _share(card.get("swap_consistency") or {})),
        ("Names what stands first", _share(card.get("first") or {})),
        ("Cohen's kappa with labels", _plain_interval(card.get("kappa") or {})),
        (
            "Prefers the longer answer",
            f"{_share(card.get('longer') or {})}; labels do: {_share(card.get('labels_longer') or {})}",
        ),
        (
            "No opinion, or unreadable",
            f"{card.get('abstained', 0)} tied in both orders, {card.get('unparsed', 0)} not read",
        ),
        *([("Judges", ", ".join(card["judges"]))] if len(card.get("judges") or {}) > 1 else []),
        *([("Alpha among judges", signed(points(alpha)))] if alpha is not None else []),
        *([("People's labels", f"{labels['used']} of {labels['given']} are of these answers")] if labels else []),
    ]


def _plain_interval(found: Mapping[str, Any]) -> str:
    if found.get("mean") is None:
        return NOTHING
    mean, low, high = (signed(points(found[end])) for end in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _grades(run: Run, graded: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the judge card says of the grades; None where there are none."""
    if not graded:
        return None
    difference, alpha = graded["difference"], graded.get("alpha")
    missing = [(run.titles.get(arm, arm), found["unparsed"]) for arm, found in graded["arms"].items()]
    kappa, corrected = graded["kappa"], difference.get("corrected") or {}
    return {
        "may_decide": graded["may_decide"],
        "facts": [
            ("Difference", f"{_gain(difference)}, n = {difference['n']}"),
            *(
                [("Difference, corrected", f"{_gain(corrected)} by labels of {corrected['n']}")]
                if corrected.get("n")
                else []
            ),
            ("Higher grade is the labels' winner", _share(graded["agreement"])),
            *([("Weighted kappa with people", _plain_interval(kappa))] if kappa["n"] else []),
            *([("Alpha among judges, ordinal", signed(points(alpha)))] if alpha is not None else []),
            ("Replies without a grade", ", ".join(f"{arm} {count}" for arm, count in missing if count) or "none"),
        ],
    }


def _gain(found: Mapping[str, Any]) -> str:
    mean, low, high = (gain(SCORE, found.get(end)) for end in ("mean", "low", "high"))
    return mean if found.get("mean") is None else f"{mean} ({low} to {high})"


def _share(found: Mapping[str, Any]) -> str:
    if found.get("mean") is None:
        return NOTHING
    low, high = found.get("low"), found.get("high")
    interval = "" if low is None or high is None else f" ({percent(low)} to {percent(high)})"
    return percent(found["mean"]) + interval


def slices(run: Run) -> list[dict[str, Any]]:
    """Return a heat table for the primary metric and for the one beside it; the better, the deeper."""
    tables: dict[str, dict[str, Any]] = run.details("evaluation").get("slices") or {}
    shown = []
    for metric in [run.metrics[0], run.harm]:
        if metric is None:
            continue
        rows = [_slice(name, table, metric, list(run.arms)) for name, table in sorted(tables.items())]
        rows = [row for row in rows if row["n"]]
        if rows:
            shown.append({"metric": metric, "arms": [run.titles.get(arm, arm) for arm in run.arms], "rows": rows})
    return shown


def _slice(name: str, table: Mapping[str, Any], metric: Metric, arms: Sequence[str]) -> dict[str, Any]:
    cells = [cell(table.get(arm) or {}, metric) for arm in arms]
    span = (metric.high - metric.low) or 1.0
    for one in cells:
        share = 0.0 if one["mean"] is None else min(max((one["mean"] - metric.low) / span, 0), 1)
        one["heat"] = (
            "" if one["mean"] is None else f"{round(100 * (share if metric.better == 'higher' else 1 - share))}"
        )
    known = dict(zip(arms, cells, strict=True))
    before, after = (known.get(arm, {}).get("mean") for arm in ("baseline", "candidate"))
    change = None if before is None or after is None else after - before
    return {
        "key": name.partition("=")[0],
        "value": name.partition("=")[2] or name,
        "n": max((one["n"] for one in cells), default=0),
        "cells": cells,
        "change": gain(metric, change),
        "worse": change is not None and _oriented(metric, change) < 0,
    }


def training(run: Run) -> list[dict[str, Any]]:
    """Return the curves of each training step, and whether it had an effect at all."""
    shown = []
    for stage, title in run.trained.items():
        if stage not in run.summaries:
            continue
        details = run.details(stage)
        effect = details.get("effect") or {}
        shown.append(
            {
                "title": title,
                "headline": run.summaries[stage].headline,
                "charts": _curves(title, details.get("curve") or [], SERIES | OWN_SERIES.get(stage, {})),
                "ok": effect.get("ok"),
                "checks": effect.get("checks") or {},
                "facts": _facts(run, stage, details, effect),
            }
        )
    return shown


def _facts(run: Run, stage: str, details: Mapping[str, Any], effect: Mapping[str, Any]) -> list[str]:
    """Return a training step's small print: amounts, what was dropped, the change of the weights, the time."""
    tokens, change = run.summaries[stage].metrics.get("tokens"), effect.get("weight_change")
    dropped = [f"{count:,} dropped: {plain(name)}" for name, count in (details.get("dropped") or {}).items() if count]
    return [
        *([f"{details['examples']:,} examples"] if details.get("examples") is not None else []),
        *([f"{tokens:,.0f} tokens"] if tokens else []),
        *dropped,
        *([f"weights changed by {100 * change:.2g}%"] if change is not None else []),
        *([duration(run.seconds[stage])] if run.seconds.get(stage) is not None else []),
    ]


def _curves(title: str, curve: Sequence[Mapping[str, float]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    charts = []
    # The loss of a policy gradient says nothing of progress: it stands near zero by construction.
    wanted = [name for name in names if not (name == "loss" and any("reward" in point for point in curve))]
    for name in wanted:
        known = [point for point in curve if point.get(name) is not None and math.isfinite(point[name])]
        line = [(float(point["step"]), float(point[name])) for point in known]
        if not line:
            continue
        first, last = points(line[0][1]), points(line[-1][1])
        label = f"{title}: {names[name]} from {first} to {last}"
        charts.append(
            {"name": names[name], "first": first, "last": last, "svg": figures.line_chart(label, line, points)}
        )
    return charts


def compare(run: Run) -> list[dict[str, Any]]:
    """Return the examples won and lost against the base model, SFT and the champion, each if it is another model."""
    if "candidate" not in run.results:
        return []
    digests = run.digests
    lower = _lower(run)
    return [
        cases.compare(run.results, run.examples, other, run.titles.get(other, other), run.metrics[0], lower)
        | {"harm": lower}
        for other in ("baseline", "champion", "sft")
        if other in run.results and (other not in digests or digests[other] != digests.get("candidate"))
    ]


def missed(run: Run) -> dict[str, Any] | None:
    """Return what the candidate still does wrong where it matters, beside what it would replace."""
    harm = _lower(run)
    other = next((arm for arm in ("champion", "baseline") if arm in run.results), None)
    if harm is None or other is None or "candidate" not in run.results:
        return None
    return cases.missed(run.results, run.examples, other, run.titles[other], harm)


def _lower(run: Run) -> Metric | None:
    """Return the metric of harm, if lower is better of it."""
    return run.harm if run.harm is not None and run.harm.better == "lower" else None


def data(run: Run) -> dict[str, Any]:
    """Return what came in, what was refused and why, and where the rest went."""
    checked, parted = run.details("validation"), run.details("splits")
    found = parted.get("splits") or {}
    order = [name for name in run.recipe.data.shares if name in found] + sorted(found.keys() - run.recipe.data.shares)
    parts = {name: found[name] for name in order if found[name].get("rows")}
    expectations = checked.get("expectations") or []
    return {
        "headlines": [run.summaries[name].headline for name in ("validation", "splits") if name in run.summaries],
        "checked": checked,
        "reasons": sorted((checked.get("reasons") or {}).items(), key=lambda item: (-item[1], item[0])),
        "unmet": [one for one in expectations if not one.get("success")],
        "expectations": len(expectations),
        "parts": parts,
        "duplicates": parted.get("duplicates_dropped", 0),
        "conflicts": parted.get("conflicts", 0),
        "contamination": (parted.get("contamination") or {}).get("counts") or {},
        "contaminated": (parted.get("contamination") or {}).get("examples") or [],
        "pairs": pairs(run),
    }


def pairs(run: Run) -> dict[str, Any] | None:
    """Return how good the preference pairs are; None where the recipe makes none."""
    if "pairs" not in run.summaries:
        return None
    details, sampled = run.details("pairs"), run.details("candidates")
    bins = details.get("margin_histogram") or {}
    edges, counts = bins.get("edges") or [], bins.get("counts") or []
    drawn = len(edges) > 1 and any(counts)
    longer, right = details.get("chosen_longer_share"), sampled.get("right_share")
    return {
        "headline": run.summaries["pairs"].headline,
        "count": details.get("pairs", 0),
        "svg": figures.histogram("Score margin of the pairs, chosen less rejected", edges, counts) if drawn else None,
        "longer": None if longer is None else percent(longer),
        "right": None if right is None else percent(right),
        "candidates": sampled.get("candidates"),
        "sources": sorted((details.get("sources") or {}).items(), key=lambda item: (-item[1], item[0])),
        "dropped": sorted((details.get("dropped") or {}).items(), key=lambda item: (-item[1], item[0])),
    }


def lineage(run: Run) -> dict[str, Any]:
    """Return the digests of what was read and made, and the time of each step."""
    digests = run.digests
    steps: list[dict[str, Any]] = [
        {
            "title": title,
            "digest": run.manifests[name].digest,
            "parents": sorted(run.manifests[name].parents.items()),
            "seconds": run.seconds.get(name),
        }
        for name, title in run.steps.items()
        if name in run.summaries
    ]
    times = [one["seconds"] for one in steps if one["seconds"] is not None]
    longest = max(times, default=0) or 1
    for one in steps:
        one["share"] = round(100 * one["seconds"] / longest, 1) if one["seconds"] is not None else None
    return {
        "chain": _chain(run),
        "hours": _hours(run),
        "steps": steps,
        "candidate": digests.get("candidate") or run.decision.get("candidate"),
        "total": sum(times) if times else None,
        "artifacts": [
            {"name": name, "kind": run.manifests[name].kind, "digest": run.manifests[name].digest}
            for name in ("data", "results", "decision")
        ],
        "models": [{"arm": title, "digest": digests[arm]} for arm, title in run.titles.items() if arm in digests],
    }


def _chain(run: Run) -> list[dict[str, Any]]:
    """Return what led to the decision, first to last; a stage that was left out is marked."""
    digests, made = run.digests, run.manifests
    candidate = digests.get("candidate") or run.decision.get("candidate")
    verdicts = {row["title"]: row["state"] for row in stages(run)}
    links = [
        ("Recipe", digest_of(run.recipe.model_dump(mode="json")), ""),
        ("Data", made["data"].digest, ""),
        (BEFORE["baseline"], digests.get("baseline") or run.decision.get("baseline"), ""),
        *((title, digests.get(stage), verdicts[title]) for stage, title in run.recipe.stages.items()),
        ("Candidate", candidate, ""),
        ("Results", made["results"].digest, ""),
        ("Decision", made["decision"].digest, ""),
    ]
    return [{"name": name, "digest": digest, "left_out": state == "fail"} for name, digest, state in links if digest]


def _kind(run: Run, name: str) -> Kind:
    if name in LIGHT:
        return "light"
    return "train" if name in run.trained else "generate"


def _hours(run: Run) -> dict[str, str]:
    """Return the processor hours reserved: measured time by what the recipe asks for, of each kind of processor."""
    known = [
        (run.recipe.resources[_kind(run, name)], seconds / 3600) for name, seconds in run.seconds.items() if seconds
    ]
    spent = {
        "CPU": sum(asked.cpus * hours for asked, hours in known),
        "GPU": sum(asked.gpus * hours for asked, hours in known),
    }
    return {name: f"{hours:.2f}" for name, hours in spent.items() if hours}
