"""The lowest rung of training that suffices, from what was measured: a pure function from facts to advice.

`RULES` is the whole of it: one line a rule, asked from the top; the first that holds decides, and every other says with
its numbers why it does not. Most uses end above the first rung that trains anything.

Where the rows come from and who reads the advice is elsewhere: `assay advise`, and the report of a run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, inf, log, log10
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from ..contracts.errors import RecipeError
from ..contracts.metrics import Metric, Summary
from ..contracts.recipe import STAGES, Graph, JudgeReward, Recipe
from .statistics import examples_to_show, examples_to_tell

Rung = Literal[
    "measure",
    "none",
    "prompting",
    "few_shot",
    "another_model",
    "retrieval",
    "embedding",
    "classifier",
    "pretrain",
    "distill",
    "sft",
    "preference",
    "rl",
]
TITLES: dict[Rung, str] = {
    "measure": "Hold out more rows first",
    "none": "Do not train",
    "prompting": "Prompting",
    "few_shot": "Few-shot prompting",
    "another_model": "Prompting another model",
    "retrieval": "Retrieval",
    "embedding": "Retrieval with a trained encoder",
    "classifier": "A classifier on frozen features",
    "pretrain": "Continued pre-training",
    "distill": "Distillation",
    "sft": "Supervised fine-tuning",
    "preference": "Preference training",
    "rl": "Reinforcement learning",
}
UNTRAINED: dict[str, Rung] = {
    "baseline": "prompting",
    "few_shot": "few_shot",
    "lexical": "retrieval",
}
"""Arm to the rung that it measures, without training."""
FEW_LABELS, MANY_PROMPTS, LEAST_LABELS = 200, 3, 50
CLASSES, PER_CLASS = 50, 8
OF_ITS_OWN = 0.5
HOPELESS, SOLVED = 0.02, 0.98
FAR = 20
"""Times the rows that there are, beyond which a learning curve is not followed."""


class Cost(NamedTuple):
    """What a rung takes."""

    seconds: float
    source: str
    """Where the seconds are from."""


class Point(BaseModel):
    """One point of SFT's learning curve: the primary metric on the validation split."""

    model_config = ConfigDict(frozen=True)

    rows: int
    """That were trained on."""
    mean: float
    low: float
    high: float
    n: int
    """Validation rows."""


@dataclass(frozen=True)
class Facts:
    """What is known of a use before a rung is chosen. Everything was counted or measured."""

    graph: Graph
    rows: Mapping[str, int]
    """By split."""
    answers: Mapping[str, float]
    """Shape of the `sft` split's answers, as `prepare_data` counts it; empty where it was not counted."""
    metrics: Sequence[Metric]
    """The task's, the primary one first."""
    arms: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Arm to metric to mean, low, high and n, on the held-out rows, in the order of the climb."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """By metric: what it must reach to be of use."""
    verdicts: Mapping[str, str] = field(default_factory=dict)
    """Stage to `challenger` (kept) or `incumbent` (left out)."""
    endpoints: Sequence[str] = ()
    """Arms that are models behind a server, asked by their prompt alone."""
    teacher: str = ""
    """A model that may teach."""
    verified: bool = True
    """A program says what is right; no judge and no learned reward."""
    alpha: float = 0.05
    min_examples: int = 0
    """What the gate's policy asks for."""
    costs: Mapping[str, Cost] = field(default_factory=dict)
    """By rung."""
    curve: Sequence[Point] = ()
    """By number of rows; empty where none was measured."""

    @property
    def primary(self) -> Metric:
        """The metric that says what is right."""
        return self.metrics[0]

    @property
    def goals(self) -> dict[str, float]:
        """What each metric must reach: the targets, or without any the best trained arm, or else the metric's best."""
        if self.targets:
            return dict(self.targets)
        best = self.best(self.trained)
        return {self.primary.name: best[1] if best else _end(self.primary)}

    @property
    def trained(self) -> list[str]:
        """The arms that a training made, in the order of the climb."""
        return [arm for arm in self.arms if arm in STAGES]

    @property
    def untrained(self) -> list[str]:
        """The arms that a prompt or a search alone made."""
        return [arm for arm in self.arms if arm in UNTRAINED]

    @property
    def n(self) -> int:
        """Held-out rows that were measured."""
        counts = [cell["n"] for table in self.arms.values() for cell in table.values()]
        return int(max(counts, default=0))

    def best(self, arms: Sequence[str]) -> tuple[str, float] | None:
        """Return the best of some arms by the primary metric, and its mean; None where none was measured."""
        name, sign = self.primary.name, 1 if self.primary.better == "higher" else -1
        means = [(arm, float(self.arms[arm][name]["mean"])) for arm in arms if name in self.arms[arm]]
        return max(means, key=lambda one: sign * one[1], default=None)


