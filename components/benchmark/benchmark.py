"""Third-party benchmarks: what a model can do beside its task, before and after.

lm-evaluation-harness (Gao et al., doi:10.5281/zenodo.5371628) asks and scores; what is kept is its score of every
single question, so that the gate can compare arms in pairs, as it does on held-out rows. A benchmark that one arm has
answered is kept in the step's work folder: a killed step asks the others only.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..contracts.artifacts import Manifest, read_manifest, seal, sha256_file, write_atomically
from ..contracts.errors import DataError, RecipeError
from ..contracts.metrics import Metric
from ..contracts.packages import PREFIX, package_file
from ..contracts.recipe import BenchmarkSettings, read_benchmark, with_data_files
from ..contracts.rows import Example, Message, Result, read_table, write_rows
from ..runtime import context
from ..shared.contamination import TRAINING, find_contamination
from ..shared.measure import summarise_arms
from ..shared.models import check_model, first_line
from ..shared.summary import write_summary

METRICS = "metrics.json"
TASKS = Path(__file__).parent / "tasks"
"""Benchmarks whose data a Python package ships, as task files."""
TITLES = {
    "acc": "accuracy",
    "acc_norm": "accuracy, answers weighed by length",
    "exact_match": "exact match",
    "f1": "F1",
}
"""Of the harness's metrics that are shares; others keep their name."""
Sample = dict[str, Any]
"""What the harness tells of one question."""


def run(settings: BenchmarkSettings, models: Mapping[str, str], data: str, output: str, summary: Any) -> None:
    """Measure, write results and metrics, and tell.

    Args:
        settings: Which benchmarks.
        models: Folder by arm.
        data: Folder of the splits.
        output: Folder of the results.
        summary: The artifact of the tables.

    Raises:
        RecipeError: There is no such benchmark, or it has no score of single questions.
        DataError: A benchmark's own data cannot be read.
    """
    started = time.monotonic()
    manifests = {arm: read_manifest(folder, "model", "none") for arm, folder in models.items()}
    arms = {arm: manifest for arm, manifest in manifests.items() if manifest.kind == "model"}
    tasks = load_tasks(settings)
    answered = _ask_all(tasks, settings, arms, models)
    metrics = _metrics(tasks, answered)
    rows = [row for arm, manifest in arms.items() for row in to_results(arm, answered[manifest.content], metrics)]
    parents = {"data": read_manifest(data, "splits"), **manifests}
    count = write_rows(Path(output) / "results.parquet", rows, Result)
    write_atomically(
        Path(output) / METRICS, json.dumps([one.model_dump(mode="json") for one in metrics], indent=1) + "\n"
    )
    digests = {arm: manifest.content for arm, manifest in arms.items()}
    seal(output, "benchmarks", parents=parents, counts={"results": count}, metadata={"arms": digests})
    told = summarise_arms("benchmark", rows, metrics, settings.confidence)
    seen = contamination(answered[arms["baseline"].content], data)
    told = told.model_copy(update={"details": {**told.details, "contamination": seen}})
    write_summary(summary, told, seconds=time.monotonic() - started, parents=parents)


