"""Training on several nodes: the manifest against Trainer's own models, and the launcher against a real server."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
sys.path.insert(0, str(FIXTURES))
from trainjobs import serving

from assay.components.contracts.errors import RecipeError
from assay.pipelines.engines.kubeflow import trainjob, worker
from assay.pipelines.engines.kubeflow.profile import Profile, Settings

MODEL = {"schemaTitle": "system.Model"}
GOLDEN = ROOT / "tests" / "golden" / "kubeflow" / "medication-directions.yaml"
LAUNCH = """
import os, sys
from kubernetes import client
client.Configuration.set_default(client.Configuration(host=os.environ["API"]))
from assay.pipelines.engines.kubeflow import launcher
launcher.POLL_SECONDS, launcher.BEAT_SECONDS = 0.05, 0.05
sys.exit(launcher.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def wrapped():
    """Container and platform settings of the golden `train-rl`, which asks for two nodes."""
    pipeline, platforms = yaml.safe_load_all(GOLDEN.read_text())
    settings = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-train-rl"]
    return pipeline["deploymentSpec"]["executors"]["exec-train-rl"]["container"], settings


@pytest.fixture(scope="module")
def manifest(wrapped):
    container, _ = wrapped
    return json.loads(container["args"][container["args"].index("--train_job") + 1])


def test_the_manifest_is_one_of_trainer_v2(manifest):
    """Through the package's models and back nothing is lost: no field is unknown, no type is another."""
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

    parsed = TrainerV1alpha1TrainJob.from_dict(manifest)
    assert parsed is not None
    assert json.loads(parsed.to_json()) == manifest


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "trainer", "numNodes"], "2"),
        (["spec", "runtimeRef", "name"], None),
        (["spec", "activeDeadlineSeconds"], 1.5),
        (["spec", "runtimePatches", 0, "manager"], None),
    ],
)
def test_the_models_refuse_what_is_wrong(manifest, path, value):
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

    wrong = json.loads(json.dumps(manifest))
    place = wrong
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match="validation error"):
        TrainerV1alpha1TrainJob.from_dict(wrong)


def test_the_job_gets_what_the_step_would_have_got(manifest):
    spec = manifest["spec"]
    assert (spec["trainer"]["numNodes"], spec["trainer"]["numProcPerNode"]) == (2, 8)
    assert spec["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "8"
    assert spec["activeDeadlineSeconds"] == 600 * 60
    assert "podSpecOverrides" not in json.dumps(spec)
    (job,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} == {"/assay", "/dev/shm"}
    assert pod["serviceAccountName"] == "assay"


def test_the_launcher_asks_for_no_gpu_and_knows_its_pod(wrapped):
    container, settings = wrapped
    assert container["command"] == ["python", "-m", trainjob.LAUNCHER]
    assert "accelerator" not in container["resources"]
    assert not {"nodeSelector", "tolerations", "emptyDirMounts", "secretAsEnv"} & settings.keys()
    assert {entry["name"] for entry in settings["fieldPathAsEnv"]} == {"POD_NAME", "POD_UID", "POD_NAMESPACE", "RUN_ID"}
    assert "{{" not in "".join(container["args"]).replace("{{$}}", "")  # Argo would take it for one of its own


def test_several_nodes_need_a_volume():
    settings = Settings.model_validate({"nodes": {"count": 2}})
    with pytest.raises(RecipeError, match="needs a volume"):
        trainjob.wrap({"image": "x", "args": [], "resources": {}}, {}, settings, Profile())


@pytest.mark.parametrize("sharding", ["fsdp", "deepspeed"])
def test_accelerates_own_launcher_sets_these_variables(sharding):
    package = find_spec("accelerate")
    assert package is not None
    source = Path(package.origin or "").with_name("utils").joinpath("launch.py").read_text()
    for name in trainjob.SHARDING[sharding]:
        assert f'"{name}"' in source, name


def test_accelerate_loads_what_the_variables_say(monkeypatch):
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    for sharding in ("fsdp", "deepspeed"):
        for name, value in trainjob.SHARDING[sharding].items():
            monkeypatch.setenv(name, value)
    fsdp = FullyShardedDataParallelPlugin()
    assert (fsdp.fsdp_version, fsdp.reshard_after_forward, fsdp.cpu_ram_efficient_loading) == (2, True, True)
    assert fsdp.state_dict_type.name == "FULL_STATE_DICT"
    zero = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    assert (zero["stage"], zero["stage3_gather_16bit_weights_on_model_save"]) == (3, True)


@pytest.fixture
def cluster(tmp_path):
    with serving(tmp_path) as found:
        found.environment = {"JOURNAL": str(tmp_path / "journal.jsonl"), "PYTHONPATH": os.environ["PYTHONPATH"]}
        yield found


def launch(cluster, folder: Path, step: str = "double", **parameters) -> "subprocess.Popen[str]":
    """Start the launcher of a step with one input and one output, as KFP's launcher does."""
    manifest = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "spec": {
            "trainer": {"command": ["torchrun", "-m", trainjob.WORKER], "env": [{"name": "SEEN", "value": "yes"}]}
        },
    }
    name = "out" if step == "double" else "model"
    executor_input = {
        "inputs": {"parameterValues": parameters},
        "outputs": {
            "parameters": {"Output": {"outputFile": str(folder / "kfp" / "Output")}},
            "artifacts": {
                name: {
                    "artifacts": [
                        {"name": name, "uri": str(folder / "kfp" / name), "type": {"schemaTitle": "system.Model"}}
                    ]
                }
            },
            "outputFile": str(folder / "kfp" / "output_metadata.json"),
        },
    }
    return subprocess.Popen(
        [
            *(sys.executable, "-c", LAUNCH, "--train_job", json.dumps(manifest)),
            *("--component", f"steps:{step}", "--executor_input", json.dumps(executor_input)),
        ],
        env={
            **os.environ,
            "API": cluster.url,
            "ASSAY_WORK_ROOT": str(folder / "volume"),
            "POD_NAME": "launcher",
            "POD_UID": "1234",
            "POD_NAMESPACE": "team-a",
            "RUN_ID": "run-1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(autouse=True)
def steps_can_be_imported(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FIXTURES), os.environ.get("PYTHONPATH", "")]))


