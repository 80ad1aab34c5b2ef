"""The wire of `import_model`. The work is in `references.py`."""

from kfp.dsl import Model, Output

from ..runtime.step import step


@step("train")
def import_model(reference: str, model: Output[Model]) -> None:
    """Bring the base model into the run.

    Args:
        reference: `package:NAME`, a folder, `owner/name`, `s3://bucket/prefix` or `models:/name@alias`.
        model: A model folder: safetensors, tokenizer, chat template, generation settings.
    """
    from pathlib import Path

    from ..contracts.artifacts import digest_of, seal
    from ..shared.models import count_parameters, load_tokenizer
    from .references import fetch_model

    folder = Path(model.path)
    fetch_model(reference, folder)
    facts = {
        "reference": reference,
        "parameters": count_parameters(folder),
        "chat_template": digest_of(load_tokenizer(folder).chat_template),
    }
    seal(folder, "model", metadata=facts)