class Advice(BaseModel):
    """A rung, and the numbers behind it."""

    model_config = ConfigDict(frozen=True)

    rung: Rung
    title: str
    rule: str
    """Name of the rule that decided."""
    because: str
    reason: str
    """Why the rule is one, and whose."""
    passed: list[str]
    """What the rules before it found, in their order."""
    cost: str
    seconds: float | None
    """Of the rung's steps, and of the kept stages that it stands on; None where nobody measured them."""
    needed: int | None = None
    """Held-out rows in all that would decide, where too few do not."""
    curve: list[Point] = []
    outlook: str = ""
    """What the curve says of more rows; empty without one."""

    def words(self) -> str:
        """Return the advice as one short paragraph."""
        return f"{self.title}. {self.because} {self.cost}"


class Finding(NamedTuple):
    """What a rule found."""

    holds: bool
    sentence: str
    """With its numbers; empty where the rule has nothing to say."""
    rung: Rung | None = None
    """Where the rule's own is not the one."""
    needed: int | None = None


class Rule(NamedTuple):
    """One line of `RULES`."""

    name: str
    rung: Rung
    reason: str
    find: Callable[[Facts], Finding]


def advise(facts: Facts) -> Advice:
    """Return the lowest rung that suffices, or the next one to try."""
    passed: list[str] = []
    for rule in RULES:
        found = rule.find(facts)
        if found.holds:
            rung = found.rung or rule.rung
            cost = _cost_of(rung, facts)
            return Advice(
                rung=rung,
                title=_title(rung, facts),
                rule=rule.name,
                because=found.sentence,
                reason=rule.reason,
                passed=passed,
                cost=_cost(rung, cost),
                seconds=cost.seconds if cost else None,
                needed=found.needed,
                curve=list(facts.curve),
                outlook=outlook(facts),
            )
        if found.sentence:
            passed.append(found.sentence)
    raise AssertionError("the last rule always holds")


def read_facts(
    recipe: Recipe,
    splits: Summary,
    evaluation: Summary,
    selections: Mapping[str, Summary],
    costs: Mapping[str, Cost],
    targets: Mapping[str, float] | None = None,
    curve: Sequence[Point] = (),
) -> Facts:
    """Return the facts of a run.

    Args:
        recipe: What the run was compiled from.
        splits: Summary of `prepare_data`.
        evaluation: Summary of `evaluate` or `evaluate_retrieval`.
        selections: By stage, summary of the step that chose between its input and its output.
        costs: By rung.
        targets: In place of the recipe's.
        curve: Of SFT, if it was measured.

    Raises:
        RecipeError: A target is of no metric of the task.
    """
    details: dict[str, Any] = dict(evaluation.details)
    parts: dict[str, Any] = dict(splits.details)
    rewards = recipe.rl.rewards if recipe.rl else []
    endpoints = [endpoint.name for endpoint in recipe.evaluate.endpoints if endpoint.name in details["arms"]]
    known = (*UNTRAINED, *endpoints, "champion", *STAGES)
    arms = {arm: table for arm, table in details["arms"].items() if arm in known}
    metrics = [Metric.model_validate(metric) for metric in details["metrics"]]
    wanted = recipe.targets if targets is None else targets
    if unknown := sorted(wanted.keys() - {metric.name for metric in metrics}):
        raise RecipeError(
            f"the task has no metric {unknown[0]!r}",
            where="targets",
            fix=f"choose one of {[metric.name for metric in metrics]}",
        )
    if recipe.graph == "retrieval" and details["arms"].get("candidate") != details["arms"].get("baseline"):
        arms["embedding"] = details["arms"]["candidate"]  # the graph has one stage, and its output is the candidate
    return Facts(
        graph=recipe.graph,
        rows={name: int(part["rows"]) for name, part in parts["splits"].items()},
        answers=parts.get("answers") or {},
        metrics=metrics,
        arms=arms,
        targets=wanted,
        endpoints=endpoints,
        verdicts={stage: str(summary.details.get("chosen", "")) for stage, summary in selections.items()},
        teacher=recipe.distill.teacher if recipe.distill else "",
        verified=recipe.reward_model is None and not any(isinstance(one, JudgeReward) for one in rewards),
        alpha=recipe.gate.alpha,
        min_examples=recipe.gate.min_examples,
        costs=costs,
        curve=curve,
    )


