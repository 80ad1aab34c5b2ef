"""The AWS template: what cfn-lint says, and what no linter knows: that no role may do more than its duty."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber

TEMPLATE = Path(__file__).parents[2] / "infra" / "aws" / "assay.yaml"
KNOWS_NO_RESOURCE = {"ecr:GetAuthorizationToken", "cloudwatch:PutMetricData"}
JOB_ROLES = ("ProcessingRole", "TrainingRole", "RegisterRole")


@pytest.fixture(scope="module")
def resources() -> dict[str, Any]:
    from cfnlint.decode import decode

    template, problems = decode(str(TEMPLATE))
    assert not problems
    found: dict[str, Any] = template["Resources"]
    return found


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def identity_statements(resources: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every statement of a role's or a managed policy."""
    for name, resource in resources.items():
        properties = resource.get("Properties", {})
        documents = [policy["PolicyDocument"] for policy in properties.get("Policies", [])]
        if resource["Type"] == "AWS::IAM::ManagedPolicy":
            documents.append(properties["PolicyDocument"])
        for document in documents:
            yield from ((name, statement) for statement in document["Statement"])


def allowed(resources: dict[str, Any], role: str) -> dict[str, list[Any]]:
    """Return what a role may do, and on what; the managed policy of all jobs left out."""
    found: dict[str, list[Any]] = {}
    for name, statement in identity_statements(resources):
        for action in as_list(statement["Action"]) if name == role else []:
            found.setdefault(action, []).extend(as_list(statement["Resource"]))
    return found


def test_cfn_lint_has_nothing_to_say() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("cfn-lint")), str(TEMPLATE)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout


