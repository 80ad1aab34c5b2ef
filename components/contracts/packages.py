"""Files inside installed Python packages, which are read as data: nothing of the package is imported."""

from importlib.util import find_spec
from pathlib import Path

from .errors import RecipeError

PREFIX = "package:"


def package_folder(name: str, where: str = "task") -> Path:
    """Return the folder of an installed package.

    Args:
        name: As it is imported.
        where: What asks for it, told if it is missing.

    Raises:
        RecipeError: It is not installed.
    """
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise RecipeError(
            f"the package {name.replace('_', '-')} is not installed",
            where=where,
            fix=f"python -m pip install --no-deps {name.replace('_', '-')}",
        )
    return Path(spec.origin).parent


def package_file(reference: str, where: str) -> Path:
    """Return the file of `package:NAME/PATH`, of which NAME is as it is imported.

    Raises:
        RecipeError: The package is not installed, or has no such file.
    """
    name, _, inside = reference.removeprefix(PREFIX).partition("/")
    path = package_folder(name, where) / inside
    if not path.is_file():
        raise RecipeError(f"the package {name} has no file {inside or '(none is named)'}", where=where, fix="check it")
    return path
