"""One trainer for every system, on Accelerate: mixed precision, accumulation, several processes, EMA, exact resume.

Every draw is a function of (seed, step): data order, dropout and sampling are reseeded for each forward pass, so a run
that was killed continues bit for bit on the CPU, and a picture grid in between changes nothing.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.files import PACKED_FILE, atomic_path, read_state_dict, write_text_atomic
from vistok.nn.model import VistokModel
from vistok.nn.text import TextCondition
from vistok.registry import system_class

from .adversarial import AdversarialObjective, Judge, make_loss
from .checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from .ema import EMA
from .export import write_model
from .logs import MetricsLog, ProgressBar
from .monitors import GeneratorMonitor, Monitor, TokenizerMonitor
from .optimizers import build_optimizer
from .recipe import OWN_TEXT_SYSTEMS, Recipe, ScheduleRecipe, load_recipe, recipe_differences, save_recipe
from .sources import Forwards, Source, StepBatches, draw_latents, encode_images, open_source

__all__ = ["Trainer", "TrainingResult", "build_model", "load_matching", "lr_factor"]

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended.

    Attributes:
        status: `finished` or `interrupted` (Ctrl-C or SIGTERM; a checkpoint was written).
        step: optimiser steps done.
        run_dir: folder with checkpoints, metrics and pictures.
        metrics: the last logged figures.
    """

    status: str
    step: int
    run_dir: Path
    metrics: dict[str, float] = field(default_factory=dict)


