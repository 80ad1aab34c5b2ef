"""The wire of `judge`. The work is in `compare.py` and `shared/judging.py`."""

from typing import Any

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
) -> None:
    """Let a judge compare the candidate with the champion, or with the baseline if there is no champion.

    Args:
        settings: `JudgeSettings`.
        task: Name of the verifiable task; its verifier labels the better answer.
        data: `splits`; reads test.parquet.
        results: `results`; the arms' answers to it.
        model: The base model, which is the local judge named `base`.
        verdicts: `Verdict` rows, one per example; none with the backend `none`.
        summary: Win rate, swap consistency, agreement with the labels, and whether the judge may decide.
    """
    import time
    from pathlib import Path

    from ..contracts.artifacts import read_manifest, seal
    from ..contracts.recipe import JudgeSettings
    from ..contracts.rows import Example, Result, Verdict, read_rows, write_rows
    from ..shared.judging import open_judge
    from ..shared.summary import write_summary
    from ..shared.tasks.task import get_task
    from . import compare as work

    start = time.monotonic()
    wanted, chosen = JudgeSettings.model_validate(settings), get_task(task)
    parents = {
        "data": read_manifest(data.path, "splits"),
        "results": read_manifest(results.path, "results"),
        "model": read_manifest(model.path, "model"),
    }
    answers = read_rows(Path(results.path) / "results.parquet", Result)
    arms = work.choose_arms(answers)
    pairs, said = [], []
    opened = open_judge(wanted, model.path)
    if opened:
        examples = read_rows(Path(data.path) / "test.parquet", Example)
        pairs = work.pair_up(answers, examples, arms, wanted.max_examples)
        said = work.compare(pairs, opened, chosen, wanted.rubric)
    count = write_rows(Path(verdicts.path) / "verdicts.parquet", said, Verdict)
    told = {"arms": list(arms), "judge": opened.identity if opened else "none"}
    seal(verdicts.path, "verdicts", parents=parents, counts={"verdicts": count}, metadata=told)
    table = work.summarise(said, sum(pair.equal for pair in pairs), arms, wanted)
    write_summary(summary, table, seconds=time.monotonic() - start, parents=parents)
