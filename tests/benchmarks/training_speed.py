"""Training on a CPU, beside plain TRL and plain transformers: tokens a second, peak memory, the ratio.

    python tests/benchmarks/training_speed.py MODEL [sft] [dpo] [grpo]

MODEL is a folder of a `model` artifact (the demo's base model: `.assay/cache/models/…` after `make demo`). Each arm is
a process of its own, one after the other, in the environment that the engine gives a task, on the same rows in the same
order with the same optimizer and the same weights frozen. The peers run as their defaults have it, but for what a CPU
refuses (bf16) and for what the work is (rates, sizes, steps). Seconds are those of making the trainer and of training,
so that DPO's reference is in them; imports and the loading of the model are not.

GRPO draws its own samples, so its arms do equal work (steps, prompts, samples, token limit) and not equal steps.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

ARMS = {
    "sft": ("assay", "assay fp32", "trl", "transformers"),
    "dpo": ("assay", "assay fp32", "trl"),
    "grpo": ("assay", "assay fp32", "trl"),
}
ROWS, BATCH = {"sft": 64, "dpo": 32, "grpo": 16}, {"sft": 4, "dpo": 8, "grpo": 8}
"""Rows (pairs, prompts) in all, and of a step; one epoch."""
GROUP, ANSWER = 4, 48
RATE = {"sft": 3e-4, "dpo": 5e-5, "grpo": 5e-5}
ENGINE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}


def main() -> None:
    """Run every arm and print the table."""
    model, *stages = sys.argv[1:]
    limit = {precision: matmul_limit(precision) for precision in ("fp32", "bf16")}
    print(f"matrix products, 512 × 576 by 576 × 1536: {limit['fp32']:.0f} GFLOP/s fp32, {limit['bf16']:.0f} bf16")
    print(
        f"{'stage':6} {'arm':13} {'s':>6} {'tokens/s':>9} {'ratio':>6} {'peak GB':>8} {'of limit':>9} {'last loss':>10}"
    )
    for stage in stages or ARMS:
        found = {arm: run_arm(stage, arm, model) for arm in ARMS[stage]}
        peer = found["trl"]
        for arm, one in found.items():
            precision = "bf16" if one["bf16"] else "fp32"
            share = one["flop"] / one["seconds"] / 1e9 / limit[precision]
            print(
                f"{stage:6} {arm:13} {one['seconds']:6.1f} {one['tokens'] / one['seconds']:9.0f} "
                f"{peer['seconds'] / one['seconds']:5.2f}× {one['peak']:8.2f} {share:8.0%}  {one['loss']:10.4f}",
                flush=True,
            )


def run_arm(stage: str, arm: str, model: str) -> dict[str, Any]:
    """Run an arm in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        environment = {**os.environ, **ENGINE, "ASSAY_WORK": work}
        command = [sys.executable, __file__, "--arm", stage, arm, model]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{stage} {arm} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def matmul_limit(precision: str) -> float:
    """Return what the machine's matrix products reach, in GFLOP/s: the best of twenty runs of 1/20 s."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = torch.randn(512, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    best = 0.0
    for _ in range(20):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < 0.05:
            left @ right
            count += 1
        best = max(best, count * 2 * 512 * 576 * 1536 / (time.perf_counter() - start) / 1e9)
    return best


def arm_process(stage: str, arm: str, model: str) -> None:
    """Train one arm and print its numbers as JSON."""
    from assay.components.contracts import recipe
    from assay.components.contracts.rows import Example, Message, PreferencePair
    from assay.components.shared import training
    from assay.components.shared.tasks.task import get_task

    task = get_task("medication_directions")
    examples = []
    for place, row in enumerate(task.generate(ROWS[stage] + 1, 5)):
        turns = [Message(**turn) for turn in row["messages"]]
        examples.append(Example(id=f"{place:032x}", group=str(place), prompt=turns[:-1], reference=turns[-1].content))
    pairs = [
        PreferencePair(
            prompt_id=one.id,
            group=one.group,
            prompt=one.prompt,
            chosen=one.reference,
            rejected=other.reference,
            margin=1.0,
            source="reference>sampled",
        )
        for one, other in zip(examples, examples[1:], strict=False)
    ]
    kind: Any = {"sft": recipe.SFTSettings, "dpo": recipe.PreferenceSettings, "grpo": recipe.RLSettings}[stage]
    settings = kind(
        learning_rate=RATE[stage],
        batch_size=BATCH[stage],
        max_tokens=256,
        warmup_steps=2,
        save_steps=10_000,
        precision="fp32" if "fp32" in arm else "bf16",
        **(
            {
                "group_size": GROUP,
                "max_new_tokens": ANSWER,
                "max_steps": ROWS[stage] // BATCH[stage],
                "temperature": 1.0,
            }
            if stage == "grpo"
            else {}
        ),
        **({"nll_weight": 0.0} if stage == "dpo" else {}),
    )
    network, tokenizer = training.load_trainable(model, settings)
    _import_all()
    start = time.perf_counter()
    make = _ours if arm.startswith("assay") else _peer
    trainer, tokens = make(stage, arm, settings, network, tokenizer, examples[:-1], pairs, task)
    if arm.startswith("assay"):
        training.train(trainer, trainer.watcher)
    else:
        trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        json.dumps(
            {
                "seconds": seconds,
                "tokens": tokens,
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "loss": sum(losses[-2:]) / len(losses[-2:]),
                "bf16": bool(trainer.args.bf16),
                "flop": _flop(network, tokens, stage),
            }
        )
    )


def _import_all() -> None:
    """Import what either arm uses: two seconds that are of neither's work."""
    from trl import DPOTrainer, GRPOTrainer, SFTTrainer

    from assay.components.shared import rewards
    from assay.components.train_preference import preference
    from assay.components.train_rl import grpo
    from assay.components.train_sft import sft

    assert all((DPOTrainer, GRPOTrainer, SFTTrainer, rewards, preference, grpo, sft))