def test_cfn_lint_would_say_it(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(TEMPLATE.read_text().replace("ComparisonOperator: GreaterThan", "ComparisonOperator: GraterThan"))
    done = subprocess.run(
        [str(Path(sys.executable).with_name("cfn-lint")), str(broken)], capture_output=True, text=True
    )
    assert "GraterThan" in done.stdout


def test_no_action_is_a_wildcard(resources: dict[str, Any]) -> None:
    policies = [resource["Properties"] for resource in resources.values() if resource["Type"].endswith("Policy")]
    resource_policies = [
        statement
        for policy in policies
        for statement in policy["PolicyDocument"]["Statement"]
        if statement["Effect"] == "Allow"
    ]
    statements = [statement for _, statement in identity_statements(resources)]
    statements += resource_policies + resources["Key"]["Properties"]["KeyPolicy"]["Statement"]
    assert len(statements) > 30
    for statement in statements:
        assert "NotAction" not in statement
        assert not [action for action in as_list(statement["Action"]) if "*" in action], statement


def test_a_star_as_resource_is_for_what_knows_no_other(resources: dict[str, Any]) -> None:
    for name, statement in identity_statements(resources):
        if "*" in as_list(statement["Resource"]):
            actions = set(as_list(statement["Action"]))
            assert actions <= KNOWS_NO_RESOURCE or all(action.startswith("ec2:Describe") for action in actions), name


def test_a_role_is_passed_to_one_named_service_only(resources: dict[str, Any]) -> None:
    passing = [
        (name, statement) for name, statement in identity_statements(resources) if "iam:PassRole" in statement["Action"]
    ]
    assert len(passing) == 2
    for name, statement in passing:
        assert statement["Action"] == "iam:PassRole", name
        assert list(statement["Condition"]["StringEquals"]) == ["iam:PassedToService"]
        assert all("Fn::GetAtt" in resource for resource in as_list(statement["Resource"])), "roles by name, no pattern"


def test_only_a_service_of_this_account_or_one_workflow_takes_a_role(resources: dict[str, Any]) -> None:
    roles = {name: each["Properties"] for name, each in resources.items() if each["Type"] == "AWS::IAM::Role"}
    assert len(roles) == 6
    for name, role in roles.items():
        (statement,) = role["AssumeRolePolicyDocument"]["Statement"]
        if name == "ArrivalRole":  # Lambda sends no account
            assert statement["Principal"] == {"Service": "lambda.amazonaws.com"}
            continue
        condition = statement["Condition"]["StringEquals"]
        if name == "GitHubRole":
            prefix = "token.actions.githubusercontent.com"
            assert condition[f"{prefix}:aud"] == "sts.amazonaws.com"
            assert condition[f"{prefix}:sub"] == {
                "Fn::Sub": "repo:${GitHubRepository}:environment:${GitHubEnvironment}"
            }
        else:
            assert condition == {"aws:SourceAccount": {"Ref": "AWS::AccountId"}}, name


def test_what_trains_cannot_register_and_what_decides_cannot_promote(resources: dict[str, Any]) -> None:
    writes = {role: json.dumps(allowed(resources, role)["s3:PutObject"]) for role in JOB_ROLES}
    assert {role for role, places in writes.items() if "/registry/" in places} == {"RegisterRole"}
    assert "/registry/" not in json.dumps(allowed(resources, "TrainingRole"))
    assert "registry/triggers/" in json.dumps(allowed(resources, "GitHubRole")["s3:PutObject"])
    assert "registry/ledger/" not in json.dumps(allowed(resources, "GitHubRole"))
    for role in (*JOB_ROLES, "PipelineRole", "GitHubRole"):
        assert not {"sagemaker:UpdateModelPackage", "s3:PutBucketPolicy", "s3:DeleteObjectVersion"} & set(
            allowed(resources, role)
        )


def test_the_ledger_is_append_only_for_everybody(resources: dict[str, Any]) -> None:
    statements = resources["BucketPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    ledger = [each for each in statements if "ledger" in json.dumps(each["Resource"])]
    assert [each["Effect"] for each in ledger] == ["Deny", "Deny"]
    assert all(each["Principal"] == "*" for each in ledger)
    assert ledger[0]["Condition"]["Null"] == {"s3:if-none-match": "true"}
    assert ledger[1]["Action"] == ["s3:DeleteObject", "s3:DeleteObjectVersion"]
    assert "Condition" not in ledger[1]


def test_everything_at_rest_is_under_the_key_and_the_data_outlives_the_stack(resources: dict[str, Any]) -> None:
    key = {"Fn::GetAtt": ["Key", "Arn"]}
    (rule,) = resources["Bucket"]["Properties"]["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert rule["ServerSideEncryptionByDefault"]["KMSMasterKeyID"] == key
    for name, resource in resources.items():
        if resource["Type"] == "AWS::ECR::Repository":
            assert resource["Properties"]["EncryptionConfiguration"]["KmsKey"] == key, name
            assert resource["Properties"]["ImageTagMutability"] == "IMMUTABLE", name
    assert all(resources["Bucket"]["Properties"]["PublicAccessBlockConfiguration"].values())
    assert {resources[name]["DeletionPolicy"] for name in ("Bucket", "Key")} == {"Retain"}


def test_a_failed_execution_is_told(resources: dict[str, Any]) -> None:
    pattern = resources["FailureRule"]["Properties"]["EventPattern"]["detail"]
    assert pattern["currentPipelineExecutionStatus"] == ["Failed"]
    for alarm in ("FailureAlarm", "UndeliveredAlarm"):
        assert resources[alarm]["Properties"]["AlarmActions"] == [{"Ref": "Topic"}]


def event(**changes: str) -> dict[str, Any]:
    found = {"key": "arrivals/2026/monday/_MANIFEST.json", "etag": "e1", "version-id": "v1", **changes}
    return {"detail": {"bucket": {"name": "assay-bucket"}, "object": found}}


def test_the_same_marker_starts_the_pipeline_under_the_same_token(
    resources: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function's own code, against botocore's model of the service."""
    monkeypatch.setenv("PIPELINE", "assay-lamps")
    client = boto3.client("sagemaker", region_name="eu-west-1", aws_access_key_id="x", aws_secret_access_key="x")
    monkeypatch.setattr(boto3, "client", lambda service: client)
    code: dict[str, Any] = {}
    exec(resources["ArrivalFunction"]["Properties"]["Code"]["ZipFile"], code)
    arn = "arn:aws:sagemaker:eu-west-1:123456789012:pipeline/assay-lamps/execution/abcdefghijkl"

    def expected(version: str) -> dict[str, Any]:
        place = f"assay-bucket\narrivals/2026/monday/_MANIFEST.json\n{version}"
        token = hashlib.sha256(place.encode()).hexdigest()
        return {
            "PipelineName": "assay-lamps",
            "PipelineExecutionDisplayName": f"arrival-{token[:12]}",
            "PipelineParameters": [{"Name": "data", "Value": "s3://assay-bucket/arrivals/2026/monday"}],
            "ClientRequestToken": token,
        }

    with Stubber(client) as stub:
        for version in ("v1", "v1", "v2"):
            stub.add_response("start_pipeline_execution", {"PipelineExecutionArn": arn}, expected(version))
        assert code["handle"](event(), None) == arn
        code["handle"](event(), None)
        code["handle"](event(**{"version-id": "v2"}), None)
        stub.assert_no_pending_responses()


def test_the_markers_are_those_that_arrivals_knows(resources: dict[str, Any]) -> None:
    from assay.pipelines.triggers.arrivals import MANIFEST, SUCCESS

    keys = resources["ArrivalRule"]["Properties"]["EventPattern"]["detail"]["object"]["key"]
    assert [entry["wildcard"].rpartition("/")[2] for entry in keys] == [MANIFEST, SUCCESS]
