import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from benchmarks import gate_error_rates
from kfp import dsl
from scipy.stats import multinomial

from assay.components.contracts.artifacts import Manifest, seal
from assay.components.contracts.errors import DataError
from assay.components.contracts.metrics import Summary
from assay.components.contracts.recipe import Criterion, GateSettings, JudgeSettings, Recipe, Rubric
from assay.components.contracts.rows import Example, Grade, Result, Verdict, write_rows
from assay.components.judge import believe
from assay.components.shared.summary import write_summary
from assay.components.shared.tasks.task import get_task
from assay.components.write_report import figures
from assay.components.write_report.cases import marked
from assay.components.write_report.component import write_report
from assay.components.write_report.report import ERROR_RATES
from assay.components.write_report.words import duration, p_value, percent, signed

TASK = get_task("medication_directions")
HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>'
SKILL = {
    "baseline": 0.0,
    "few_shot": 0.21,
    "sft": 0.72,
    "preference": 0.75,
    "rl": 0.86,
    "candidate": 0.86,
    "champion": 0.74,
}
DIGESTS = {arm: f"{place:x}" * 64 for place, arm in enumerate(SKILL, 1)} | {"candidate": "5" * 64}
RUBRIC = Rubric(
    title="Medication directions",
    version=2,
    judged="Fields read from a direction.",
    criteria=["The dose is right."],
    scale={grade: f"of grade {grade}" for grade in range(1, 6)},
    question="Which answer reads the direction correctly and would be safer to dispense from?",
)
OPTIONAL = ("sft", "select_sft", "candidates", "pairs", "preference", "select_preference", "rl", "select_rl")


def interval(values: list[float]) -> dict[str, float | int]:
    n, mean = len(values), sum(values) / len(values)
    half = 1.96 * math.sqrt(max(mean * (1 - mean), 0.25 / n) / n)
    return {"mean": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half), "n": n}


def table(rows: list[Result]) -> dict[str, Any]:
    found = {m.name: [row.scores[m.name] for row in rows if row.scores[m.name] is not None] for m in TASK.metrics}
    return {name: interval(values) for name, values in found.items() if values}


