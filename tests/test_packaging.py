"""The wheel holds every folder that holds code, and the lock holds everything that is imported."""

import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_folder_is_in_the_wheel():
    found = sorted(
        "assay." + ".".join(init.parent.relative_to(ROOT).parts)
        for room in ("components", "pipelines")
        for init in (ROOT / room).rglob("__init__.py")
    )
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_an_init_holds_a_docstring_and_nothing_else():
    # A folder that re-exports its component would import kfp's hidden authoring names inside a step.
    for room in ("components", "pipelines"):
        for init in (ROOT / room).rglob("__init__.py"):
            assert init.read_text().count('"""') == 2, init
            assert len(init.read_text().strip().splitlines()) == 1, init


def test_the_lock_is_what_is_installed():
    pinned = dict(
        line.strip().split("==")
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line and not line.startswith("#")
    )
    wrong = {
        name: (version, metadata.version(name))
        for name, version in pinned.items()
        if metadata.version(name).split("+")[0] != version
    }
    assert not wrong, f"run `make env`: {wrong}"
