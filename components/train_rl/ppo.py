"""Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347) as in Ouyang et al. 2022 (arXiv:2203.02155).

TRL no longer has it, so the loop is ours, on transformers' trainer. One step of the trainer is one round of PPO:
sample, score, then `ppo.epochs` passes of updates. The trainer's own update is the last of them, so a checkpoint always
stands between two rounds, and a run that is resumed samples what it would have sampled.

The value head is a small network on the policy's last hidden states, without a gradient back into them. A second trunk
would double the arithmetic and the memory of every step; a head that trains the shared trunk lets the value loss move
the policy (Cobbe et al. 2021, arXiv:2009.04416). This one costs next to nothing and cannot.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl.trainer.utils import disable_dropout_in_model

from ..contracts.artifacts import read_manifest, write_atomically
from ..contracts.errors import TrainingError
from ..contracts.recipe import RLSettings
from ..contracts.rows import Example, Message, read_rows
from ..shared import training
from ..shared.chat import prompt_ids
from ..shared.generate import Generator
from ..shared.llama import is_supported
from ..shared.models import load_model
from ..shared.packing import use_tree_attention
from ..shared.rewards import open_rewards
from ..shared.summary import write_summary
from ..shared.tasks.task import Task, get_task
from .grpo import prompts
from .ppo_terms import (
    advantages_and_returns,
    kl_terms,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from .scores import Answered, Judged, Verified

NAMES = {
    name: name
    for name in (
        "loss",
        "learning_rate",
        "reward",
        "reward_std",
        "verified",
        "kl",
        "kl_coefficient",
        "policy_loss",
        "value_loss",
        "clipped_share",
        "entropy",
        "answer_tokens",
        "samples",
    )
}
VALUE_HEAD, CONTROLLER = "value_head.safetensors", "kl_controller.json"
CONTROL_GAIN, CONTROL_ERROR = 0.1, 0.2
"""Of the KL controller (Ziegler et al. 2019, arXiv:1909.08593, §2.2): gain, and the largest relative error it sees."""


class ValueHead(nn.Module):  # type: ignore[misc]
    """Expected return from a hidden state.

    Args:
        size: Of the hidden state.
        seed: Of the first layer; the last begins at 0, so every value does.
    """

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, elementwise_affine=False)
        self.inner, self.outer = nn.Linear(size, size), nn.Linear(size, 1)
        drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
        self.inner.weight.data.copy_(drawn / size**0.5)
        for zero in (self.inner.bias, self.outer.weight, self.outer.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the values [tokens] of hidden states [tokens, size]."""
        return self.outer(torch.tanh(self.inner(self.norm(hidden))))[:, 0]