class Fixture:
    """The artifacts of one run, as its steps leave them."""

    def __init__(
        self, folder: Path, n: int = 240, verdict: str = "promote", arms: tuple[str, ...] = tuple(SKILL)
    ) -> None:
        self.folder, self.names = folder, ["data", "results", "decision"]
        self.examples = self._examples(n)
        self.rows = {arm: [self._answer(arm, example) for example in self.examples] for arm in arms}
        self.data = self._seal_rows("data", "splits", "test.parquet", self.examples, Example)
        every = [row for rows in self.rows.values() for row in rows]
        metadata = {"arms": {arm: DIGESTS[arm] for arm in arms}}
        self.results = self._seal_rows("results", "results", "results.parquet", every, Result, metadata)
        self._decision(verdict)
        self._summaries()

    def _examples(self, n: int) -> list[Example]:
        examples = []
        for place, raw in enumerate(TASK.generate(n, seed=3)):
            *prompt, answer = raw["messages"]
            fields = {
                "id": f"{place:032x}",
                "group": f"g{place}",
                "prompt": prompt,
                "reference": answer["content"],
                "slices": TASK.slices(Example(id="", group="", prompt=prompt, reference="").prompt, answer["content"]),
                "source": f"rows.jsonl:{place + 1}",
            }
            examples.append(Example.model_validate(fields))
        return examples

    def _answer(self, arm: str, example: Example) -> Result:
        response, place = example.reference, int(example.id, 16)
        # The same luck for every arm: a better arm then mostly gets right what a worse one does, as models do.
        if random.Random(place).random() * 0.85 + random.Random(f"{arm[:2]}{place}").random() * 0.15 > SKILL[arm]:
            response = self._wrong(arm, example, random.Random(f"{arm}{place}"))
        if arm == "candidate" and place in (2, 3):
            response = HOSTILE
        scores = TASK.score(response, example.reference)
        fields = {"example_id": example.id, "group": example.group, "slices": example.slices}
        return Result(arm=arm, response=response, scores=scores, **fields)

    def _wrong(self, arm: str, example: Example, rng: random.Random) -> str:
        if arm == "baseline":
            return f"Sure! Here is the JSON for the direction:\n\n{example.prompt[-1].content} → dose, unit, route"
        fields = json.loads(example.reference)
        if rng.random() < 0.55 and fields["flag"] != "ok":
            fields["flag"] = "ok"
        elif rng.random() < 0.3 and "max" in fields:
            del fields["max"]
        else:
            fields["daily"] = fields["daily"] + rng.choice([-1, 1, 2, 4])
        return json.dumps(fields, separators=(",", ":"))

    def _seal_rows(self, name: str, kind: str, file: str, rows: Any, row: Any, metadata: Any = None) -> Manifest:
        write_rows(self.folder / name / file, rows, row)
        return seal(self.folder / name, kind, counts={name: len(rows)}, metadata=metadata)

    def _criterion(self, metric: str, tier: str, versus: str, test: str, margin: float, passed: bool | None) -> Any:
        mine, its = table(self.rows["candidate"])[metric], table(self.rows[versus])[metric]
        better = next(one.better for one in TASK.metrics if one.name == metric)
        difference, half = (mine["mean"] - its["mean"]) * (1 if better == "higher" else -1), 0.055
        return {
            "metric": metric,
            "tier": tier,
            "versus": versus,
            "test": test,
            "margin": margin,
            "n": mine["n"],
            "candidate": mine["mean"],
            "reference": its["mean"],
            "difference": difference,
            "low": difference - half,
            "high": difference + half,
            "p_value": 0.0003 if passed else 0.084,
            "alpha": 0.05,
            "passed": passed,
            "needed": None if passed is not None else 900,
        }

    def _slices(self, versus: str) -> list[dict[str, Any]]:
        found = []
        for place, label in enumerate(sorted({label for example in self.examples for label in example.slices})):
            one = self._criterion("exact", "slice", versus, "non_inferiority", 0.1, (True, None, False)[place % 3])
            few = "12 examples, and the policy asks for 30" if place == 1 else ""
            found.append(one | {"slice": label, "needed": None, "note": few})
        return found

    def _decision(self, verdict: str) -> None:
        rest = {"promote": True, "hold": False, "inconclusive": None}[verdict]
        criteria = [
            self._criterion("exact", "primary", "baseline", "superiority", 0.0, True),
            self._criterion("near_miss", "critical", "baseline", "non_inferiority", 0.02, True),
        ]
        missed = table(self.rows["candidate"])["near_miss"]["mean"]
        bound = {"versus": "absolute", "test": "bound", "reference": 0.5, "difference": 0.5 - missed}
        bound |= {"margin": 0.0, "low": 0.5 - missed - 0.08, "high": 0.5 - missed + 0.08, "p_value": 0.0001}
        criteria.append(criteria[1] | bound)
        if "champion" in self.rows:
            criteria += [
                self._criterion("exact", "primary", "champion", "superiority", 0.0, rest),
                self._criterion("near_miss", "critical", "champion", "non_inferiority", 0.02, rest),
                self._criterion("false_alarm", "supporting", "champion", "non_inferiority", 0.02, None),
            ]
        reason = {
            "promote": "Promote: exact is better than the champion, and near misses did not get worse; all 4 passed.",
            "hold": "Hold: near misses may have become worse than the champion's by more than the margin of 2 points.",
            "inconclusive": "Inconclusive: exact rose, but 240 examples cannot rule out that near misses became worse.",
        }[verdict]
        decision = {
            "schema": 1,
            "decision": verdict,
            "reason": reason,
            "needed": 900 if verdict == "inconclusive" else None,
            "candidate": DIGESTS["candidate"],
            "champion": DIGESTS["champion"] if "champion" in self.rows else None,
            "baseline": DIGESTS["baseline"],
            "examples": len(self.examples),
            "alpha": 0.05,
            "look": 3,
            "level": 0.0034,
            "criteria": criteria,
            "slices": self._slices("champion" if "champion" in self.rows else "baseline"),
            "judge": {},
            "arms": {arm: table(rows) for arm, rows in self.rows.items()},
            "policy": GateSettings(criteria=[Criterion(metric="exact")]).model_dump(mode="json"),
        }
        (self.folder / "decision").mkdir()
        (self.folder / "decision" / "decision.json").write_text(json.dumps(decision))
        seal(self.folder / "decision", "decision", parents={"results": self.results})

    def summary(self, name: str, step: str, headline: str, seconds: float, details: Any, **metrics: float) -> None:
        output = dsl.Metrics(uri=str(self.folder / name))
        told = Summary(step=step, headline=headline, metrics=metrics, details=details)
        write_summary(output, told, seconds=seconds, parents={"data": self.data})
        self.names.append(name)

    def _summaries(self) -> None:
        self._summarise_data()
        self._summarise_training()
        for stage, (kept, before, after) in {
            "sft": (True, 0.0, 0.71),
            "preference": (False, 0.71, 0.705),
            "rl": (True, 0.71, 0.845),
        }.items():
            self._summarise_selection(stage, kept, before, after)
        self._summarise_evaluation()

    def _summarise_data(self) -> None:
        reasons = {"duplicate_id": 3, "not_json": 2, "answer_does_not_parse": 7}
        checked = [
            {"name": f"expect_{n}", "column": "prompt", "success": n != 4, "severity": "warning", "unexpected": n}
            for n in range(9)
        ]
        told = {"rows": 2012, "accepted": 2000, "quarantined": 12, "reasons": reasons, "expectations": checked}
        headline = "2,000 of 2,012 rows accepted, 12 quarantined, 8 of 9 expectations met."
        self.summary("validation", "validate_data", headline, 4.2, told)
        sizes = {"sft": 402, "preference": 296, "rl": 511, "validation": 190, "test": len(self.examples)}
        parts = {name: {"rows": rows, "groups": rows - rows // 9} for name, rows in sizes.items()}
        told = {"splits": parts, "duplicates_dropped": 14, "conflicts": 0}
        self.summary("splits", "prepare_data", "1,639 rows split five ways; no group in two splits.", 1.1, told)

    def _summarise_training(self) -> None:
        rng = random.Random(1)

        def series(steps: int, **lines: tuple[float, float]) -> list[dict[str, float]]:
            def value(first: float, last: float, step: int) -> float:
                return last + (first - last) * math.exp(-4 * step / steps) + rng.gauss(0, 0.04) * abs(first - last)

            return [{"step": s + 1, **{name: value(*ends, s) for name, ends in lines.items()}} for s in range(steps)]

        curves = {
            "sft": series(100, loss=(2.9, 0.07), learning_rate=(3e-4, 0)),
            "preference": series(32, loss=(1.1, 0.32), accuracy=(0.5, 0.93), margin=(0.0, 2.4)),
            "rl": series(
                16, loss=(0.01, -0.02), reward=(0.71, 0.88), exact=(0.55, 0.79), informative_groups=(0.8, 0.4)
            ),
        }
        for stage, curve in curves.items():
            effect = {"weight_change": 0.0123, "ok": True, "checks": {"weights_changed": True, "finite": True}}
            told = {
                "curve": curve,
                "effect": effect,
                "examples": 402,
                "dropped": {"too_long": 2 if stage == "sft" else 0},
            }
            headline = f"{len(curve)} steps, loss {curve[0]['loss']:.2f} → {curve[-1]['loss']:.2f}."
            self.summary(stage, f"train_{stage}", headline, 312.7, told, weight_change=0.0123, tokens=48211.0)
        told = {"prompts": 160, "candidates": 640, "right_share": 0.58}
        self.summary("candidates", "sample_candidates", "640 candidates for 160 prompts.", 88.0, told)
        told = {
            "pairs": 117,
            "dropped": {"all_equal": 37, "too_long": 6},
            "chosen_longer_share": 0.47,
            "margin_histogram": {"edges": [x / 10 for x in range(11)], "counts": [4, 9, 14, 22, 19, 11, 8, 12, 11, 7]},
            "sources": {"sampled>sampled": 81, "reference>sampled": 36},
        }
        headline = "117 pairs from 160 prompts; the chosen answer is the longer one in 47%."
        self.summary("pairs", "build_preferences", headline, 0.9, told)

    def _summarise_selection(self, stage: str, kept: bool, before: float, after: float) -> None:
        told = {
            "chosen": "challenger" if kept else "incumbent",
            "metric": "exact",
            "incumbent": {"exact": interval([before] * 190)},
            "challenger": {"exact": interval([after] * 190)},
            "difference": {"mean": after - before, "low": after - before - 0.05, "high": after - before + 0.05},
            "reason": f"exact {before:.3f} → {after:.3f}: {'the output goes on' if kept else 'not above 0'}",
        }
        self.summary(f"select_{stage}", "select_model", "chosen", 21.4, told)

    def _summarise_evaluation(self) -> None:
        labels = sorted({label for example in self.examples for label in example.slices})
        told = {
            "arms": {arm: table(rows) for arm, rows in self.rows.items()},
            "slices": {
                label: {arm: table([row for row in rows if label in row.slices]) for arm, rows in self.rows.items()}
                for label in labels
            },
            "metrics": [metric.model_dump(mode="json") for metric in TASK.metrics],
        }
        self.summary("evaluation", "evaluate", "measured", 402.5, told)
        self._judge()

    def _judge(self) -> None:
        """Let it prefer the candidate more often than it errs, and grade all that was answered to 32 examples."""
        rng, verdicts, grades = random.Random(5), [], []
        for place, example in enumerate(self.examples[:32]):
            first = rng.choices(["a", "b", "tie", "unparsed"], [0.6, 0.2, 0.15, 0.05])[0]
            swapped = first if rng.random() < 0.6 else "tie"
            winner = "tie" if first != swapped or first == "unparsed" else first
            fields = {"arm_a": "candidate", "arm_b": "baseline", "label": ["tie", "a", None][place % 3]}
            fields |= {"example_id": example.id, "group": example.group, "longer": "b", "votes": [winner]}
            verdicts.append(Verdict(winner=winner, first=first, swapped=swapped, **fields))
            for arm in self.rows:
                found = None if rng.random() < 0.1 else 1 + 4 * min(1.0, 0.8 * SKILL[arm] + 0.2 * rng.random())
                key = {"arm": arm, "example_id": example.id, "group": example.group}
                label = 1 + int(4 * SKILL[arm]) if place % 2 else None
                grades.append(Grade(grade=found, grades=[found, found and 1 + rng.random()], label=label, **key))
        settings, labels = JudgeSettings(rubric=RUBRIC), {"given": 40, "used": 32, "raters": 2, "alpha": 0.7}
        told = believe.summarise(
            verdicts,
            ("candidate", "baseline"),
            settings,
            panel={"local:5": verdicts, "openai:m": verdicts},
            grades=grades,
            labels=labels,
        )
        self.summary("judging", "judge", told.headline, 61.0, told.details)

    def render(self, version: int = 3, without: tuple[str, ...] = (), **recipe: Any) -> str:
        artifacts = {name: dsl.Artifact(uri=str(self.folder / name)) for name in self.names if name not in without}
        wanted = Recipe(name="directions", title="Medication directions to fields", **recipe)
        report = dsl.HTML(uri=str(self.folder / "report.html"))
        write_report.python_func(recipe=wanted.model_dump(mode="json"), version=version, report=report, **artifacts)
        return Path(report.path).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Reads a page strictly enough: every element that opens closes, in order."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return Fixture(tmp_path_factory.mktemp("run"))


def test_a_whole_run_on_one_page(run: Fixture) -> None:
    text = run.render()
    page = Page(text)
    assert len(text.encode()) < 400_000
    for words in ("Promoted as version 3", "The climb", "The gate", "The judge", "GRPO", "Left out", "Slices"):
        assert words in page.text
    assert "<0.001" in page.text
    assert {"nan", "None", "Undefined"}.isdisjoint(page.text.split())
    ids = {value for name, value in page.attributes if name == "id"}
    assert {value[1:] for name, value in page.attributes if name == "href"} <= ids


def test_the_page_asks_for_no_other_file(run: Fixture) -> None:
    text = run.render()
    page = Page(text)
    assert all(value.startswith("#") for name, value in page.attributes if name in ("src", "href", "srcset"))
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert "url(" not in text
    assert "@import" not in text


def test_hostile_text_stays_text(run: Fixture) -> None:
    text = run.render(base_model=HOSTILE)
    assert "<script" not in text
    assert "<img" not in text
    assert Page(text).text.count('alert("1")') >= 2


def test_the_same_artifacts_give_the_same_bytes(run: Fixture) -> None:
    assert run.render() == run.render()


@pytest.mark.parametrize(
    ("verdict", "words"), [("hold", "Held"), ("inconclusive", "Inconclusive, needs 840 more held-out examples")]
)
def test_what_was_not_promoted_says_so(tmp_path: Path, verdict: str, words: str) -> None:
    page = Page(Fixture(tmp_path, n=60, verdict=verdict).render(version=0))
    assert words in page.text
    assert "Promoted" not in page.text


def test_stages_that_did_not_run_leave_no_hole(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, n=60, arms=("baseline", "candidate"))
    page = Page(fixture.render(without=OPTIONAL, preference=None, rl=None))
    assert page.text.count("Not in this run") == 1
    assert "no champion yet" in page.text
    for words in ("Preference pairs", "Training", "against SFT"):
        assert words not in page.text


def test_a_verdict_on_something_that_is_no_metric_of_the_task_shows_no_measured_columns(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, n=60)
    told = {"chosen": "incumbent", "metric": "log_perplexity", "difference": {"mean": 0.1}, "reason": "perplexity rose"}
    fixture.summary("select_pretrain", "select_pretrain", "incumbent", 1.0, told)
    text = fixture.render(pretrain={"corpus": "text"})
    row = text[text.index("perplexity rose") - 900 :].partition("perplexity rose")[0].rpartition("<tr")[2]
    assert "Continued pre-training" in row
    assert "Left out" in row
    assert "→" not in row
    assert "→" in text.partition("perplexity rose")[2].partition("</tr>")[2].partition("</tr>")[0]  # SFT's


def test_missed_unsafe_directions_come_first(run: Fixture) -> None:
    text = run.render()
    against_sft = text[text.index("Candidate against SFT") :]
    cases = against_sft[: against_sft.index('id="data"')].split('class="case"')[1:]
    severe = ['class="severe"' in case for case in cases]
    assert severe[0]
    assert len(cases) <= 16


def test_what_every_arm_missed_is_shown(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, n=60, arms=("baseline", "candidate"))
    missed = [row for row in fixture.rows["candidate"] if row.scores["near_miss"]]
    unsafe = [row for row in fixture.rows["candidate"] if row.scores["near_miss"] is not None]
    assert missed
    assert not any(row.scores["near_miss"] == 0 for row in fixture.rows["baseline"])  # so nothing is lost to it
    text = fixture.render(without=OPTIONAL)
    assert f"Near misses of the candidate: {len(missed)} of {len(unsafe)}" in Page(text).text
    block = text.split('<div class="missed">')[1].split("Candidate against")[0]
    assert block.count('class="case"') == len(missed)


def test_a_model_is_not_compared_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIGESTS, "sft", DIGESTS["candidate"])
    page = Page(Fixture(tmp_path, n=60).render())
    assert "Candidate against Champion" in page.text
    assert "Candidate against SFT" not in page.text


def test_the_policys_critical_metric_stands_beside_the_primary(run: Fixture) -> None:
    gate = {"criteria": [{"metric": "exact"}, {"metric": "false_alarm", "tier": "critical"}]}
    assert "False alarms of the candidate" in Page(run.render(gate=gate)).text


def test_cost_is_measured_time_by_what_is_reserved(run: Fixture) -> None:
    light, other = {"cpus": 1}, {"cpus": 2, "gpus": 1}
    page = Page(run.render(resources={"light": light, "train": other, "generate": other}))
    hours = (3 * 312.7 + 88.0 + 3 * 21.4 + 402.5 + 61.0) / 3600
    cpu = 2 * hours + (4.2 + 1.1 + 0.9) / 3600
    assert f"Cost: {cpu:.2f} CPU hours and {hours:.2f} GPU hours" in page.text


def test_lineage_runs_from_the_recipe_to_the_decision(run: Fixture) -> None:
    text = run.render()
    chain = Page(text[text.index('<ol class="chain">') : text.index("</ol>")] + "</ol>").text
    names = ["Recipe", "Data", "Base model", "SFT", "DPO (left out)", "GRPO", "Candidate", "Results", "Decision"]
    places = [chain.index(name) for name in names]
    assert places == sorted(places)


def test_a_changed_artifact_is_refused(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, n=30)
    (tmp_path / "decision" / "decision.json").write_text("{}")
    with pytest.raises(DataError, match="not the one that was sealed"):
        fixture.render()


def test_fields_are_marked_by_type_and_value() -> None:
    states = {one["name"]: one["state"] for one in marked('{"a":"1","b":2,"d":0}', '{"a":1,"b":2,"c":3}')}
    assert states == {"a": "wrong", "b": "same", "c": "missing", "d": "extra"}
    assert marked("no idea", "{}")[0]["state"] == "wrong"
    assert marked("", "word")[0]["value"] == "(no answer)"


def test_gains_point_right_whichever_way_a_metric_is_better(run: Fixture) -> None:
    decision = json.loads((run.folder / "decision" / "decision.json").read_text())
    harm = next(one for one in decision["criteria"] if one["metric"] == "near_miss" and one["versus"] == "baseline")
    assert harm["candidate"] < harm["reference"]
    assert f"+{100 * harm['difference']:.1f}" in Page(run.render()).text


def test_the_gate_shows_bounds_slices_and_which_look_it_is(run: Fixture) -> None:
    text = Page(run.render()).text
    assert "Against the bound" in text
    assert "below the bound" in text
    assert "Slices against the champion" in text
    assert "too few" in text
    assert "this is decision 3, at 0.0034" in text
    assert "99.3% interval must lie right" in text


def test_the_gate_says_how_often_it_is_wrong(run: Fixture) -> None:
    text = run.render()
    page = Page(text)
    assert "How often this gate is wrong" in page.text
    assert "McNemar at the gate's level" in page.text
    told = json.loads(ERROR_RATES.read_bytes())
    assert all(percent(share) in page.text for share in told["rates"]["+0"][0].values())
    part = text[text.index('id="wrong"') :]
    part = part[: part.index("</details>")]
    assert part.count("<polyline") == 4 + 3 * 4 + 3
    assert part.count('class="threshold"') == 3, "this run's examples stand in each figure by examples"


def test_the_error_rates_that_a_report_shows_are_those_of_the_gate_as_it_is() -> None:
    """The gate's own verdict on every outcome of 50 examples, by its probability."""
    told, n = json.loads(ERROR_RATES.read_bytes()), 50
    counts = [(gained, lost) for gained in range(26) for lost in range(26)]
    for name, level in (("gate, looks: 1", told["alpha"]), ("gate, default", gate_error_rates.FIRST)):
        promoted = [pair for pair in counts if gate_error_rates.gate(*pair, n, level)]
        for effect, rows in told["rates"].items():
            shares = [(told["flipped"] + sign * float(effect)) / 2 for sign in (1, -1)]
            outcome = multinomial(n, [*shares, 1 - sum(shares)])
            exact = sum(outcome.pmf([gained, lost, n - gained - lost]) for gained, lost in promoted)
            noise = math.sqrt(exact * (1 - exact) / told["repetitions"])
            assert rows[told["sizes"].index(n)][name] == pytest.approx(exact, abs=4 * noise + 1e-4)


def test_axes_and_words() -> None:
    assert [figures.round_up(value) for value in (0.0, 0.03, 0.21, 0.6, 7)] == pytest.approx([1, 0.05, 0.25, 1, 10])
    assert figures.ticks(-0.1, 0.3, 4) == [-0.1, 0.0, 0.1, 0.2, 0.3]
    assert "does not apply" in figures.dot_plot("t", [figures.Dot("SFT", None)], percent, 1.0)
    assert figures.line_chart("flat", [(1, 0.5)], str)
    assert figures.line_chart("rising", [(1, 0.71), (9, 0.88)], percent).count('class="grid"') >= 3
    assert (percent(0.125), percent(-0.0), p_value(1e-9), p_value(None)) == ("12.5%", "0%", "<0.001", "–")
    assert (signed("-3.0"), signed("+0.0"), duration(59.9), duration(3725)) == ("−3.0", "0.0", "59.9 s", "1 h 02 min")


def test_a_reward_model_stands_before_rl_with_its_curve_and_pairs(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, n=60, arms=("baseline", "sft", "rl", "candidate"))
    curve = [{"step": 1, "loss": 0.69, "accuracy": 0.5}, {"step": 2, "loss": 0.31, "accuracy": 0.9}]
    told = {"curve": curve, "effect": {"ok": True, "checks": {"ranks_held_out_pairs": True}}, "examples": 90}
    fixture.summary("reward_model", "train_reward", "80% (65% to 90%) of 40 held-out pairs are ranked right", 60, told)
    text = fixture.render(
        without=("preference", "select_preference"), preference=None, reward_model={}, rl={"algorithm": "ppo"}
    )
    page = Page(text)
    for words in ("of 40 held-out pairs", "ranks held out pairs", "Train reward model", "Preference pairs"):
        assert words in page.text
    assert page.text.index("of 40 held-out pairs") < page.text.index("16 steps, loss")  # RL's headline
    assert "Select after reward model" not in page.text


def test_the_page_says_what_would_suffice(tmp_path: Path) -> None:
    page = Fixture(tmp_path).render()
    (told,) = re.findall(r"<b>What would suffice:</b> (.*?)</p>", page)
    assert told.startswith("Reinforcement learning (511 prompts). rl: exact 0.921")
    assert "(as it took in this run, after sft)" in told  # preference was left out


def test_an_encoders_curve_is_not_called_one_of_pairs(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, n=60, arms=("baseline", "candidate"))
    curve = [{"step": 1, "loss": 2.1, "accuracy": 0.3}, {"step": 2, "loss": 0.9, "accuracy": 0.8}]
    fixture.summary("embedding", "train_embedding", "2 steps", 9.0, {"curve": curve, "effect": {"ok": True}})
    page = Page(fixture.render(without=(*OPTIONAL,), graph="retrieval"))
    assert "Questions with their passage first in the batch · 0.3 → 0.8" in page.text
    assert "Pairs ranked right" not in page.text


def test_the_judges_score_stands_in_the_arms_table_and_its_card_says_how_far_to_believe_it(run: Fixture) -> None:
    text = run.render()
    table = text[text.index("<h2>The climb</h2>") :]
    table = table[table.index("<table>") : table.index("</table>")]
    assert "Judge score" in table
    assert "advisory only" in table  # below the floor
    scores = json.loads((run.folder / "judging" / "summary.json").read_text())["details"]["grades"]["arms"]
    for arm, title in (("baseline", "Base model"), ("sft", "SFT"), ("champion", "Champion")):
        row = table[table.index(f"<th>{title}") :].partition("</tr>")[0]
        found = scores[arm]
        assert f"{found['mean']:.3g}<" in row
        assert f"{found['low']:.3g} to {found['high']:.3g}" in row
    card = Page(text[text.index("<h3>The judge") :].partition('<details id="wrong"')[0].rpartition("</div>")[0]).text
    for words in (
        "Medication directions , version 2",
        "Win rate, corrected",
        "Cohen's kappa with labels",
        "Prefers the longer answer",
        "Alpha among judges, ordinal",
        "32 of 40 are of these answers",
        "Their agreement with labels does not clear the floor",
    ):
        assert words in card


def test_four_arms_get_the_whole_width(tmp_path: Path) -> None:
    some, more = ("baseline", "sft", "candidate"), ("baseline", "sft", "rl", "candidate")
    narrow, wide = (
        Fixture(tmp_path / str(len(arms)), n=30, arms=arms).render(without=OPTIONAL) for arms in (some, more)
    )
    assert '<div class="wide">' in wide
    assert '<div class="wide">' not in narrow
