"""Remember an attempt that was not good enough, so that the ledger tells of failures too."""

from pathlib import Path

from assay.components.contracts.artifacts import read_manifest
from assay.components.shared import registry


def hold(name: str, candidate: str | Path, decision: str | Path) -> None:
    """Write the ledger entry of a candidate that the gate held.

    Raises:
        RegistryError: The decision is to promote, or about another model.
        DataError: An input is not what its manifest says.
    """
    content = read_manifest(candidate, "model", verify=False).content
    registry.hold(name, content, registry.keep_decision(decision))
