"""Searches on the same questions: BM25 against its formula, ranks to metrics, and what the reader is given."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from kfp import dsl

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

from train_step import questions

from assay.components.contracts.artifacts import link_tree, read_manifest, seal
from assay.components.contracts.errors import DataError, ModelError
from assay.components.contracts.recipe import EvaluateSettings
from assay.components.contracts.rows import Example, Message, Result, read_rows, write_rows
from assay.components.evaluate_retrieval import retrieve as work
from assay.components.evaluate_retrieval.component import evaluate_retrieval
from assay.components.shared.embed import Encoding, write_encoding
from assay.components.shared.retrieval import bm25, nearest, passage, places, read_corpus
from assay.components.shared.summary import read_summary
from assay.components.shared.tasks.task import get_task

SETTINGS = EvaluateSettings(few_shot=2, max_new_tokens=4)


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASSAY_CPUS", "1")
    monkeypatch.setenv("ASSAY_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))


def splits(folder: Path, rows: list[Example]) -> Path:
    """Write a `splits` artifact: half of the rows held out."""
    half = len(rows) // 2
    write_rows(folder / "sft.parquet", rows[:half], Example)
    write_rows(folder / "test.parquet", rows[half:], Example)
    seal(folder, "splits")
    return folder


def encoder(model: Path, folder: Path, **changes: object) -> Path:
    """Write a model's files as an encoder's."""
    link_tree(model, folder)
    plain = {"pooling": "mean", "query_prefix": "", "lowercase": True, "layers": 2, "dimensions": 64}
    write_encoding(folder, Encoding.model_validate({**plain, **changes}))
    seal(folder, "model")
    return folder


def test_bm25_is_the_formula() -> None:
    corpus = ["the cat sat", "the dog sat on the mat", "a bird"]
    found = bm25(["the cat", "the the", "fish"], corpus)
    length, mean = [3, 6, 2], 11 / 3

    def part(times: int, holders: int, place: int) -> float:
        rare = math.log(1 + (3 - holders + 0.5) / (holders + 0.5))
        return rare * times * 2.5 / (times + 1.5 * (0.25 + 0.75 * length[place] / mean))

    wanted = [
        [part(1, 2, 0) + part(1, 1, 0), part(2, 2, 1), 0],
        [2 * part(1, 2, 0), 2 * part(2, 2, 1), 0],
        [0, 0, 0],
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_the_corpus_is_every_split_and_equal_passages_stand_once(tmp_path: Path) -> None:
    rows = questions(4)
    twin = rows[0].model_copy(
        update={"id": "twin", "prompt": [Message(role="system", content=passage(rows[0]).upper()), rows[0].prompt[1]]}
    )
    corpus = read_corpus(splits(tmp_path / "data", [*rows, twin]))
    assert len(corpus) == 4
    assert places([passage(rows[0]), passage(twin)], corpus) == [corpus.index(passage(twin))] * 2


def test_equal_scores_are_ranked_by_place() -> None:
    assert nearest(np.array([[1, 3, 3, 2, 3]], dtype=np.float32), 4).tolist() == [[1, 2, 4, 3]]


def test_ranks_become_metrics() -> None:
    example, task = questions(1)[0], get_task("retrieval")

    def scores(listed: list[int]) -> dict[str, float | None]:
        found = work._result("candidate", example, task, example.reference, ["p"], 7, np.array(listed))
        assert found.response == f"{example.reference}\n[p]"
        return found.scores

    assert scores([7, 1, 2]) == {"recall_1": 1, "recall_5": 1, "mrr_10": 1, "answer": 1}
    assert scores([1, 2, 3, 4, 7, 5]) == {"recall_1": 0, "recall_5": 1, "mrr_10": 0.2, "answer": 1}
    assert scores([1, 2, 3, 4, 5, 7]) == {"recall_1": 0, "recall_5": 0, "mrr_10": 1 / 6, "answer": 1}
    assert scores([1, 2, 3]) == {"recall_1": 0, "recall_5": 0, "mrr_10": 0, "answer": 1}


def test_the_reader_sees_worked_examples_then_what_was_found(tmp_path: Path) -> None:
    rows = questions(6)
    asked = work.Asked.read(splits(tmp_path / "data", rows), SETTINGS)
    (prompt, *_) = work.reader_prompts(asked, np.array([[2, 0]] * 3))
    assert [turn.role for turn in prompt] == ["user", "assistant", "user", "assistant", "user"]
    assert prompt[0].content == f"{passage(asked.shots[0])}\n\n{asked.shots[0].prompt[1].content}"
    assert prompt[1].content == asked.shots[0].reference
    assert prompt[4].content == f"{asked.corpus[2]}\n{asked.corpus[0]}\n\n{asked.examples[0].prompt[1].content}"


@pytest.mark.parametrize("read_passages", [1, 2])
def test_every_arm_answers_every_question_and_the_right_passage_is_the_ceiling(
    read_passages: int, tiny_model: Path, tmp_path: Path
) -> None:
    data = splits(tmp_path / "data", questions(12))
    candidate = encoder(tiny_model, tmp_path / "candidate")
    champion = encoder(tiny_model, tmp_path / "champion", pooling="last")
    evaluate_retrieval.python_func(
        settings={**SETTINGS.model_dump(mode="json"), "read_passages": read_passages},
        task="retrieval",
        data=dsl.Dataset(uri=str(data)),
        baseline=dsl.Model(uri=str(tiny_model)),
        candidate=dsl.Model(uri=str(candidate)),
        champion=dsl.Model(uri=str(champion)),
        results=dsl.Dataset(uri=str(tmp_path / "results")),
        summary=dsl.Metrics(uri=str(tmp_path / "summary")),
    )
    rows = read_rows(tmp_path / "results" / "results.parquet", Result)
    arms = read_manifest(tmp_path / "results", "results").metadata["arms"]
    by_arm = {arm: [row for row in rows if row.arm == arm] for arm in arms}
    assert set(by_arm) == {"lexical", "baseline", "candidate", "champion", "gold"}
    assert all([row.example_id for row in some] == [row.example_id for row in rows[:6]] for some in by_arm.values())
    assert all(row.scores["recall_1"] == 1 for row in by_arm["gold"])
    # The candidate has the weights and the pooling of the base, so it finds the same; the champion pools otherwise.
    assert [row.scores for row in by_arm["candidate"]] == [row.scores for row in by_arm["baseline"]]
    assert [row.scores for row in by_arm["candidate"]] != [row.scores for row in by_arm["champion"]]
    assert arms["lexical"] == arms["gold"] == arms["baseline"] != arms["candidate"]
    told = read_summary(tmp_path / "summary")
    assert told.metrics["gold_recall_1"] == 1
    assert "lexical" in told.headline


def test_a_candidate_that_is_no_encoder_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    asked = work.Asked.read(splits(tmp_path / "data", questions(6)), SETTINGS)
    with pytest.raises(ModelError, match="this is not an encoder"):
        work.measure_arms({"baseline": tiny_model, "candidate": tiny_model}, get_task("retrieval"), asked, SETTINGS)


def test_nothing_held_out_is_the_inputs_fault(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.parquet", [], Example)
    with pytest.raises(DataError, match="the test split is empty"):
        work.Asked.read(tmp_path, SETTINGS)
