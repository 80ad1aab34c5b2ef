"""The entry point in SageMaker's containers: the real one, as a process, on real steps in a private /opt/ml."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from assay.components.contracts.artifacts import METADATA, read_manifest
from assay.components.runtime import s3
from assay.components.runtime.context import RESUME_EXIT
from assay.components.runtime.task import parse
from fixtures import aws

TESTS = str(Path(__file__).parents[1])
STEPS = "fixtures.steps"


def template(component: str, **parts) -> dict:
    return {"component": component, "code_digest": "", "parameters": {}, "artifacts": {}, "outputs": {}, **parts}


def constant(kind: str, value) -> dict:
    return {"type": kind, "value": value}


def argument(kind: str) -> dict:
    return {"type": kind, "argument": True}


class Container:
    """A private root with the files that SageMaker writes for a kind of job."""

    def __init__(
        self, root: Path, task: dict, *, training: bool = False, hosts: tuple[str, ...] = ("algo-1",), host=""
    ):
        self.root, self.training = root, training
        self.inputs = root / ("input/data" if training else "processing/input")
        self.outputs = root / ("model" if training else "processing/output")
        self.message = root / "output" / ("failure" if training else "message")
        for name in task["outputs"].get("artifacts", {}):
            (self.outputs / name).mkdir(parents=True)  # as SageMaker mounts them
        config = root / ("input/config" if training else "config")
        config.mkdir(parents=True)
        resources = {"current_host": host or hosts[0], "hosts": sorted(hosts), "network_interface_name": "lo"}
        (config / "resourceconfig.json").write_text(json.dumps(resources))
        (config / ("hyperparameters.json" if training else "processingjobconfig.json")).write_text("{}")
        (self.inputs / "task").mkdir(parents=True)
        (self.inputs / "task" / "task.json").write_text(json.dumps(task))

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        path = os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])
        given = {**os.environ, "PYTHONPATH": path, "ASSAY_ML_ROOT": str(self.root), **environment}
        given.setdefault("JOURNAL", str(self.root / "journal"))
        line = [sys.executable, "-m", "assay.components.runtime.sagemaker", *arguments]
        return subprocess.Popen(line, env=given, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments: str, **environment: str) -> int:
        process = self.start(*arguments, **environment)
        _, self.errors = process.communicate(timeout=120)
        return process.returncode

    @property
    def params(self) -> dict:
        return json.loads((self.outputs / "params" / "params.json").read_text())


def test_a_processing_job_leaves_sealed_folders_where_sagemaker_uploads_them(tmp_path):
    parameters = {
        "task": constant("STRING", "medication_directions"),
        "rows": argument("NUMBER_INTEGER"),
        "seed": constant("NUMBER_INTEGER", 3.0),
    }
    task = template(
        "assay.components.generate_data.component:generate_data",
        parameters=parameters,
        outputs={"parameters": {}, "artifacts": {"raw": "system.Dataset"}},
    )
    container = Container(tmp_path, task)
    assert container.run("--parameter", "rows=12") == 0, container.errors
    manifest = read_manifest(container.outputs / "raw", "raw")
    assert manifest.counts == {"rows": 12}
    assert manifest.metadata["seed"] == 3
    assert not container.message.exists()
    assert sorted(path.name for path in container.outputs.iterdir()) == ["raw"]


def test_a_training_job_leaves_its_outputs_below_the_model_folder_and_works_in_the_checkpoints(tmp_path):
    task = template(
        f"{STEPS}:train",
        parameters={"steps": constant("NUMBER_INTEGER", 4.0)},
        outputs={"parameters": {"Output": "NUMBER_INTEGER"}, "artifacts": {"model": "system.Model"}},
    )
    container = Container(tmp_path, task, training=True)
    assert container.run() == 0, container.errors
    assert read_manifest(container.outputs / "model", "model").counts == {"steps": 4}
    assert (tmp_path / "checkpoints" / "step").read_text() == "4"
    assert container.params == {"Output": 4}


def test_an_output_that_is_one_file_travels_with_its_metadata_to_the_step_that_reads_it(tmp_path):
    task = template(
        f"{STEPS}:write",
        parameters={"text": argument("STRING")},
        outputs={"parameters": {"Output": "NUMBER_INTEGER"}, "artifacts": {"out": "system.Dataset"}},
    )
    writer = Container(tmp_path / "write", task)
    assert writer.run("--parameter", "text=a=b c") == 0, writer.errors
    assert (writer.outputs / "out" / "out").read_text() == "a=b c"
    assert json.loads((writer.outputs / "out" / METADATA).read_text()) == {"file": "out", "metadata": {"words": 2}}
    assert writer.params == {"Output": 5}
    reads = template(
        f"{STEPS}:read",
        artifacts={"data": {"schema_title": "system.Dataset", "subfolder": "out", "optional": False}},
        outputs={"parameters": {"Output": "STRING"}, "artifacts": {}},
    )
    reader = Container(tmp_path / "read", reads, training=True)
    (writer.outputs).rename(reader.inputs / "data")  # as the channel of a Training producer: one folder for all outputs
    assert reader.run() == 0, reader.errors
    assert reader.params == {"Output": "a=b c"}


def test_parameters_keep_their_types_and_lists_are_one_text(tmp_path):
    kinds = {"rate": "NUMBER_DOUBLE", "grade": "STRING", "good": "BOOLEAN", "many": "LIST", "n": "NUMBER_INTEGER"}
    container = Container(tmp_path, template(f"{STEPS}:facts", outputs={"parameters": kinds, "artifacts": {}}))
    assert container.run() == 0, container.errors
    assert container.params == {"rate": 0.61, "grade": 'it\'s "A"', "good": True, "many": "[3, 1, 2]", "n": 3}
    assert [parse(text, kinds[name]) for name, text in [("many", "[3, 1, 2]"), ("good", "True"), ("n", "3.0")]] == [
        [3, 1, 2],
        True,
        3,
    ]


def test_an_optional_input_that_is_not_there_is_none_and_a_required_one_is_a_clear_failure(tmp_path):
    entry = {"schema_title": "system.Dataset", "subfolder": "", "optional": True}
    outputs = {"parameters": {"Output": "STRING"}, "artifacts": {}}
    container = Container(tmp_path / "a", template(f"{STEPS}:optional", artifacts={"data": entry}, outputs=outputs))
    assert container.run() == 0, container.errors
    assert container.params == {"Output": "None False"}
    needed = template(f"{STEPS}:read", artifacts={"data": {**entry, "optional": False}}, outputs=outputs)
    container = Container(tmp_path / "b", needed)
    assert container.run() == 2
    assert "the input 'data' is not there" in container.message.read_text()


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("user", 2, "rows.jsonl:7: row 7 has no text\n  → give it one"),
        ("bug", 1, "exit code 1: ValueError: a bug in the step"),
        ("killed", 137, "killed by SIGKILL (out of memory?)"),
        ("stopped", 75, "goes on from its last checkpoint"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_the_failure_file_says_why(tmp_path, how, code, said, training):
    task = template(
        f"{STEPS}:fail",
        parameters={"how": constant("STRING", how)},
        outputs={"parameters": {"Output": "NUMBER_INTEGER"}, "artifacts": {}},
    )
    container = Container(tmp_path, task, training=training)
    assert container.run() == code
    assert said in container.message.read_text()
    assert not (container.outputs / "params").exists()


def test_a_parameter_that_was_not_given_and_one_of_another_type_are_named(tmp_path):
    task = template(
        f"{STEPS}:double",
        parameters={"n": argument("NUMBER_INTEGER")},
        outputs={"parameters": {"Output": "NUMBER_INTEGER"}, "artifacts": {"out": "system.Model"}},
    )
    missing, wrong = Container(tmp_path / "a", task), Container(tmp_path / "b", task)
    assert missing.run() == 2
    assert "the parameter 'n' was not given" in missing.message.read_text()
    assert wrong.run("--parameter", "n=many") == 2
    assert "the parameter 'n' is not a NUMBER_INTEGER" in wrong.message.read_text()


def test_the_message_is_cut_to_what_sagemaker_reads(tmp_path):
    container = Container(tmp_path, template(f"{STEPS}:" + "é" * 2000))
    assert container.run() == 1
    assert 1000 < len(container.message.read_bytes()) <= 1024
    container.message.read_text(encoding="utf-8")  # no character is cut in two


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists()


def test_sigterm_lets_a_training_end_at_a_checkpoint_and_the_next_one_goes_on(tmp_path):
    task = template(
        f"{STEPS}:train",
        parameters={"steps": constant("NUMBER_INTEGER", 60)},
        outputs={"parameters": {}, "artifacts": {"model": "system.Model"}},
    )
    container = Container(tmp_path, task, training=True)
    process = container.start()
    wait_for(tmp_path / "checkpoints" / "step")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == RESUME_EXIT
    assert not (container.outputs / "model" / "manifest.json").exists()
    reached = int((tmp_path / "checkpoints" / "step").read_text())
    assert 0 < reached < 60
    assert container.run() == 0, container.errors
    starts = [json.loads(line)["start"] for line in (tmp_path / "journal").read_text().splitlines()]
    assert starts == [0, reached]
    assert read_manifest(container.outputs / "model", "model").counts == {"steps": 60}


def test_several_hosts_run_under_torchrun_and_only_rank_0_writes(tmp_path):
    (tmp_path / "ranked.py").write_text(
        "import os\nfrom pathlib import Path\nfrom kfp.dsl import Model, Output\n"
        "def ranked(model: Output[Model]) -> str:\n"
        "    Path(model.path).mkdir(parents=True)\n"
        "    Path(model.path, 'rank').write_text(os.environ['RANK'])\n"
        "    Path(os.environ['JOURNAL']).open('a').write(os.environ['RANK'] + '/' + os.environ['WORLD_SIZE'] + '\\n')\n"
        "    return os.environ['NCCL_SOCKET_IFNAME']\n"
    )
    task = template(
        "ranked:ranked", outputs={"parameters": {"Output": "STRING"}, "artifacts": {"model": "system.Model"}}
    )
    hosts = ("127.0.0.1", "localhost")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONPATH": path, "JOURNAL": str(tmp_path / "journal"), "OMP_NUM_THREADS": "1"}
    containers = [Container(tmp_path / host, task, training=True, hosts=hosts, host=host) for host in hosts]
    processes = [container.start(**environment) for container in containers]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    first, second = containers
    assert sorted((tmp_path / "journal").read_text().split()) == ["0/2", "1/2"]
    assert (first.outputs / "model" / "rank").read_text() == "0"
    assert first.params == {"Output": "lo"}
    assert not any(path.is_file() for path in second.outputs.rglob("*"))


def test_the_shim_itself_imports_neither_torch_nor_kfp():
    code = "import sys, assay.components.runtime.sagemaker; print({'torch', 'kfp', 'boto3'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.fixture(scope="module")
def environment():
    with aws.server() as environment:
        yield environment


@pytest.fixture
def client(environment, monkeypatch):
    import boto3

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return boto3.client("s3")


def test_inputs_beyond_the_tenth_are_fetched_from_s3(tmp_path, environment, client):
    bucket = aws.bucket(client)
    client.put_object(Bucket=bucket, Key="run/data/a.txt", Body=b"one")
    client.put_object(Bucket=bucket, Key="run/data2/b.txt", Body=b"two")
    task = template(
        f"{STEPS}:read",
        artifacts={"data": {"schema_title": "system.Dataset"}},
        outputs={"parameters": {"Output": "STRING"}, "artifacts": {}},
    )
    container = Container(tmp_path / "a", task)
    assert container.run("--fetch", f"data=s3://{bucket}/run/data", **environment) == 0, container.errors
    assert container.params == {"Output": "one"}
    empty = Container(tmp_path / "b", task)
    assert empty.run("--fetch", f"data=s3://{bucket}/nothing", **environment) == 2
    assert f"s3://{bucket}/nothing: there is no object" in empty.message.read_text()
    denied = Container(tmp_path / "c", task)
    assert denied.run("--fetch", "data=s3://no-such-bucket/x", **environment) == 2
    assert "S3 refuses" in denied.message.read_text()


def test_a_prefix_is_a_folder_or_one_object_and_never_leads_out(tmp_path, client):
    bucket = aws.bucket(client)
    (tmp_path / "from" / "sub").mkdir(parents=True)
    (tmp_path / "from" / "sub" / "x").write_text("x")
    (tmp_path / "from" / "y").symlink_to("sub/x")
    assert s3.upload(client, tmp_path / "from", f"s3://{bucket}/up/") == 1
    assert s3.download(client, f"s3://{bucket}/up", tmp_path / "to") == 1
    assert (tmp_path / "to" / "sub" / "x").read_text() == "x"
    assert s3.objects(client, f"s3://{bucket}/up/sub/x") == {"x": "up/sub/x"}
    client.put_object(Bucket=bucket, Key="bad/../../escaped", Body=b"")
    with pytest.raises(ValueError, match="outside"):
        s3.download(client, f"s3://{bucket}/bad", tmp_path / "to")
