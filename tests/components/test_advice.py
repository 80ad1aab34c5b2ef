"""Each rule of `assay advise`, on facts made by hand: where it holds, and where it just does not."""

from dataclasses import replace
from typing import Any

import pytest

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.metrics import Metric, Summary
from assay.components.contracts.recipe import Recipe
from assay.components.shared.advice import (
    FEW_LABELS,
    LEAST_LABELS,
    PER_CLASS,
    RULES,
    Cost,
    Facts,
    Point,
    advise,
    outlook,
    read_facts,
)
from assay.components.shared.statistics import examples_to_show, examples_to_tell, proportion

EXACT = Metric(name="exact", title="Exact", better="higher", definition="")
MISSES = Metric(name="misses", title="Misses", better="lower", definition="")
ROWS = {"sft": 600, "preference": 200, "rl": 300, "validation": 100, "test": 400}
SENTENCES = {"distinct": 590.0, "rarest": 1.0, "read_off": 0.0, "contexts": 0.002}


def arm(right: float, n: int = 400, **others: float) -> dict[str, dict[str, float]]:
    """A table of measured shares with Wilson's intervals."""
    cells = {"exact": right, **others}
    return {name: proportion(share * n, n).model_dump() for name, share in cells.items()}


def facts(**changes: Any) -> Facts:
    """A use that a prompt does not serve, whose 600 labels were not trained on."""
    given: dict[str, Any] = {
        "graph": "post_training",
        "rows": ROWS,
        "answers": SENTENCES,
        "metrics": [EXACT, MISSES],
        "arms": {"baseline": arm(0.1), "few_shot": arm(0.3)},
        "targets": {"exact": 0.8},
        "min_examples": 100,
    }
    return Facts(**(given | changes))


def test_a_prompt_that_reaches_the_target_ends_it():
    advice = advise(facts(arms={"baseline": arm(0.9), "few_shot": arm(0.95)}))
    assert (advice.rung, advice.rule, advice.passed) == ("prompting", "prompt suffices", [])
    assert "exact 0.900 [0.867, 0.926] reaches the target 0.800 (n = 400)" in advice.because
    assert advice.cost == "No training."


def test_worked_examples_that_reach_the_target_end_it():
    advice = advise(facts(arms={"baseline": arm(0.1), "few_shot": arm(0.9)}))
    assert advice.rung == "few_shot"
    assert "is short of the target" in advice.passed[0]


def test_every_target_must_be_reached_and_lower_is_better_where_it_is():
    arms = {"baseline": arm(0.1, misses=0.9), "few_shot": arm(0.95, misses=0.30)}
    targets = {"exact": 0.8, "misses": 0.1}
    assert advise(facts(arms=arms, targets=targets)).rung == "sft"
    arms["few_shot"] = arm(0.95, misses=0.02)
    assert advise(facts(arms=arms, targets=targets)).rung == "few_shot"


def test_a_metric_that_an_arm_lacks_is_no_target_reached():
    advice = advise(facts(arms={"baseline": arm(0.95)}, targets={"misses": 0.1}))
    assert advice.rung != "prompting"
    assert "misses was not measured" in advice.passed[0]


def test_another_model_that_suffices_by_its_prompt_needs_no_training_of_ours():
    arms = {"baseline": arm(0.1), "large": arm(0.9)}
    advice = advise(facts(arms=arms, endpoints=["large"]))
    assert (advice.rung, advice.rule) == ("another_model", "another model suffices")
    assert advise(facts(arms=arms, endpoints=["large"], targets={})).rung == "sft"  # no target says that it is enough


def test_a_champion_that_serves_is_kept():
    advice = advise(facts(arms={"baseline": arm(0.1), "champion": arm(0.9)}))
    assert (advice.rung, advice.rule) == ("none", "champion suffices")
    assert advise(facts(arms={"baseline": arm(0.1), "champion": arm(0.9)}, targets={})).rung == "sft"


def test_a_search_by_words_that_suffices_needs_no_encoder():
    searches = {"lexical": arm(0.9), "baseline": arm(0.2)}
    assert advise(facts(graph="retrieval", arms=searches)).rung == "retrieval"


def test_an_encoder_is_trained_where_words_fail():
    searches = {"lexical": arm(0.4), "baseline": arm(0.2)}
    advice = advise(facts(graph="retrieval", arms=searches))
    assert (advice.rung, advice.rule) == ("embedding", "search must be taught")
    trained = advise(facts(graph="retrieval", arms=searches | {"embedding": arm(0.9)}))
    assert (trained.rung, trained.rule) == ("embedding", "a stage suffices")