@dataclass(frozen=True)
class Rollout:
    """Samples with all that an update needs; [sequences, tokens] over the answers but for the first two."""

    ids: Tensor
    """[sequences, length]: prompt and answer, padded on the right."""
    lengths: Tensor
    """[sequences, 2]: tokens of the prompt and of the answer."""
    logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def take(self, rows: Tensor) -> "Rollout":
        """Return some of the sequences."""
        return Rollout(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class PPOTrainer(Trainer):  # type: ignore[misc]
    """transformers' trainer, each of whose steps is a round of PPO.

    Args:
        settings: The stage's.
        reference: The frozen start model; None where it is the model without its adapters.
        reward: Scores samples.
        verify: Scores them too, for the curve only; None to leave it out.
        more: As for `Trainer`.
    """

    def __init__(
        self,
        settings: RLSettings,
        reference: Any,
        reward: Callable[[Sequence[Answered]], list[float]],
        verify: Callable[[Sequence[Answered]], list[float]] | None,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.settings, self.reference, self.reward, self.verify = settings, reference, reward, verify
        self.plain = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.head = ValueHead(self.plain.config.hidden_size, self.args.seed).to(self.args.device)
        self.coefficient = settings.ppo.kl_coefficient
        self.sampler = Generator(self.model, self.processing_class)
        self.numbers: dict[str, float] = {}
        for one in (self.plain, reference):
            if one is not None and is_supported(one):
                use_tree_attention(one)

    def create_optimizer(self, model: Any = None) -> Any:
        """Let the optimizer train the value head too."""
        known = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not known:
            rate = self.settings.ppo.value_learning_rate
            optimizer.add_param_group({"params": list(self.head.parameters()), "lr": rate, "weight_decay": 0.0})
        return optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Sample, and update but for the last time: that update is the trainer's own, with what is left as gradient."""
        model.train()
        rollout = self.roll_out(inputs["rows"])
        batches = list(self._minibatches(len(rollout.ids)))
        told: dict[str, float] = {}
        for place, rows in enumerate(batches):
            loss, numbers = self.loss(rollout.take(rows))
            self.accelerator.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.args.max_grad_norm)
            for name, value in numbers.items():
                told[name] = told.get(name, 0.0) + value / len(batches)
            if place < len(batches) - 1:
                self._clip_grad_norm(model)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.numbers |= told
        return torch.tensor(told["policy_loss"] + told["value_loss"], device=self.args.device)

    @torch.no_grad()
    def roll_out(self, rows: list[dict[str, Any]]) -> Rollout:
        """Answer prompts, score the answers, and estimate each token's advantage.

        Args:
            rows: With `ids` of the prompt and `reference`.
        """
        settings, step = self.settings, self.state.global_step
        self.head.zero_grad()  # the trainer clears the policy's gradient after its update, not the head's
        self.sampler.sync()
        groups = self.sampler.generate(
            [row["ids"] for row in rows],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            samples=settings.group_size,
            seed=self.args.seed * 1_000_003 + step,
        )
        samples = [
            Answered(row["ids"], row["reference"], answer, row["question"])
            for row, group in zip(rows, groups, strict=True)
            for answer in group
        ]
        scores = torch.tensor(self.reward(samples), dtype=torch.float32, device=self.args.device)
        ids, lengths = self._pad(samples)
        parts = [self._read_both(ids[some], lengths[some]) for some in self._chunks(len(ids))]
        logps, reference, values, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        mask = self._mask(lengths)
        ratio = (logps - reference) * mask
        kl = kl_terms(ratio, settings.ppo.kl_estimator)
        rewards = token_rewards(scores, kl, mask, self.coefficient)
        advantages, returns = advantages_and_returns(rewards, values, mask, settings.ppo.gamma, settings.ppo.gae_lambda)
        nats = float(masked_mean(kl_terms(ratio, "k3"), mask))
        self.numbers = {
            "reward": float(scores.mean()),
            "reward_std": float(scores.std(correction=0)),
            "kl": nats,
            "kl_coefficient": self.coefficient,
            "entropy": float(masked_mean(entropy, mask)),
            "answer_tokens": float(lengths[:, 1].float().mean()),
            "samples": float(len(samples)),
        }
        if self.verify:
            self.numbers["verified"] = sum(self.verify(samples)) / len(samples)
        self._control(nats)
        return Rollout(
            ids, lengths, logps, values, whiten(advantages, mask) if settings.ppo.whiten else advantages, returns
        )

    def loss(self, batch: Rollout) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of an update, and what to tell of it."""
        settings, mask = self.settings, self._mask(batch.lengths)
        logps, values, _ = self._read(self.plain, batch.ids, batch.lengths)
        policy, clipped = policy_loss(
            logps, batch.logps, batch.advantages, mask, settings.epsilon, settings.epsilon_high
        )
        value = value_loss(values, batch.values, batch.returns, mask, settings.ppo.value_clip)
        numbers = {
            "policy_loss": policy.item(),
            "value_loss": value.item(),
            "clipped_share": clipped.item(),
        }
        return policy + value, numbers  # they share no weight, so neither needs a coefficient

    def _read(self, model: Any, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities, values and entropies of the answers' tokens, each [sequences, tokens]; 0 elsewhere.

        Args:
            model: The policy or the reference.
            ids: [sequences, length].
            lengths: As in `Rollout`.
        """
        places = torch.arange(ids.shape[1], device=ids.device)
        answered = (places >= lengths[:, :1]) & (places < lengths.sum(-1, keepdim=True))
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.args.bf16):
            seen = (places < lengths.sum(-1, keepdim=True)).long()
            states, place = training.hidden_states(model, ids, attention_mask=seen, use_cache=False)
            # What comes before a token tells its probability and its value.
            asked, which = place.to(ids.device)[:, :-1][answered[:, 1:]].unique(return_inverse=True)
            logits = model.get_output_embeddings()(states[asked])
        every = (logits.float() / self.settings.temperature).log_softmax(-1)
        mask = self._mask(lengths)
        empty = every.new_zeros(mask.shape)
        with torch.no_grad():
            entropy = -(every.exp() * every).sum(-1)[which]
        return (
            empty.masked_scatter(mask, every[which, ids[answered]]),
            empty.masked_scatter(mask, self.head(states[asked].detach().float())[which]),
            empty.masked_scatter(mask, entropy),
        )

    def _read_both(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `_read` tells of the policy, with the reference's log-probabilities in the second place."""
        logps, values, entropy = self._read(self.plain, ids, lengths)
        with nullcontext() if self.reference is not None else self.model.disable_adapter():
            reference, _, _ = self._read(self.reference or self.plain, ids, lengths)
        return logps, reference, values, entropy

    def _pad(self, samples: Sequence[Answered]) -> tuple[Tensor, Tensor]:
        rows = [one.prompt + one.answer.ids for one in samples]
        width, pad = max(map(len, rows)), self.processing_class.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.args.device)
        lengths = [[len(one.prompt), len(one.answer.ids)] for one in samples]
        return ids, torch.tensor(lengths, device=self.args.device)

    def _mask(self, lengths: Tensor) -> Tensor:
        """Return [sequences, max_new_tokens]: true on an answer's tokens."""
        return torch.arange(self.settings.max_new_tokens, device=lengths.device) < lengths[:, 1:]

    def _chunks(self, count: int) -> Iterator[slice]:
        size = self.settings.ppo.minibatch_size
        return (slice(start, start + size) for start in range(0, count, size))

    def _minibatches(self, count: int) -> Iterator[Tensor]:
        """Yield the rows of each update. The order is the seed's and the step's, so a resumed run repeats it."""
        draw = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        for _ in range(self.settings.ppo.epochs):
            order = torch.randperm(count, generator=draw)
            yield from (order[some].sort().values for some in self._chunks(count))

    def _control(self, nats: float) -> None:
        """Raise the KL's coefficient where it is above its target, and lower it below."""
        target = self.settings.ppo.kl_target
        if target:
            error = min(max(nats / target - 1, -CONTROL_ERROR), CONTROL_ERROR)
            self.coefficient *= 1 + CONTROL_GAIN * error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the round's numbers to the trainer's."""
        super().log({**logs, **self.numbers} if "loss" in logs else logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the trainer would count the tokens of its inputs, and these are prompts."""
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        save_file({name: value.contiguous() for name, value in self.head.state_dict().items()}, folder / VALUE_HEAD)
        write_atomically(folder / CONTROLLER, json.dumps({"coefficient": self.coefficient}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        self.head.load_state_dict(load_file(folder / VALUE_HEAD))
        self.coefficient = float(json.loads((folder / CONTROLLER).read_bytes())["coefficient"])


def tune(
    settings: RLSettings,
    task: str,
    seed: int,
    base: str,
    data: str,
    output: str,
    summary: Any,
    reward: str | None = None,
) -> None:
    """Train, save the policy, check that it had an effect and stayed near its start, and tell."""
    started = time.monotonic()
    parents = {"base": read_manifest(base, "model"), "data": read_manifest(data, "splits")}
    if reward:
        parents["reward"] = read_manifest(reward, "reward_model")
    model, tokenizer = training.load_trainable(base, settings)
    rows, dropped = prompts(read_rows(Path(data) / "rl.parquet", Example), tokenizer, settings)
    trainer, watcher = make_trainer(model, tokenizer, rows, get_task(task), settings, seed, base, reward)
    training.train(trainer, watcher)
    training.save(trainer, tokenizer, settings, output, parents["base"], {"stage": "rl", "task": task})
    points = training.curve(trainer, NAMES)
    nats, limit = training.ends(points, "kl")[1], settings.ppo.max_kl
    effect = training.check_effect(
        training.weight_change(base, output),
        points,
        {
            "rewards_differ": (
                any(point["reward_std"] > 0 for point in points),
                "all samples of each step had equal rewards: raise temperature or group_size, or take harder (or "
                "easier) prompts",
            ),
            "kl_bounded": (
                nats <= limit,
                f"the policy is {nats:.2g} nats per token from its start, more than ppo.max_kl ({limit:g}): raise "
                "ppo.kl_coefficient or set ppo.kl_target, or lower learning_rate, ppo.epochs or max_steps",
            ),
        },
    )
    first, last = training.ends(points, "reward")
    told = training.summary(
        "train_rl",
        f"PPO, {len(points)} rounds: {'reward model on' if reward else 'reward of'} the samples {first:.3f} → "
        f"{last:.3f}, {nats:.2g} nats per token from the start",
        points,
        effect,
        examples=len(rows),
        tokens=int(sum(point["answer_tokens"] * point["samples"] for point in points)),
        dropped=dropped,
        metrics={"reward_first": first, "reward_last": last, "kl_last": nats, **_verified(points)},
    )
    write_summary(summary, told, seconds=time.monotonic() - started, parents=parents)


def make_trainer(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    task: Task,
    settings: RLSettings,
    seed: int,
    base: str | Path,
    reward: str | None = None,
) -> tuple[PPOTrainer, training.Watcher]:
    """Return the trainer on prompts and the watcher on it.

    Raises:
        TrainingError: Several processes train together.
    """
    watcher = training.Watcher(["loss", "reward", "kl"])
    adapter, where = training.adapter(settings), training.device(settings)
    disable_dropout_in_model(model)  # a ratio of probabilities must not depend on which weights were dropped
    if adapter:
        from peft import get_peft_model

        model = get_peft_model(model, adapter)
    arguments = TrainingArguments(**training.arguments(settings, seed), remove_unused_columns=False)
    if arguments.world_size > 1:
        raise TrainingError("PPO trains in one process", where="rl.algorithm", fix="give the step one GPU, or say grpo")
    verified = Verified(open_rewards(settings.rewards, task))
    trainer = PPOTrainer(
        settings,
        None if adapter else load_model(base, device=where).requires_grad_(False),
        Judged(reward, tokenizer, settings.ppo.unfinished_penalty, where) if reward else verified,
        verified if reward else None,
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([_row(tokenizer, row) for row in rows]),
        data_collator=_collect,
        processing_class=tokenizer,
        callbacks=[watcher],
    )
    return trainer, watcher


def _row(tokenizer: Any, row: dict[str, Any]) -> dict[str, Any]:
    turns = [Message(**turn) for turn in row["prompt"]]
    return {"ids": prompt_ids(tokenizer, turns), "reference": row["reference"], "question": turns[-1].content}


def _collect(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rows": rows}


def _verified(points: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return what the verifier says of the samples that a reward model judged, first and last."""
    if "verified" not in points[0]:
        return {}
    first, last = training.ends(points, "verified")
    return {"verified_first": first, "verified_last": last}
