"""What the training steps share: arguments, checkpoints that survive a kill, the loss curve, the effect check.

The trainers are TRL's. A step keeps its checkpoints in the task's work folder, each sealed by the sha256 of its files;
a torn one is removed and the one before it used. Run again after a kill, a step goes on from there with the same order
of the data, the same random state and the same optimizer, and ends with the same bytes as if it had never stopped.
"""

import ctypes
import math
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..contracts.artifacts import Manifest, read_manifest, seal
from ..contracts.errors import DataError, TrainingError
from ..contracts.metrics import Summary
from ..contracts.recipe import TrainSettings
from ..runtime.context import Stopped, progress, work_folder
from .lean import round_embeddings, score_tokens, use_lean_layers
from .llama import is_supported
from .models import check_model, dither, load_model, load_tokenizer, multiplies_bf16, save_model, set_threads
from .packing import pack, run_packed, use_tree_attention

IGNORED = -100
"""Label of a token without loss (PyTorch's cross entropy)."""
CHECKPOINTS = 2
"""Complete checkpoints kept: the newest, and one before it should that one be damaged."""
MIN_WEIGHT_CHANGE = 1e-6
"""Relative L2 change of the saved weights below which nothing was learned; one bf16 step is 4e-3 of a weight."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Of glibc's `mallopt` (malloc.h)."""
TORCH_WRITER = "inline_container"
"""In what `torch.save` says when a file cannot be written; the error itself is a plain RuntimeError."""


def device(settings: TrainSettings) -> str:
    """Return `cuda` or `cpu`.

    Raises:
        TrainingError: The recipe asks for a GPU and there is none.
    """
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.device == "cuda" and found == "cpu":
        raise TrainingError("there is no GPU", where="device: cuda", fix="say device: auto, or use a GPU profile there")
    return found if settings.device == "auto" else settings.device


def arguments(settings: TrainSettings, seed: int, **more: Any) -> dict[str, Any]:
    """Return the keywords that every trainer's configuration takes.

    Args:
        settings: The stage's section of the recipe.
        seed: Of the data order and of whatever else is random.
        more: What the stage adds or replaces.
    """
    on_gpu = device(settings) == "cuda"
    return {
        "output_dir": str(work_folder() / "checkpoints"),
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": own_share(settings.batch_size, "batch_size"),
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "lr_scheduler_type": "linear",
        "adam_beta2": 0.99,  # runs of tens of steps: 0.999 would still be warming up at the end
        "bf16": multiplies_in_bf16(settings),
        "use_cpu": not on_gpu,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_liger_kernel": settings.fused_kernels,
        # The trainers score the head themselves: fused with its loss, it would hide the logits from them.
        "liger_kernel_config": {"fused_linear_cross_entropy": False} if settings.fused_kernels else None,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # the filter would hide what the effect check looks for
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
        "seed": seed,
        "data_seed": seed,
        **more,
    }


def multiplies_in_bf16(settings: TrainSettings) -> bool:
    """Return whether the matrix products are computed in bf16."""
    return settings.precision == "bf16" and multiplies_bf16()


def own_share(size: int, name: str) -> int:
    """Return this process's part of a batch: the batch stays what the recipe says, however many processes there are.

    Raises:
        TrainingError: The processes do not divide it.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if size % processes:
        raise TrainingError(
            f"{processes} processes cannot share {size} evenly",
            where=name,
            fix="make it a multiple of hosts · processes",
        )
    return size // processes


def load_trainable(folder: str | Path, settings: TrainSettings) -> tuple[Any, Any]:
    """Return model (fp32, in training mode) and tokenizer, with frozen what does not train.

    With `method: full` the embeddings stay as they are: a short run sees few of their rows, and they are a fifth of a
    small model's arithmetic.
    """
    set_threads()
    _check_packages(settings)
    if settings.method == "qlora":
        return _load_quantized(folder, settings), load_tokenizer(folder)
    model, tokenizer = load_model(folder, dtype="float32", attention=_attention(settings)), load_tokenizer(folder)
    model.train()
    if settings.method == "full":
        model.get_input_embeddings().weight.requires_grad_(False)
        layers = model.model.layers
        if settings.frozen_layers >= len(layers):
            raise TrainingError(
                f"the model has {len(layers)} layers, so nothing would train",
                where=f"frozen_layers: {settings.frozen_layers}",
                fix="lower it",
            )
        for layer in layers[: settings.frozen_layers]:
            layer.requires_grad_(False)
        if settings.stochastic_rounding and multiplies_in_bf16(settings):
            dither_matrices(model)
    return model, tokenizer


def dither_matrices(model: Any) -> None:
    """Dither what trains and what products round to bf16: the model computes what it did, and small steps show."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad and weight.ndim == 2:
            dither(weight, generator)


