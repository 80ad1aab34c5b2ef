"""`assay images`: build the images that steps run in, push them, and name them by digest."""

from pathlib import Path
from typing import Annotated

import typer

from assay.components.contracts.errors import RunError

from . import build as work
from .roles import ROLES, Accelerator, Role

app = typer.Typer(help="Build, push and name the container images that steps run in.", no_args_is_help=True)

Roles = Annotated[list[str] | None, typer.Option("--role", help="data, train or serve; all when left out.")]
Base = Annotated[str, typer.Option(envvar="ASSAY_IMAGE_BASE", help="Base image; give it by digest.")]
Cuda = Annotated[bool, typer.Option("--cuda", help="The CUDA variant of train and serve.")]
Registry = Annotated[
    str, typer.Option(envvar="ASSAY_IMAGE_REGISTRY", help="Prefix: host/path, without the image's name.")
]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Write the lines to this file as well.")]


@app.command()
def build(
    role: Roles = None,
    base: Base = work.BASE,
    cuda: Cuda = False,
    torch_index: Annotated[str, typer.Option(help="Package index with torch's CPU wheels.")] = "",
    wheels: Annotated[Path | None, typer.Option(help="Folder of wheels, used before any index.")] = None,
) -> None:
    """Build images; prints the name of each."""
    settings = work.Build(base, _accelerator(cuda), torch_index, wheels)
    for name in _roles(role):
        typer.echo(work.build(name, settings))


@app.command()
def push(
    registry: Registry, role: Roles = None, base: Base = work.BASE, cuda: Cuda = False, output: Output = None
) -> None:
    """Push images that were built with the same options; prints and writes what `digest` does."""
    settings = work.Build(base, _accelerator(cuda))
    _print({name: work.push(name, settings, registry) for name in _roles(role)}, output)


@app.command()
def digest(
    registry: Registry, role: Roles = None, base: Base = work.BASE, cuda: Cuda = False, output: Output = None
) -> None:
    """Print `ASSAY_IMAGE_<ROLE>=repository@sha256:…` of the images of this code that were pushed."""
    settings = work.Build(base, _accelerator(cuda))
    _print({name: work.reference(name, settings, registry) for name in _roles(role)}, output)


def _roles(given: list[str] | None) -> list[Role]:
    chosen = given or ROLES
    unknown = sorted(set(chosen) - set(ROLES))
    if unknown:
        raise RunError(f"there is no role {unknown[0]!r}", fix=f"choose of {', '.join(ROLES)}")
    return [role for role in ROLES if role in chosen]


def _accelerator(cuda: bool) -> Accelerator:
    return "cuda" if cuda else "cpu"


def _print(references: dict[Role, str], output: Path | None) -> None:
    lines = work.images_file(references)
    typer.echo(lines, nl=False)
    if output is not None:
        try:
            output.write_text(lines, encoding="utf-8")
        except OSError as error:
            raise RunError(
                f"cannot be written: {error.strerror}", where=str(output), fix="choose another path"
            ) from error
