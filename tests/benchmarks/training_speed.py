"""Training on a CPU, beside plain TRL and plain transformers: tokens a second, peak memory, the ratio.

    python tests/benchmarks/training_speed.py MODEL [sft] [dpo] [grpo] [--rows N] [--seeds N]

MODEL is a folder of a `model` artifact (the demo's base model: `.assay/cache/models/…` after `make demo`). Each arm is
a process of its own, one after the other, in the environment that the engine gives a task, on the same rows in the same
order with the same optimizer and the same weights frozen. The peers run as their defaults have it, but for what a CPU
refuses and for what the work is (rates, sizes, steps). TRL's default is bf16, which it refuses on a CPU unless it is
told to use one: `trl` is in fp32, `trl bf16` under torch's autocast. Seconds are those of making the trainer and of
training, so that DPO's reference is in them; imports and the loading of the model are not.

`assay` rounds weights for products in bf16 to nearest in SFT, and by chance in the others, as its recipes do by
default; `assay dithered` is SFT with `stochastic_rounding`.

GRPO draws its own samples, so its arms do equal work (steps, prompts, samples, token limit) and not equal steps.

What SFT learned is measured as well: the held-out loss, in nats a token of the answers to other rows, of the weights
as the arm saves them (Assay in bf16, the peers in fp32), computed in fp32 by transformers' own code. With `--seeds`,
rows and order are drawn anew for each; the table has the means, and of the held-out loss the mean difference from
TRL's, seed by seed, with its 95 % t-interval.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ARMS = {
    "sft": ("assay", "assay dithered", "assay fp32", "trl", "trl bf16", "transformers"),
    "dpo": ("assay", "assay fp32", "trl", "trl bf16"),
    "grpo": ("assay", "assay fp32", "trl", "trl bf16"),
}
ROWS, BATCH = {"sft": 64, "dpo": 32, "grpo": 16}, {"sft": 4, "dpo": 8, "grpo": 8}
"""Rows (pairs, prompts) in all, and of a step; one epoch."""
HELD_OUT = 128
"""Rows that measure what SFT learned."""
GROUP, ANSWER = 4, 48
RATE = {"sft": 3e-4, "dpo": 5e-5, "grpo": 5e-5}
ENGINE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}


def main() -> None:
    """Run every arm and print the table."""
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("model")
    asked.add_argument("stages", nargs="*", choices=list(ARMS), default=list(ARMS))
    asked.add_argument("--rows", type=int, default=0, help="rows of each stage instead of its own")
    asked.add_argument("--seeds", type=int, default=1, help="trainings of each arm")
    given = asked.parse_args()
    limit = {precision: matmul_limit(precision) for precision in ("fp32", "bf16")}
    print(f"matrix products, 512 × 576 by 576 × 1536: {limit['fp32']:.0f} GFLOP/s fp32, {limit['bf16']:.0f} bf16")
    print(
        f"{'stage':6} {'arm':14} {'s':>6} {'tokens/s':>9} {'ratio':>6} {'peak GB':>8} {'of limit':>9} "
        f"{'last loss':>10} {'held out':>9}  less than TRL's"
    )
    for stage in given.stages:
        rows = given.rows or ROWS[stage]
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS[stage]}
        for seed in range(given.seeds):
            for arm, runs in found.items():
                runs.append(run_arm(stage, arm, given.model, rows, seed))
        peers = found["trl"]
        for arm, runs in found.items():
            mean = {name: statistics.fmean(one[name] for one in runs) for name in runs[0]}
            precision = "bf16" if mean["bf16"] else "fp32"
            share = mean["flop"] / mean["seconds"] / 1e9 / limit[precision]
            ratio = statistics.fmean(one["seconds"] for one in peers) / mean["seconds"]
            learned = f"{mean['held_out']:9.4f}  {_difference(peers, runs)}" if "held_out" in mean else ""
            print(
                f"{stage:6} {arm:14} {mean['seconds']:6.1f} {mean['tokens'] / mean['seconds']:9.0f} {ratio:5.2f}× "
                f"{mean['peak']:8.2f} {share:8.0%}  {mean['loss']:10.4f} {learned}",
                flush=True,
            )


def _difference(peers: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """Return by how much the held-out loss is less than TRL's, with its interval where there are seeds."""
    from scipy.stats import t

    gains = [peer["held_out"] - one["held_out"] for peer, one in zip(peers, runs, strict=True)]
    mean = statistics.fmean(gains)
    if len(gains) < 2:
        return f"{mean:+.4f}"
    half = t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / len(gains) ** 0.5
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