def _check_packages(settings: TrainSettings) -> None:
    """Refuse what needs a GPU where there is none, and what needs a package that is not installed."""
    asked = [
        (settings.method == "qlora", "method: qlora", "bitsandbytes", "pip install 'assay[gpu]'", "say method: lora"),
        (settings.fused_kernels, "fused_kernels: true", "liger_kernel", "pip install 'assay[gpu]'", "leave it out"),
        (settings.flash_attention, "flash_attention: true", "flash_attn", "pip install flash-attn", "leave it out"),
    ]
    for wanted, where, package, install, without in asked:
        if wanted and device(settings) == "cpu":
            raise TrainingError("this works on a GPU only", where=where, fix=f"{without}, or use a GPU")
        if wanted and find_spec(package) is None:
            raise TrainingError(f"{package} is not installed", where=where, fix=install)


def _attention(settings: TrainSettings) -> str | None:
    return "flash_attention_2" if settings.flash_attention else None


def _load_quantized(folder: str | Path, settings: TrainSettings) -> Any:
    """Return the model with weights of 4 bits (NF4, doubly quantized), computing in bf16."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        check_model(folder),
        quantization_config=four_bits(),
        attn_implementation=_attention(settings),
        device_map={"": int(os.environ.get("LOCAL_RANK", "0"))},
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.gradient_checkpointing)


def four_bits() -> Any:
    """Return transformers' configuration of QLoRA's weights (Dettmers et al. 2023, section 3)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def adapter(settings: TrainSettings) -> Any:
    """Return PEFT's configuration for `method: lora` and `qlora`, None for `full`."""
    if settings.method == "full":
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def check_labels(rows: Sequence[dict[str, list[int]]], prepared: Any) -> None:
    """Assert token by token that the loss is on what is to be learned alone.

    Args:
        rows: `input_ids`, and a `completion_mask` with 1 where there is a loss.
        prepared: The trainer's rows.

    Raises:
        TrainingError: The trainer prepared the rows otherwise (a changed TRL).
    """
    for row, made in zip(rows, prepared, strict=True):
        wanted = [
            token if kept else IGNORED for token, kept in zip(row["input_ids"], row["completion_mask"], strict=True)
        ]
        if made["labels"] != wanted:
            raise TrainingError(
                "TRL prepared the labels otherwise than on the tokens to be learned alone",
                fix="install the pinned trl (requirements.lock)",
            )


