"""The gate: what it promotes, what it holds, what it leaves open, and what it refuses to compare."""

import json
from pathlib import Path

import numpy as np
import pytest
from kfp import dsl
from pydantic import ValidationError

from assay.components.contracts.artifacts import read_manifest, seal
from assay.components.contracts.errors import DataError, RecipeError, RegistryError
from assay.components.contracts.metrics import Summary
from assay.components.contracts.recipe import Criterion, GateSettings, SliceRule
from assay.components.contracts.rows import Example, Result, Verdict, write_rows
from assay.components.find_champion.component import find_champion
from assay.components.gate.component import gate
from assay.components.gate.decide import Finding, Scores, Turn, check_arms, group_by_arm, judged, slices_of, turn_of
from assay.components.gate.decide import decide as decide_in_turn
from assay.components.gate.decide import findings_of as findings_of_columns
from assay.components.hold_model.component import hold_model
from assay.components.shared import registry
from assay.components.shared.looks import HeldOut, Look, Looks
from assay.components.shared.summary import write_summary
from assay.components.shared.tasks.task import get_task

METRICS = get_task("medication_directions").metrics
SETTINGS = GateSettings(min_examples=50)
FIRST = Turn(1, 0.05)
DIGESTS = {"baseline": "b", "candidate": "c", "champion": "h"}


def findings_of(settings: GateSettings, metrics, arms) -> list[Finding]:
    return findings_of_columns(settings, metrics, Scores.of(arms, metrics))


def decide(*given, turn: Turn = FIRST):
    return decide_in_turn(*given, turn)


def results(arm: str, exact: list[float], near_miss: list[float | None] | None = None) -> list[Result]:
    misses = near_miss or [None] * len(exact)
    return [
        Result(
            arm=arm,
            example_id=f"{i:05}",
            group=f"g{i}",
            response="{}",
            slices=[],
            scores={"exact": value, "near_miss": miss},
        )
        for i, (value, miss) in enumerate(zip(exact, misses, strict=True))
    ]


def decision(settings: GateSettings = SETTINGS, digests: dict[str, str] = DIGESTS, **arms: list[float]):
    rows = [row for arm, values in arms.items() for row in results(arm, values)]
    grouped = group_by_arm(rows)
    findings = findings_of(settings, METRICS, grouped)
    return decide(settings, findings, digests, len(grouped["candidate"]), METRICS)


def test_a_better_candidate_is_promoted_with_numbers_in_the_sentence():
    made = decision(baseline=[0.0] * 100, champion=[0.0] * 40 + [1.0] * 60, candidate=[1.0] * 90 + [0.0] * 10)
    assert made.decision == "promote"
    assert "0.900 against 0.600" in made.reason
    assert "n = 100" in made.reason


def test_examples_in_the_prompt_may_be_what_training_must_beat():
    """The few-shot arm is compared with only where a criterion names it."""
    arms = {"baseline": [0.0] * 100, "few_shot": [1.0] * 80 + [0.0] * 20, "candidate": [1.0] * 60 + [0.0] * 40}
    digests = {"baseline": "b", "candidate": "c", "few_shot": "b"}
    assert decision(digests=digests, **arms).decision == "promote"
    asked = GateSettings(min_examples=50, criteria=[Criterion(metric="exact", versus=["baseline", "few_shot"])])
    made = decision(asked, digests, **arms)
    assert made.decision == "hold"
    assert "few_shot: 0.600 against 0.800" in made.reason


def test_a_worse_candidate_is_held():
    made = decision(baseline=[0.0] * 100, champion=[1.0] * 90 + [0.0] * 10, candidate=[1.0] * 60 + [0.0] * 40)
    assert made.decision == "hold"


def test_the_same_results_are_inconclusive_and_the_same_bytes_are_held():
    same = [1.0] * 60 + [0.0] * 40
    assert decision(baseline=[0.0] * 100, champion=same, candidate=same).decision == "inconclusive"
    made = decision(digests={**DIGESTS, "champion": "c"}, baseline=[0.0] * 100, champion=same, candidate=same)
    assert (made.decision, "byte for byte" in made.reason) == ("hold", True)