def outlook(facts: Facts) -> str:
    """Return in words what SFT's learning curve says of more rows; nothing without two points.

    The error is taken to go on falling as a power of the rows (Hestness et al. 2017, arXiv:1712.00409), as it did
    between the last two points; so it is a guess, and the more so the farther it reaches.
    """
    if len(facts.curve) < 2:
        return ""
    metric, (before, last) = facts.primary, facts.curve[-2:]
    told = ", ".join(f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}] with {one.rows:,}" for one in facts.curve)
    words = f"Learning curve of SFT, {metric.name} on {last.n:,} validation rows: {told}."
    end = _end(metric)
    errors = [abs(end - one.mean) for one in (before, last)]
    if errors[1] >= errors[0]:
        return f"{words} The last rows brought nothing, so more of the same would not."
    if not errors[1]:
        return words
    power = log(errors[0] / errors[1]) / log(last.rows / before.rows)
    twice = end + (last.mean - end) * 2**-power
    words += f" If its error goes on falling as it last did, {2 * last.rows:,} rows come to {twice:.3f}"
    goal = facts.targets.get(metric.name)
    if goal is None or abs(end - goal) >= errors[1]:
        return f"{words}."
    wanted = last.rows * (errors[1] / abs(end - goal)) ** (1 / power) if goal != end else inf
    reach = f"takes about {round_up(wanted):,}" if wanted <= FAR * last.rows else "is out of its reach"
    return f"{words}, and the target {goal:.3f} {reach}."


def round_up(value: float) -> int:
    """Return a number of rows to two digits, rounded up: it is a guess, and should look like one."""
    step = int(10 ** max(0, floor(log10(value)) - 1))
    return ceil(value / step) * step


# --- the rules ------------------------------------------------------------------------------------------------------


def _enough_without(facts: Facts, arm: str) -> Finding:
    if arm not in facts.arms:
        return Finding(False, "")
    words, shown = _against(facts, arm)
    rung = UNTRAINED.get(arm)
    if arm == "baseline" and facts.graph == "retrieval":
        rung = "retrieval"
    return Finding(shown is True, words, rung)


def _endpoint(facts: Facts) -> Finding:
    """Find another model that suffices by its prompt alone."""
    said = []
    for arm in facts.endpoints:
        words, shown = _against(facts, arm)
        said.append(words)
        if facts.targets and shown is True:
            return Finding(True, f"{words} It is another model, paid for at every request.")
    return Finding(False, " ".join(said))


def _champion(facts: Facts) -> Finding:
    if "champion" not in facts.arms:
        return Finding(False, "")
    words, shown = _against(facts, "champion")
    return Finding(bool(facts.targets) and shown is True, words)


def _stage(facts: Facts) -> Finding:
    """Find the lowest trained arm that suffices."""
    said = []
    for arm in facts.trained:
        words, shown = _against(facts, arm)
        if shown is True and facts.verdicts.get(arm) != "incumbent":
            return Finding(True, words, arm)  # type: ignore[arg-type]  # a stage's name is its rung's
        said.append(words + (" It was left out." if facts.verdicts.get(arm) == "incumbent" else ""))
    return Finding(False, " ".join(said))