class Objective(nn.Module):
    """Makes a network's training loss its `forward`, which is what DDP and autocast wrap."""

    def __init__(self, model: VistokModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The network's `training_loss`."""
        return self.model.training_loss(batch)


def lr_factor(schedule: ScheduleRecipe, step: int, steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0) of `steps`, as a factor of the recipe's."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "cosine":
        done = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
        return schedule.final_ratio + (1 - schedule.final_ratio) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule.name == "step":
        return schedule.factor ** sum(step >= fraction * steps for fraction in schedule.milestones)
    return 1.0


def seed_everything(*numbers: int) -> None:
    """Seed Python, numpy and torch (all devices) by a hash of the numbers."""
    state = np.random.SeedSequence(numbers).generate_state(2)
    seed = int(state[0]) << 32 | int(state[1])
    random.seed(seed)
    np.random.seed(int(state[0]))
    torch.manual_seed(seed % 2**63)


def build_model(recipe: Recipe) -> VistokModel:
    """The network of a recipe with its seeded random weights.

    Raises:
        UnknownNameError: no such system.
        InvalidInputError: its constructor does not know an argument.
    """
    cls = system_class(recipe.model.system)
    known = [name for name in inspect.signature(cls).parameters if name != "self"]
    for name in recipe.model.config:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
            raise InvalidInputError(f"unknown recipe field model.config.{name}; did you mean {' or '.join(nearest)}?")
    seed_everything(recipe.seed)
    return cls(**recipe.model.config)


def read_weights(source: str) -> dict[str, Tensor]:
    """Weights of an exported folder, a run folder or checkpoint (its moving average), or a shipped name.

    Raises:
        CheckpointError, UnknownNameError: nothing usable there.
    """
    folder = Path(source)
    if not folder.is_dir() or is_transformers(folder) or (folder / "model_index.json").is_file():
        from vistok import hub

        found = hub.load(source)
        parts = getattr(found, "components", None)
        if parts is None:
            return found.state_dict()
        return {  # of a pipeline: each network under its name
            f"{name}.{key}": value
            for name, part in parts.items()
            if isinstance(part, nn.Module)
            for key, value in part.state_dict().items()
        }
    checkpoint = latest_checkpoint(folder)
    candidates = [folder / name for name in (WEIGHTS_FILE, PACKED_FILE, "ema.safetensors", "model.safetensors")]
    if checkpoint is not None:
        candidates += [checkpoint / "ema.safetensors", checkpoint / "model.safetensors"]
    for file in candidates:
        if file.is_file():
            return read_state_dict(file)
    raise CheckpointError(
        f"{folder} holds no weights; expected one of {', '.join(file.name for file in candidates[:3])}"
    )


def is_transformers(folder: Path) -> bool:
    """Whether a folder holds a model of transformers, whose files use other names than the model."""
    file = folder / "config.json"
    return file.is_file() and "model_type" in json.loads(file.read_text(encoding="utf-8"))


def load_matching(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Load the tensors that fit by name and shape.

    Returns:
        One sentence for each tensor of the model that keeps its random values, and each that was not used.

    Raises:
        CheckpointError: nothing fits.
    """
    own = model.state_dict()
    fitting = {
        name: value for name, value in weights.items() if name in own and tuple(own[name].shape) == tuple(value.shape)
    }
    if not fitting:
        raise CheckpointError("init_from: no tensor of the checkpoint fits this network by name and shape")
    report = []
    for name, value in own.items():
        if name not in weights:
            report.append(f"{name}: not in the checkpoint, starts at random")
        elif name not in fitting:
            report.append(
                f"{name}: {list(weights[name].shape)} in the checkpoint, not {list(value.shape)}, starts at random"
            )
    report += [f"{name}: in the checkpoint only, unused" for name in weights if name not in own]
    model.load_state_dict(fitting, strict=False)
    return report


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the training process decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Trainer:
    """Runs a recipe.

    Args:
        recipe: what to train.
        output: run folder (see `checkpoint`).
        device: `cpu`, `cuda`, or None for the best there is. Under `accelerate launch` each process takes its own.
        tensorboard: also write TensorBoard event files (extra `train`).
        on_progress: called with what is done, units done and units in all, instead of showing bars.

    Raises:
        InvalidInputError: the recipe asks for something this machine or system cannot do.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: str | os.PathLike[str],
        *,
        device: str | None = None,
        tensorboard: bool = True,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        if device not in (None, "cpu", "cuda"):
            raise InvalidInputError(
                f"device {device!r}: expected cpu or cuda; choose one of several GPUs with CUDA_VISIBLE_DEVICES"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise InvalidInputError("device cuda: PyTorch sees no GPU here; use --device cpu")
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            # Accelerate keeps its settings in process-wide singletons: a second training in one process may differ.
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        self.recipe, self.run_dir = recipe, Path(output)
        self.accelerator = Accelerator(
            mixed_precision=recipe.precision,
            gradient_accumulation_steps=recipe.gradient_accumulation,
            # Without this, several processes on a machine without a GPU would each train alone.
            cpu=device == "cpu" or (device is None and not _has_accelerator()),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        if recipe.precision == "fp16" and self.device.type == "cpu":
            raise InvalidInputError("precision fp16 is 4 to 80 times slower than fp32 on the CPU; use bf16 or no")
        shares = self.accelerator.num_processes * recipe.gradient_accumulation
        if recipe.batch_size % shares:
            raise InvalidInputError(
                f"batch_size {recipe.batch_size} cannot be divided among {self.accelerator.num_processes} processes x "
                f"{recipe.gradient_accumulation} accumulation steps; choose a multiple of {shares}"
            )
        self.tensorboard, self.on_progress = tensorboard, on_progress
        self._interrupted = False

    # ------------------------------------------------------------------------------------------------- setting up
    def _set_up(self) -> None:
        """Networks, data and optimisers; nothing is on disk yet."""
        recipe = self.recipe
        self.model = build_model(recipe)
        self.tokenizer = None if recipe.tokenizer is None else load_helper(recipe.tokenizer, self.device)
        check_vocabulary(recipe, self.model, self.tokenizer)
        give_autoencoder(recipe, self.model, self.tokenizer)
        if recipe.model.codebook_embeddings:
            embed_codebook(recipe, self.model, self.tokenizer)
        if recipe.model.init_from is not None:
            weights = read_weights(recipe.model.init_from)
            if hasattr(self.model, "rename_initial"):  # a checkpoint under other names
                weights = self.model.rename_initial(weights)
            report = load_matching(self.model, weights)
            if self.main and report:
                write_text_atomic(self.run_dir / "init_from.txt", "\n".join(report) + "\n")
        train_only(self.model, recipe.model.trained)
        self.model.to(self.device)
        if recipe.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.encode_captions = None
        if recipe.text_encoder is not None:
            length = int(getattr(self.model.config, "num_condition_tokens", 1))
            self.encode_captions = load_text_encoder(recipe.text_encoder, length, self.device)
        self.source = self._open_source()
        optimizer = build_optimizer(self.model, recipe.optimizer, self.device)
        self.judge: Any = None
        if recipe.discriminator is None:
            self.objective, self.optimizer = self.accelerator.prepare(Objective(self.model), optimizer)
        else:
            loss = make_loss(recipe.model.system, recipe.discriminator).to(self.device)
            self.objective, self.optimizer = self.accelerator.prepare(AdversarialObjective(self.model, loss), optimizer)
            judge = Judge(loss)
            self.discriminator = judge.discriminator
            adam = torch.optim.Adam(judge.parameters(), lr=recipe.discriminator.lr, betas=recipe.discriminator.betas)
            self.judge, self.judge_optimizer = self.accelerator.prepare(judge, adam)
        self.ema = EMA(self.model, recipe.ema_decay) if recipe.ema_decay and self.main else None
        self.monitor = self._monitor() if self.main else None
        self.step = 0

    def _open_source(self) -> Source:
        with self.accelerator.main_process_first():  # the first process fills the token cache for all
            if self.main:
                with ProgressBar("encoding", 1, shown=self.on_progress is None) as bar:
                    return self._source(lambda done, total: self._tell(bar, "encoding", done, total))
            return self._source(None)

    def _tell(self, bar: ProgressBar, what: str, done: int, total: int, note: str = "") -> None:
        bar.update(done, total=total, note=note)
        if self.on_progress is not None:
            self.on_progress(what, done, total)

    def _source(self, on_progress: Callable[[int, int], None] | None) -> Source:
        return open_source(
            self.recipe,
            tokenizer=self.tokenizer,
            cache=self.run_dir.parent / "token-cache",
            device=self.device,
            on_progress=on_progress,
        )

    def _monitor(self) -> Monitor | None:
        """The monitor that suits the network; None for helper networks."""
        model = self.model
        if self.recipe.model.system in ("seed", "seed-unclip", "image-language"):
            from .seed import seed_monitor

            return seed_monitor(self.recipe, self.source, self.device)
        if self.recipe.model.system == "caption-encoder":
            from .caption_encoder import CaptionMonitor

            return CaptionMonitor(self.recipe, self.device)
        if self.recipe.model.system == "lab-llava":
            from .lvlm import LlavaMonitor

            return LlavaMonitor(self.recipe, self.device)
        if self.recipe.model.system in OWN_TEXT_SYSTEMS:
            from .text_to_image import TextToImageMonitor

            return TextToImageMonitor(self.recipe, self.tokenizer, self.device)
        if hasattr(model, "decode"):
            return TokenizerMonitor(self.recipe, model, self.source, self.device)
        if hasattr(model, "generate") and self.tokenizer is not None:
            return GeneratorMonitor(self.recipe, model, self.tokenizer, self.encode_captions, self.source, self.device)
        return None

    def _claim_folder(self, resume: bool) -> None:
        """Check that the run folder is new or belongs to this recipe; write the recipe into it."""
        path = self.run_dir / "recipe.yaml"
        if path.is_file():
            if not resume:
                raise InvalidInputError(
                    f"{self.run_dir} already holds a run; resume it or choose another output folder"
                )
            differences = recipe_differences(load_recipe(path), self.recipe)
            if differences:
                raise InvalidInputError(
                    f"{self.run_dir} was started with another recipe ({'; '.join(differences)}); "
                    "use the old values or another output folder"
                )
        self.accelerator.wait_for_everyone()  # nobody writes before all have looked
        if self.main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save_recipe(path, self.recipe)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------------------------------ checkpoints
    def _save(self) -> None:
        """Write a checkpoint of the current step (main process)."""
        if self.main:
            scaler = self.accelerator.scaler
            extra: dict[str, Any] = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            if self.judge is not None:
                extra["discriminator"] = self.discriminator.state_dict()
                extra["discriminator_optimizer"] = self.judge_optimizer.state_dict()
            checkpoint = Checkpoint(
                step=self.step,
                model=dict(self.model.state_dict()),
                ema=None if self.ema is None else self.ema.state_dict(),
                ema_updates=0 if self.ema is None else self.ema.updates,
                extra=extra,
            )
            config = {key: value for key, value in self.model.config.items() if not key.startswith("_")}
            save_checkpoint(self.run_dir, checkpoint, config, self.recipe.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        path = latest_checkpoint(self.run_dir)
        if path is None:
            return
        saved = load_checkpoint(path)
        try:
            self.model.load_state_dict(saved.model, strict=True)
            self.optimizer.load_state_dict(saved.extra["optimizer"])
            if self.judge is not None:
                self.discriminator.load_state_dict(saved.extra["discriminator"])
                self.judge_optimizer.load_state_dict(saved.extra["discriminator_optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} does not fit this recipe's network: {error}") from error
        if self.accelerator.scaler is not None and saved.extra.get("scaler") is not None:
            self.accelerator.scaler.load_state_dict(saved.extra["scaler"])
        if self.ema is not None:
            if saved.ema is None:
                raise CheckpointError(f"{path} holds no moving average, but the recipe asks for one")
            self.ema.load_state_dict(saved.ema, saved.ema_updates)
        self.step = saved.step

    # ---------------------------------------------------------------------------------------------------- the loop
    def fit(self, *, resume: bool = True) -> TrainingResult:
        """Train to the recipe's last step, from the newest checkpoint of the run folder if there is one.

        The finished network is in the run folder under `model`, for `vistok.load`.

        Args:
            resume: False refuses a folder that already holds a run.

        Raises:
            InvalidInputError: the folder belongs to another recipe (naming the fields that differ).
            CheckpointError: a checkpoint is damaged.
            InvalidOutputError: the loss became NaN or infinite.
        """
        self._claim_folder(resume)
        self._set_up()
        self._restore()
        self.log = MetricsLog(self.run_dir, self.step, self.tensorboard) if self.main else None
        try:
            shown = self.main and self.on_progress is None
            with self._interrupts(), ProgressBar(self.recipe.name, self.recipe.steps, shown=shown) as bar:
                status = self._loop(bar)
        finally:
            if self.log is not None:
                self.log.close()
        if status == "finished" and self.main:
            write_model(self.run_dir, self.run_dir / "model", self.recipe.name)
        if self.accelerator.num_processes > 1:
            self.accelerator.end_training()
        return TrainingResult(status, self.step, self.run_dir, self.figures)

    def _loop(self, bar: ProgressBar) -> str:
        recipe = self.recipe
        self.figures: dict[str, float] = {}
        window: dict[str, Tensor] = {}
        window_steps, window_start = 0, time.monotonic()
        batches = iter(self._loader())
        self.objective.train()
        saved_at = self.step
        while self.step < recipe.steps:
            scalars = self._optimizer_step(batches)
            self.step += 1
            if self.ema is not None:
                self.ema.update(self.model)
            for name, value in scalars.items():
                window[name] = window[name] + value if name in window else value
            window_steps += 1
            last = self.step == recipe.steps
            interrupted = self._agree_on_interrupt()
            due = {
                name: every > 0 and (last or self.step % every == 0)
                for name, every in (
                    ("log", recipe.log_every),
                    ("checkpoint", recipe.checkpoint_every),
                    ("validate", recipe.validate_every),
                    ("sample", recipe.sample_every),
                )
            }
            if due["log"] or due["checkpoint"] or interrupted:
                figures = self._averages(window, window_steps)
                seconds = time.monotonic() - window_start
                figures["samples_per_second"] = window_steps * recipe.batch_size / seconds
                figures["lr"] = recipe.optimizer.lr * lr_factor(recipe.schedule, self.step - 1, recipe.steps)
                if due["log"]:
                    self._write(figures)
                    window, window_steps, window_start = {}, 0, time.monotonic()
            note = f"loss {self.figures['loss']:.4f}" if "loss" in self.figures else ""
            self._tell(bar, recipe.name, self.step, recipe.steps, note)
            if due["checkpoint"] or interrupted:
                self._save()
                saved_at = self.step
            if due["validate"] or due["sample"]:
                paused = time.monotonic()
                self._watch(due["validate"], due["sample"])
                window_start += time.monotonic() - paused
            if interrupted and not last:
                return "interrupted"
        if saved_at != self.step or latest_checkpoint(self.run_dir) is None:
            self._save()
        return "finished"

    def _loader(self) -> DataLoader:
        recipe = self.recipe
        batches = StepBatches(
            self.source,
            recipe.batch_size,
            recipe.gradient_accumulation,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        accumulation = recipe.gradient_accumulation
        return DataLoader(
            batches,
            batch_size=None,
            sampler=Forwards(self.step * accumulation, recipe.steps * accumulation),
            num_workers=recipe.workers,
            prefetch_factor=4 if recipe.workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_interrupts,
        )

    def _optimizer_step(self, batches: Iterator[dict[str, Any]]) -> dict[str, Tensor]:
        """One step over all accumulation passes; means of the scalars, for this process."""
        recipe = self.recipe
        factor = lr_factor(recipe.schedule, self.step, recipe.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.optimizer.lr * factor
        scenes = getattr(getattr(self.source, "order", None), "size", None)
        if hasattr(self.model, "epoch") and scenes is not None:  # networks whose objective changes over the epochs
            self.model.epoch = self.step * recipe.batch_size / scenes
        scalars: dict[str, Tensor] = {}
        for number in range(recipe.gradient_accumulation):
            seed_everything(recipe.seed, self.step, number, self.accelerator.process_index)
            batch = self.prepare(next(batches))
            trained = [self.objective] if self.judge is None else [self.objective, self.judge]
            with self.accelerator.accumulate(*trained):
                found = self.objective(batch)
                sample = found.pop("sample", None)
                self.accelerator.backward(found["loss"])
                if self.accelerator.sync_gradients and recipe.max_grad_norm:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
                    scalars["grad_norm"] = torch.as_tensor(norm, dtype=torch.float32, device=self.device)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.judge is not None:
                    found |= self._judge_turn(batch["images"], sample)
            for name, value in found.items():
                share = value.detach().float() / recipe.gradient_accumulation
                scalars[name] = scalars[name] + share if name in scalars else share
        return scalars

    def _judge_turn(self, images: Tensor, sample: Tensor) -> dict[str, Tensor]:
        """The discriminator's part of a forward pass (within `accumulate`)."""
        found = self.judge(images, sample, self.step)
        self.accelerator.backward(found["loss"])
        if self.accelerator.sync_gradients and self.recipe.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.discriminator.parameters(), self.recipe.max_grad_norm)
        self.judge_optimizer.step()
        self.judge_optimizer.zero_grad()
        return {f"discriminator_{name}": value for name, value in found.items()}

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A source's batch as the network takes it: on the device, images as floats or tokenized, captions encoded."""
        ready = {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        ready["step"] = self.step
        if "images" in ready:
            images = ready["images"].float() / 127.5 - 1
            if self.recipe.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            if self.tokenizer is None:
                ready["images"] = images
            else:
                del ready["images"]
                ready |= encode_images(self.tokenizer, images, self.pivot_size(images))
        draw_latents(self.tokenizer, ready)
        if self.encode_captions is not None:
            if "captions" not in ready:
                raise InvalidInputError("the recipe has a text_encoder, but its data has no captions")
            condition = self.encode_captions(ready["captions"])
            ready["text_features"], ready["text_mask"] = condition.features, condition.mask
        if not getattr(self.model, "reads_captions", False):
            ready.pop("captions", None)
        return ready

    def pivot_size(self, images: Tensor) -> int:
        """Side in pixels of the small copies that the generator wants; 0 for none."""
        pivots = getattr(self.model, "pivot_grid", None)
        return 0 if pivots is None else images.shape[-1] * pivots[1] // self.model.grid[1]

    def _averages(self, window: dict[str, Tensor], steps: int) -> dict[str, float]:
        """Means over the window and over the processes; refuses to go on from a loss that is no number."""
        names = list(window)
        sums = torch.stack([window[name] for name in names])
        means = self.accelerator.reduce(sums, reduction="mean") / steps
        figures = dict(zip(names, means.tolist(), strict=True))
        if not math.isfinite(figures["loss"]):
            raise InvalidOutputError(
                f"the loss is {figures['loss']} at step {self.step}; the newest checkpoint is older and whole. "
                "Try a lower optimizer.lr, a longer schedule.warmup_steps, a max_grad_norm, or precision no"
            )
        return figures

    def _write(self, figures: dict[str, float]) -> None:
        self.figures = {**self.figures, **figures}
        if self.log is not None:
            self.log.write(self.step, figures)

    def _watch(self, validate: bool, sample: bool) -> None:
        """Held-out figures and picture grids with the averaged weights (main process)."""
        if self.main and self.monitor is not None and self.log is not None:
            self.model.eval()
            seed_everything(self.recipe.seed, self.step)
            with self.ema.applied(self.model) if self.ema is not None else nullcontext():
                if validate:
                    self._write(self.monitor.validate(self.model))
                if sample:
                    pictures, figures = self.monitor.sample(self.model, self.recipe.seed)
                    if figures:
                        self._write(figures)
                    for name, picture in pictures.items():
                        with atomic_path(self.run_dir / "samples" / f"{name}-{self.step:08d}.png") as path:
                            Image.fromarray(picture).save(path)
                        self.log.image(self.step, name, picture)
            self.model.train()
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------------------------------ interruption
    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Within the block, a first Ctrl-C or SIGTERM asks for a checkpoint and an end; a second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._interrupted = False
        previous = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: FrameType | None) -> None:
            self._interrupted = True
            signal.signal(number, previous[number])

        for number in previous:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _agree_on_interrupt(self) -> bool:
        """Whether any process was interrupted: all must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return self._interrupted
        flag = torch.tensor([float(self._interrupted)], device=self.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())


def load_helper(name: str, device: torch.device) -> Any:
    """A frozen network from `vistok.load`."""
    from vistok import hub

    return hub.load(name).to(device).eval().requires_grad_(False)


def train_only(model: nn.Module, beginnings: Sequence[str]) -> None:
    """Freeze the parameters whose names begin with none of these; an empty list freezes nothing.

    Raises:
        InvalidInputError: no parameter's name begins so.
    """
    names = [name for name, _ in model.named_parameters()]
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in names):
            known = sorted({name.split(".")[0] for name in names})
            raise InvalidInputError(f"model.trained: no parameter begins with {beginning!r}; parts: {', '.join(known)}")
    if beginnings:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(tuple(beginnings)))


def give_autoencoder(recipe: Recipe, model: Any, tokenizer: Any) -> None:
    """Hand the recipe's tokenizer to a network that works on its latents (FlexTok on a KL tokenizer).

    Raises:
        InvalidInputError: the recipe names another one than the network's configuration, or none.
    """
    named = model.config.get("autoencoder")
    if named is None:
        return
    if named != recipe.tokenizer:
        raise InvalidInputError(
            f"model.config.autoencoder is {named!r}, but the recipe's tokenizer is {recipe.tokenizer!r}: name the same"
        )
    model.set_autoencoder(tokenizer)


def embed_codebook(recipe: Recipe, model: Any, tokenizer: Any) -> None:
    """Start a generator's embeddings and heads from the codebook of its tokenizer.

    Raises:
        InvalidInputError: the generator or the tokenizer has no codes.
    """
    features = getattr(tokenizer, "code_features", None)  # of codes that are no learned table
    if not (hasattr(model, "embed_codebook") and (features is not None or hasattr(tokenizer, "quantizer"))):
        raise InvalidInputError(
            f"model.codebook_embeddings needs a generator of discrete tokens and a tokenizer with a codebook; got "
            f"{type(model).__name__} and {type(tokenizer).__name__}"
        )
    seed_everything(recipe.seed)
    model.embed_codebook((tokenizer.quantizer.codes() if features is None else features()).cpu())


def load_text_encoder(name: str, num_tokens: int, device: torch.device) -> Callable[[Sequence[str]], TextCondition]:
    """The frozen text encoder of a recipe, as captions -> features.

    Args:
        name: shipped name, folder or Hub id.
        num_tokens: length that captions are padded to.
        device: where it runs.
    """
    from vistok.generators.text import TextEncoder

    encoder = TextEncoder.from_pretrained(name).to(device)

    def encode(captions: Sequence[str]) -> TextCondition:
        with torch.no_grad():
            return encoder(list(captions), num_tokens=num_tokens)

    return encode


def check_vocabulary(recipe: Recipe, model: VistokModel, tokenizer: Any) -> None:
    """A generator and its tokenizer must speak of the same codebook.

    Raises:
        InvalidInputError: their sizes differ.
    """
    have = getattr(tokenizer, "codebook_size", None)
    want = getattr(model.config, "vocab_size", None)
    if have is not None and want is not None and have != want:
        raise InvalidInputError(
            f"model.config.vocab_size is {want}, but the tokenizer {recipe.tokenizer!r} has {have} codes"
        )
