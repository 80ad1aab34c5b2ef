"""What a training step on several nodes runs in its own pod: create the TrainJob, follow it, bring its outputs home.

The job's pods see the shared volume alone, so inputs are staged there and outputs come back from there. The job ends
with this pod in three ways: a SIGTERM deletes it; its owner is this pod, so Kubernetes collects it; and its processes
stop by themselves when the launcher's heartbeat does (KFP's own launcher does not pass a signal on).
"""

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from assay.components.contracts.errors import AssayError, RunError
from assay.components.runtime.context import RESUME_EXIT, Stopped
from assay.components.runtime.work import ROOT, work_key

GROUP = {"group": "trainer.kubeflow.org", "version": "v1alpha1", "plural": "trainjobs"}
HEARTBEAT = "heartbeat"
BEAT_SECONDS = 20.0
POLL_SECONDS = 5.0


def main(argv: list[str] | None = None) -> int:
    """Run one step; return its exit code: 0 done, 2 the input's fault, 75 stopped and resumable, 1 the job failed."""
    parser = argparse.ArgumentParser(prog="python -m assay.pipelines.engines.kubeflow.launcher")
    parser.add_argument("--train_job", required=True, help="the manifest as JSON")
    parser.add_argument("--component", required=True, help="module:function")
    parser.add_argument("--code_digest", default="")
    parser.add_argument("--executor_input", required=True, help="KFP's ExecutorInput as JSON")
    given = parser.parse_args(argv)
    executor_input = json.loads(given.executor_input)
    run_id, pod = os.environ.get("RUN_ID", ""), os.environ
    key = work_key(given.component, given.code_digest, {"inputs": [executor_input["inputs"], run_id]})
    stage = Stage(Path(os.environ[ROOT]) / key, executor_input)
    manifest = complete(json.loads(given.train_job), f"assay-{key[:20]}", pod, given, stage.folder)
    signal.signal(signal.SIGTERM, _stop)
    try:
        stage.write()
        with _beating(stage.folder / HEARTBEAT):
            Job(manifest, pod["POD_NAMESPACE"]).run()
        stage.bring_home()
    except Stopped:
        return RESUME_EXIT
    except AssayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if stage.bring_error() else 1
    return 0


