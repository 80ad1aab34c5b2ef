"""What the training steps share: arguments, the head, and above all that a killed run ends as if it never was."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

import train_step
from train_step import SETTINGS, STAGES, TECHNIQUES

from assay.components.contracts.artifacts import Manifest, read_manifest, seal
from assay.components.contracts.errors import TrainingError
from assay.components.contracts.recipe import RLSettings, SFTSettings, TrainSettings
from assay.components.runtime.context import RESUME_EXIT
from assay.components.shared import training
from assay.components.shared.models import load_model, save_model
from assay.components.shared.summary import read_summary
from assay.components.train_rl import grpo, ppo

ONE_CORE = {"ASSAY_CPUS": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(autouse=True)
def _letters(task: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (grpo, ppo):
        monkeypatch.setattr(module, "get_task", lambda name: train_step.Letters())


class Lab:
    """Runs stages on the tiny model, and keeps what a run without interruption gives."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.data = {stage: train_step.data_for(stage, folder / f"{stage}-data") for stage in STAGES}
        # Before two runs ask for it at once, or one whose base is poisoned.
        train_step.make_teacher(base, Path(f"{self.data['distill']}-teacher"))
        self.done: dict[str, Path] = {}

    def uninterrupted(self, technique: str, patch: pytest.MonkeyPatch) -> Path:
        """Return the folder of a run that nothing stopped: `model`, `summary`, `work`."""
        if technique not in self.done:
            folder = self.folder / technique
            with patch.context() as context:
                context.setenv("ASSAY_WORK", str(folder / "work"))
                self.run(technique, folder)
            self.done[technique] = folder
        return self.done[technique]

    def job(self, technique: str, output: Path) -> dict[str, Any]:
        stage, more = TECHNIQUES[technique]
        return {
            "stage": stage,
            "settings": SETTINGS[stage] | more,
            "base": str(self.base),
            "data": str(self.data[stage]),
            "output": str(output),
        }

    def run(self, technique: str, output: Path, **settings: Any) -> None:
        job = self.job(technique, output)
        train_step.run(**{**job, "settings": {**job["settings"], **settings}})