def load_tasks(settings: BenchmarkSettings) -> dict[str, Any]:
    """Return the harness's task objects by name; a group is its tasks.

    Raises:
        RecipeError: The harness is not installed, knows no such name, or cannot read a task.
        DataError: A task's data cannot be read.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(
            "lm-evaluation-harness is not installed", where="benchmarks", fix="pip install 'assay[benchmarks]'"
        ) from error
    own = {path.stem: path for path in sorted(TASKS.glob("*.yaml"))}
    ours = {name: read_benchmark(path) for name, path in own.items() if name in settings.tasks}
    names = [task for task in settings.tasks if isinstance(task, str) and task not in ours]
    manager = TaskManager(include_defaults=bool(names))  # to look through its thousands of files takes seconds
    for name in names:
        if name not in manager.task_index:
            raise RecipeError(
                f"lm-evaluation-harness has no task {name!r}",
                where="benchmarks.tasks",
                fix=f"`python -m lm_eval ls tasks` lists what it has; {' and '.join(own)} are Assay's; or name a file",
            )
    found: dict[str, Any] = {}
    for task in settings.tasks:
        title = task if isinstance(task, str) else str(task["task"])
        given = ours.get(title, task) if isinstance(task, str) else task  # a file's mapping, or the harness's own name
        given = given if isinstance(given, str) else _locate(given)
        try:
            found |= manager.load([given])["tasks"]
        except Exception as error:  # datasets, the hub, Jinja: whatever a task's data are read with
            raise DataError(
                f"the benchmark {title} cannot be read: {first_line(error)}",
                where="benchmarks.tasks",
                fix="check its dataset_path and dataset_kwargs; without a network, name files of your own",
            ) from error
    for task in found.values():
        if settings.few_shot >= 0:
            task.set_config(key="num_fewshot", value=settings.few_shot)
    return found


def _locate(task: dict[str, Any]) -> dict[str, Any]:
    """Return a task whose data in packages are named by their paths on this machine.

    Raises:
        RecipeError: A package is not installed here.
        DataError: Its data are others than those that the recipe was read with.
    """
    where = f"benchmarks.tasks: {task['task']}"
    digests = (task.get("metadata") or {}).get("sha256") or {}

    def found(name: str) -> str:
        if not name.startswith(PREFIX):
            return name
        path = package_file(name, where)
        digest = sha256_file(path)
        if digests.get(name, digest) != digest:
            raise DataError(
                f"{name} is not the file that the recipe was read with",
                where=where,
                fix="install the same version of the package here",
            )
        return str(path)

    return with_data_files(task, found)


def _ask_all(
    tasks: Mapping[str, Any], settings: BenchmarkSettings, arms: Mapping[str, Manifest], models: Mapping[str, str]
) -> dict[str, dict[str, list[Sample]]]:
    """Return every task's samples by content of the model; arms of one content are asked once."""
    folders = {manifest.content: models[arm] for arm, manifest in arms.items()}
    answered: dict[str, dict[str, list[Sample]]] = {}
    for place, (content, folder) in enumerate(folders.items()):
        kept = {name: context.work_folder() / f"{content[:16]}-{_digest(name)}.json" for name in tasks}
        left = {name: task for name, task in tasks.items() if not kept[name].is_file()}
        model = _load(folder, settings) if left else None
        done = place * len(tasks) + len(tasks) - len(left)
        for count, (name, task) in enumerate(left.items(), 1):
            samples = _ask(model, name, task, settings)
            write_atomically(kept[name], json.dumps(samples))
            context.progress(done + count, len(folders) * len(tasks), "benchmarks")
        answered[content] = {name: json.loads(path.read_bytes()) for name, path in kept.items()}
    return answered


def _load(folder: str, settings: BenchmarkSettings) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM

    from ..shared.models import quiet, set_threads

    quiet()
    set_threads()
    there = torch.cuda.is_available()
    return HFLM(
        pretrained=str(check_model(folder)),
        device="cuda" if there else "cpu",
        dtype="auto" if there else "float32",  # on a CPU bf16 is no quicker for single questions
        batch_size=settings.batch_size,
        trust_remote_code=False,
    )


def _ask(model: Any, name: str, task: Any, settings: BenchmarkSettings) -> list[Sample]:
    """Return of every question the score by metric, the answer and what was asked."""
    import lm_eval

    told = lm_eval.simple_evaluate(
        model=model,
        tasks=[task],
        limit=settings.limit or None,
        apply_chat_template=settings.chat_template,
        bootstrap_iters=0,  # the intervals are ours
        log_samples=True,
    )
    return list(_read(name, told["samples"][name]))