def _ours(
    stage: str, arm: str, settings: Any, network: Any, tokenizer: Any, examples: Any, pairs: Any, task: Any
) -> Any:
    from assay.components.shared.rewards import open_rewards
    from assay.components.train_preference import preference
    from assay.components.train_rl import grpo
    from assay.components.train_sft import sft

    rows: Any
    if stage == "sft":
        rows, _ = sft.tokenize(examples, tokenizer, settings.max_tokens)
        trainer, watcher = sft.make_trainer(network, tokenizer, rows, settings, 0)
    elif stage == "dpo":
        rows, _ = preference.tokenize(pairs, tokenizer, settings.max_tokens)
        trainer, watcher = preference.make_trainer(network, tokenizer, rows, settings, 0)
    else:
        rows, _ = grpo.prompts(examples, tokenizer, settings)
        score = open_rewards([], task)
        trainer, watcher = grpo.make_trainer(network, tokenizer, rows, score, settings, 0)
    trainer.watcher = watcher
    return trainer, _tokens(stage, examples, pairs, tokenizer)


def _peer(
    stage: str, arm: str, settings: Any, network: Any, tokenizer: Any, examples: Any, pairs: Any, task: Any
) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    from assay.components.shared.chat import completion_ids, prompt_ids
    from assay.components.shared.training import device

    assert device(settings) == "cpu"
    common: dict[str, Any] = {
        "output_dir": os.environ["ASSAY_WORK"],
        "learning_rate": settings.learning_rate,
        "num_train_epochs": 1,
        "per_device_train_batch_size": settings.batch_size,
        "warmup_steps": settings.warmup_steps,
        "lr_scheduler_type": "linear",
        "adam_beta2": 0.99,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
        "data_seed": 0,
        "dataloader_pin_memory": False,
    }
    tokens = _tokens(stage, examples, pairs, tokenizer)
    trainer: Any
    rows: list[dict[str, Any]] = []
    if stage == "sft":
        for one in examples:
            prompt, answer = prompt_ids(tokenizer, one.prompt), completion_ids(tokenizer, one.reference)
            mask, labels = [0] * len(prompt) + [1] * len(answer), [-100] * len(prompt) + answer
            more = {"labels": labels} if arm == "transformers" else {"completion_mask": mask}
            rows.append({"input_ids": prompt + answer, **more})
    if arm == "transformers":
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        trainer = Trainer(
            model=network,
            args=TrainingArguments(**common),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )
    elif stage == "sft":
        trainer = SFTTrainer(
            model=network,
            args=SFTConfig(**common, completion_only_loss=True),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    elif stage == "dpo":
        rows = [
            {
                "prompt": [turn.model_dump() for turn in one.prompt],
                "chosen": [{"role": "assistant", "content": one.chosen}],
                "rejected": [{"role": "assistant", "content": one.rejected}],
            }
            for one in pairs
        ]
        trainer = DPOTrainer(
            model=network, args=DPOConfig(**common), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    else:
        turns = [[turn.model_dump() for turn in one.prompt] for one in examples]
        rows = [{"prompt": prompt, "reference": one.reference} for prompt, one in zip(turns, examples, strict=True)]

        def reward(completions: Any, reference: list[str], **_: Any) -> list[float]:
            return [task.reward(turn[0]["content"], one) for turn, one in zip(completions, reference, strict=True)]

        common |= {
            "per_device_train_batch_size": settings.batch_size * GROUP,
            "num_generations": GROUP,
            "max_completion_length": ANSWER,
            "max_steps": settings.max_steps,
        }
        trainer = GRPOTrainer(
            model=network,
            reward_funcs=reward,
            args=GRPOConfig(**common),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    return trainer, tokens


def _tokens(stage: str, examples: Any, pairs: Any, tokenizer: Any) -> int:
    """Return the tokens of all sequences that are trained on, without padding."""
    from assay.components.shared.chat import completion_ids, prompt_ids

    if stage == "grpo":
        return sum(GROUP * (len(prompt_ids(tokenizer, one.prompt)) + ANSWER) for one in examples)
    if stage == "dpo":
        return sum(
            len(prompt_ids(tokenizer, one.prompt)) + len(completion_ids(tokenizer, answer))
            for one in pairs
            for answer in (one.chosen, one.rejected)
        )
    return sum(
        len(prompt_ids(tokenizer, one.prompt)) + len(completion_ids(tokenizer, one.reference)) for one in examples
    )


def _flop(network: Any, tokens: int, stage: str) -> float:
    """Return the work of the plain algorithm: 6 FLOP a weight and token, DPO's reference and GRPO's samples 2 more.

    Embeddings do not count; the head does, as if it scored every token. What an arm leaves out (prompts shared, tokens
    that are not scored) makes its share of the limit larger, as it should.
    """
    weights = sum(one.numel() for one in network.parameters())
    return float(weights * tokens * (6 if stage == "sft" else 8))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        arm_process(*sys.argv[2:])
    else:
        main()
