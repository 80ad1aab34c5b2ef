"""The wire of `judge`. The work is in `compare.py`, `grades.py` and `believe.py`; the judges in `shared/judging.py`."""

from typing import Any, Optional

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from ..runtime.step import step


@step("train")
def judge(
    settings: dict[str, Any],
    task: str,
    data: Input[Dataset],
    results: Input[Dataset],
    model: Input[Model],
    verdicts: Output[Dataset],
    summary: Output[Metrics],
    labels: Optional[Input[Dataset]] = None,
) -> None:
    """Let judges compare the candidate with the champion (or the baseline), and grade the answers of every arm.

    Args:
        settings: `JudgeSettings`.
        task: Name of the verifiable task; its verifier labels the better answer.
        data: `splits`; reads test.parquet.
        results: `results`; the arms' answers to it.
        model: The base model, which is the local judge named `base`.
        verdicts: `Verdict` rows, one per example, and `Grade` rows, one per arm and example; none without a judge.
        summary: Win rate, grades, agreement with the labels, and whether the judge may decide.
        labels: `Label` rows as JSON lines: people's grades of answers. None lets the task's verifier label.
    """
    import time
    from pathlib import Path

    from ..contracts.artifacts import read_manifest, seal
    from ..contracts.recipe import JudgeSettings, Rubric
    from ..contracts.rows import Example, Grade, Result, Verdict, read_rows, write_rows
    from ..shared.judging import identity_of, open_judge
    from ..shared.questions import grading_text, pairwise_text, rubric_card
    from ..shared.summary import write_summary
    from ..shared.tasks.task import get_task
    from . import believe, compare, grades
    from .labels import by_answer, card, read_labels

    start = time.monotonic()
    wanted, chosen = JudgeSettings.model_validate(settings), get_task(task)
    parents = {
        "data": read_manifest(data.path, "splits"),
        "results": read_manifest(results.path, "results"),
        "model": read_manifest(model.path, "model"),
    }
    answers = read_rows(Path(results.path) / "results.parquet", Result)
    arms = compare.choose_arms(answers)
    people = read_labels(labels.path) if labels else None
    known = None if people is None else by_answer(people)
    said, graded = {}, []
    if judges := [judge for one in wanted.judges if (judge := open_judge(one, model.path))]:
        examples = read_rows(Path(data.path) / "test.parquet", Example)
        pairs = compare.pair_up(answers, examples, arms, wanted.max_examples)
        text = pairwise_text(wanted.rubric)
        said = {identity_of(one, wanted.rubric): compare.compare(pairs, one, chosen, text, known) for one in judges}
        if isinstance(wanted.rubric, Rubric):
            shown = [pair.example for pair in pairs]
            graded = grades.grade(answers, shown, judges, grading_text(wanted.rubric), wanted.aggregate, known)
    together = compare.combine(list(said.values())) if said else []
    counts = {
        "verdicts": write_rows(Path(verdicts.path) / "verdicts.parquet", together, Verdict),
        "grades": write_rows(Path(verdicts.path) / "grades.parquet", graded, Grade),
    }
    told = {"arms": list(arms), "judges": list(said), "rubric": rubric_card(wanted.rubric)}
    seal(verdicts.path, "verdicts", parents=parents, counts=counts, metadata=told)
    counted = None if people is None else card(people, answers)
    table = believe.summarise(together, arms, wanted, panel=said, grades=graded, labels=counted)
    write_summary(summary, table, seconds=time.monotonic() - start, parents=parents)
