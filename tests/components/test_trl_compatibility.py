"""What we lean on in TRL beyond its documentation: an upgrade that moves any of it fails here, by name.

The numbers themselves are held against numpy in the tests of each technique.
"""

import inspect
from typing import Any

import pytest
import trl
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput

METHODS: dict[tuple[Any, str], list[str]] = {
    (DPOTrainer, "_prepare_dataset"): ["dataset", "processing_class", "args", "dataset_name"],
    (DPOTrainer, "_precompute_ref_logps"): ["dataset", "name", "batch_size"],
    (DPOTrainer, "_compute_loss"): ["model", "inputs", "return_outputs"],
    (DataCollatorForPreference, "torch_call"): ["examples"],
    (GRPOTrainer, "_generate_and_score_completions"): ["inputs"],
    (GRPOTrainer, "_generate_single_turn"): [
        *("prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images")
    ],
    (GRPOTrainer, "_tokenize_prompts"): ["prompts"],
    (GRPOTrainer, "_compute_loss"): ["model", "inputs"],
    (SFTTrainer, "compute_loss"): ["model", "inputs", "return_outputs", "num_items_in_batch"],
}
"""What our trainers override or call, and the arguments by which they do it."""


def test_the_release_is_the_one_that_was_read() -> None:
    assert trl.__version__.rsplit(".", 1)[0] == "1.16", "read the methods below again, then raise the bound"


@pytest.mark.parametrize(("owner", "name"), METHODS, ids=lambda value: getattr(value, "__name__", value))
def test_a_method_takes_what_ours_give(owner: Any, name: str) -> None:
    assert list(inspect.signature(getattr(owner, name)).parameters)[1:] == METHODS[owner, name]


def test_the_fused_heads_output_has_the_fields_that_ours_fills() -> None:
    fields = set(inspect.signature(FusedCausalLMOutput).parameters)
    assert {"loss", "log_probs", "entropy", "mean_logits", "is_top1", "label_mask"} <= fields


def test_the_losses_and_levels_that_recipes_name_are_still_there() -> None:
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert all(f'"{name}"' in source for name in ("grpo", "dapo", "luspo", "sequence"))
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert all(f'"{name}"' in source for name in ("sigmoid", "ipo", "sft"))
    assert {"epsilon_high", "steps_per_generation", "importance_sampling_level"} <= set(
        inspect.signature(GRPOConfig).parameters
    )