def test_of_trained_stages_the_lowest_that_reaches_the_target_is_named():
    climb = {"baseline": arm(0.1), "sft": arm(0.7), "preference": arm(0.9), "rl": arm(0.95)}
    advice = advise(facts(arms=climb, costs={"preference": Cost(103.4, "as it last ran here")}))
    assert (advice.rung, advice.rule) == ("preference", "a stage suffices")
    assert advice.cost == "Cost: about 104 s (as it last ran here)."
    assert advice.seconds == 103.4


def test_a_rung_costs_what_it_stands_on_too():
    climb = {"baseline": arm(0.1), "sft": arm(0.5), "preference": arm(0.5), "rl": arm(0.95)}
    costs = {stage: Cost(100.0, "here") for stage in ("sft", "preference", "rl")}
    advice = advise(facts(arms=climb, costs=costs, verdicts={"preference": "incumbent"}))
    assert advice.cost == "Cost: about 200 s (here, after sft)."


def test_a_stage_that_was_left_out_is_not_recommended():
    climb = {"baseline": arm(0.1), "sft": arm(0.9), "rl": arm(0.95)}
    assert advise(facts(arms=climb, verdicts={"sft": "incumbent", "rl": "challenger"})).rung == "rl"


def test_without_a_target_the_lowest_stage_that_is_level_with_the_best_suffices():
    climb = {"baseline": arm(0.1), "sft": arm(0.80), "preference": arm(0.82), "rl": arm(0.83)}
    advice = advise(facts(arms=climb, targets={}))
    assert advice.rung == "sft"
    assert "reaches the best trained arm's 0.830" in advice.because
    level = {"baseline": arm(0.8), "sft": arm(0.81)}
    assert advise(facts(arms=level, targets={})).rung == "prompting"  # what training added is within the noise


def test_an_arm_on_the_edge_asks_for_rows_not_for_training():
    advice = advise(facts(arms={"baseline": arm(0.1), "few_shot": arm(0.83)}))
    assert (advice.rung, advice.rule) == ("measure", "target is within the interval")
    assert advice.needed == examples_to_tell(0.83, 0.8, 0.05) == 1100
    on_it = advise(facts(arms={"baseline": arm(0.1), "few_shot": arm(0.8)}))
    assert on_it.needed is None
    assert "no number of rows" in on_it.because


def test_too_few_held_out_rows_come_before_any_training():
    few = facts(arms={"baseline": arm(0.8, 60)}, targets={"exact": 0.9}, min_examples=0)
    advice = advise(few)
    assert (advice.rung, advice.rule) == ("measure", "too few held-out rows")
    assert advice.needed == examples_to_show(0.1, 0.05) == 118  # (0.2 - 0.01) · (1.645 + 0.842)² / 0.01, rounded up
    assert advise(facts(arms={"baseline": arm(0.1, 60)}, min_examples=50)).rung == "sft"
    assert advise(facts(arms={"baseline": arm(0.1, 60)}, min_examples=61)).needed == 61


def test_answers_that_stand_in_documents_are_looked_up():
    read = SENTENCES | {"read_off": 0.9, "contexts": 0.8}
    assert advise(facts(answers=read)).rung == "retrieval"
    assert advise(facts(answers=read | {"contexts": 0.01})).rung == "sft"  # one system prompt that lists the answers


def test_a_small_closed_set_of_answers_is_a_classifiers():
    labels = SENTENCES | {"distinct": 5.0, "rarest": float(PER_CLASS)}
    assert advise(facts(answers=labels)).rung == "classifier"
    assert advise(facts(answers=labels | {"rarest": PER_CLASS - 1.0})).rung == "sft"
    assert advise(facts(answers=labels | {"distinct": 1.0})).rung == "sft"
    tried = {"baseline": arm(0.1), "classifier": arm(0.5)}
    assert advise(facts(answers=labels, arms=tried)).rung != "classifier"


def test_a_teacher_labels_many_prompts():
    rows = ROWS | {"sft": FEW_LABELS - 1, "preference": 300, "rl": 300}
    advice = advise(facts(rows=rows, teacher="hub/teacher"))
    assert advice.rung == "distill"
    assert "199 labelled rows and 600 further prompts" in advice.because
    assert advise(facts(rows=rows)).rung == "sft"
    assert advise(facts(rows=rows | {"sft": FEW_LABELS}, teacher="hub/teacher")).rung == "sft"


def test_too_few_labels_are_not_trained_on():
    advice = advise(facts(rows=ROWS | {"sft": LEAST_LABELS - 1}))
    assert (advice.rung, advice.rule) == ("none", "too few labels")
    assert advise(facts(rows=ROWS | {"sft": LEAST_LABELS})).rung == "sft"


def test_labels_are_the_first_thing_to_train_on():
    advice = advise(facts())
    assert (advice.rung, advice.title) == ("sft", "Supervised fine-tuning (600 rows)")
    assert "the best arm so far is few_shot with exact 0.300" in advice.because
    assert advice.cost.startswith("Its cost was not measured")