def _reached(facts: Facts) -> Finding:
    """Find an arm that may be good enough, and how many rows would tell."""
    for arm in facts.arms if facts.targets else ():
        words, shown = _against(facts, arm)
        if shown is not None:
            continue
        needed = 0
        for name, goal in facts.goals.items():
            cell = facts.arms[arm].get(name)
            metric = _metric(facts, name)
            if cell and _met(metric, cell, goal) is not True:
                more = examples_to_tell(_share(metric, float(cell["mean"])), _share(metric, goal), facts.alpha)
                if more is None:
                    return Finding(True, f"{words} It lies on the target, so no number of rows would tell.")
                needed = max(needed, more, facts.n + 1)
        return Finding(True, f"{words} About {needed:,} held-out rows would tell.", needed=needed)
    return Finding(False, "")


def _held_out(facts: Facts) -> Finding:
    best = facts.best(list(facts.arms))
    if best is None:
        return Finding(True, f"No arm was measured by {facts.primary.name}.")
    goal = facts.goals.get(facts.primary.name, _end(facts.primary))
    gap = abs(goal - best[1])
    share = gap / (facts.primary.high - facts.primary.low)
    needed = max(facts.min_examples, examples_to_show(share, facts.alpha) if gap else 0)
    held = f"{facts.n:,} held-out rows were measured (of {facts.rows.get('test', 0):,})"
    if facts.n < needed:
        return Finding(True, f"{held}; to show a gain of {gap:.3f} takes about {needed:,}.", needed=needed)
    return Finding(False, f"{held}; about {needed:,} suffice to show a gain of {gap:.3f}.")


def _documents(facts: Facts) -> Finding:
    if facts.graph == "retrieval" or not facts.answers:
        return Finding(False, "")
    read, own = facts.answers["read_off"], facts.answers["contexts"]
    holds = read >= OF_ITS_OWN and own >= OF_ITS_OWN
    words = f"{read:.0%} of the answers stand in the text that comes before the question"
    return Finding(holds, f"{words}, which {own:.0%} of the rows have of their own." if read else "")


def _encoder(facts: Facts) -> Finding:
    if facts.graph != "retrieval":
        return Finding(False, "")
    words = f"No search without training suffices; {facts.rows.get('sft', 0):,} questions with their passages are left."
    return Finding("embedding" not in facts.arms, words)


def _teacher(facts: Facts) -> Finding:
    labels, prompts = facts.rows.get("sft", 0), _prompts(facts)
    if not facts.teacher or "distill" in facts.arms:
        return Finding(False, "")
    words = f"There are {labels:,} labelled rows and {prompts:,} further prompts, and a teacher ({facts.teacher})."
    return Finding(labels < FEW_LABELS and prompts >= MANY_PROMPTS * labels, words)


def _closed_set(facts: Facts) -> Finding:
    if not facts.answers or "classifier" in facts.arms or facts.graph == "retrieval":
        return Finding(False, "")
    distinct, rarest, labels = int(facts.answers["distinct"]), int(facts.answers["rarest"]), facts.rows.get("sft", 0)
    often = "once" if rarest == 1 else f"{rarest:,} times"
    words = f"The {labels:,} answers are {distinct:,} different ones, the rarest stands {often}."
    return Finding(2 <= distinct <= CLASSES and rarest >= PER_CLASS, words)


def _no_labels(facts: Facts) -> Finding:
    labels = facts.rows.get("sft", 0)
    words = f"There are {labels:,} labelled rows; from about {LEAST_LABELS} on fine-tuning shows."
    return Finding(labels < LEAST_LABELS, words)


def _sft(facts: Facts) -> Finding:
    labels, best = facts.rows.get("sft", 0), facts.best(list(facts.arms))
    told = f"the best arm so far is {best[0]} with {facts.primary.name} {best[1]:.3f}" if best else ""
    measured = {"sft", "distill", "classifier", "embedding"} & facts.arms.keys()
    return Finding(not measured, f"{labels:,} labelled rows have not been trained on; {told}." if not measured else "")


def _preference(facts: Facts) -> Finding:
    prompts = facts.rows.get("preference", 0)
    if "preference" in facts.arms or facts.graph == "retrieval":
        return Finding(False, "")
    words = f"{prompts:,} prompts are kept for pairs, and none was trained on."
    return Finding(prompts > 0 and "sft" in facts.arms, words)