def complete(manifest: dict[str, Any], name: str, pod: Any, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the manifest with what is known only in the pod: name, owner, arguments."""
    owner = {"apiVersion": "v1", "kind": "Pod", "name": pod["POD_NAME"], "uid": pod["POD_UID"]}
    manifest["metadata"] = {
        "name": name,
        "labels": {"assay-run": pod.get("RUN_ID", "")},
        "ownerReferences": [owner],
    }
    trainer = manifest["spec"]["trainer"]
    trainer["args"] = ["--component", given.component, "--code_digest", given.code_digest]
    trainer["args"] += ["--executor_input", f"@{folder / 'executor_input.json'}"]
    trainer["env"] = [*trainer["env"], {"name": "ASSAY_WORK", "value": str(folder / "work")}]
    return manifest


class Stage:
    """The folder on the shared volume through which a step's inputs and outputs pass."""

    def __init__(self, folder: Path, executor_input: dict[str, Any]) -> None:
        self.folder, self.given = folder, executor_input
        self.output = folder / "executor_output.json"

    def write(self) -> None:
        """Put the inputs and the executor's input there, with its paths."""
        (self.folder / "work").mkdir(parents=True, exist_ok=True)
        inputs = {name: self._staged("inputs", name, entry) for name, entry in self._artifacts("inputs").items()}
        for name, entry in inputs.items():
            _copy(_local(self._artifacts("inputs")[name]["uri"]), Path(entry["uri"]))
        outputs = {name: self._staged("outputs", name, entry) for name, entry in self._artifacts("outputs").items()}
        (self.folder / "outputs").mkdir(exist_ok=True)
        parameters = {name: {"outputFile": str(self.folder / "parameters" / name)} for name in self._parameters()}
        there = {
            "inputs": {**self.given["inputs"], "artifacts": _listed(inputs)},
            "outputs": {"parameters": parameters, "artifacts": _listed(outputs), "outputFile": str(self.output)},
        }
        (self.folder / "executor_input.json").write_text(json.dumps(there), encoding="utf-8")

    def bring_home(self) -> None:
        """Copy the outputs to where KFP wants them, and remove the folder."""
        written = json.loads(self.output.read_text(encoding="utf-8"))
        for name, entry in self._artifacts("outputs").items():
            _copy(self.folder / "outputs" / name, _local(entry["uri"]))
            for told in written.get("artifacts", {}).get(name, {}).get("artifacts", []):
                told["uri"] = entry["uri"]
        home = Path(self.given["outputs"]["outputFile"])
        home.parent.mkdir(parents=True, exist_ok=True)
        home.write_text(json.dumps(written), encoding="utf-8")
        shutil.rmtree(self.folder, ignore_errors=True)

    def bring_error(self) -> bool:
        """Copy the step's own words on what is wrong with its input; return whether there are any."""
        error = self.folder / "error.json"
        if not error.is_file():
            return False
        home = Path(self.given["outputs"]["outputFile"]).with_name("error.json")
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(error, home)
        error.unlink()  # the next attempt's are its own
        print(f"error: {json.loads(home.read_text(encoding='utf-8'))['what']}", file=sys.stderr)
        return True

    def _artifacts(self, side: str) -> dict[str, dict[str, Any]]:
        """Return the one artifact of each name: a training step reads and writes no lists."""
        listed = self.given[side].get("artifacts", {}).items()
        return {name: only for name, entry in listed for (only,) in [entry["artifacts"]]}

    def _parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = self.given["outputs"].get("parameters", {})
        return parameters

    def _staged(self, side: str, name: str, entry: dict[str, Any]) -> dict[str, Any]:
        return {**entry, "uri": str(self.folder / side / name)}


class Job:
    """A TrainJob in the cluster."""

    def __init__(self, manifest: dict[str, Any], namespace: str) -> None:
        from kubernetes import client, config

        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            config.load_incluster_config()
        self.api = client.CustomObjectsApi()
        self.manifest, self.name = manifest, manifest["metadata"]["name"]
        self.place = {**GROUP, "namespace": namespace}

    def run(self) -> None:
        """Create the job and wait for its end; whatever ends this, the job is gone after it.

        Raises:
            RunError: The job failed, or cannot be created.
        """
        try:
            self.create()
            self.wait()
        finally:
            self.delete()

    def create(self) -> None:
        """Create the job anew; one that an earlier attempt left behind goes first."""
        from kubernetes.client import ApiException

        self.delete()
        end = time.monotonic() + 120
        while True:
            try:
                self.api.create_namespaced_custom_object(**self.place, body=self.manifest)
                return
            except ApiException as error:
                if error.status != 409 or time.monotonic() > end:  # 409: the old one is still going
                    raise _refused(error, self.name) from None
            time.sleep(POLL_SECONDS)

    def wait(self) -> None:
        """Return when the job is complete."""
        told = ""
        while True:
            job = self.api.get_namespaced_custom_object(**self.place, name=self.name)
            conditions = {entry["type"]: entry for entry in job.get("status", {}).get("conditions", [])}
            if failed := _true(conditions.get("Failed")):
                why = failed.get("message") or failed.get("reason", "")
                fix = f"kubectl logs -l jobset.sigs.k8s.io/jobset-name={self.name} --prefix"
                raise RunError(f"the TrainJob failed: {why}", where=self.name, fix=fix)
            if _true(conditions.get("Complete")):
                return
            if (now := json.dumps(job.get("status", {}).get("jobsStatus", []))) != told:
                print(f"{self.name}: {now}", flush=True)
                told = now
            time.sleep(POLL_SECONDS)

    def delete(self) -> None:
        """Delete the job and its pods, if it is there."""
        from kubernetes.client import ApiException

        try:
            self.api.delete_namespaced_custom_object(**self.place, name=self.name, propagation_policy="Foreground")
        except ApiException as error:
            if error.status != 404:
                raise _refused(error, self.name) from None


@contextmanager
def _beating(path: Path) -> Iterator[None]:
    """Touch a file as long as the block runs."""
    stop = threading.Event()

    def beat() -> None:
        while True:
            path.touch()
            if stop.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _true(condition: dict[str, Any] | None) -> dict[str, Any] | None:
    return condition if condition and condition.get("status") == "True" else None


def _refused(error: Any, name: str) -> RunError:
    try:
        words = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        words = error.reason
    fix = "let the run's service account create, get and delete trainjobs (infra/README.md)"
    return RunError(f"Kubernetes refuses the TrainJob: {words}", where=name, fix=fix)


def _listed(artifacts: dict[str, Any]) -> dict[str, Any]:
    return {name: {"artifacts": [entry]} for name, entry in artifacts.items()}


def _local(uri: str) -> Path:
    """Return where KFP's launcher puts an artifact in this pod."""
    for scheme, mount in {"s3://": "/s3/", "gs://": "/gcs/", "minio://": "/minio/"}.items():
        if uri.startswith(scheme):
            return Path(mount + uri.removeprefix(scheme))
    return Path(uri)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _stop(signum: int, frame: object) -> None:
    raise Stopped


if __name__ == "__main__":
    sys.exit(main())
