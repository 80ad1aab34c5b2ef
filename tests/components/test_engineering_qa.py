"""Engineering questions: the rows' source, the measures, and what the simulated expert prefers."""

from itertools import islice

import numpy as np
import pytest

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.packages import package_folder
from assay.components.contracts.recipe import Recipe
from assay.components.shared.similarity import load_encoder, similarity
from assay.components.shared.tasks import engineering_qa
from assay.components.shared.tasks.engineering_qa import TASK, length_ratio, overlap, words
from assay.components.shared.tasks.task import get_task
from assay.pipelines import cli

EXPERT = "A building permit takes ten weeks. The fee follows the municipal tariff."


def test_rows_are_the_packages_in_the_seeds_order() -> None:
    rows = list(TASK.generate(503, 0))
    assert [turn["role"] for turn in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert len({row["messages"][1]["content"] for row in rows}) > 490
    assert list(TASK.generate(20, 0)) == list(islice(rows, 20))
    assert list(TASK.generate(20, 1)) != list(islice(rows, 20))


def test_more_rows_than_there_are_is_an_error() -> None:
    with pytest.raises(RecipeError, match="503 questions, not 504"):
        next(TASK.generate(504, 0))


def test_a_package_that_is_absent_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engineering_qa, "PACKAGE", "no_such_package")
    with pytest.raises(RecipeError, match="no-such-package is not installed") as error:
        next(TASK.generate(10, 0))
    assert error.value.fix == "python -m pip install --no-deps no-such-package"


def test_a_package_is_found_and_not_imported() -> None:
    assert (package_folder("trl") / "__init__.py").is_file()


def test_questions_that_differ_in_writing_only_are_one_group() -> None:
    one, other = (TASK.prompt(text) for text in ("What is a bygglov?", "what is a  BYGGLOV"))
    assert TASK.group(one) == TASK.group(other) == "what is a bygglov"


def test_overlap_by_hand() -> None:
    # 4 words against 6; "permit" and "the" stand in both, "the" once of two times: 2 · 2 / 10
    assert overlap("The permit costs money", "pay the permit before the start") == pytest.approx(0.4)
    assert overlap("the the the", "the") == pytest.approx(0.5)
    assert overlap("", "the") == overlap("fee", "the") == 0.0
    assert words("Fee: 3,000–8,000 SEK (BBR)") == ["fee", "3", "000", "8", "000", "sek", "bbr"]


def test_length_ratio_leaves_outer_space_out() -> None:
    assert length_ratio("  abcd\n", "ab") == 2.0
    assert length_ratio("", "ab") == 0.0


def test_the_mean_vectors_cosine_by_hand() -> None:
    one, other = "a building permit", "the fee"
    found = load_encoder()
    means = [
        found.embeddings[found.tokenizer.encode(text, add_special_tokens=False).ids].astype(np.float64).mean(0)
        for text in (one, other)
    ]
    cosine = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    assert similarity(one, other) == pytest.approx(max(0.0, cosine), abs=1e-6)
    assert similarity(one, one) == pytest.approx(1.0, abs=1e-6)
    assert similarity(one, "") == similarity("", "") == 0.0


def test_texts_of_one_meaning_are_nearer_than_others() -> None:
    near = similarity("The roof must be insulated.", "Insulation of the roof is required.")
    far = similarity("The roof must be insulated.", "Invoices are due after thirty days.")
    assert near > 0.6 > 0.3 > far


def test_the_simulated_expert_prefers_what_is_near_and_as_long() -> None:
    near = "The permit takes about ten weeks, and the fee follows the tariff of the municipality."
    far = "You should paint the facade every ten years with a breathable paint of good quality."
    rewards = [TASK.reward(text, EXPERT) for text in (EXPERT, near, near + " " + near + " " + near, far, "")]
    assert rewards == sorted(rewards, reverse=True)
    assert rewards[0] == 1.0
    assert rewards[-1] == 0.0
    assert all(0 <= reward < 1 for reward in rewards[1:])
    assert TASK.reward(near, EXPERT, finished=False) == pytest.approx(rewards[1] / 2)
    assert TASK.reward(EXPERT, EXPERT, finished=False) < 0.5


def test_scores_are_the_metrics_and_within_their_range() -> None:
    for text in (EXPERT, "", "fee " * 60):
        scores = TASK.score(text, EXPERT)
        assert list(scores) == [metric.name for metric in TASK.metrics]
        assert all(value is not None and 0 <= value <= 1 for value in scores.values())
    assert TASK.score(EXPERT, EXPERT) == {"similarity": pytest.approx(1.0), "overlap": 1.0, "length": 1.0}
    assert TASK.score("fee " * 60, EXPERT)["length"] == 0.0


def test_the_recipe_climbs_from_sft_over_a_reward_model_to_ppo() -> None:
    recipe = Recipe.load(cli.RECIPES / "engineering-qa.yaml")
    assert recipe.stages == {"sft": "SFT", "rl": "PPO"}
    assert recipe.reward_model
    names = {metric.name for metric in get_task(recipe.task).metrics}
    assert {criterion.metric for criterion in recipe.gate.criteria} | {
        recipe.select.metric,
        recipe.select.guard,
    } <= names