def test_an_open_question_asks_for_more_examples():
    candidate = [1.0] * 64 + [0.0] * 36
    champion = [1.0] * 55 + [0.0] * 9 + [1.0] * 4 + [0.0] * 32
    made = decision(baseline=[0.0] * 100, champion=champion, candidate=candidate)
    assert made.decision == "inconclusive"
    assert made.needed is not None
    assert made.needed > 100
    assert str(made.needed) in made.reason


def test_too_few_examples_decide_nothing():
    made = decision(baseline=[0.0] * 20, candidate=[1.0] * 20)
    assert (made.decision, made.needed) == ("inconclusive", 50)


def test_without_a_champion_the_baseline_is_what_counts():
    made = decision(digests={"baseline": "b", "candidate": "c"}, baseline=[0.0] * 100, candidate=[1.0] * 100)
    assert made.decision == "promote"
    assert "1 required" in made.reason
    assert "there is no champion to compare with" in made.reason


def test_a_critical_criterion_vetoes_a_better_primary_one():
    settings = GateSettings(
        min_examples=50,
        criteria=[
            Criterion(metric="exact"),
            Criterion(metric="near_miss", tier="critical", test="non_inferiority", margin=0.05),
        ],
    )
    rows = [
        *results("baseline", [0.0] * 200, [1.0] * 100 + [None] * 100),
        *results("champion", [0.5] * 200, [0.0] * 100 + [None] * 100),
        *results("candidate", [1.0] * 200, [1.0] * 40 + [0.0] * 60 + [None] * 100),
    ]
    grouped = group_by_arm(rows)
    findings = findings_of(settings, METRICS, grouped)
    made = decide(settings, findings, DIGESTS, 200, METRICS)
    assert made.decision == "hold"
    assert "Near misses" in made.reason
    assert next(f for f in findings if f.metric == "near_miss" and f.versus == "champion").n == 100


def test_a_model_five_points_worse_is_hardly_ever_promoted():
    rng, promoted = np.random.default_rng(0), 0
    for _ in range(400):
        draw = rng.random(200)
        champion = (draw < 0.60).astype(float)
        flip = rng.random(200)
        candidate = np.where(champion == 1, flip >= 0.208, flip < 0.1875).astype(float)  # 0.60 → 0.55, 20 % flipped
        promoted += (
            decision(baseline=[0.0] * 200, champion=champion.tolist(), candidate=candidate.tolist()).decision
            == "promote"
        )
    assert promoted / 400 <= 0.01


def test_arms_on_different_examples_are_refused():
    rows = [*results("baseline", [0.0] * 60), *results("candidate", [1.0] * 61)]
    with pytest.raises(DataError, match="not measured on the same examples"):
        group_by_arm(rows)
    with pytest.raises(DataError, match="'candidate' was not measured"):
        group_by_arm(results("baseline", [0.0]))


def test_an_example_measured_twice_is_refused():
    rows = [*results("baseline", [0.0]), *results("candidate", [1.0])]
    with pytest.raises(DataError, match="measured twice"):
        group_by_arm([*rows, *rows])


def test_a_champion_without_results_is_not_passed_over():
    grouped = group_by_arm([*results("baseline", [0.0] * 60), *results("candidate", [1.0] * 60)])
    with pytest.raises(DataError, match="'champion' has no results"):
        check_arms(grouped, DIGESTS)


def test_examples_in_all_count_those_the_metric_does_not_apply_to():
    settings = GateSettings(criteria=[Criterion(metric="near_miss", test="non_inferiority", margin=0.05)])
    rows = [
        *results("baseline", [0.0] * 300, [0.0] * 45 + [1.0] * 5 + [None] * 250),
        *results("candidate", [0.0] * 300, [1.0] * 2 + [0.0] * 45 + [1.0] * 3 + [None] * 250),
    ]
    [finding] = findings_of(settings, METRICS, group_by_arm(rows))
    assert (finding.n, finding.passed) == (50, None)
    assert finding.needed is not None
    assert finding.needed > 300  # one row in six tells something, so more than 50 of these are more than 300 rows