def _rl(facts: Facts) -> Finding:
    prompts, best = facts.rows.get("rl", 0), facts.best(facts.trained)
    if "rl" in facts.arms or best is None or facts.graph == "retrieval":
        return Finding(False, "")
    words = f"{best[0]} has {facts.primary.name} {best[1]:.3f}, and {prompts:,} prompts are kept for RL"
    if not facts.verified:
        return Finding(False, f"{words}, but no program says what is right.")
    mixed = HOPELESS < best[1] < SOLVED
    more = "so that samples of a prompt differ." if mixed else "so that hardly any samples of a prompt would differ."
    return Finding(mixed and prompts > 0, f"{words}, {more}")


def _nothing(facts: Facts) -> Finding:
    tried = ", ".join(facts.trained) or "nothing"
    return Finding(True, f"Measured: {tried}; none of it reaches the goal, and the rows for other rungs are not there.")


RULES: tuple[Rule, ...] = (
    Rule(
        "prompt suffices",
        "prompting",
        "What a prompt does needs no training, no data and no model of one's own (Brown et al. 2020, "
        "arXiv:2005.14165); the interval's worse end counts.",
        lambda facts: _enough_without(facts, "baseline"),
    ),
    Rule(
        "examples suffice",
        "few_shot",
        "Worked examples in the prompt cost tokens at every request, and nothing else (arXiv:2005.14165).",
        lambda facts: _enough_without(facts, "few_shot"),
    ),
    Rule(
        "words suffice",
        "retrieval",
        "A search by words (BM25) has no model to train or to serve, and is a strong baseline (Thakur et al. 2021, "
        "arXiv:2104.08663).",
        lambda facts: _enough_without(facts, "lexical"),
    ),
    Rule(
        "another model suffices",
        "another_model",
        "A larger model by its prompt: right away, and the dearer the more it is asked (Chen et al. 2023, "
        "arXiv:2305.05176).",
        _endpoint,
    ),
    Rule(
        "champion suffices",
        "none",
        "The model in service meets the target: a new one can only be as useful.",
        _champion,
    ),
    Rule(
        "a stage suffices",
        "sft",
        "Of the stages that were trained and measured the lowest that reaches the goal; each further one is cost and "
        "risk.",
        _stage,
    ),
    Rule(
        "target is within the interval",
        "measure",
        "An arm that may already suffice: rows are cheaper than a training that was not needed.",
        _reached,
    ),
    Rule(
        "too few held-out rows",
        "measure",
        "A gain that the held-out rows cannot show is not decided by training (paired test at the gate's level, "
        "power 0.8, one example in five changing; Card et al. 2020, arXiv:2010.06595).",
        _held_out,
    ),
    Rule(
        "answers stand in documents",
        "retrieval",
        "Facts are better looked up than trained in (Ovadia et al. 2023, arXiv:2312.05934), and change without a "
        "training.",
        _documents,
    ),
    Rule(
        "search must be taught",
        "embedding",
        "Where words fail an encoder learns from questions with their passages (Karpukhin et al. 2020, "
        "arXiv:2004.04906).",
        _encoder,
    ),
    Rule(
        "answers are a small closed set",
        "classifier",
        f"At most {CLASSES} labels with {PER_CLASS} rows each: a linear head on frozen features learns them in one "
        "pass (Tunstall et al. 2022, arXiv:2209.11055, from 8 a class), and says how sure it is.",
        _closed_set,
    ),
    Rule(
        "labels are few, prompts many, and there is a teacher",
        "distill",
        f"Under {FEW_LABELS} labels and {MANY_PROMPTS} times as many prompts: a teacher labels them (Kim and Rush "
        "2016, arXiv:1606.07947; Hsieh et al. 2023, arXiv:2305.02301).",
        _teacher,
    ),
    Rule(
        "too few labels",
        "none",
        f"Under {LEAST_LABELS} rows fine-tuning rarely shows (OpenAI's guide: 50 to 100); they serve better as worked "
        "examples and as a test.",
        _no_labels,
    ),
    Rule(
        "labels were not trained on",
        "sft",
        "The first rung that changes weights; a thousand good rows teach a form (Zhou et al. 2023, arXiv:2305.11206).",
        _sft,
    ),
    Rule(
        "pairs were not trained on",
        "preference",
        "Its own better answers against its worse ones; cheaper than RL, for nothing is sampled while it trains "
        "(Rafailov et al. 2023, arXiv:2305.18290).",
        _preference,
    ),
    Rule(
        "a verifier was not trained on",
        "rl",
        "A program says what is right, and the model is right sometimes: a group of samples that are all right or all "
        "wrong has no gradient (Shao et al. 2024, arXiv:2402.03300; Yu et al. 2025, arXiv:2503.14476).",
        _rl,
    ),
    Rule(
        "every rung was climbed",
        "none",
        "The same data and the same steps would end at the same place: more labels, or a larger base model.",
        _nothing,
    ),
)
"""From the lowest rung up; the first rule that holds decides."""


