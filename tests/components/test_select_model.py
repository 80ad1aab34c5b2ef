"""A stage that does not help is not built upon."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kfp import dsl

from assay.components.contracts.artifacts import read_manifest, seal
from assay.components.contracts.errors import DataError, RecipeError
from assay.components.contracts.recipe import EvaluateSettings, SelectSettings
from assay.components.contracts.rows import Example, Message, Result, write_rows
from assay.components.select_model import select
from assay.components.select_model.component import select_model
from assay.components.shared.models import load_model, save_model
from assay.components.shared.summary import read_summary
from assay.components.shared.tasks.task import get_task

METRICS = get_task("medication_directions").metrics


def results(exact: list[float], near_miss: list[float | None] | None = None) -> list[Result]:
    guard = near_miss or [None] * len(exact)
    return [
        Result(
            arm="x",
            example_id=str(place),
            group=str(place),
            response="",
            slices=[],
            scores={metric.name: 0.0 for metric in METRICS} | {"exact": one, "near_miss": other},
        )
        for place, (one, other) in enumerate(zip(exact, guard, strict=True))
    ]


def choose(old: list[Result], new: list[Result], **settings: Any) -> select.Choice:
    return select.choose(old, new, METRICS, SelectSettings(**settings), 0.95)


BAD, GOOD = [0.0] * 10 + [1.0] * 10, [0.0] * 5 + [1.0] * 15


def test_the_better_one_goes_on() -> None:
    choice = choose(results(BAD), results(GOOD))
    assert choice.chosen == "challenger"
    assert choice.difference.mean == 0.25
    assert choice.difference.low < 0.25 < choice.difference.high
    assert choice.reason.startswith("exact +0.250 [")


def test_the_worse_one_does_not() -> None:
    choice = choose(results(GOOD), results(BAD))
    assert choice.chosen == "incumbent"
    assert choice.reason.endswith("not better, so the stage is not built upon")


def test_a_tie_keeps_the_incumbent_unless_a_loss_is_allowed() -> None:
    assert choose(results(GOOD), results(GOOD)).chosen == "incumbent"
    assert choose(results(GOOD), results(GOOD), min_gain=-0.01).chosen == "challenger"


def test_the_gain_must_be_large_enough() -> None:
    assert choose(results(BAD), results(GOOD), min_gain=0.25).chosen == "challenger"
    small = choose(results(BAD), results(GOOD), min_gain=0.3)
    assert small.chosen == "incumbent"
    assert "not at least 0.3 better" in small.reason


def test_less_is_better_where_the_metric_says_so() -> None:
    risky, safe = results([1.0] * 4, [1.0, 1.0, None, 0.0]), results([1.0] * 4, [0.0, 1.0, None, 0.0])
    assert choose(risky, safe, metric="near_miss").chosen == "challenger"
    assert choose(safe, risky, metric="near_miss").chosen == "incumbent"


def test_the_guard_may_forbid_a_gain() -> None:
    safe = results(BAD, [0.0] * 20)
    riskier = results(GOOD, [1.0] * 2 + [0.0] * 18)
    refused = choose(safe, riskier, guard="near_miss", guard_margin=0.05)
    assert refused.chosen == "incumbent"
    assert refused.reason.endswith("but near_miss is 0.100 worse; 0.05 is allowed")
    assert choose(safe, riskier, guard="near_miss", guard_margin=0.15).chosen == "challenger"


def test_a_metric_without_examples_or_without_a_name_is_the_inputs_fault() -> None:
    with pytest.raises(DataError, match="'near_miss' applies to no example"):
        choose(results(BAD), results(GOOD), metric="near_miss")
    with pytest.raises(RecipeError, match="no metric 'speed'"):
        choose(results(BAD), results(GOOD), metric="speed")


@pytest.mark.parametrize(("min_gain", "chosen"), [(0.0, "incumbent"), (-1.0, "challenger")])
def test_the_wire_passes_the_chosen_model_on_as_it_is(
    min_gain: float, chosen: str, tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    model = load_model(tiny_model)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    save_model(model, tiny_tokenizer, tmp_path / "challenger")
    seal(tmp_path / "challenger", "model", metadata={"stage": "sft"})
    task = get_task("medication_directions")
    turns = [[Message(**turn) for turn in row["messages"]] for row in task.generate(6, seed=0)]
    rows = [
        Example(id=f"{place:032x}", group=str(place), prompt=some[:-1], reference=some[-1].content)
        for place, some in enumerate(turns)
    ]
    write_rows(tmp_path / "data" / "validation.parquet", rows, Example)
    seal(tmp_path / "data", "splits")
    said = select_model.python_func(
        settings=SelectSettings(min_gain=min_gain).model_dump(mode="json"),
        evaluation=EvaluateSettings(max_new_tokens=4).model_dump(mode="json"),
        task="medication_directions",
        incumbent=dsl.Model(uri=str(tiny_model)),
        challenger=dsl.Model(uri=str(tmp_path / "challenger")),
        data=dsl.Dataset(uri=str(tmp_path / "data")),
        best=dsl.Model(uri=str(tmp_path / "best")),
        summary=dsl.Metrics(uri=str(tmp_path / "summary")),
    )
    source = {"incumbent": tiny_model, "challenger": tmp_path / "challenger"}[chosen]
    assert said == chosen
    assert read_manifest(tmp_path / "best", "model") == read_manifest(source, "model")
    details: Any = read_summary(tmp_path / "summary").details
    assert details["chosen"] == chosen
    assert details["metric"] == "exact"
    assert details["incumbent"]["exact"]["n"] == details["challenger"]["exact"]["n"] == 6
    assert details["difference"]["mean"] == 0
    assert details["reason"]