def test_a_metric_that_applies_nowhere_leaves_the_question_open():
    settings = GateSettings(min_examples=50, criteria=[Criterion(metric="exact"), Criterion(metric="near_miss")])
    grouped = group_by_arm([*results("baseline", [0.0] * 60), *results("candidate", [1.0] * 60)])
    made = decide(settings, findings_of(settings, METRICS, grouped), {"baseline": "b", "candidate": "c"}, 60, METRICS)
    assert (made.decision, made.needed) == ("inconclusive", None)
    assert "applies to no example" in made.reason


def test_an_effect_of_nothing_does_not_ask_for_more_examples():
    same = [1.0] * 60 + [0.0] * 40
    made = decision(baseline=[0.0] * 100, champion=same, candidate=same)
    assert made.needed is None
    assert "more examples of this kind would not show it" in made.reason


def test_lower_is_better_holds_a_candidate_that_misses_more():
    settings = GateSettings(min_examples=50, criteria=[Criterion(metric="near_miss")])
    rows = [
        *results("baseline", [0.0] * 60, [0.0] * 60),
        *results("candidate", [0.0] * 60, [1.0] * 20 + [0.0] * 40),
    ]
    grouped = group_by_arm(rows)
    [finding] = findings_of(settings, METRICS, grouped)
    assert finding.difference == pytest.approx(-1 / 3)
    assert decide(settings, [finding], {"baseline": "b", "candidate": "c"}, 60, METRICS).decision == "hold"


def test_supporting_findings_pass_together_and_decide_nothing():
    # Five misses fewer, none more: p = 1/32, enough alone and not with one beside it that says nothing.
    settings = GateSettings(
        min_examples=50,
        criteria=[
            Criterion(metric="exact"),
            Criterion(metric="near_miss", tier="supporting"),
            Criterion(metric="near_miss", tier="supporting", test="non_inferiority"),
        ],
    )
    rows = [
        *results("baseline", [0.0] * 60, [1.0] * 5 + [0.0] * 55),
        *results("candidate", [1.0] * 60, [0.0] * 60),
    ]
    grouped = group_by_arm(rows)
    alone = GateSettings(criteria=[settings.criteria[1]])
    assert [finding.passed for finding in findings_of(alone, METRICS, grouped)] == [True]
    found = findings_of(settings, METRICS, grouped)
    by_test = {finding.test: finding for finding in found if finding.tier == "supporting"}
    assert by_test["non_inferiority"].p_value <= 0.025
    assert by_test["superiority"].passed is True  # the last step of Holm's procedure is at α itself
    harder = [*settings.criteria, Criterion(metric="false_alarm", tier="supporting")]  # says nothing: p = 1
    found = findings_of(settings.model_copy(update={"criteria": harder}), METRICS, grouped)
    assert [f.passed for f in found if f.tier == "supporting" and f.test == "superiority"] == [None, None]
    assert decide(settings, found, {"baseline": "b", "candidate": "c"}, 60, METRICS).decision == "promote"


def first_model(misses: int, tier: str = "critical"):
    """A first candidate whose base model misses every one of 174 unsafe directions."""
    bound = Criterion(metric="near_miss", tier=tier, versus=["champion", "absolute"], bound=0.5)
    settings = GateSettings(min_examples=50, criteria=[Criterion(metric="exact"), bound])
    rows = [
        *results("baseline", [0.0] * 400, [1.0] * 174 + [None] * 226),
        *results("candidate", [1.0] * 400, [1.0] * misses + [0.0] * (174 - misses) + [None] * 226),
    ]
    findings = findings_of(settings, METRICS, group_by_arm(rows))
    return findings, decide(settings, findings, {"baseline": "b", "candidate": "c"}, 400, METRICS)


def test_a_ceiling_stops_a_first_model_that_only_beats_a_base_model_that_misses_everything():
    findings, made = first_model(misses=66)
    assert made.decision == "promote"
    [bound] = [finding for finding in findings if finding.versus == "absolute"]
    assert (bound.n, bound.reference, bound.passed) == (174, 0.5, True)
    _, made = first_model(misses=120)
    assert made.decision == "hold"
    assert "Near misses is not below 0.5: 0.690 (90 % interval 0.627 to 0.747, n = 174)" in made.reason
    _, made = first_model(misses=84)
    assert made.decision == "inconclusive"
    assert made.needed is not None
    assert "is not shown to be below 0.5" in made.reason