def _read(name: str, samples: Sequence[Mapping[str, Any]]) -> Iterator[Sample]:
    merged: dict[int, Sample] = {}
    for sample in samples:  # once for each filter of the task
        one = merged.setdefault(
            int(sample["doc_id"]),
            {"hash": sample["doc_hash"], "asked": _question(sample), "answer": _answer(sample), "scores": {}},
        )
        ending = "" if sample["filter"] == "none" else f",{sample['filter']}"
        for metric in sample["metrics"]:
            value = sample[metric]
            if isinstance(value, (bool, int, float)) or hasattr(value, "item"):
                one["scores"][f"{name}.{metric}{ending}"] = float(value)
    for place in sorted(merged):
        if not merged[place]["scores"]:
            raise RecipeError(
                "it has no score of single questions, so arms cannot be compared in pairs",
                where=f"benchmarks.tasks: {name}",
                fix="choose one that is scored by acc, exact_match or the like",
            )
        yield merged[place] | {"place": place}


def _question(sample: Mapping[str, Any]) -> str:
    """Return the context that the model saw; of choices the first, for they share it."""
    return str(sample["arguments"][0][0])


def _answer(sample: Mapping[str, Any]) -> str:
    """Return the text that was generated, or which choice was the likeliest."""
    found = sample["filtered_resps"]
    if all(isinstance(one, str) for one in found):
        return "\n".join(found)
    likelihoods = [float(one[0]) for one in found]
    return f"choice {likelihoods.index(max(likelihoods))}"


def _metrics(tasks: Mapping[str, Any], answered: Mapping[str, Mapping[str, list[Sample]]]) -> list[Metric]:
    """Return the metrics that are shares, in the order of the tasks.

    Raises:
        RecipeError: A task has none.
    """
    found = []
    for name, task in tasks.items():
        higher = task.higher_is_better()
        values: dict[str, list[float]] = {}
        for samples in answered.values():
            for metric, value in (score for sample in samples[name] for score in sample["scores"].items()):
                values.setdefault(metric, []).append(value)
        shares = {metric for metric, all_ in values.items() if all(0 <= value <= 1 for value in all_)}
        if not shares:
            raise RecipeError(
                f"none of its scores lies between 0 and 1 (it has {', '.join(sorted(values))})",
                where=f"benchmarks.tasks: {name}",
                fix="choose one that is scored by acc, exact_match or the like",
            )
        for metric in sorted(shares):
            plain = metric.removeprefix(f"{name}.").partition(",")[0]
            found.append(
                Metric(
                    name=metric,
                    title=f"{name}: {TITLES.get(plain, plain)}",
                    better="higher" if higher.get(plain, True) else "lower",
                    definition=f"Mean of {plain} over the benchmark's questions, as lm-evaluation-harness scores them.",
                )
            )
    return found


def to_results(arm: str, answered: Mapping[str, Sequence[Sample]], metrics: Sequence[Metric]) -> list[Result]:
    """Return one row per question, with every metric: None of the other benchmarks' ones."""
    names = [metric.name for metric in metrics]
    return [
        Result(
            arm=arm,
            example_id=_digest(name, str(sample["place"]), sample["hash"]),
            group=_digest(name, sample["hash"]),  # the same question twice is one draw
            response=sample["answer"],
            slices=[f"benchmark={name}"],
            scores={metric: sample["scores"].get(metric) for metric in names},
        )
        for name, samples in answered.items()
        for sample in samples
    ]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def contamination(answered: Mapping[str, Sequence[Sample]], data: str | Path) -> dict[str, dict[str, int]]:
    """Return by benchmark how many of its questions the training rows have, as `find_contamination` counts."""
    splits = {name: read_table(Path(data) / f"{name}.parquet", Example) for name in TRAINING}
    for name, samples in answered.items():
        questions = [
            Example(
                id=_digest(name, str(sample["place"]), sample["hash"]),
                group="",
                prompt=[Message(role="user", content=sample["asked"] or " ")],
                reference="",
            ).model_dump()
            for sample in samples
        ]
        splits[name] = pa.Table.from_pylist(questions, schema=Example.SCHEMA)
    return find_contamination(splits, list(answered)).counts
