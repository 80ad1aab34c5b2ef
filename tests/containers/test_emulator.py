"""The emulator's requests in containers: two steps of a definition, the second of which refuses its input."""

from pathlib import Path

import pytest

from assay.components.runtime import s3
from assay.pipelines.engines.sagemaker.emulate import Emulator
from assay.pipelines.engines.sagemaker.emulation.aws import client, provide
from assay.pipelines.engines.sagemaker.emulation.machines import docker_answers
from fixtures import aws
from fixtures.containers import Images
from fixtures.definitions import Book, get, output

pytestmark = pytest.mark.docker


def test_requests_run_in_containers_where_docker_answers(images: Images, tmp_path: Path) -> None:
    image = images.of("data")
    assert docker_answers()
    with aws.server() as environment:
        storage = client("s3", environment)
        book = Book(f"s3://{aws.bucket(storage)}/assay", tmp_path / "tasks")
        made = book.processing(
            "generate",
            "assay.components.generate_data.component:generate_data",
            {"task": ("STRING", "medication_directions"), "seed": ("NUMBER_INTEGER", 0)},
            given={"rows": ("NUMBER_INTEGER", get("Parameters.rows"))},
            outputs={"raw": "system.Dataset"},
        )
        wrong = book.processing(
            "prepare",
            "assay.components.prepare_data.component:prepare_data",
            {"settings": ("STRUCT", {})},
            artifacts={"accepted": output("generate", "raw")},
            outputs={"data": "system.Dataset", "summary": "system.Metrics"},
        )
        rows = [{"Name": "rows", "Type": "Integer", "DefaultValue": 12}]
        definition = book.definition(made, wrong, parameters=rows)
        provide(definition, book.folder, environment)
        emulator = Emulator(
            tmp_path / "home",
            environment,
            environment={"OMP_NUM_THREADS": "1"},
            containers=True,
            images={"assay-data": image},
            pace=0.01,
        )
        execution = emulator.run(definition, "steps")
        assert execution.steps["generate"].state == "Succeeded", execution.reason
        uri = execution.steps["generate"].properties["ProcessingOutputConfig"]["Outputs"][0]["S3Output"]["S3Uri"]
        assert set(s3.objects(storage, uri)) == {"manifest.json", "rows.jsonl"}
    assert "this is a 'raw' artifact; wanted 'rows'" in execution.steps["prepare"].reason
    assert "exit code: 2" in execution.reason
