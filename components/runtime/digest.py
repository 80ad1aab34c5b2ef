"""The digest of a step's code: every module of ours that it can reach, and the versions of what it imports.

It stands in the IR, so that a cache on any engine is keyed by what the step really runs: a change to the report does
not invalidate a training, and a new torch does.
"""

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ..contracts.artifacts import digest_of, sha256_file

OURS = "assay."
DATA = (".j2", ".json")
"""Suffixes of files that a module reads beside itself: a template or a table is code."""
DISTRIBUTIONS = {"yaml": "PyYAML"}
"""Modules whose distribution has another name (case, `-` and `_` aside)."""


def code_digest(module: str) -> str:
    """Return the sha256 (hex) over the sources `module` reaches and the third-party versions they name.

    Imports inside functions count: a step imports its heavy libraries late.
    """
    sources, libraries = reach(module)
    versions = {library: _version(library) for library in libraries}
    return digest_of({"sources": sources, "libraries": versions})


def reach(module: str) -> tuple[dict[str, str], set[str]]:
    """Return the sha256 of every source of ours that a module reaches, and the top modules of others that they name."""
    sources: dict[str, str] = {}
    libraries: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if path is None or name in sources:
            continue
        sources[name] = sha256_file(path)
        for data in sorted(each for suffix in DATA for each in path.parent.glob(f"*{suffix}")):
            sources[f"{name}:{data.name}"] = sha256_file(data)
        for imported in _imports(name, path):
            if imported.startswith(OURS):
                waiting.append(imported)
            else:
                libraries.add(imported.split(".")[0])
    return sources, libraries - sys.stdlib_module_names


@cache
def _source(name: str) -> Path | None:
    """Return the file of a module of ours, found by folder: asking Python would import the packages on the way."""
    room, *inner = name.removeprefix(OURS).split(".")
    folder = _room(room)
    if folder is None:
        return None
    path = folder.joinpath(*inner)
    found = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
    return found if name != OURS.rstrip(".") else None  # `from module import function` names no file


@cache
def _room(room: str) -> Path | None:
    spec = find_spec(f"{OURS}{room}")
    return Path(spec.origin).parent if spec and spec.origin else None


@cache
def _imports(name: str, path: Path) -> frozenset[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([base] if base else []))
            found.add(base)
            if base.startswith(OURS.rstrip(".")):
                found.update(f"{base}.{alias.name}" for alias in node.names)
    return frozenset(found)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield every statement; `ast.walk` visits expressions too, which hold no import, and takes four times as long."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, name, ()):
            yield child
            yield from _statements(child)


@cache
def _version(library: str) -> str:
    """Return the installed version of the distribution that provides a module, or that there is none.

    Asked by name: to look through the files of every distribution, as `packages_distributions` does, takes a second.
    """
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(library, library))
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