def test_a_job_runs_the_step_and_its_outputs_come_home(cluster, tmp_path):
    launcher = launch(cluster, tmp_path, n=21)
    out, error = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, error + (tmp_path / "pod.log").read_text()
    assert (tmp_path / "kfp" / "out" / "n.txt").read_text() == "42"
    written = json.loads((tmp_path / "kfp" / "output_metadata.json").read_text())
    assert written["parameterValues"] == {"Output": 42}
    assert written["artifacts"]["out"]["artifacts"][0]["uri"] == str(tmp_path / "kfp" / "out")
    assert written["artifacts"]["out"]["artifacts"][0]["metadata"] == {"n": 21}
    assert cluster.jobs == {}
    assert cluster.log == ["create", "delete Foreground"]
    assert list((tmp_path / "volume").iterdir()) == []


def test_the_job_belongs_to_the_launchers_pod(cluster, tmp_path):
    launcher = launch(cluster, tmp_path, step="train", steps=2000)
    wait_for(lambda: cluster.jobs)
    (job,) = cluster.jobs.values()
    launcher.kill()
    launcher.communicate()
    assert job["metadata"]["ownerReferences"] == [
        {"apiVersion": "v1", "kind": "Pod", "name": "launcher", "uid": "1234"}
    ]
    assert job["metadata"]["labels"] == {"assay-run": "run-1"}
    assert job["metadata"]["name"].startswith("assay-")


def test_a_sigterm_deletes_the_job_and_the_next_attempt_goes_on(cluster, tmp_path):
    launcher = launch(cluster, tmp_path, step="train", steps=60)
    journal = tmp_path / "journal.jsonl"
    (work,) = wait_for(lambda: list((tmp_path / "volume").rglob("step")))
    wait_for(lambda: int(work.read_text() or 0) > 3)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 75
    assert cluster.jobs == {}
    again = launch(cluster, tmp_path, step="train", steps=60)
    _, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    starts = [json.loads(line)["start"] for line in journal.read_text().splitlines()]
    assert starts[0] == 0
    assert starts[1] > 3


def test_a_job_left_behind_by_a_killed_launcher_is_replaced(cluster, tmp_path):
    first = launch(cluster, tmp_path, step="train", steps=2000)
    wait_for(lambda: cluster.jobs)
    first.kill()
    first.communicate()
    second = launch(cluster, tmp_path, step="train", steps=2000)
    wait_for(lambda: cluster.log.count("create") == 2)
    assert cluster.log == ["create", "delete Foreground", "create"]
    second.terminate()
    second.communicate(timeout=60)
    assert cluster.jobs == {}


@pytest.mark.parametrize(
    ("how", "code", "words"), [("user", 2, "row 7 has no text"), ("bug", 1, "the TrainJob failed")]
)
def test_a_failed_job_fails_the_step_with_its_words(cluster, tmp_path, how, code, words):
    launcher = launch(cluster, tmp_path, step="fail", how=how)
    _, error = launcher.communicate(timeout=120)
    assert launcher.returncode == code
    assert words in error
    assert "Traceback" not in error
    assert cluster.jobs == {}
    assert (tmp_path / "kfp" / "error.json").exists() == (how == "user")


def test_a_forbidden_job_says_what_to_allow(cluster, tmp_path):
    cluster.allowed = False
    launcher = launch(cluster, tmp_path, n=1)
    _, error = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert 'cannot create resource "trainjobs"' in error
    assert "Traceback" not in error


def test_a_process_whose_launcher_is_gone_ends(tmp_path):
    (tmp_path / "heartbeat").touch()
    code = f"import pathlib, sys\nfrom {worker.__name__} import watch\nwatch(pathlib.Path(sys.argv[1]), 0.5)"
    command = [sys.executable, "-c", code, str(tmp_path / "heartbeat")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the launcher is gone" in done.stderr


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found
