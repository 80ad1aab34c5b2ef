"""Every arm on the same examples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kfp import dsl

from assay.components.contracts.artifacts import read_manifest, seal
from assay.components.contracts.errors import DataError, RecipeError
from assay.components.contracts.recipe import EvaluateSettings
from assay.components.contracts.rows import Example, Message, Result, read_rows, write_rows
from assay.components.evaluate.component import evaluate
from assay.components.evaluate.evaluate import measure_arms
from assay.components.shared import generate
from assay.components.shared.measure import by_arm, choose_shots, find_metric, first_rows, score_answers, tabulate
from assay.components.shared.models import load_model, save_model
from assay.components.shared.summary import read_summary
from assay.components.shared.tasks.task import get_task
from fixtures.chat_server import completion, serving

TASK = get_task("medication_directions")
SETTINGS = EvaluateSettings(few_shot=2, max_new_tokens=4, batch_size=4)


def examples(count: int, seed: int = 0) -> list[Example]:
    rows = [[Message(**turn) for turn in row["messages"]] for row in TASK.generate(count, seed=seed)]
    return [
        Example(
            id=f"{(place * 7) % count:032x}",
            group=TASK.group(turns[:-1]),
            prompt=turns[:-1],
            reference=turns[-1].content,
            slices=TASK.slices(turns[:-1], turns[-1].content),
        )
        for place, turns in enumerate(rows)
    ]


@pytest.fixture
def other_model(tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """The tiny model with other weights."""
    model = load_model(tiny_model)
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(-2, 2, 64))
    save_model(model, tiny_tokenizer, tmp_path / "other")
    seal(tmp_path / "other", "model")
    return tmp_path / "other"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_rows(folder / "test.parquet", examples(10), Example)
    write_rows(folder / "sft.parquet", examples(6, seed=1), Example)
    seal(folder, "splits")
    return folder


@pytest.fixture
def no_champion(tmp_path: Path) -> Path:
    folder = tmp_path / "none"
    folder.mkdir()
    seal(folder, "none")
    return folder


def run(
    target: Path, data: Path, baseline: Path, candidate: Path, champion: Path, *, chosen: Any = SETTINGS, **stages: Path
) -> Path:
    evaluate.python_func(
        settings=chosen.model_dump(mode="json"),
        task="medication_directions",
        data=dsl.Dataset(uri=str(data)),
        baseline=dsl.Model(uri=str(baseline)),
        candidate=dsl.Model(uri=str(candidate)),
        champion=dsl.Model(uri=str(champion)),
        results=dsl.Dataset(uri=str(target / "results")),
        summary=dsl.Metrics(uri=str(target / "summary")),
        **{arm: dsl.Model(uri=str(folder)) for arm, folder in stages.items()},
    )
    return target


def test_all_arms_answer_all_examples(
    data: Path, tiny_model: Path, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    run(tmp_path / "run", data, tiny_model, other_model, tiny_model, sft=other_model)
    rows = read_rows(tmp_path / "run" / "results" / "results.parquet", Result)
    arms = by_arm(rows)
    assert list(arms) == ["baseline", "few_shot", "sft", "candidate", "champion"]
    assert [row.example_id for row in arms["baseline"]] == sorted(example.id for example in examples(10))
    assert all([row.example_id for row in arms["baseline"]] == [row.example_id for row in arm] for arm in arms.values())
    answers = {arm: [row.response for row in some] for arm, some in arms.items()}
    assert answers["sft"] == answers["candidate"] != answers["baseline"] == answers["champion"]
    assert answers["few_shot"] != answers["baseline"]
    by_id = {example.id: example for example in examples(10)}
    assert all(row.scores == TASK.score(row.response, by_id[row.example_id].reference) for row in rows)


def test_the_digests_of_the_arms_are_recorded(
    data: Path, tiny_model: Path, other_model: Path, no_champion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    run(tmp_path / "run", data, tiny_model, other_model, no_champion)
    manifest = read_manifest(tmp_path / "run" / "results", "results")
    tiny, other = (read_manifest(folder).content for folder in (tiny_model, other_model))
    assert manifest.metadata["arms"] == {"baseline": tiny, "few_shot": tiny, "candidate": other}
    assert manifest.counts == {"results": 30}
    assert set(manifest.parents) == {"data", "baseline", "candidate", "champion"}


def test_two_runs_give_the_same_bytes_and_equal_models_are_asked_once(
    data: Path, tiny_model: Path, no_champion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    batches: list[int] = []
    original = generate.Generator.run

    def watched(self: Any, prompts: Any, batch: list[int], *arguments: Any, **named: Any) -> Any:
        batches.append(len(batch))
        return original(self, prompts, batch, *arguments, **named)

    monkeypatch.setattr(generate.Generator, "run", watched)
    digests = []
    for name in ("first", "second"):
        folder = run(tmp_path / name, data, tiny_model, tiny_model, no_champion, rl=tiny_model)
        digests.append([read_manifest(folder / part).digest for part in ("results", "summary")])
    assert digests[0] == digests[1]
    assert sum(batches) == 20  # baseline and few-shot, once each


def test_progress_runs_over_all_arms(
    data: Path, tiny_model: Path, no_champion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ASSAY_PROGRESS", str(tmp_path / "progress"))
    run(tmp_path / "run", data, tiny_model, tiny_model, no_champion)
    lines = [json.loads(line) for line in (tmp_path / "progress").read_text().splitlines()]
    done = [line["done"] for line in lines]
    assert done == sorted(done)
    assert (done[-1], {line["total"] for line in lines}) == (30, {30})


def test_the_summary_has_arms_slices_and_metrics(
    data: Path, tiny_model: Path, no_champion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    summary: Any = read_summary(run(tmp_path / "run", data, tiny_model, tiny_model, no_champion) / "summary")
    exact = summary.details["arms"]["candidate"]["exact"]
    assert exact["n"] == 10
    assert exact["mean"] == 0
    assert exact["low"] == pytest.approx(0)
    assert exact["high"] > 0.2
    assert [metric["name"] for metric in summary.details["metrics"]] == [metric.name for metric in TASK.metrics]
    assert summary.metrics["baseline_exact"] == 0
    assert sum(table["baseline"]["exact"]["n"] for table in summary.details["slices"].values()) >= 10
    assert summary.headline.startswith("exact on 10 held-out examples: candidate 0.000 [0.000, ")


def test_few_shot_examples_come_from_different_groups() -> None:
    rows = examples(6)
    twins = [row.model_copy(update={"id": f"0{row.id[1:]}", "group": rows[0].group}) for row in rows[:3]]
    shots = choose_shots([*twins, *rows[3:]], 3)
    assert len({shot.group for shot in shots}) == 3
    assert shots == choose_shots([*rows[3:], *twins], 3)
    assert choose_shots([], 0) == []
    with pytest.raises(DataError, match="wants 5 worked examples"):
        choose_shots(twins, 5)


def test_no_held_out_example_is_the_inputs_fault(tiny_model: Path) -> None:
    with pytest.raises(DataError, match="the test split is empty"):
        measure_arms({"baseline": tiny_model}, TASK, [], [], SETTINGS)


def test_rows_are_taken_by_id() -> None:
    rows = examples(10)
    assert [row.id for row in first_rows(rows, 3)] == sorted(row.id for row in rows)[:3]
    assert len(first_rows(rows, 0)) == 10


def test_a_metric_counts_only_where_it_applies() -> None:
    rows = [
        Result(
            arm="a", example_id=str(n), group=str(n), response="", slices=[], scores=dict.fromkeys(names, 1.0) | none
        )
        for n, (names, none) in enumerate([(["exact"], {"near_miss": None}), (["exact", "near_miss"], {})])
    ]
    table = tabulate(rows, [metric for metric in TASK.metrics if metric.name in ("exact", "near_miss")], 0.95)
    assert {name: cell["n"] for name, cell in table.items()} == {"exact": 2, "near_miss": 1}
    assert tabulate(rows[:1], [find_metric(TASK.metrics, "near_miss", "")], 0.95) == {}
    with pytest.raises(RecipeError, match="no metric 'speed'"):
        find_metric(TASK.metrics, "speed", "select.metric")


def test_a_model_behind_a_server_is_an_arm_like_the_others(
    data: Path, tiny_model: Path, no_champion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    known = {example.prompt[-1].content: example.reference for example in examples(10)}
    with serving(lambda body: completion(known[body["messages"][-1]["content"]], tokens=7)) as server:
        one = {"url": server.url, "model": "large-1"}
        endpoints = [{**one, "name": "large"}, {**one, "name": "shown", "few_shot": True}]
        chosen = EvaluateSettings.model_validate({**SETTINGS.model_dump(), "endpoints": endpoints})
        digests = []
        for name in ("first", "second"):
            folder = run(tmp_path / name, data, tiny_model, tiny_model, no_champion, chosen=chosen)
            digests.append([read_manifest(folder / part).digest for part in ("results", "summary")])
    assert digests[0] == digests[1]
    assert len(server.bodies) == 20  # the second run asked nothing
    assert {len(body["messages"]) for body in server.bodies} == {2, 6}  # two worked examples, two turns each
    arms = by_arm(read_rows(folder / "results" / "results.parquet", Result))
    assert list(arms) == ["baseline", "few_shot", "candidate", "large", "shown"]
    assert [row.example_id for row in arms["large"]] == [row.example_id for row in arms["baseline"]]
    summary: Any = read_summary(folder / "summary")
    assert summary.details["arms"]["large"]["exact"]["mean"] == 1.0
    assert summary.details["endpoints"]["large"]["tokens"] == 70
    assert summary.details["slices"].keys() >= {"safety=safe", "safety=unsafe"}
    digest = read_manifest(folder / "results").metadata["arms"]["large"]
    assert digest == summary.details["endpoints"]["large"]["digest"]


def test_an_arm_without_confidence_has_no_brier_score(tmp_path: Path) -> None:
    task = get_task("product_content")
    label = next(iter(task.generate(1, seed=0)))["messages"][-1]["content"]
    asked = Example(id="0", group="g", prompt=[Message(role="user", content="x")], reference=label)
    (row,) = score_answers("large", task, [asked], [(label, None)])
    assert row.scores["brier"] is None
    assert tabulate([row], task.metrics, 0.95).keys() >= {"exact"}
    assert "ece" not in tabulate([row], task.metrics, 0.95)
