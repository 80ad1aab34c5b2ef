"""Which model a candidate must beat, and how often its held-out examples were asked about this model before."""

from pathlib import Path

from assay.components.contracts.artifacts import Manifest, link_tree, seal, write_atomically
from assay.components.contracts.recipe import GateSettings
from assay.components.contracts.rows import Example, read_table
from assay.components.shared import looks, registry
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


def write_looks(
    name: str,
    content: str,
    champion: Entry | None,
    policy: GateSettings,
    measurement: str,
    data: tuple[Path, Manifest],
    most: int,
    folder: str | Path,
) -> None:
    """Write `looks.json`: the decisions on these held-out examples before this question was first asked.

    Args:
        name: The registered model.
        content: Content digest of the candidate.
        champion: What it is compared with.
        policy: The gate's.
        measurement: `Recipe.measurement`.
        data: Folder of the splits, and their manifest.
        most: Examples that are measured, as `EvaluateSettings.max_rows`.
        folder: The artifact.

    Raises:
        RegistryError: The ledger or a decision record is not what was written.
    """
    ids = sorted(read_table(data[0] / "test.parquet", Example)["id"].to_pylist())
    held_out = looks.HeldOut.of(ids[:most] if most else ids)  # as `measure.first_rows` chooses
    opposite = champion.content if champion else None
    found = looks.count(registry.decisions(name), content, opposite, policy, measurement, held_out)
    write_atomically(Path(folder) / "looks.json", found.model_dump_json(indent=1) + "\n")
    seal(folder, "looks", parents={"data": data[1]})
