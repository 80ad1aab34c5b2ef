"""Third-party benchmarks: what the harness scores, question by question, and what becomes of it."""

import json
import shutil
from pathlib import Path

import pytest
from kfp import dsl

from assay.components.benchmark import benchmark as work
from assay.components.benchmark.component import benchmark
from assay.components.contracts.artifacts import read_manifest, seal, sha256_file
from assay.components.contracts.errors import DataError, RecipeError
from assay.components.contracts.metrics import Metric
from assay.components.contracts.packages import package_file
from assay.components.contracts.recipe import BenchmarkSettings, Criterion, GateSettings, Recipe
from assay.components.contracts.rows import Example, Message, Result, read_rows, write_rows
from assay.components.gate.decide import Scores, findings_of, read_benchmarks
from assay.components.shared.summary import read_summary

CHOICE = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
WRITTEN = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    rows = [
        {"question": f"Which colour has thing {i}?", "choices": ["red", "deep blue"], "answer": i % 2} for i in range(8)
    ]
    (tmp_path / "colours.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0]])), encoding="utf-8")
    sums = [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)), encoding="utf-8")
    (tmp_path / "colours.yaml").write_text(CHOICE, encoding="utf-8")
    (tmp_path / "sums.yaml").write_text(WRITTEN, encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\nbenchmarks: {tasks: [colours.yaml, sums.yaml]}\n", encoding="utf-8")
    return Recipe.load(path)


def splits(folder: Path) -> dsl.Dataset:
    """Training rows, one of which asks what a benchmark asks."""
    for name in ("sft", "preference", "rl", "validation", "test"):
        asked = ["Which colour has thing 3?"] if name == "rl" else []
        prompts = [[Message(role="user", content=text)] for text in asked]
        rows = [Example(id=f"{i:032x}", group=str(i), prompt=prompt, reference="") for i, prompt in enumerate(prompts)]
        write_rows(folder / f"{name}.parquet", rows, Example)
    seal(folder, "splits")
    return dsl.Dataset(uri=str(folder))


def nothing(folder: Path) -> dsl.Model:
    folder.mkdir()
    seal(folder, "none")
    return dsl.Model(uri=str(folder))


def ask(tmp_path: Path, settings: BenchmarkSettings, model: Path, out: str = "out") -> tuple[Path, dsl.Metrics]:
    results, summary = tmp_path / out / "results", dsl.Metrics(uri=str(tmp_path / out / "summary"))
    benchmark.python_func(
        settings=settings.model_dump(mode="json"),
        data=dsl.Dataset(uri=str(tmp_path / "data")),
        baseline=dsl.Model(uri=str(model)),
        candidate=dsl.Model(uri=str(model)),
        champion=dsl.Model(uri=str(tmp_path / "none")),
        results=dsl.Dataset(uri=str(results)),
        summary=summary,
    )
    return results, summary


def test_every_question_has_its_score_for_every_arm(tmp_path, recipe, tiny_model, monkeypatch) -> None:
    monkeypatch.setenv("ASSAY_WORK", str(tmp_path / "work"))
    (tmp_path / "work").mkdir()
    splits(tmp_path / "data")
    nothing(tmp_path / "none")
    results, summary = ask(tmp_path, recipe.benchmarks, tiny_model)
    rows = read_rows(results / "results.parquet", Result)
    manifest = read_manifest(results, "benchmarks")
    content = read_manifest(tiny_model, "model").content
    assert manifest.metadata["arms"] == {"baseline": content, "candidate": content}
    assert [Metric.model_validate(one).name for one in json.loads((results / "metrics.json").read_bytes())] == [
        "colours.acc",
        "sums.exact_match",
    ]
    mine = [row for row in rows if row.arm == "candidate"]
    assert len(mine) == 13
    assert len({row.example_id for row in mine}) == 13
    assert len({row.group for row in mine}) == 12, "a question that stands twice is one draw"
    colours = [row for row in mine if row.slices == ["benchmark=colours"]]
    assert all(row.scores["sums.exact_match"] is None and row.scores["colours.acc"] in (0, 1) for row in colours)
    # What the harness counts right is the likeliest choice, and the answer says which that was.
    answers = [i % 2 for i in range(8)] + [0]
    by_id = {row.example_id: row for row in colours}
    ordered = [
        by_id[work._digest("colours", str(i), sample["hash"])] for i, sample in enumerate(kept(tmp_path, content))
    ]
    assert [row.scores["colours.acc"] for row in ordered] == [
        float(row.response == f"choice {answer}") for row, answer in zip(ordered, answers, strict=True)
    ]
    told = read_summary(summary.path)
    assert told.details["contamination"] == {
        "colours": {"rows": 9, "exact": 1, "near": 0, "overlapping": 0},
        "sums": {"rows": 4, "exact": 0, "near": 0, "overlapping": 0},
    }
    assert told.details["arms"]["candidate"]["colours.acc"]["n"] == 9
    # What was answered is not asked again, and gives the same bytes.
    monkeypatch.setattr(work, "_load", lambda folder, settings: pytest.fail("it was asked again"))
    again, _ = ask(tmp_path, recipe.benchmarks, tiny_model, "again")
    assert read_manifest(again, "benchmarks").digest == manifest.digest


def kept(tmp_path: Path, content: str) -> list[dict]:
    return json.loads((tmp_path / "work" / f"{content[:16]}-{work._digest('colours')}.json").read_bytes())


def test_a_limit_takes_the_first_questions_and_changed_data_are_another_task(tmp_path, recipe) -> None:
    settings = recipe.benchmarks
    assert settings.tasks[0]["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "colours.jsonl")}
    before = settings.tasks[0]["metadata"]["sha256"]
    (tmp_path / "colours.jsonl").write_text("{}", encoding="utf-8")
    assert Recipe.load(tmp_path / "recipe.yaml").benchmarks.tasks[0]["metadata"]["sha256"] != before


TOPICS = """
task: topics
dataset_path: json
dataset_kwargs: {data_files: {test: "package:zaragoza_construction_faq/data/faq-en.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}\\nThis is about"
doc_to_choice: [heating, walls]
doc_to_target: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def test_data_in_a_package_keep_their_name_and_are_compared_where_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "topics.yaml").write_text(TOPICS, encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\nbenchmarks: {tasks: [topics.yaml]}\n", encoding="utf-8")
    settings = Recipe.load(path).benchmarks
    ((reference, digest),) = settings.tasks[0]["metadata"]["sha256"].items()
    assert settings.tasks[0]["dataset_kwargs"]["data_files"] == {"test": reference}
    assert digest == sha256_file(package_file(reference, ""))
    (task,) = work.load_tasks(settings).values()
    assert len(list(task.test_docs())) == 503
    other = BenchmarkSettings(tasks=[settings.tasks[0] | {"metadata": {"sha256": {reference: "0" * 64}}}])
    with pytest.raises(DataError, match="not the file that the recipe was read with"):
        work.load_tasks(other)


@pytest.mark.parametrize(
    ("data", "words"), [("no_such_package/a.jsonl", "no-such-package is not installed"), ("trl/a", "has no file a")]
)
def test_a_package_that_is_not_here_is_told_with_the_recipe(tmp_path: Path, data: str, words: str) -> None:
    (tmp_path / "topics.yaml").write_text(
        TOPICS.replace("zaragoza_construction_faq/data/faq-en.jsonl", data), encoding="utf-8"
    )
    (tmp_path / "recipe.yaml").write_text("name: a\nbenchmarks: {tasks: [topics.yaml]}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=words):
        Recipe.load(tmp_path / "recipe.yaml")


def test_assays_own_task_files_ask_what_the_packages_rows_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows of the package's form, for the package itself is 700 MB and not among Assay's."""
    rows = {
        "quartz": ("Eric adds resistors. The resistance\n\n A: increases\n B: decreases", "B"),
        "fcc_amateur_extra": ("Which one?\nA. 1 MHz\nB. 2 MHz\nC. 3 MHz\nD. 4 MHz\n", "C"),
    }
    for name, (question, ideal) in rows.items():
        folder = tmp_path / "evals" / "registry" / "data" / name
        folder.mkdir(parents=True)
        turns = [{"role": "system", "content": "Choose."}, {"role": "user", "content": question}]
        (folder / "samples.jsonl").write_text(json.dumps({"input": turns, "ideal": ideal}), encoding="utf-8")
    settings = BenchmarkSettings(tasks=list(rows))
    (tmp_path / "evals" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    tasks = work.load_tasks(settings)
    asked = {name: next(iter(task.test_docs())) for name, task in tasks.items()}
    assert {name: task.doc_to_text(asked[name]) for name, task in tasks.items()} == {
        "quartz": "Question: Eric adds resistors. The resistance\nAnswer:",
        "fcc_amateur_extra": "Which one?\nA. 1 MHz\nB. 2 MHz\nC. 3 MHz\nD. 4 MHz\nAnswer:",
    }
    assert tasks["quartz"].doc_to_choice(asked["quartz"]) == ["increases", "decreases"]
    assert tasks["quartz"].doc_to_target(asked["quartz"]) == 1
    assert tasks["fcc_amateur_extra"].doc_to_target(asked["fcc_amateur_extra"]) == 2


@pytest.mark.parametrize(
    ("tasks", "error", "words"),
    [
        (["no_such_task"], RecipeError, "has no task 'no_such_task'"),
        (
            [{"task": "gone", "dataset_path": "json", "dataset_kwargs": {"data_files": "/nowhere.jsonl"}}],
            DataError,
            "the benchmark gone cannot be read",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(tasks, error, words) -> None:
    with pytest.raises(error, match=words):
        work.load_tasks(BenchmarkSettings(tasks=tasks))


def test_the_same_benchmark_in_another_folder_is_the_same_measurement_and_other_data_are_not(tmp_path, recipe) -> None:
    other = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, other, ignore=shutil.ignore_patterns("elsewhere"))
    assert Recipe.load(other / "recipe.yaml").measurement == recipe.measurement
    assert recipe.model_copy(update={"benchmarks": None}).measurement != recipe.measurement
    given = recipe.benchmarks.tasks[0]
    asked = [given | {"dataset_kwargs": {**given["dataset_kwargs"], "field": "hard"}}, recipe.benchmarks.tasks[1]]
    changed = recipe.benchmarks.model_copy(update={"tasks": asked})
    assert recipe.model_copy(update={"benchmarks": changed}).measurement != recipe.measurement
    (other / "sums.jsonl").write_text("{}", encoding="utf-8")
    assert Recipe.load(other / "recipe.yaml").measurement != recipe.measurement


def test_code_in_a_task_file_is_refused(tmp_path, recipe) -> None:
    (tmp_path / "colours.yaml").write_text(CHOICE + "process_results: !function utils.process\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "recipe.yaml")


def test_a_task_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="a task file says its name"):
        BenchmarkSettings(tasks=[{"dataset_path": "json"}])


def benchmarks(folder: Path, candidate: float, arms: dict[str, str]) -> Path:
    """Write 200 questions, all right by the baseline, and the first share of them by the candidate."""
    metric = Metric(name="colours.acc", title="colours: accuracy", better="higher", definition="-")
    rows = [
        Result(
            arm=arm,
            example_id=f"{i:032x}",
            group=str(i),
            response="",
            slices=[],
            scores={metric.name: float(arm == "baseline" or i < 200 * candidate)},
        )
        for arm in ("baseline", "candidate")
        for i in range(200)
    ]
    write_rows(folder / "results.parquet", rows, Result)
    (folder / "metrics.json").write_text(json.dumps([metric.model_dump(mode="json")]))
    seal(folder, "benchmarks", metadata={"arms": arms})
    return folder


@pytest.mark.parametrize(("kept", "passed"), [(1.0, True), (0.97, None), (0.80, False)])
def test_a_model_that_forgot_what_it_could_does_not_pass(tmp_path: Path, kept: float, passed: bool | None) -> None:
    digests = {"baseline": "b", "candidate": "c"}
    folder = benchmarks(tmp_path / "benchmarks", kept, digests)
    beside = read_benchmarks(folder, read_manifest(folder, "benchmarks"), {**digests, "few_shot": "b", "sft": "c"})
    criterion = Criterion(metric="colours.acc", tier="critical", test="non_inferiority", margin=0.05)
    task = Metric(name="exact", title="Exact", better="higher", definition="-")
    nobody = Scores(arms={"baseline": {}, "candidate": {}})
    (finding,) = findings_of(GateSettings(criteria=[criterion]), [task], nobody, beside)
    assert (finding.passed, finding.n, finding.versus) == (passed, 200, "baseline")
    assert finding.needed is None
    assert ("benchmarks.limit" in finding.note) is (passed is None)


def test_benchmarks_of_other_models_decide_nothing(tmp_path: Path) -> None:
    folder = benchmarks(tmp_path / "benchmarks", 1.0, {"baseline": "b", "candidate": "another"})
    with pytest.raises(DataError, match="asked of other models"):
        read_benchmarks(folder, read_manifest(folder, "benchmarks"), {"baseline": "b", "candidate": "c"})


def test_a_criterion_on_a_benchmark_that_is_not_asked_is_refused() -> None:
    task = Metric(name="exact", title="Exact", better="higher", definition="-")
    with pytest.raises(RecipeError, match="there is no metric 'colours.acc'"):
        findings_of(GateSettings(criteria=[Criterion(metric="colours.acc")]), [task], Scores(arms={}))