def test_after_sft_come_pairs_then_the_verifier_then_nothing():
    climb = {"baseline": arm(0.1), "sft": arm(0.5)}
    assert advise(facts(arms=climb)).rung == "preference"
    assert advise(facts(arms=climb, rows=ROWS | {"preference": 0})).rung == "rl"
    climb |= {"preference": arm(0.55)}
    assert advise(facts(arms=climb)).rung == "rl"
    climb |= {"rl": arm(0.6)}
    advice = advise(facts(arms=climb))
    assert (advice.rung, advice.rule) == ("none", "every rung was climbed")
    assert "sft, preference, rl" in advice.because


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"verified": False}, "no program says what is right"),
        ({"arms": {"sft": arm(0.0), "preference": arm(0.01)}}, "hardly any samples"),
        ({"rows": ROWS | {"rl": 0}}, "0 prompts are kept"),
    ],
)
def test_rl_needs_a_verifier_prompts_and_a_model_that_is_right_sometimes(changes, word):
    climb = {"arms": {"sft": arm(0.5), "preference": arm(0.55)}}
    advice = advise(facts(**(climb | changes)))
    assert advice.rung == "none"
    assert any(word in sentence for sentence in advice.passed)


def test_the_last_rule_always_holds_and_each_has_a_reason():
    assert advise(replace(facts(), arms={"sft": arm(0.0)}, rows={}, answers={})).rung in {"none", "measure"}
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.reason for rule in RULES)


def test_facts_are_read_from_the_summaries_of_a_run():
    recipe = Recipe.model_validate({"name": "x", "targets": {"exact": 0.5}, "distill": {"teacher": "hub/teacher"}})
    splits = Summary(
        step="prepare_data",
        headline="",
        details={"splits": {"sft": {"rows": 9, "groups": 9}}, "answers": SENTENCES},
    )
    arms = {"baseline": arm(0.1), "sft": arm(0.4), "candidate": arm(0.4), "gold": arm(1.0)}
    told = Summary(
        step="evaluate", headline="", details={"arms": arms, "metrics": [EXACT.model_dump(), MISSES.model_dump()]}
    )
    selected = {"sft": Summary(step="select_model", headline="", details={"chosen": "challenger"})}
    found = read_facts(recipe, splits, told, selected, {})
    assert list(found.arms) == ["baseline", "sft"]
    assert (found.rows, found.teacher, found.targets) == ({"sft": 9}, "hub/teacher", {"exact": 0.5})
    assert found.verdicts == {"sft": "challenger"}
    with pytest.raises(RecipeError, match="no metric 'exakt'"):
        read_facts(recipe, splits, told, selected, {}, {"exakt": 1.0})


def curve(*means: float) -> list[Point]:
    return [Point(rows=100 * 2**k, mean=mean, low=mean - 0.1, high=mean + 0.1, n=80) for k, mean in enumerate(means)]


def test_without_a_curve_there_is_no_outlook():
    assert (advise(facts()).outlook, advise(facts()).curve) == ("", [])
    assert advise(facts(curve=curve(0.5))).outlook == ""


def test_the_curve_is_told_and_followed():
    """The error goes 0.8, 0.4, 0.2: it halves with each doubling, so 800 rows leave 0.1, and 0.05 takes 1,600."""
    advice = advise(facts(curve=curve(0.2, 0.6, 0.8), targets={"exact": 0.95}))
    assert "0.200 [0.100, 0.300] with 100, 0.600 [0.500, 0.700] with 200, 0.800" in advice.outlook
    assert "exact on 80 validation rows" in advice.outlook
    assert "800 rows come to 0.900, and the target 0.950 takes about 1,600." in advice.outlook
    assert [point.rows for point in advice.curve] == [100, 200, 400]


@pytest.mark.parametrize(
    ("means", "target", "words"),
    [
        ((0.5, 0.5), 0.8, "The last rows brought nothing"),
        ((0.50, 0.51), 0.8, "is out of its reach"),
        ((0.5, 0.8), 1.0, "is out of its reach"),
        ((0.5, 0.9), 0.8, "400 rows come to 0.980."),
        ((0.5, 1.0), 0.8, "1.000 [0.900, 1.100] with 200."),
    ],
)
def test_where_a_curve_ends(means: tuple[float, ...], target: float, words: str):
    assert words in outlook(facts(curve=curve(*means), targets={"exact": target}))


def test_where_lower_is_better_the_curve_falls():
    told = outlook(
        facts(
            metrics=[MISSES, EXACT],
            arms={"baseline": arm(0.1, misses=0.9)},
            curve=curve(0.8, 0.4),
            targets={"misses": 0.1},
        )
    )
    assert "400 rows come to 0.200, and the target 0.100 takes about 800." in told