@pytest.fixture(scope="module")
def lab(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tiny_model, tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A process that forks a process for each job it is given."""
    with (tmp_path_factory.mktemp("driver") / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, train_step.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **ONE_CORE},
            text=True,
        )
        yield process
        process.communicate()


def wait_for_steps(fifo: Path, count: int) -> None:
    """Read progress lines until there are `count`.

    The file is a named pipe: a step that reports when nobody reads waits, so a busy machine cannot outrun the test.
    """
    seen = 0
    while seen < count:
        seen += sum(1 for _ in fifo.open())


def outcome(folder: Path) -> tuple[Manifest, Manifest]:
    """Return what must be the same, bit for bit, whatever happened on the way."""
    return read_manifest(folder / "model", "model", "reward_model"), read_manifest(folder / "summary", "summary")


def checkpoints(work: Path) -> list[str]:
    return sorted(path.name for path in (work / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_killed_run_ends_with_the_same_bytes(
    technique: str, lab: Lab, driver: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "progress"
    os.mkfifo(fifo)
    job = {**lab.job(technique, tmp_path), "work": str(tmp_path / "work"), "progress": str(fifo)}
    assert driver.stdin
    assert driver.stdout
    driver.stdin.write(json.dumps(job) + "\n")
    driver.stdin.flush()
    try:
        wanted = outcome(lab.uninterrupted(technique, monkeypatch))
    finally:
        pid = int(driver.stdout.readline())
        if sys.exc_info()[0]:  # the same job in the driver failed, or waits for a reader
            os.kill(pid, signal.SIGKILL)
            driver.stdout.readline()
    wait_for_steps(fifo, 5)
    os.kill(pid, signal.SIGKILL)
    assert int(driver.stdout.readline()) == -signal.SIGKILL
    assert checkpoints(tmp_path / "work")
    lab.run(technique, tmp_path)
    assert outcome(tmp_path) == wanted


def ranks(count: int, job: dict[str, Any], work: Path, die_at: int = 0) -> int:
    """Run a stage in several processes over gloo, and return torchrun's exit code."""
    program = str(Path(train_step.__file__).with_name("train_ranks.py"))
    port = str(29_500 + os.getpid() % 1000)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_port", port]
    environment = {**os.environ, **ONE_CORE, "ASSAY_WORK": str(work)}
    done = subprocess.run(
        [*command, program, json.dumps({**job, "die_at": die_at})], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 or die_at, done.stderr[-3000:]
    return done.returncode


def test_two_processes_one_and_two_again_are_one_training(lab: Lab, tmp_path: Path) -> None:
    """World size 2 → 1 → 2, killed between: the batch stays the recipe's, so the losses are those of one process."""
    job = {**lab.job("sft", tmp_path / "out"), "seed": 1}
    job["settings"] = {**job["settings"], "batch_size": 4, "max_steps": 9, "precision": "fp32"}
    work = tmp_path / "ranks"
    assert ranks(2, job, work, die_at=4) != 0
    assert checkpoints(work) == ["checkpoint-3"]
    assert ranks(1, job, work, die_at=7) != 0
    assert checkpoints(work) == ["checkpoint-3", "checkpoint-6"]
    assert ranks(2, job, work) == 0
    alone = {**job, "output": str(tmp_path / "alone")}
    train_step.run(**alone)
    found, wanted = (
        [point["loss"] for point in read_summary(folder / "summary").details["curve"]]
        for folder in (tmp_path / "out", tmp_path / "alone")
    )
    assert len(found) == 9
    assert found == pytest.approx(wanted, rel=2e-4)
    ours, its = (load_model(folder / "model").state_dict() for folder in (tmp_path / "out", tmp_path / "alone"))
    for name, value in its.items():
        torch.testing.assert_close(ours[name], value, atol=2e-3, rtol=0, msg=name)


def test_processes_that_cannot_share_a_batch_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(TrainingError, match="3 processes cannot share 4 evenly"):
        training.arguments(TrainSettings(batch_size=4), seed=0)


def test_a_round_of_ppo_is_not_cut_by_sigterm(
    lab: Lab, driver: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "progress"
    os.mkfifo(fifo)
    job = {**lab.job("ppo", tmp_path), "work": str(tmp_path / "work"), "progress": str(fifo)}
    assert driver.stdin
    assert driver.stdout
    driver.stdin.write(json.dumps(job) + "\n")
    driver.stdin.flush()
    wanted = outcome(lab.uninterrupted("ppo", monkeypatch))
    pid = int(driver.stdout.readline())
    wait_for_steps(fifo, 4)
    os.kill(pid, signal.SIGTERM)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # let it report what it still does
    assert int(driver.stdout.readline()) > 0  # `Stopped` left the job; it was not the signal that ended it
    os.close(reader)
    newest = training.newest_checkpoint(tmp_path / "work" / "checkpoints")
    assert newest
    assert newest.name in ("checkpoint-4", "checkpoint-5", "checkpoint-6")
    lab.run("ppo", tmp_path)
    assert outcome(tmp_path) == wanted


def executor_input(lab: Lab, folder: Path) -> str:
    def artifact(name: str, kind: str, uri: Path) -> dict[str, Any]:
        schema = {"schemaTitle": f"system.{kind}", "schemaVersion": "0.0.1"}
        return {name: {"artifacts": [{"name": name, "type": schema, "uri": str(uri), "metadata": {}}]}}

    values = {"settings": SETTINGS["sft"], "task": "medication_directions", "seed": 1}
    return json.dumps(
        {
            "inputs": {
                "parameterValues": values,
                "artifacts": {**artifact("base", "Model", lab.base), **artifact("data", "Dataset", lab.data["sft"])},
            },
            "outputs": {
                "artifacts": {
                    **artifact("model", "Model", folder / "model"),
                    **artifact("summary", "Metrics", folder / "summary"),
                },
                "outputFile": str(folder / "executor_output.json"),
            },
        }
    )


def test_sigterm_saves_and_the_run_goes_on(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "progress"
    os.mkfifo(fifo)
    component = "assay.components.train_sft.component:train_sft"
    command = ["--component", component, "--executor_input", executor_input(lab, tmp_path)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "assay.components.runtime", *command],
            env={**os.environ, **ONE_CORE, "ASSAY_PROGRESS": str(fifo)},
            stdout=log,
            stderr=log,
        )
    wait_for_steps(fifo, 4)
    process.send_signal(signal.SIGTERM)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # let it report what it still does
    assert process.wait(120) == RESUME_EXIT, (tmp_path / "log").read_text()
    os.close(reader)
    assert not (tmp_path / "model").exists()
    newest = training.newest_checkpoint(tmp_path / "work" / "checkpoints")
    assert newest
    assert newest.name in ("checkpoint-4", "checkpoint-5", "checkpoint-6")  # the step it was in, not the last regular
    lab.run("sft", tmp_path)
    assert outcome(tmp_path) == outcome(lab.uninterrupted("sft", monkeypatch))


def test_a_torn_checkpoint_is_removed_and_the_one_before_used(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = lab.uninterrupted("sft", monkeypatch)
    shutil.copytree(before / "work", tmp_path / "work")
    assert checkpoints(tmp_path / "work") == ["checkpoint-3", "checkpoint-6"]
    weights = tmp_path / "work" / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    os.truncate(weights, weights.stat().st_size // 2)
    newest = training.newest_checkpoint(tmp_path / "work" / "checkpoints")
    assert newest
    assert newest.name == "checkpoint-3"
    assert checkpoints(tmp_path / "work") == ["checkpoint-3"]
    lab.run("sft", tmp_path)
    assert outcome(tmp_path) == outcome(before)


def test_two_checkpoints_are_kept(lab: Lab, tmp_path: Path) -> None:
    lab.run("sft", tmp_path, save_steps=1, max_steps=5)
    assert checkpoints(tmp_path / "work") == ["checkpoint-3", "checkpoint-4"]


@contextmanager
def no_room() -> Iterator[None]:
    """Let no file grow beyond a megabyte: as on a full disk, the write fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_and_the_checkpoint_before_stays(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = lab.uninterrupted("sft", monkeypatch)
    shutil.copytree(before / "work", tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "checkpoints" / "checkpoint-6")
    with no_room(), pytest.raises(TrainingError, match="checkpoint could not be written"):
        lab.run("sft", tmp_path)
    lab.run("sft", tmp_path)
    assert outcome(tmp_path) == outcome(before)


@pytest.mark.parametrize(
    "write", [lambda path: torch.save(torch.zeros(2**20), path), lambda path: path.write_bytes(bytes(2**21))]
)
def test_a_full_disk_is_told_by_whichever_writer_meets_it(write: Callable[[Path], Any], tmp_path: Path) -> None:
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path)), train=lambda **more: write(tmp_path / "optimizer.pt")
    )
    with no_room(), pytest.raises(TrainingError, match="checkpoint could not be written"):
        training.train(trainer, training.Watcher([]))


def test_another_error_of_torch_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path)), train=lambda **more: torch.zeros(2) @ torch.zeros(3)
    )
    with pytest.raises(RuntimeError, match="size"):
        training.train(trainer, training.Watcher([]))


def test_a_rate_too_small_for_the_saved_weights_is_an_error(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing was learned.*weights changed by 0") as error:
        lab.run("sft", tmp_path, learning_rate=1e-12, max_steps=2)
    assert "learning_rate" in error.value.fix


@pytest.mark.parametrize("stage", STAGES)
def test_numbers_that_are_not_finite_stop_the_run_at_their_step(
    stage: str, lab: Lab, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    model = load_model(lab.base)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    save_model(model, tiny_tokenizer, tmp_path / "poisoned")
    seal(tmp_path / "poisoned", "model")
    with pytest.raises(TrainingError, match=r"nan|NaN") as error:
        train_step.run(**{**lab.job(stage, tmp_path), "base": str(tmp_path / "poisoned")})
    assert "at step 1:" in error.value.what


@pytest.mark.parametrize("stage", ["rl", "ppo"])
def test_rewards_that_are_all_equal_are_an_error_that_says_what_to_try(
    stage: str, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step.Letters, "reward", lambda *rest, **more: 0.5)
    with pytest.raises(TrainingError, match="rewards_differ") as error:
        lab.run(stage, tmp_path, max_steps=2)
    assert "temperature" in error.value.fix
    assert "group_size" in error.value.fix


def test_a_head_of_another_kind_is_left_to_trls_head(tiny_model: Path) -> None:
    class Shifted(torch.nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return super().forward(states) + 1

    model = load_model(tiny_model)
    model.lm_head.__class__ = Shifted
    asked: list[dict[str, Any]] = []
    model.forward = lambda *rest, **named: asked.append(named)
    training.score_answers_only(SimpleNamespace(args=SimpleNamespace(use_cpu=True, bf16=False), model=model))
    ids = torch.arange(6)[None]
    model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert asked[0]["fused_lm_head"] is True


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_the_quick_head_is_trls_head(tiny_model: Path, temperature: float) -> None:
    ours, theirs = load_model(tiny_model), load_model(tiny_model)
    arguments = SimpleNamespace(use_cpu=True, bf16=False)
    training.score_answers_only(SimpleNamespace(args=arguments, model=ours), temperature)
    add_fused_lm_head(theirs, temperature=temperature, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    torch.manual_seed(0)
    ids = torch.randint(3, 1000, (3, 12))
    labels, attention = ids.clone(), torch.ones_like(ids)
    labels[:, :5] = -100  # prompts
    labels[1, :8] = -100
    labels[0, 9:], attention[0, 9:] = -100, 0  # padding on the right, as in SFT
    labels[2, :7], attention[2, :3] = -100, 0  # and on the left, as in GRPO
    batch = {"input_ids": ids, "attention_mask": attention, "labels": labels, "fused_lm_head": True}
    one, other = ours(**batch), theirs(**batch)
    assert torch.equal(one.label_mask, other.label_mask)
    assert torch.equal(one.is_top1, other.is_top1)
    for name in ("loss", "log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-4, rtol=1e-4)
    weights = torch.rand_like(one.log_probs)  # a sum that treats every position differently
    (one.log_probs * weights).sum().backward()
    (other.log_probs * weights).sum().backward()
    for (name, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_the_quick_head_takes_a_batch_without_labels_and_plain_calls(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    ids = torch.arange(3, 9)[None]
    plain = model(input_ids=ids).logits
    training.score_answers_only(SimpleNamespace(args=SimpleNamespace(use_cpu=True, bf16=False), model=model))
    assert torch.equal(model(input_ids=ids).logits, plain)
    empty = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    empty.loss.backward()
    assert empty.loss == 0
    assert not model.model.layers[0].mlp.up_proj.weight.grad.any()


def test_on_a_gpu_the_head_is_left_to_trl(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    before = model.forward
    training.score_answers_only(SimpleNamespace(args=SimpleNamespace(use_cpu=False), model=model))
    assert model.forward == before


def test_arguments_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "multiplies_bf16", lambda: False)
    on_cpu = training.arguments(SFTSettings(), 7)
    assert (on_cpu["use_cpu"], on_cpu["bf16"], on_cpu["dataloader_pin_memory"]) == (True, False, False)
    assert (on_cpu["seed"], on_cpu["data_seed"]) == (7, 7)
    monkeypatch.setattr(training, "multiplies_bf16", lambda: True)
    assert training.arguments(SFTSettings(), 7)["bf16"], "on a CPU too, where that is quicker"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu = training.arguments(RLSettings(gradient_checkpointing=True), 7, per_device_train_batch_size=32)
    assert (on_gpu["use_cpu"], on_gpu["bf16"], on_gpu["dataloader_pin_memory"]) == (False, True, True)
    assert on_gpu["gradient_checkpointing"]
    assert on_gpu["per_device_train_batch_size"] == 32
    assert not training.arguments(SFTSettings(precision="fp32"), 7)["bf16"]
    assert training.arguments(SFTSettings(device="cpu"), 7)["use_cpu"]


def test_weights_that_products_round_are_dithered_and_compute_as_before(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "multiplies_bf16", lambda: True)
    stored = load_model(tiny_model)
    chosen = TrainSettings(frozen_layers=1, stochastic_rounding=True)
    model, _ = training.load_trainable(tiny_model, chosen)
    whole, _ = training.load_trainable(tiny_model, chosen.model_copy(update={"precision": "fp32"}))
    nearest, _ = training.load_trainable(tiny_model, TrainSettings(frozen_layers=1))
    for (name, old), now, *same in zip(
        stored.named_parameters(), model.parameters(), whole.parameters(), nearest.parameters(), strict=True
    ):
        moves = now.requires_grad and now.ndim == 2
        assert torch.equal(now, old) != moves, name
        assert torch.equal(now.bfloat16().float(), old), name
        assert all(torch.equal(one, old) for one in same), name


def test_what_learns_at_low_rates_rounds_by_chance() -> None:
    by_chance = {
        one.__name__ for one in TrainSettings.__subclasses__() if one.model_fields["stochastic_rounding"].default
    }
    assert by_chance == {"PreferenceSettings", "RewardModelSettings", "RLSettings"}


def test_a_gpu_that_is_not_there_is_told() -> None:
    with pytest.raises(TrainingError, match="there is no GPU"):
        training.device(TrainSettings(device="cuda"))


def test_the_adapter_is_the_recipes() -> None:
    assert training.adapter(TrainSettings()) is None
    lora = training.adapter(TrainSettings(method="lora", lora_rank=8, lora_alpha=24))
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (8, 24, "all-linear")


def test_freezing_everything_is_refused(tiny_model: Path) -> None:
    with pytest.raises(TrainingError, match="the model has 2 layers"):
        training.load_trainable(tiny_model, TrainSettings(frozen_layers=2))


def test_the_loss_is_read_over_a_tenth_of_the_steps() -> None:
    points = [{"loss": float(value)} for value in range(30)]
    assert training.loss_ends(points) == (1.0, 28.0)
    assert training.loss_ends(points[:3]) == (0.0, 2.0)


def test_memory_that_a_step_frees_is_there_for_the_next() -> None:
    def step() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        gradients = [torch.ones(1_000_000) for _ in range(50)]
        del gradients
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    training.keep_freed_memory()
    step()
    assert step() < 1000, "200 MB are 49,000 pages"
