"""Make a registered version the champion, once it is shown that what will be served is what was measured.

Where people must approve it, it goes into the queue instead, and the last approval makes it the champion.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from assay.components.contracts.artifacts import is_encoder, read_manifest
from assay.components.contracts.errors import RegistryError
from assay.components.contracts.recipe import EvaluateSettings
from assay.components.shared import announce, registry, review
from assay.components.shared.registry import Deployment


def deploy(name: str, version: int, settings: EvaluateSettings, candidate: str | Path, data: str | Path) -> int:
    """Check the registered files through the server, then make them the champion or let them await approval.

    Does nothing when the version is champion, or waits, and its check is on record.

    Args:
        name: The registered model.
        version: What the gate let in.
        settings: How many held-out prompts to compare, and how long answers may be.
        candidate: The trained model that was measured.
        data: The splits.

    Returns:
        The version, now champion; 0 while it awaits approval.

    Raises:
        RegistryError: The registry refuses, or the served model answers otherwise; the champion stays.
    """
    content = read_manifest(candidate, "model", verify=False).content
    if _is_deployed(name, version, content):
        return version
    entry = registry.check_promotion(name, version)
    if entry.content != content:
        raise RegistryError(
            f"version {version} of {name!r} is not the model that this run trained",
            where=str(candidate),
            fix="deploy the version that this run registered",
        )
    seen = registry.candidate(name, registry.history(name), version)
    waits = seen.required > 0 and entry.event == "registered"
    if waits and seen.check:
        review.submit(name, version)
        return 0
    prompts, tokens = check_parity(registry.model_folder(content), settings, candidate, data)
    record = Deployment(
        name=name, version=version, content=content, prompts=prompts, tokens=tokens, command=f"assay serve {name}"
    )
    if waits:
        registry.record_deployment(record)  # before it is put into the queue: people see it there
        review.submit(name, version)
        return 0
    registry.promote(name, version)
    registry.sync_alias(name)
    registry.record_deployment(record)
    announce.announce(name)
    return version


def check_parity(
    registered: Path, settings: EvaluateSettings, candidate: str | Path, data: str | Path
) -> tuple[int, int]:
    """Return how many prompts and tokens were compared, all equal: generated ones, or of an encoder those it read.

    Raises:
        RegistryError: The served model answers otherwise.
        DataError: An input is not what its manifest says.
    """
    from .parity import compare, compare_vectors, golden_prompts, served_answers, trained_answers

    read_manifest(candidate, "model")
    read_manifest(data, "splits")
    examples = golden_prompts(data, settings.golden_prompts)
    if is_encoder(candidate):
        return len(examples), compare_vectors(registered, candidate, examples)
    prompts = [example.prompt for example in examples]
    with ThreadPoolExecutor(1) as beside:  # the server is a process of its own; it loads and answers meanwhile
        asked = beside.submit(served_answers, registered, prompts, settings.max_new_tokens)
        trained = trained_answers(candidate, prompts, settings.max_new_tokens)
        served = asked.result()
    return len(examples), compare(examples, trained, served)


def _is_deployed(name: str, version: int, content: str) -> bool:
    champion = registry.champion(name)
    if champion is None or (champion.version, champion.content) != (version, content):
        return False
    record = registry.deployment(name, version)
    return record is not None and record.content == content