def run_arm(stage: str, arm: str, model: str, rows: int, seed: int) -> dict[str, Any]:
    """Run an arm in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        environment = {**os.environ, **ENGINE, "ASSAY_WORK": work}
        command = [sys.executable, __file__, "--arm", stage, arm, model, str(rows), str(seed)]
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


def _examples(count: int, seed: int) -> list[Any]:
    """Return as many medication directions."""
    from assay.components.contracts.rows import Example, Message
    from assay.components.shared.tasks.task import get_task

    examples = []
    for place, row in enumerate(get_task("medication_directions").generate(count, seed)):
        turns = [Message(**turn) for turn in row["messages"]]
        examples.append(Example(id=f"{place:032x}", group=str(place), prompt=turns[:-1], reference=turns[-1].content))
    return examples


def arm_process(stage: str, arm: str, model: str, rows: int, seed: int) -> None:
    """Train one arm and print its numbers as JSON."""
    from assay.components.contracts import recipe
    from assay.components.contracts.rows import PreferencePair
    from assay.components.shared import training
    from assay.components.shared.tasks.task import get_task

    task = get_task("medication_directions")
    examples = _examples(rows + 1, 5 + seed)
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
                "max_steps": rows // BATCH[stage],
                "temperature": 1.0,
            }
            if stage == "grpo"
            else {}
        ),
        **({"nll_weight": 0.0} if stage == "dpo" else {}),
        **({"stochastic_rounding": True} if arm == "assay dithered" else {}),
    )
    network, tokenizer = training.load_trainable(model, settings)
    _import_all()
    start = time.perf_counter()
    make = _ours if arm.startswith("assay") else _peer
    trainer, tokens = make(stage, arm, settings, network, tokenizer, examples[:-1], pairs, task, seed)
    if arm.startswith("assay"):
        training.train(trainer, trainer.watcher)
    else:
        trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {
        "seconds": seconds,
        "tokens": tokens,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "loss": sum(losses[-2:]) / len(losses[-2:]),
        "bf16": bool(trainer.args.bf16),
        "flop": _flop(network, tokens, stage),
    }
    if stage == "sft":
        found["held_out"] = _held_out_loss(network, model, tokenizer, rounded=make is _ours)
    print(json.dumps(found))


def _held_out_loss(network: Any, model: str, tokenizer: Any, rounded: bool) -> float:
    """Return the mean loss in nats of an answer's token, of the weights alone, in plain transformers and fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    from assay.components.shared.chat import completion_ids, prompt_ids

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        for weight, trained in zip(plain.parameters(), network.parameters(), strict=True):
            weight.copy_(trained.to(torch.bfloat16) if rounded else trained)
        total, count = 0.0, 0
        for one in _examples(HELD_OUT, 1000):
            prompt, answer = prompt_ids(tokenizer, one.prompt), completion_ids(tokenizer, one.reference)
            logits = plain(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
            count += len(answer)
    return total / count


def _import_all() -> None:
    """Import what either arm uses: two seconds that are of neither's work."""
    from trl import DPOTrainer, GRPOTrainer, SFTTrainer

    from assay.components.shared import rewards
    from assay.components.train_preference import preference
    from assay.components.train_rl import grpo
    from assay.components.train_sft import sft

    assert all((DPOTrainer, GRPOTrainer, SFTTrainer, rewards, preference, grpo, sft))


def _ours(
    stage: str, arm: str, settings: Any, network: Any, tokenizer: Any, examples: Any, pairs: Any, task: Any, seed: int
) -> Any:
    from assay.components.shared.rewards import open_rewards
    from assay.components.train_preference import preference
    from assay.components.train_rl import grpo
    from assay.components.train_sft import sft

    rows: Any
    if stage == "sft":
        rows, _ = sft.tokenize(examples, tokenizer, settings.max_tokens)
        trainer, watcher = sft.make_trainer(network, tokenizer, rows, settings, seed)
    elif stage == "dpo":
        rows, _ = preference.tokenize(pairs, tokenizer, settings.max_tokens)
        trainer, watcher = preference.make_trainer(network, tokenizer, rows, settings, seed)
    else:
        rows, _ = grpo.prompts(examples, tokenizer, settings)
        score = open_rewards([], task)
        trainer, watcher = grpo.make_trainer(network, tokenizer, rows, score, settings, seed)
    trainer.watcher = watcher
    return trainer, _tokens(stage, examples, pairs, tokenizer)


def _peer(
    stage: str, arm: str, settings: Any, network: Any, tokenizer: Any, examples: Any, pairs: Any, task: Any, seed: int
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
        "bf16": arm == "trl bf16",
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": seed,
        "data_seed": seed,
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
        arm_process(*sys.argv[2:5], rows=int(sys.argv[5]), seed=int(sys.argv[6]))
    else:
        main()
