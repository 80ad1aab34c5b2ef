"""The wire of `train_pretrain`; the work is in `pretrain.py`."""

from typing import Any, Optional

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from ..runtime.step import step


@step("train")
def train_pretrain(
    settings: dict[str, Any],
    task: str,
    seed: int,
    base: Input[Model],
    corpus: Input[Dataset],
    model: Output[Model],
    summary: Output[Metrics],
    verdict: Output[Metrics],
    general: Optional[Input[Dataset]] = None,
    data: Optional[Input[Dataset]] = None,
) -> None:
    """Train a model on a domain's text, and keep the result only if it helped there and did no harm elsewhere.

    Args:
        settings: `PretrainSettings`.
        task: Name of the task; kept in the model's metadata.
        seed: Of the data order and of the base model's samples.
        base: The model to start from.
        corpus: The user's text: a file or a folder of .jsonl, .parquet or .txt.
        model: The tuned model, adapters merged; the base, file by file, where the tuned one was left out.
        summary: Loss curve, effect check, perplexities before and after.
        verdict: Whether the tuned model goes on, and why.
        general: Text of no domain, as `corpus`; None samples it from the base model.
        data: `splits`; documents that hold a validation or test row are left out. None leaves nothing out.
    """
    from ..contracts.recipe import PretrainSettings
    from .pretrain import pretrain

    wanted, other = PretrainSettings.model_validate(settings), general.path if general else None
    held = data.path if data else None
    pretrain(wanted, task, seed, base.path, corpus.path, other, model.path, summary, verdict, held)
