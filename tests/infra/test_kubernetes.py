"""The manifests: valid against Kubernetes' own schemas, and no more rights than the steps need."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "infra" / "kubernetes"
MANIFESTS = sorted(path for path in FOLDER.glob("*.yaml") if "example" not in path.name)
WORKLOADS = ("Deployment", "StatefulSet")


def validate(*paths: Path) -> "subprocess.CompletedProcess[str]":
    program = str(Path(sys.executable).with_name("kubernetes-validate"))
    return subprocess.run(
        [program, "--strict", "-k", "1.34", *map(str, paths)], capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    return [found for path in MANIFESTS for found in yaml.safe_load_all(path.read_text())]


def of(objects: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [found for found in objects if found["kind"] in kinds]


def test_every_manifest_is_valid() -> None:
    done = validate(*MANIFESTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARN" not in done.stdout + done.stderr  # a kind without a schema would pass with a warning
    assert (done.stdout + done.stderr).count("passed for resource") == 24


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("5-mlflow.yaml", "resources:\n            requests: {cpu", "resourcez:\n            requests: {cpu"),
        ("2-access.yaml", "verbs: [get]", "verbz: [get]"),
        ("4-network.yaml", "port: 443", "port: [443]"),
    ],
)
def test_a_typing_error_would_be_found(tmp_path: Path, file: str, old: str, new: str) -> None:
    text = (FOLDER / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    assert validate(tmp_path / file).returncode != 0


def test_all_is_in_one_namespace_and_nothing_is_named_twice(objects: list[dict[str, Any]]) -> None:
    cluster_wide = ("Namespace", "ClusterRole", "ClusterRoleBinding")
    named = [(found["kind"], found["metadata"]["name"]) for found in objects]
    assert len(named) == len(set(named))
    for found in objects:
        wanted = None if found["kind"] in cluster_wide else "assay"
        assert found["metadata"].get("namespace") == wanted, found["metadata"]["name"]


def test_rights_are_named_one_by_one(objects: list[dict[str, Any]]) -> None:
    rules = [rule for role in of(objects, "Role", "ClusterRole") for rule in role["rules"]]
    assert len(rules) == 9
    for rule in rules:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
        assert not {"create", "update", "patch", "delete"} & set(rule["verbs"]) or rule["apiGroups"] != [""]
        if {"secrets", "configmaps"} & set(rule["resources"]):
            assert rule["resourceNames"], "by name, or the steps could read every secret"
            assert rule["verbs"] == ["get"]
    (cluster,) = of(objects, "ClusterRole")
    assert all(set(rule["verbs"]) <= {"get", "list"} for rule in cluster["rules"])


def test_workloads_run_as_nobody_and_hold_no_secret(objects: list[dict[str, Any]]) -> None:
    found = of(objects, *WORKLOADS)
    assert len(found) == 2
    for workload in found:
        pod = workload["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            for variable in container["env"]:
                secret = any(word in variable["name"] for word in ("PASSWORD", "STORE_URI", "SECRET", "TOKEN"))
                assert secret == ("valueFrom" in variable) or variable["name"] == "MLFLOW_ARTIFACTS_DESTINATION"


def test_network_is_shut_and_every_door_is_used(objects: list[dict[str, Any]]) -> None:
    policies = {found["metadata"]["name"]: found["spec"] for found in of(objects, "NetworkPolicy")}
    shut = policies.pop("nothing-unless-allowed")
    assert shut == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    block = policies["https"]["egress"][0]["to"][0]["ipBlock"]
    assert block["except"] == ["169.254.0.0/16"], "the node's metadata service would give its role away"
    labels = {label for found in of(objects, *WORKLOADS) for label in found["metadata"]["labels"].values()}
    for name, policy in policies.items():
        selected = policy["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/name")
        assert selected is None or selected in labels, name


def test_services_and_volumes_meet_their_workloads(objects: list[dict[str, Any]]) -> None:
    claims = {found["metadata"]["name"] for found in of(objects, "PersistentVolumeClaim")}
    for workload in of(objects, *WORKLOADS):
        pod = workload["spec"]["template"]
        assert workload["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        used = {volume["name"] for volume in pod["spec"]["volumes"]}
        used |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        assert {mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]} == used
        named = [
            volume["persistentVolumeClaim"]["claimName"]
            for volume in pod["spec"]["volumes"]
            if len(volume) > 1 and "persistentVolumeClaim" in volume
        ]
        assert set(named) <= claims
    ports = {
        port["name"]
        for found in of(objects, *WORKLOADS)
        for port in found["spec"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert {port["targetPort"] for found in of(objects, "Service") for port in found["spec"]["ports"]} == ports


def test_the_shared_volume_is_for_many_nodes(objects: list[dict[str, Any]]) -> None:
    (claim,) = [found for found in of(objects, "PersistentVolumeClaim") if found["metadata"]["name"] == "assay"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
