"""What infra/README.md tells to do exists: files, commands, options; and its example profile is one."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from assay.pipelines.commands.trigger import app
from assay.pipelines.engines.kubeflow.profile import Profile

INFRA = Path(__file__).parents[2] / "infra"
README = (INFRA / "README.md").read_text()
CALLS = re.findall(r"^ *assay trigger (.+?)(?: {2,}#.*)?$", README, flags=re.MULTILINE)


def test_every_file_it_names_is_there_and_every_file_is_named() -> None:
    named = set(re.findall(r"`(?:infra/)?((?:kubernetes|aws|ci)/[\w.-]+\.yaml|[\w-]+\.yaml)`", README))
    here = {path.name for path in INFRA.rglob("*.yaml")} | {"deploy.yaml"}
    theirs = {"aws/deploy.example.yaml"}  # comes with the SageMaker engine
    assert not {name for name in named - theirs if name.rpartition("/")[2] not in here}


def test_it_shows_every_trigger_command() -> None:
    assert {call.split()[0] for call in CALLS} == {"cron", "watch", "ci", "registry", "list"}


@pytest.mark.parametrize("call", CALLS)
def test_its_commands_have_these_options(call: str) -> None:
    command, *rest = call.split()
    told = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert told.exit_code == 0
    assert all(option in told.output for option in rest if option.startswith("--"))


def test_the_example_profile_is_a_profile_of_the_kubeflow_engine() -> None:
    loaded = Profile.load(INFRA / "kubernetes" / "deploy.example.yaml")
    assert loaded.volume.claim == "assay"
    assert loaded.settings("train-rl", "train").timeout_minutes == 480
