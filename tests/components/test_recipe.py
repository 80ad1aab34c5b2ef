"""Reading a recipe: profiles, seeds, and every problem at once."""

import re
from pathlib import Path

import pytest
import yaml

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Recipe, merge
from assay.pipelines import cli


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_merge_goes_mapping_by_mapping_and_leaves_its_arguments():
    base = {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2], "c": {"k": 1}}
    assert merge(base, {"a": {"y": {"w": 3}}, "b": [3], "c": None}) == {
        "a": {"x": 1, "y": {"z": 2, "w": 3}},
        "b": [3],
        "c": None,
    }
    assert base == {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2], "c": {"k": 1}}


def test_a_profile_is_an_overlay_and_the_seed_an_argument(tmp_path):
    path = write(tmp_path, "name: a\nsft: {epochs: 2, batch_size: 8}\nprofiles: {big: {sft: {batch_size: 64}}}\n")
    plain, big = Recipe.load(path), Recipe.load(path, "big", seed=7)
    assert (plain.sft.batch_size, plain.seed) == (8, 0)
    assert (big.sft.batch_size, big.sft.epochs, big.seed) == (64, 2, 7)


def test_every_profile_of_the_recipes_that_come_with_assay_is_valid():
    for path in cli.RECIPES.glob("*.yaml"):
        for profile in ["", *(yaml.safe_load(path.read_text(encoding="utf-8")).get("profiles") or {})]:
            assert Recipe.load(path, profile).name == path.stem


def test_all_problems_are_listed_at_once(tmp_path):
    path = write(
        tmp_path,
        "name: Bad Name\nsedd: 1\nsft: {learning_rate: 7, epoch: 2}\n"
        "data: {shares: {sft: 0.9, test: 0.9}}\ngate: {alpha: 2}\n",
    )
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    message = str(caught.value)
    for key in ("name:", "sedd:", "sft.learning_rate:", "sft.epoch:", "gate.alpha:", "shares must sum to 1, not 1.8"):
        assert key in message
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "wanted a YAML mapping"),
        ("- a\n", "wanted a YAML mapping"),
        ("name: [a\n", "cannot be read"),
        ("name: a\nprofiles: [gpu]\n", "wanted a mapping"),
        ("name: a\nprofiles: {gpu: 3}\n", "wanted a mapping"),
        ("name: a\n", "there is no profile 'gpu'"),
        ("name: a\nprofiles: {gpu: {seed: -1}}\n", "seed: Input should be greater"),
        ("name: a\nprofiles: {gpu: {data: {shares: {sft: 1.5, test: -0.5}}}}\n", "must not be negative"),
        ("name: a\nprofiles: {gpu: {data: {shares: {sft: 0.5, tests: 0.5}}}}\n", "data.shares.tests"),
    ],
)
def test_what_is_not_a_recipe_says_why(tmp_path, text, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.load(write(tmp_path, text), "gpu")


def test_another_encoding_is_named(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: é".encode("latin-1"))
    with pytest.raises(RecipeError, match="utf-8"):
        Recipe.load(path)


def test_stages_can_be_left_out(tmp_path):
    recipe = Recipe.load(write(tmp_path, "name: a\npreference: null\nrl: null\n"))
    assert recipe.preference is None
    assert recipe.rl is None


def test_a_recipe_survives_json(tmp_path):
    recipe = Recipe.load(cli.RECIPES / "medication-directions.yaml", "gpu", seed=3)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


RUBRIC = """\
title: Sums
judged: The answer to a sum.
criteria: [It is right.]
scale: {1: a, 2: b, 3: c, 4: d, 5: e}
question: Which of both is right.
"""


def test_a_rubric_is_text_a_mapping_or_a_file_beside_the_recipe(tmp_path):
    (tmp_path / "rubrics").mkdir()
    (tmp_path / "rubrics" / "sums.yaml").write_text(RUBRIC, encoding="utf-8")
    given = "name: a\njudge: {rubric: {file: rubrics/sums.yaml}}\n"
    read = Recipe.load(write(tmp_path, given))
    inline = Recipe.load(write(tmp_path, f"name: a\njudge: {{rubric: {yaml.safe_load(RUBRIC)}}}\n"))
    assert read == inline
    assert read.judge.rubric.scale[5] == "e"
    assert Recipe.model_validate(read.model_dump(mode="json")) == read  # the file itself does not travel
    assert Recipe.load(write(tmp_path, "name: a\njudge: {rubric: Which one.}\n")).judge.rubric == "Which one."
    profile = "name: a\nprofiles: {big: {judge: {rubric: {file: rubrics/sums.yaml}}}}\n"
    overlay = Recipe.load(write(tmp_path, profile), "big")
    assert overlay.judge == read.judge


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{file: nowhere.yaml}", "nowhere.yaml.*cannot be read|cannot be read.*nowhere.yaml"),
        ("{file: recipe.txt}", "not a rubric"),
        ("{title: a}", r"judge.rubric.rubric.criteria: Field required"),
        (
            str(yaml.safe_load(RUBRIC.replace("5: e", "6: e"))),
            "each of the grades 1, 2, 3, 4 and 5",
        ),
    ],
)
def test_what_is_not_a_rubric_says_why(tmp_path, text, words):
    (tmp_path / "recipe.txt").write_text("- a\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(write(tmp_path, f"name: a\njudge: {{rubric: {text}}}\n"))
    assert re.search(words, str(caught.value))


def test_a_panel_stands_in_place_of_the_one_judge(tmp_path):
    panel = "panel: [{}, {backend: openai, model: m, url: 'http://host/v1'}]"
    judge = Recipe.load(write(tmp_path, f"name: a\njudge: {{{panel}}}\n")).judge
    assert [one.backend for one in judge.judges] == ["local", "openai"]
    with pytest.raises(RecipeError, match="panel names the judges"):
        Recipe.load(write(tmp_path, f"name: a\njudge: {{backend: bedrock, {panel}}}\n"))


@pytest.mark.parametrize(
    ("required", "tier", "good"),
    [(1, "critical", False), (2, "critical", True), (0, "critical", True), (1, "primary", True)],
)
def test_what_is_critical_takes_two_people_where_people_approve(tmp_path, required, tier, good):
    path = write(
        tmp_path,
        f"name: a\napproval: {{required: {required}}}\ngate: {{criteria: [{{metric: near_miss, tier: {tier}}}]}}\n",
    )
    if good:
        assert Recipe.load(path).approval.required == required
    else:
        with pytest.raises(RecipeError, match="near_miss is critical in the gate, so two people must approve"):
            Recipe.load(path)
