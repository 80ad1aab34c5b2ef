"""Which model a candidate must beat."""

from pathlib import Path

from assay.components.contracts.artifacts import link_tree, seal
from assay.components.shared import registry
from assay.components.shared.ledger import Entry


def opponent(name: str, content: str) -> Entry | None:
    """Return the registration a candidate is compared with, or None when there is none.

    That is the champion; or, for a candidate with the champion's own bytes, what that champion replaced. So a run that
    is repeated after its model became champion asks the same question again and gets the same answer.

    Args:
        name: The registered model.
        content: Content digest of the candidate.
    """
    champion = registry.champion(name)
    if champion is not None and champion.content == content:
        return registry.predecessor(name, champion.version)
    return champion


def write(champion: Entry | None, folder: str | Path) -> int:
    """Write the champion's files, or an empty artifact of kind `none`; return its version, 0 for none.

    Raises:
        RegistryError: The registry's files are not the ones that were registered.
    """
    folder = Path(folder)
    if champion is None:
        folder.mkdir(parents=True, exist_ok=True)
        seal(folder, "none")
        return 0
    registry.read_model(champion.content)
    link_tree(registry.model_folder(champion.content), folder)
    return champion.version