# --- parts ----------------------------------------------------------------------------------------------------------


def _against(facts: Facts, arm: str) -> tuple[str, bool | None]:
    """Return an arm against the goals in words, and whether it is shown to reach all (True), or not one (False)."""
    said: list[str] = []
    shown: list[bool | None] = []
    for name, goal in facts.goals.items():
        cell, metric = facts.arms[arm].get(name), _metric(facts, name)
        if cell is None:
            said.append(f"{name} was not measured")
            shown.append(False)
            continue
        met = _met(metric, cell, goal) if facts.targets else _level(metric, cell, goal)
        kind = "the target" if facts.targets else "the best trained arm's" if facts.trained else "the best there is,"
        told = {True: "reaches", False: "is short of", None: "may or may not reach"}[met]
        interval = f"[{cell['low']:.3f}, {cell['high']:.3f}]"
        said.append(f"{name} {cell['mean']:.3f} {interval} {told} {kind} {goal:.3f}")
        shown.append(met)
    state = True if all(one is True for one in shown) else False if any(one is False for one in shown) else None
    return f"{arm}: {'; '.join(said)} (n = {facts.n:,}).", state


def _met(metric: Metric, cell: Mapping[str, float], goal: float) -> bool | None:
    """Tell whether an interval lies on the good side of a target; None where it holds the target."""
    low, high = float(cell["low"]), float(cell["high"])
    if metric.better == "lower":
        return True if high <= goal else False if low > goal else None
    return True if low >= goal else False if high < goal else None


def _level(metric: Metric, cell: Mapping[str, float], goal: float) -> bool:
    """Tell whether an arm is level with the best one: its interval reaches that one's mean."""
    return bool(cell["low"] <= goal if metric.better == "lower" else cell["high"] >= goal)


def _metric(facts: Facts, name: str) -> Metric:
    return next(metric for metric in facts.metrics if metric.name == name)


def _share(metric: Metric, value: float) -> float:
    """Return a value as a share of the metric's range."""
    return (value - metric.low) / (metric.high - metric.low)


def _end(metric: Metric) -> float:
    return metric.high if metric.better == "higher" else metric.low


def _prompts(facts: Facts) -> int:
    return facts.rows.get("preference", 0) + facts.rows.get("rl", 0)


def _title(rung: Rung, facts: Facts) -> str:
    of = {"sft": facts.rows.get("sft", 0), "classifier": facts.rows.get("sft", 0), "rl": facts.rows.get("rl", 0)}
    of["preference"], of["distill"] = facts.rows.get("preference", 0), facts.rows.get("sft", 0) + _prompts(facts)
    unit = "prompts" if rung in ("rl", "preference", "distill") else "rows"
    return f"{TITLES[rung]} ({of[rung]:,} {unit})" if rung in of else TITLES[rung]


def _cost_of(rung: Rung, facts: Facts) -> Cost | None:
    """Return the cost of a rung and of the stages below it that were kept; None where its own is not known."""
    if rung not in facts.costs:
        return None
    below = [arm for arm in facts.trained if STAGES.index(arm) < STAGES.index(rung)]
    chain = [arm for arm in below if facts.verdicts.get(arm) != "incumbent" and arm in facts.costs]
    words = f", after {' and '.join(chain)}" if chain else ""
    return Cost(sum(facts.costs[arm].seconds for arm in (*chain, rung)), facts.costs[rung].source + words)


def _cost(rung: Rung, cost: Cost | None) -> str:
    if rung in ("measure", "none", "prompting", "few_shot", "another_model"):
        return "No training."
    if cost is None:
        return "Its cost was not measured: no run of this recipe had such a step."
    return f"Cost: about {ceil(cost.seconds):,} s ({cost.source})."