def answer_logits(trainer: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Return a model's next-token logits where there is a label, [labels, vocabulary].

    Args:
        trainer: Says where it trains; on a CPU `score_answers_only` has seen the model.
        model: The trainer's, as it is wrapped, or another on the same tokens.
        inputs: A padded batch with `labels`.
    """
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if trainer.args.use_cpu:
        made = model(**given, labels=inputs["labels"], use_cache=False, fused_lm_head=True, only_logits=True)
        return made.logits
    logits = model(**given, use_cache=False).logits[:, :-1]
    return logits[inputs["labels"][:, 1:] != IGNORED].float()


def score_answers_only(trainer: Any, temperature: float = 1.0, model: Any = None) -> None:
    """On a CPU, let the trainer's model compute each token once, and logits only where there is a label.

    TRL's fused head does the latter on a GPU; on a CPU it scores every position, prompt and padding too, and twice.
    Where the model is a plain Llama, sequences that begin alike are packed (`packing.py`). The numbers are the same.

    Args:
        trainer: One of TRL's that calls its model with `fused_lm_head=True`.
        temperature: That TRL's head was given.
        model: Another model than the trainer's.
    """
    if not trainer.args.use_cpu:
        return
    keep_freed_memory()  # before `train`: a reference may be scored first
    from transformers.modeling_outputs import CausalLMOutput
    from trl.trainer.utils import FusedCausalLMOutput

    model = trainer.model if model is None else model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = model.forward
    if is_supported(model):
        use_tree_attention(model)
        use_lean_layers(model)
        if trainer.args.bf16:
            round_embeddings(model)

    def forward(
        *positional: Any, fused_lm_head: bool = False, labels: Any = None, only_logits: bool = False, **named: Any
    ) -> Any:
        if not fused_lm_head:
            return before(*positional, **({"labels": labels} if labels is not None else {}), **named)
        head = model.get_output_embeddings()
        plain = type(head) is torch.nn.Linear and head.bias is None
        # TRL's head accounts for the balance of a mixture of experts, and takes a head of any kind.
        if named.get("output_router_logits") or not (plain or only_logits):
            return before(*positional, fused_lm_head=True, labels=labels, **named)
        wanted = labels[:, 1:]
        mask = wanted != IGNORED
        states, place = hidden_states(model, *positional, **{**named, "use_cache": False})
        asked, which = place[:, :-1][mask].unique(return_inverse=True)
        if only_logits:
            return CausalLMOutput(logits=head(states[asked]).float()[which] / temperature)
        scores = score_tokens(states[asked], head, which, wanted[mask], temperature)
        empty = scores.log_probs.new_zeros(mask.shape)
        return FusedCausalLMOutput(
            loss=-scores.log_probs.sum() / mask.sum().clamp(min=1),
            log_probs=empty.masked_scatter(mask, scores.log_probs),
            entropy=empty.masked_scatter(mask, scores.entropy),
            mean_logits=empty.masked_scatter(mask, scores.mean),
            is_top1=torch.zeros_like(mask).masked_scatter(mask, scores.likeliest),
            label_mask=mask,
        )

    model.forward = forward


def hidden_states(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states [places, size], and the place of each input token [sequences, length] among them."""
    if attention_mask is not None and is_supported(model):
        packed = pack(input_ids, attention_mask)
        return run_packed(model, packed, **named), packed.place
    hidden = model.base_model(input_ids, attention_mask=attention_mask, **named).last_hidden_state
    return hidden.flatten(0, 1), torch.arange(input_ids.numel()).view(input_ids.shape)


class Watcher(TrainerCallback):  # type: ignore[misc]
    """Reports progress, seals checkpoints, stops on SIGTERM at the end of a step and on numbers that are not finite."""

    def __init__(self, shown: Sequence[str], every: int = 1) -> None:
        """Watch a trainer.

        Args:
            shown: TRL's names of the numbers that go into the progress.
            every: Steps after which the run may stop and go on later as if it had not.
        """
        self.shown, self.every = shown, every
        self.stopping = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Pass a step's numbers on."""
        logs = more["logs"]
        if "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(float(logs.get(name, 0))):
                raise TrainingError(
                    f"{name} is {logs[name]} at step {state.global_step}: the training diverged",
                    fix="lower learning_rate, or look at the longest rows of the data",
                )
        values = {name.rpartition("/")[2]: float(logs[name]) for name in self.shown if name in logs}
        progress(state.global_step, state.max_steps, "steps", **values)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Save and stop, if the engine asked for it; do not save what is about to be finished."""
        if agreed(self.stopping) and state.global_step % self.every == 0:
            self.stopping = True
            control.should_save = control.should_training_stop = True
        elif state.global_step >= state.max_steps:
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Seal the checkpoint that was just written, then let the oldest go."""
        agreed(True)  # every process has written its part
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        seal(folder / f"checkpoint-{state.global_step}", "checkpoint")
        for old in _checkpoints(folder)[:-CHECKPOINTS]:
            shutil.rmtree(old)


def train(trainer: Any, watcher: Watcher) -> None:
    """Run a trainer from its newest good checkpoint to the end.

    Raises:
        Stopped: SIGTERM came; the state is saved.
        TrainingError: The disk is full; checkpoints written before are kept.
    """
    keep_freed_memory()
    folder = Path(trainer.args.output_dir)
    if os.environ.get("RANK", "0") == "0":
        newest_checkpoint(folder)  # removes what is damaged, before another process looks
    agreed(True)
    latest = newest_checkpoint(folder)
    with _sigterm_sets(watcher):
        try:
            trainer.train(resume_from_checkpoint=str(latest) if latest else None)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and TORCH_WRITER not in str(error):
                raise
            raise TrainingError(
                f"a checkpoint could not be written: {error}",
                where=str(folder),
                fix="make room and run the step again: it goes on from the checkpoint before",
            ) from error
    if watcher.stopping:
        raise Stopped


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, removing those that a kill or the disk has damaged."""
    for path in reversed(_checkpoints(folder)):
        try:
            read_manifest(path, "checkpoint")
        except DataError:
            shutil.rmtree(path)
        else:
            return path
    return None


def agreed(value: bool) -> bool:
    """Return whether it is true for any process; all wait for each other."""
    if not torch.distributed.is_initialized():
        return value
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    told = torch.tensor([value], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return bool(told.item())


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, up to 2 GB, instead of giving it back to the system.

    Each step frees the gradients and asks for as much again: every page would be zeroed anew, a tenth of SFT's time.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is not None:
        change(TRIM_THRESHOLD, 2**31 - 1)
        change(MMAP_THRESHOLD, 2**25)  # the most it takes


@contextmanager
def _sigterm_sets(watcher: Watcher) -> Iterator[None]:
    """Let SIGTERM end the training at the end of a step instead of in the middle of one."""

    def ask(number: int, frame: object) -> None:
        watcher.stopping = True

    try:
        before = signal.signal(signal.SIGTERM, ask)
    except ValueError:  # not the main thread: a test
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def curve(trainer: Any, names: dict[str, str]) -> list[dict[str, float]]:
    """Return the trainer's log, a point a step.

    Args:
        trainer: After training; its history goes through checkpoints.
        names: TRL's name of each number to its name in the summary.
    """
    return [
        {"step": entry["step"], **{ours: float(entry[theirs]) for theirs, ours in names.items() if theirs in entry}}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def save(
    trainer: Any,
    tokenizer: Any,
    settings: TrainSettings,
    folder: str | Path,
    base: Manifest,
    metadata: dict[str, Any],
) -> Manifest:
    """Write the trained model as a `model` artifact, adapters merged: what is evaluated is what is served."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model.config, "quantization_config", None):
        model = on_whole_weights(model)
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    save_model(merged, tokenizer, folder, dithered=must_dither(trainer, settings))
    kept = {key: value for key, value in base.metadata.items() if key in ("reference", "parameters", "chat_template")}
    return seal(folder, "model", parents={"base": base}, metadata={**kept, **metadata})


def must_dither(trainer: Any, settings: TrainSettings) -> bool:
    """Return whether the weights have to be dithered to be saved; where products rounded them, they are already."""
    return settings.stochastic_rounding and (not trainer.args.bf16 or hasattr(trainer.model, "peft_config"))


def on_whole_weights(tuned: Any) -> Any:
    """Return the adapters on the base's weights as they are on disk: merged into 4 bits they would be rounded away."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    base = load_model(tuned.get_base_model().config._name_or_path, dtype="float32")
    whole = get_peft_model(base, tuned.peft_config["default"])
    set_peft_model_state_dict(whole, {name: value.cpu() for name, value in get_peft_model_state_dict(tuned).items()})
    return whole


def weight_change(base: str | Path, tuned: str | Path, added: Sequence[str] = ()) -> float:
    """Return the relative L2 change of the weights as saved: ‖tuned − base‖ / ‖base‖, those `added` left out."""
    from safetensors import safe_open

    moved = size = 0.0
    before = {key: file for path in sorted(Path(base).glob("*.safetensors")) for key, file in _tensors(path)}
    for path in sorted(Path(tuned).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in sorted(set(file.keys()) - set(added)):
                with safe_open(before[key], framework="pt") as other:
                    old = other.get_tensor(key).double()
                moved += float((file.get_tensor(key).double() - old).square().sum())
                size += float(old.square().sum())
    return math.sqrt(moved / size)


def _tensors(path: Path) -> Iterator[tuple[str, Path]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            yield key, path


def check_effect(
    change: float, points: Sequence[dict[str, float]], checks: dict[str, tuple[bool, str]]
) -> dict[str, Any]:
    """Return the effect check of a step, or fail it: a step that taught nothing must not look like one that did.

    Args:
        change: Of the weights, relative.
        points: The curve.
        checks: The stage's own checks by name: whether it holds, and what to try if not.

    Raises:
        TrainingError: One does not hold.
    """
    every = {
        "finite": (all(math.isfinite(point["loss"]) for point in points), "lower learning_rate"),
        **checks,  # before the weights: they know the cause
        "weights_changed": (change > MIN_WEIGHT_CHANGE, "raise learning_rate or the number of steps"),
    }
    for name, (holds, fix) in every.items():
        if not holds:
            raise TrainingError(
                f"nothing was learned: the check {name!r} failed (weights changed by {change:.2g}, "
                f"{len(points)} steps, loss {points[0]['loss']:.4g} → {points[-1]['loss']:.4g})",
                fix=fix,
            )
    return {"weight_change": change, "ok": True, "checks": {name: holds for name, (holds, _) in every.items()}}


def loss_ends(points: Sequence[dict[str, float]]) -> tuple[float, float]:
    """Return the mean loss over the first and over the last tenth of the steps (at least one)."""
    count = max(1, len(points) // 10)
    losses = [point["loss"] for point in points]
    return sum(losses[:count]) / count, sum(losses[-count:]) / count


def ends(points: Sequence[dict[str, float]], name: str) -> tuple[float, float]:
    """Return the mean of a number over the first and over the last quarter of the steps."""
    values = [point[name] for point in points if name in point]
    count = max(1, len(values) // 4)
    return sum(values[:count]) / count, sum(values[-count:]) / count


def loss_fell(points: Sequence[dict[str, float]], fix: str) -> dict[str, tuple[bool, str]]:
    """Return the check that the loss fell, for `check_effect`.

    Args:
        points: The curve.
        fix: What to try beside a higher rate and more epochs.
    """
    first, last = loss_ends(points)
    return {"loss_fell": (last < first, f"raise learning_rate or epochs; {fix}")}


def summary(
    step: str,
    headline: str,
    points: Sequence[dict[str, float]],
    effect: dict[str, Any],
    *,
    examples: int,
    tokens: int,
    dropped: dict[str, int],
    metrics: dict[str, float] | None = None,
) -> Summary:
    """Return a training step's summary.

    Args:
        step: Its name.
        headline: One sentence.
        points: The curve.
        effect: Of `check_effect`.
        examples: That were trained on.
        tokens: Of these, prompt and answer.
        dropped: Examples left out, by reason.
        metrics: The stage's own scalars.
    """
    first, last = loss_ends(points)
    return Summary(
        step=step,
        headline=headline,
        metrics={
            "loss_first": first,
            "loss_last": last,
            "weight_change": effect["weight_change"],
            "steps": float(len(points)),
            "examples": float(examples),
            "tokens": float(tokens),
            **(metrics or {}),
        },
        details={"curve": list(points), "effect": effect, "examples": examples, "dropped": dropped},
    )
