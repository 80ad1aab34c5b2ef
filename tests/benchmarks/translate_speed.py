"""How long a compiled graph takes to become a checked SageMaker definition.

    python tests/benchmarks/translate_speed.py

CPU seconds of this process, best of three; the graphs are made without kfp, whose import alone takes about one second.
"""

import time
from collections.abc import Callable
from typing import Any

from assay.pipelines.engines.sagemaker.profile import Deploy
from assay.pipelines.engines.sagemaker.translate import translate
from assay.pipelines.engines.sagemaker.validate import check
from assay.pipelines.ir import model, portability

ROLE = "arn:aws:iam::123456789012:role/assay"
PROFILE = Deploy.model_validate(
    {
        "region": "eu-central-1",
        "root": "s3://assay-test/root",
        "roles": dict.fromkeys(("pipeline", "processing", "training"), ROLE),
    }
)
TYPE = {"schemaTitle": "system.Dataset", "schemaVersion": "0.0.1"}


def graph(tasks: int) -> dict[str, Any]:
    """Return the IR of a graph in which each task reads what the two before it wrote, an artifact and a number."""
    components, executors, dag = {}, {}, {}
    for number in range(tasks):
        name = f"task-{number}"
        before = [f"task-{other}" for other in range(max(0, number - 2), number)]
        components[f"comp-{name}"] = {
            "executorLabel": f"exec-{name}",
            "inputDefinitions": {
                "artifacts": {f"data_{index}": {"artifactType": TYPE} for index in range(len(before))},
                "parameters": {f"n_{index}": {"parameterType": "NUMBER_INTEGER"} for index in range(len(before))}
                | {"settings": {"parameterType": "STRUCT"}},
            },
            "outputDefinitions": {
                "artifacts": {"out": {"artifactType": TYPE}},
                "parameters": {"Output": {"parameterType": "NUMBER_INTEGER"}},
            },
        }
        executors[f"exec-{name}"] = {
            "container": {
                "image": "assay-data-python",
                "command": ["python", "-m", "assay.components.runtime"],
                "args": ["--component", "a.b:c", "--code_digest", "0" * 64, "--executor_input", "{{$}}"],
            }
        }
        dag[name] = {
            "componentRef": {"name": f"comp-{name}"},
            "cachingOptions": {"enableCache": True},
            "dependentTasks": before,
            "inputs": {
                "artifacts": {
                    f"data_{index}": {"taskOutputArtifact": {"producerTask": other, "outputArtifactKey": "out"}}
                    for index, other in enumerate(before)
                },
                "parameters": {
                    f"n_{index}": {"taskOutputParameter": {"producerTask": other, "outputParameterKey": "Output"}}
                    for index, other in enumerate(before)
                }
                | {"settings": {"runtimeValue": {"constant": {f"key_{key}": key * 1.0 for key in range(20)}}}},
            },
        }
    return {
        "pipelineInfo": {"name": "bench"},
        "schemaVersion": "2.1.0",
        "root": {"dag": {"tasks": dag}},
        "components": components,
        "deploymentSpec": {"executors": executors},
    }


def best(work: Callable[[], Any]) -> float:
    """Return the least CPU seconds of three runs."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def measure(tasks: int) -> dict[str, float]:
    """Return CPU seconds by stage."""
    raw = graph(tasks)
    pipeline = model.load(raw)
    translation = translate(pipeline, PROFILE)
    found = {finding.what for finding in check(translation.definition)}
    assert found <= {"it is larger than 1 MiB"}, found
    return {
        "load the IR": best(lambda: model.load(raw)),
        "lint": best(lambda: portability.lint(model.load(raw), "sagemaker")) - best(lambda: model.load(raw)),
        "translate": best(lambda: translate(model.load(raw), PROFILE)) - best(lambda: model.load(raw)),
        "write JSON": best(lambda: translation.text),
        "validate": best(lambda: check(translation.definition)),
    }


def main() -> None:
    """Print the table."""
    start = time.process_time()
    check({"Version": "2020-12-01", "Steps": []})
    from assay.pipelines.engines.sagemaker import shapes

    shapes.shape("sagemaker", "CreateProcessingJobRequest")
    print(f"read botocore's service model once: {time.process_time() - start:.2f} s")
    for tasks in (20, 100, 500):
        stages = measure(tasks)
        told = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in stages.items())
        size = len(translate(model.load(graph(tasks)), PROFILE).wire) / 2**20
        print(f"{tasks:4} tasks: {sum(stages.values()):.2f} s CPU ({told}); {size:.2f} of 1 MiB")


if __name__ == "__main__":
    main()