def sliced(parts: dict[str, tuple[int, int, int]], **rule):
    """A candidate that is better overall, with slices of (examples, gained, lost) against a champion half right."""
    rows = []
    for arm in ("baseline", "champion", "candidate"):
        place = 0
        for label, (n, gained, lost) in parts.items():
            for i in range(n):
                champion = float(gained <= i < gained + lost + (n - gained - lost) // 2)
                exact = {"baseline": 0.0, "champion": champion}.get(
                    arm, 1.0 if i < gained else 0.0 if i < gained + lost else champion
                )
                [row] = results(arm, [exact])
                own = {"example_id": f"{place:05}", "group": f"g{place}", "slices": [label]}
                rows.append(row.model_copy(update=own))
                place += 1
    settings = GateSettings(
        min_examples=50, slices=[SliceRule(**{"by": "flag", "metric": "exact", "versus": ["champion"], **rule})]
    )
    scores = Scores.of(group_by_arm(rows), METRICS)
    found = slices_of(settings, METRICS, scores)
    every = [*findings_of_columns(settings, METRICS, scores), *found]
    return {one.slice: one for one in found}, decide(settings, every, DIGESTS, place, METRICS)


def test_a_slice_that_is_shown_to_be_worse_holds_a_candidate_that_is_better_overall():
    found, made = sliced({"flag=ok": (200, 80, 5), "flag=overdose": (60, 2, 30)})
    assert made.decision == "hold"
    assert "where flag=overdose is worse by more than 0.1 than the champion: 0.267 against 0.733" in made.reason
    assert (found["flag=ok"].passed, found["flag=overdose"].passed) == (True, False)
    assert found["flag=overdose"].difference == pytest.approx(-28 / 60)


def test_a_slice_that_only_looks_worse_blocks_nothing():
    # Four in forty lost: eight points, and as many again could be chance.
    found, made = sliced({"flag=ok": (200, 80, 5), "flag=overdose": (40, 4, 10)})
    assert found["flag=overdose"].difference == pytest.approx(-0.15)
    assert (made.decision, found["flag=overdose"].passed) == ("promote", None)


def test_a_slice_of_few_examples_is_shown_and_not_tested():
    found, made = sliced({"flag=ok": (200, 80, 5), "flag=overdose": (20, 0, 20)}, min_examples=30)
    assert (made.decision, found["flag=overdose"].passed) == ("promote", None)
    assert found["flag=overdose"].note == "20 examples, and the policy asks for 30"


def test_many_slices_are_held_to_alpha_together():
    # Thirteen lost of thirty with none gained show a loss of more than 0.2 by themselves: p = 0.004, not below 0.05/20.
    worse = {"flag=overdose": (30, 0, 13)}
    found, made = sliced({"flag=ok": (400, 150, 5), **worse}, margin=0.2)
    assert (made.decision, found["flag=overdose"].passed) == ("hold", False)
    others = {f"flag={place}": (30, 10, 2) for place in range(20)}
    found, made = sliced({"flag=ok": (400, 150, 5), **worse, **others}, margin=0.2)
    assert (made.decision, found["flag=overdose"].passed) == ("promote", None)


def test_slices_without_a_change_seldom_hold_a_candidate():
    rng, held, fell = np.random.default_rng(8), 0, 0
    settings = GateSettings(slices=[SliceRule(by="part", metric="exact", versus=["champion"], margin=0.0)])
    places = {f"part={k}": np.arange(30 * k, 30 * (k + 1)) for k in range(20)}
    for _ in range(100):
        champion = (rng.random(600) < 0.6).astype(float)
        candidate = np.where(rng.random(600) < 0.2, rng.permutation(champion), champion)
        arms = {"candidate": {"exact": candidate}, "champion": {"exact": champion}}
        found = slices_of(settings, METRICS, Scores(arms, None, places))
        held += any(one.passed is False for one in found)
        fell += any(one.difference <= -0.05 for one in found)
    assert held <= 5 + 3 * 2.2  # α, and three standard errors
    assert fell >= 90  # what a rule on means would hold


def test_a_slice_that_there_is_not_is_named():
    with pytest.raises(RecipeError, match="no held-out example has a slice 'colour'"):
        sliced({"flag=ok": (60, 20, 0)}, by="colour")


@pytest.mark.parametrize("bound", [0.0, 1.0, 2.0])
def test_a_bound_that_asks_for_nothing_or_for_the_impossible_is_refused(bound):
    settings = GateSettings(criteria=[Criterion(metric="near_miss", versus=["absolute"], bound=bound)])
    with pytest.raises(RecipeError, match="asks for nothing or for the impossible"):
        findings_of(settings, METRICS, group_by_arm([*results("baseline", [0.0]), *results("candidate", [1.0])]))


def test_a_bound_and_absolute_go_together():
    for wrong in ({"versus": ["absolute"]}, {"bound": 0.5}):
        with pytest.raises(ValidationError, match="go together"):
            Criterion(metric="near_miss", **wrong)
    kept = Criterion(metric="near_miss", versus=["absolute"], bound=0.5)
    assert Criterion.model_validate(kept.model_dump(mode="json")) == kept
    assert "bound" not in Criterion(metric="exact").model_dump(mode="json")  # the IR's constants have no null


def test_a_metric_the_task_has_not_is_named():
    settings = GateSettings(criteria=[Criterion(metric="bleu")])
    with pytest.raises(RecipeError, match="bleu"):
        findings_of(settings, METRICS, group_by_arm([*results("baseline", [0.0]), *results("candidate", [1.0])]))


def verdicts(wins: int, losses: int) -> list[Verdict]:
    return [
        Verdict(example_id=str(i), group=str(i), arm_a="candidate", arm_b="baseline", winner=w, first=w, swapped=w)
        for i, w in enumerate(["a"] * wins + ["b"] * losses)
    ]


def test_a_judge_below_its_floor_cannot_decide():
    settings = GateSettings(judge_may_decide=True)
    [trusted] = judged(settings, {"may_decide": True, "compared": ["candidate", "baseline"]}, verdicts(30, 2))
    [doubted] = judged(settings, {"may_decide": False, "compared": ["candidate", "baseline"]}, verdicts(30, 2))
    assert (trusted.passed, doubted.passed) == (True, None)
    assert judged(GateSettings(), {}, verdicts(30, 2)) == []
    made = decide(settings, [doubted], {"baseline": "b", "candidate": "c"}, 100, METRICS)
    assert (made.decision, made.needed) == ("inconclusive", None)
    assert "below its floor" in made.reason


def write_looks(folder: Path, held_out: HeldOut, promoted: list[bool]) -> None:
    earlier = [Look(candidate="d", promoted=won) for won in promoted]
    folder.mkdir(parents=True)
    (folder / "looks.json").write_text(Looks(held_out=held_out, measurement="m", earlier=earlier).model_dump_json())
    seal(folder, "looks")


def test_what_passes_at_first_is_open_at_a_later_look():
    champion, candidate = [1.0] * 10 + [0.0] * 90, [0.0] * 2 + [1.0] * 18 + [0.0] * 80  # 10 gained, 2 lost: p = 0.019
    grouped = group_by_arm([*results("baseline", champion), *results("candidate", candidate)])
    held_out, made = HeldOut.of(["x"]), []
    for earlier in (0, 1):
        looks = Looks(held_out=held_out, measurement="m", earlier=[Look(candidate="d", promoted=False)] * earlier)
        turn = turn_of(SETTINGS, looks, held_out)
        findings = findings_of(SETTINGS.model_copy(update={"alpha": turn.level}), METRICS, grouped)
        made.append(decide(SETTINGS, findings, {"baseline": "b", "candidate": "c"}, 100, METRICS, turn=turn))
    assert [one.decision for one in made] == ["promote", "inconclusive"]
    assert "decision 2 on these examples, at level 0.0076" in made[1].reason


def test_examples_that_answered_all_planned_questions_promote_nothing_more():
    settings = SETTINGS.model_copy(update={"looks": 2})
    held_out = HeldOut.of(["x"])
    looks = Looks(held_out=held_out, measurement="m", earlier=[Look(candidate="d", promoted=False)] * 2)
    turn = turn_of(settings, looks, held_out)
    grouped = group_by_arm([*results("baseline", [0.0] * 100), *results("candidate", [1.0] * 100)])
    findings = findings_of(settings, METRICS, grouped)
    made = decide(settings, findings, {"baseline": "b", "candidate": "c"}, 100, METRICS, turn=turn)
    assert (turn, made.decision, made.needed) == ((3, 0.0), "inconclusive", None)
    assert "2 decisions were taken on these held-out examples" in made.reason


def test_looks_that_were_counted_for_other_examples_are_refused():
    with pytest.raises(DataError, match="counted for other examples"):
        turn_of(SETTINGS, Looks(held_out=HeldOut.of(["x"]), measurement="m", earlier=[]), HeldOut.of(["y"]))


def test_labels_overrule_a_judge_that_flatters():
    settings, trusted = GateSettings(judge_may_decide=True), {"may_decide": True, "compared": ["candidate", "baseline"]}
    flattered = verdicts(180, 20)
    assert judged(settings, trusted, flattered)[0].passed is True
    known = [
        row.model_copy(update={"label": "ab"[place % 2] if place < 60 else None}) for place, row in enumerate(flattered)
    ]
    [found] = judged(settings, trusted, known)
    assert (found.passed, found.n) == (None, 200)
    assert found.candidate == pytest.approx(0.5, abs=0.05)
    right = [row.model_copy(update={"label": row.winner if place % 3 else None}) for place, row in enumerate(flattered)]
    [found] = judged(settings, trusted, right)
    assert (found.passed, found.candidate) == (True, pytest.approx(0.9, abs=0.02))
    assert judged(settings, trusted | {"may_decide": False}, right)[0].passed is None
    worse = [row.model_copy(update={"label": "b" if place < 60 else None}) for place, row in enumerate(flattered)]
    assert judged(settings, trusted, worse)[0].passed is False


def test_the_wire_writes_the_record_on_both_branches(tmp_path: Path):
    for name, exact, wanted in (("yes", [1.0] * 100, True), ("no", [0.0] * 100, False)):
        folder = tmp_path / name
        write_rows(
            folder / "results" / "results.parquet",
            [*results("baseline", [0.0] * 100), *results("candidate", exact)],
            Result,
        )
        seal(folder / "results", "results", metadata={"arms": {"baseline": "b", "candidate": "c"}})
        write_rows(folder / "verdicts" / "verdicts.parquet", verdicts(3, 1), Verdict)
        seal(folder / "verdicts", "verdicts")
        held_out = HeldOut.of(f"{i:05}" for i in range(100))
        write_looks(folder / "looks", held_out, [False, False])
        judging = dsl.Metrics(uri=str(folder / "judging"))
        write_summary(judging, Summary(step="judge", headline="-", details={"may_decide": False}))
        out = dsl.Artifact(uri=str(folder / "decision"))
        passed = gate.python_func(
            settings=SETTINGS.model_dump(mode="json"),
            task="medication_directions",
            results=dsl.Dataset(uri=str(folder / "results")),
            verdicts=dsl.Dataset(uri=str(folder / "verdicts")),
            judging=judging,
            looks=dsl.Artifact(uri=str(folder / "looks")),
            decision=out,
            summary=dsl.Metrics(uri=str(folder / "summary")),
        )
        record = json.loads((Path(out.path) / "decision.json").read_text())
        assert passed is wanted
        assert read_manifest(out.path, "decision").parents.keys() == {"results", "verdicts", "judging", "looks"}
        assert record["examples"] == 100
        assert record["arms"]["candidate"]["exact"]["n"] == 100
        assert record["decision"] == ("promote" if wanted else "inconclusive")
        assert (record["look"], record["alpha"]) == (3, 0.05)
        assert record["level"] == record["criteria"][0]["alpha"] == pytest.approx(0.05 * 6 / (3 * np.pi) ** 2)
        assert HeldOut.model_validate(record["held_out"]) == held_out
        assert "decision 3 on these examples, at level 0.0034" in record["reason"]


class Chain:
    """The steps from the champion to the held attempt, on one registry."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, 0
        self.ids = [f"{place:032x}" for place in range(100)]
        rows = [Example(id=one, group=one, prompt=[], reference="") for one in self.ids]
        write_rows(folder / "data" / "test.parquet", rows, Example)
        seal(folder / "data", "splits")

    def decide(self, words: str, exact: list[float]) -> dict:
        """Return the record of a candidate with these bytes and scores, once the registry knows of it."""
        return self.end(self.start(words), exact)

    def start(self, words: str) -> Path:
        """Make a candidate and count the looks before it; return the run's folder."""
        self.runs += 1
        run = self.folder / str(self.runs)
        (run / "model").mkdir(parents=True)
        (run / "model" / "model.safetensors").write_text(words)
        seal(run / "model", "model")
        policy, data = SETTINGS.model_dump(mode="json"), dsl.Dataset(uri=str(self.folder / "data"))
        asked = {"name": "chain", "policy": policy, "evaluation": {}, "measurement": "m", "data": data}
        made = {"champion": dsl.Model(uri=str(run / "champion")), "looks": dsl.Artifact(uri=str(run / "looks"))}
        find_champion.python_func(**asked, candidate=dsl.Model(uri=str(run / "model")), **made)
        return run

    def end(self, run: Path, exact: list[float]) -> dict:
        """Decide; return the record, which the registry has unless it is to promote."""

        def at(name: str, kind=dsl.Artifact):
            return kind(uri=str(run / name))

        content = read_manifest(run / "model", "model").content
        arms = {"baseline": [0.0] * 10 + [1.0] * 2 + [0.0] * 88, "candidate": exact}
        answers = [
            row.model_copy(update={"example_id": one, "group": one})
            for arm, values in arms.items()
            for row, one in zip(results(arm, values), self.ids, strict=True)
        ]
        write_rows(run / "results" / "results.parquet", answers, Result)
        seal(run / "results", "results", metadata={"arms": {"baseline": "b", "candidate": content}})
        write_rows(run / "verdicts" / "verdicts.parquet", verdicts(3, 1), Verdict)
        seal(run / "verdicts", "verdicts")
        write_summary(at("judging", dsl.Metrics), Summary(step="judge", headline="-", details={"may_decide": False}))
        policy = SETTINGS.model_dump(mode="json")
        given = {"results": at("results"), "verdicts": at("verdicts"), "judging": at("judging"), "looks": at("looks")}
        made = {"decision": at("decision"), "summary": at("summary", dsl.Metrics)}
        passed = gate.python_func(settings=policy, task="medication_directions", **given, **made)
        if not passed:
            hold_model.python_func(name="chain", candidate=at("model"), decision=at("decision"))
        return json.loads((run / "decision" / "decision.json").read_text())


def test_a_retrain_is_another_look_and_a_repeated_run_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASSAY_REGISTRY", str(tmp_path / "registry"))
    chain = Chain(tmp_path)
    same, better = [0.0] * 10 + [1.0] * 2 + [0.0] * 88, [1.0] * 10 + [0.0] * 90  # ten gained, two lost: p = 0.019
    first = chain.decide("unchanged", same)
    assert (first["decision"], first["look"]) == ("inconclusive", 1)
    assert chain.decide("unchanged", same) == first
    second = chain.decide("better", better)
    assert (second["decision"], second["look"]) == ("inconclusive", 2)  # it would have been promoted at first
    assert second["level"] == pytest.approx(first["level"] / 4)
    assert chain.decide("unchanged", same) == first
    assert chain.decide("third", better)["look"] == 3


def test_of_two_runs_at_once_the_one_that_counted_too_few_looks_decides_anew(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("ASSAY_REGISTRY", str(tmp_path / "registry"))
    chain = Chain(tmp_path)
    late, other = chain.start("late"), chain.start("other")
    chain.end(other, [0.0] * 10 + [1.0] * 2 + [0.0] * 88)
    record = chain.end(late, [1.0] * 100)
    assert (record["decision"], record["look"]) == ("promote", 1)
    content = record["candidate"]
    for refused in (
        lambda: registry.require_turn("chain", record),
        lambda: registry.register("chain", 1, content, registry.keep_decision(late / "decision")),
    ):
        with pytest.raises(RegistryError, match="took this for look 1 .* and it is look 2"):
            refused()
    assert [entry.event for entry in registry.history("chain")] == ["held"]
    again = chain.decide("late", [1.0] * 100)
    assert (again["decision"], again["look"]) == ("promote", 2)
    kept = registry.keep_decision(tmp_path / str(chain.runs) / "decision")
    assert registry.register("chain", 1, content, kept).event == "registered"
