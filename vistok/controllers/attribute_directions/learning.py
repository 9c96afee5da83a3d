"""Learned directions: distilling "positive minus negative" predictions of the denoiser into one vector (equation 4).

Letters: S scales of a micro-step, N text positions, D width, L latent shape.

One micro-step takes a noisy sample x_t of the target prompt, asks the frozen denoiser for the clean estimates f of the
target, positive and negative prompt, and fits `f(target with delta at scale s)` to
`f(target) + s (f(positive) - f(negative))` for S random scales s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vistok.controllers.attribute_directions.deltas import AttributeDelta, ContrastivePrompts, PromptPair, add_direction
from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.files import atomic_path, read_state_dict, save_tensors
from vistok.nn.denoisers import Denoiser
from vistok.nn.prompts import describe_pipeline, encode_prompts
from vistok.nn.spans import character_mask, covered_tokens, token_spans

__all__ = ["Draws", "LearningSettings", "DirectionLearner", "MicroStep", "TrajectoryBank"]


@dataclass(frozen=True)
class LearningSettings:
    """How a direction is learned; the defaults are the authors'.

    Attributes:
        steps: optimiser steps.
        micro_steps: gradients summed (not averaged) into one step.
        scales: S, predictions a micro-step.
        scale_range: smallest and largest |s|; the sign is random.
        learning_rate: of AdamW.
        betas: of AdamW.
        weight_decay: of AdamW.
        num_inference_steps: of the sampler that makes x_t.
        guidance_scale: of that sampler (FLUX: its embedded guidance).
        trajectory_pairs: micro-steps that share one sampled trajectory. 1 samples a new one each time, as the authors
            do (three quarters of their time); 10 is about 2.5 times faster in total.
        weighting: `clean` compares clean estimates, as the authors do: noisy steps then weigh (1 - abar) / abar;
            `uniform` removes that weight.
        size: pixels a side that SDXL is told for predictions.
        image_size: pixels a side of the samples; None for the network's own.
        seed: every draw is a function of it and of the step, so a resumed run continues exactly.
    """

    steps: int = 1000
    micro_steps: int = 10
    scales: int = 4
    scale_range: tuple[float, float] = (0.1, 5.0)
    learning_rate: float = 0.1
    betas: tuple[float, float] = (0.5, 0.8)
    weight_decay: float = 0.333
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    trajectory_pairs: int = 1
    weighting: str = "clean"
    size: int | None = 1024
    image_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.scale_range
        if min(self.steps, self.micro_steps, self.scales, self.num_inference_steps, self.trajectory_pairs) < 1:
            raise InvalidInputError("steps, micro_steps, scales, num_inference_steps and trajectory_pairs are >= 1")
        if not 0 <= low <= high:
            raise InvalidInputError(f"scale_range must be 0 <= smallest <= largest, got {self.scale_range}")
        if self.weighting not in ("clean", "uniform"):
            raise InvalidInputError(f"weighting must be 'clean' or 'uniform', got {self.weighting!r}")


@dataclass(frozen=True)
class Draws:
    """The random numbers of one micro-step.

    Attributes:
        time: where on the trajectory, in [0, 1).
        latents: initial noise [1, *L].
        signs: uniform [S]; a scale is positive where the draw exceeds 0.5.
        magnitudes: uniform [S].
    """

    time: float
    latents: Tensor
    signs: Tensor
    magnitudes: Tensor

    def scales(self, smallest: float, largest: float) -> Tensor:
        """The S scales."""
        sign = torch.where(self.signs > 0.5, 1.0, -1.0)
        return sign * ((largest - smallest) * self.magnitudes + smallest)


@dataclass(frozen=True)
class MicroStep:
    """What a micro-step computed: x_t [1, *L], targets and predictions [S, *L], and the loss."""

    noisy: Tensor
    target: Tensor
    prediction: Tensor
    loss: Tensor


class TrajectoryBank:
    """Sampled trajectories of target prompts, shared between attributes of one noun (the target does not depend on
    them), and storable.

    Args:
        capacity: trajectories kept a prompt; further ones replace the oldest.
    """

    def __init__(self, capacity: int = 4) -> None:
        if capacity < 1:
            raise InvalidInputError(f"the capacity of a trajectory bank is at least 1, got {capacity}")
        self.capacity = capacity
        self._kept: dict[str, list[Tensor]] = {}

    def __len__(self) -> int:
        return sum(len(kept) for kept in self._kept.values())

    def add(self, prompt: str, trajectory: Tensor) -> None:
        """Keep the latents [steps, *L] before each step of one trajectory."""
        kept = self._kept.setdefault(prompt, [])
        kept.append(trajectory.detach().cpu())
        del kept[: -self.capacity]

    def get(self, prompt: str) -> list[Tensor]:
        """The trajectories of a prompt."""
        return self._kept.get(prompt, [])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all trajectories as safetensors."""
        tensors: dict[str, Tensor] = {}
        names: dict[str, str] = {}
        for number, (prompt, kept) in enumerate(self._kept.items()):
            names[str(number)] = prompt
            tensors |= {f"{number}.{index}": value for index, value in enumerate(kept)}
        save_tensors(path, tensors, names)

    @classmethod
    def load(cls, path: str | os.PathLike[str], capacity: int = 4) -> TrajectoryBank:
        """Read what `save` wrote."""
        from safetensors import safe_open

        bank = cls(capacity)
        read_state_dict(path)  # one clear error for a missing or damaged file
        with safe_open(str(path), framework="pt") as file:
            names = file.metadata() or {}
            for key in sorted(file.keys(), key=lambda name: tuple(map(int, name.split(".")))):
                bank.add(names[key.split(".")[0]], file.get_tensor(key))
        return bank


class DirectionLearner:
    """Learns a delta against a pipeline's denoiser.

        learner = DirectionLearner(pipe, ContrastivePrompts([PromptPair("man", "old man", "young man")]))
        delta = learner.learn("age.ckpt.pt")      # run it again to resume

    Works with Stable Diffusion 1.x/2.x, SDXL, SD3 and FLUX. Network weights are never changed.

    Args:
        pipe: a diffusers pipeline.
        prompts: the prompt set.
        settings: see there.
        initial: the delta to start from; None for zero.
        pooled: also learn vectors for the pooled embeddings (not in the paper).
        bank: trajectories of earlier runs to draw from when `trajectory_pairs` exceeds 1.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: ContrastivePrompts,
        settings: LearningSettings | None = None,
        *,
        initial: AttributeDelta | None = None,
        pooled: bool = False,
        bank: TrajectoryBank | None = None,
    ) -> None:
        self.pipe, self.prompts = pipe, prompts
        self.settings = settings or LearningSettings()
        self.text = describe_pipeline(pipe)
        self.denoiser = Denoiser(
            pipe, self.settings.num_inference_steps, guidance=self.settings.guidance_scale, size=self.settings.size
        )
        self.bank = bank if bank is not None else TrajectoryBank()
        vectors = {slot.key: torch.zeros(slot.width) for slot in self.text.encoders if slot.tokens}
        pooled_vectors: dict[str, Tensor] = {}
        if pooled:
            encoded, _ = encode_prompts(self.text, [""])
            pooled_vectors = {key: torch.zeros(value.shape[-1]) for key, value in encoded.pooled.items()}
        for mine, given in (
            (vectors, initial.tokenwise if initial else {}),
            (pooled_vectors, initial.pooled if initial else {}),
        ):
            for key, value in given.items():
                if key in mine and mine[key].shape != value.shape:
                    raise InvalidInputError(
                        f"the initial delta of {key} has {len(value)} numbers; this pipeline's encoder is "
                        f"{len(mine[key])} wide"
                    )
                if key in mine:
                    mine[key] = value.float().clone()
        device = self.denoiser.device
        self.vectors = {key: nn.Parameter(value.to(device)) for key, value in vectors.items()}
        self.pooled_vectors = {key: nn.Parameter(value.to(device)) for key, value in pooled_vectors.items()}
        self.optimizer = torch.optim.AdamW(
            [*self.vectors.values(), *self.pooled_vectors.values()],
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
        )
        self.step = 0
        self.losses: list[float] = []
        # Prompts are few and repeat thousands of times: each is encoded once and kept on the CPU.
        self._encoded: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._masks: dict[tuple[str, str, str], Tensor] = {}
        self._shared: dict[str, Any] = {}

    @property
    def delta(self) -> AttributeDelta:
        """The direction as it is now."""
        return AttributeDelta(
            {key: value.detach().float().cpu().clone() for key, value in self.vectors.items()},
            {key: value.detach().float().cpu().clone() for key, value in self.pooled_vectors.items()},
        )

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """(embeddings [n, N, D], pooled [n, P] or None) on the denoiser's device."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if new:
            encoded, _ = encode_prompts(self.text, new)
            embeds, pooled = encoded.assemble()
            for row, prompt in enumerate(new):
                self._encoded[prompt] = (embeds[row].cpu(), None if pooled is None else pooled[row].cpu())
        rows = [self._encoded[prompt] for prompt in prompts]
        device = self.denoiser.device
        vectors = [vector for _, vector in rows if vector is not None]
        return (
            torch.stack([tokens for tokens, _ in rows]).to(device),
            torch.stack(vectors).to(device) if vectors else None,
        )

    def subject_mask(self, item: PromptPair, key: str) -> Tensor:
        """bool [N of the encoder]: the subject's tokens in the target prompt."""
        name = (item.target, item.pattern, key)
        if name not in self._masks:
            slot = self.text.slot(key)
            marked = character_mask(item.target, item.pattern)
            characters = [(index, index + 1) for index, inside in enumerate(marked) if inside]
            mask = torch.zeros(slot.length, dtype=torch.bool)
            mask[covered_tokens(token_spans(item.target, slot.tokenizer), characters, slot.length)] = True
            self._masks[name] = mask
        return self._masks[name]

    def _shifted(self, item: PromptPair, embeds: Tensor, pooled: Tensor | None, scales: Tensor) -> tuple[Any, Any]:
        """The target's embeddings [S, N, D] moved by the delta at each scale."""
        count = len(scales)
        moved = embeds.expand(count, -1, -1).clone()
        column = 0
        for slot in self.text.encoders:
            if not slot.tokens:
                continue
            # SD3 lays T5 behind the CLIP positions; all other encoders lie side by side on the width.
            after = self.text.family == "sd3" and slot.kind == "t5"
            rows = slice(embeds.shape[1] - slot.length if after else 0, embeds.shape[1] if after else slot.length)
            columns = slice(0 if after else column, (0 if after else column) + slot.width)
            column += slot.width
            mask = self.subject_mask(item, slot.key).expand(count, -1)
            area = embeds[:, rows, columns].expand(count, -1, -1)
            moved[:, rows, columns] = add_direction(area, self.vectors[slot.key], mask, scales)
        if pooled is None:
            return moved, None
        vectors = pooled.expand(count, -1)
        parts, start = [], 0
        for slot in self.text.encoders:
            if not slot.pooled:
                continue
            size = self._pooled_width(slot.key, vectors.shape[-1], start)
            part = vectors[:, start : start + size]
            if slot.key in self.pooled_vectors:
                part = part + scales.to(part)[:, None] * self.pooled_vectors[slot.key].to(part)
            parts.append(part)
            start += size
        return moved, torch.cat(parts, dim=-1)

    def _pooled_width(self, key: str, total: int, start: int) -> int:
        if key in self.pooled_vectors:
            return len(self.pooled_vectors[key])
        slots = [slot for slot in self.text.encoders if slot.pooled]
        if key == slots[-1].key:
            return total - start
        return int(getattr(self.text.slot(key).model.config, "projection_dim", total - start))

    def negative(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """The unconditional embeddings of the sampler: zeros for SDXL, the empty prompt otherwise."""
        embeds, pooled = self.encode([""])
        if self.text.family == "sdxl":
            embeds, pooled = torch.zeros_like(embeds), None if pooled is None else torch.zeros_like(pooled)
        return embeds.expand(rows, -1, -1), None if pooled is None else pooled.expand(rows, -1)

    @torch.no_grad()
    def noisy_sample(self, item: PromptPair, draws: Draws) -> tuple[Tensor, Tensor]:
        """(x_t [1, *L], timestep): a guided sample of the target prompt, cut at the drawn time.

        As in the authors' code x_t has the level of `timesteps[round(time * S)]` and is judged at
        `timesteps[round(time * (S - 1))]`.
        """
        steps = len(self.denoiser.timesteps)
        wanted = round(draws.time * steps)
        embeds, pooled = self.encode([item.target])
        negative, negative_pooled = self.negative(1)
        path = self.denoiser.trajectory(
            draws.latents.to(self.denoiser.device, self.denoiser.dtype),
            embeds,
            pooled,
            negative,
            negative_pooled,
            self.settings.guidance_scale,
        )
        # The sampler does no step more than is asked for.
        latents = next(islice(path, wanted, None))
        return latents, self.denoiser.timesteps[round(draws.time * (steps - 1))]

    @torch.no_grad()
    def _banked_sample(self, item: PromptPair, draws: Draws, fresh: bool) -> tuple[Tensor, Tensor]:
        """A pair (x_t, t) of one level from the bank; a fresh trajectory is sampled whole and kept."""
        if fresh or not self.bank.get(item.target):
            embeds, pooled = self.encode([item.target])
            negative, negative_pooled = self.negative(1)
            path = self.denoiser.trajectory(
                draws.latents.to(self.denoiser.device, self.denoiser.dtype),
                embeds,
                pooled,
                negative,
                negative_pooled,
                self.settings.guidance_scale,
            )
            self.bank.add(item.target, torch.cat(list(path)[:-1]))
        kept = self.bank.get(item.target)
        chosen = kept[-1]
        index = min(int(draws.time * len(chosen)), len(chosen) - 1)
        return chosen[index : index + 1].to(self.denoiser.device), self.denoiser.timesteps[index]

    def micro_step(self, item: PromptPair, draws: Draws, noisy: tuple[Tensor, Tensor] | None = None) -> MicroStep:
        """One prediction task; the loss carries the gradient to the delta.

        Args:
            item: prompts with their prefix.
            draws: random numbers.
            noisy: (x_t, timestep), or None to sample them.
        """
        latents, timestep = self.noisy_sample(item, draws) if noisy is None else noisy
        scales = draws.scales(*self.settings.scale_range).to(latents.device)
        embeds, pooled = self.encode([item.target, item.positive, item.negative])
        count = len(scales)
        shape = (-1,) + (1,) * (latents.ndim - 1)
        with torch.no_grad():
            estimates = self.denoiser.clean_estimate(latents.expand(3, *latents.shape[1:]), timestep, embeds, pooled)
            plain, positive, negative = estimates.float().chunk(3)
            target = plain + scales.reshape(shape) * (positive - negative)
        moved, moved_pooled = self._shifted(item, embeds[:1], None if pooled is None else pooled[:1], scales)
        prediction = self.denoiser.clean_estimate(
            latents.expand(count, *latents.shape[1:]), timestep, moved, moved_pooled
        ).float()
        error = (prediction - target).square()
        if self.settings.weighting == "uniform":
            signal, noise = self.denoiser.level(timestep.to(latents.device))
            # A clean estimate is off by noise / signal times the noise prediction's error (flow models: by noise).
            factor = noise / signal if self.denoiser.family == "unet" else noise
            error = error / factor.square().clamp_min(1e-8)
        return MicroStep(latents, target, prediction, error.mean())

    def draws(self, step: int, micro: int) -> Draws:
        """The random numbers of a micro-step, a function of seed, step and micro-step alone."""
        generator = torch.Generator().manual_seed(
            (self.settings.seed * 1_000_003 + step * self.settings.micro_steps + micro) % (2**63)
        )
        time = float(torch.rand(1, generator=generator))
        latents = torch.randn((1, *self.denoiser.latent_shape(self.settings.image_size)), generator=generator)
        signs = torch.rand(self.settings.scales, generator=generator)
        magnitudes = torch.rand(self.settings.scales, generator=generator)
        return Draws(time, latents, signs, magnitudes)

    def item(self, number: int) -> PromptPair:
        """The prompts of the `number`-th micro-step: every item once an epoch, in an order drawn for each epoch."""
        epoch, place = divmod(number, len(self.prompts))
        generator = torch.Generator().manual_seed(self.settings.seed * 7919 + epoch)
        return self.prompts[int(torch.randperm(len(self.prompts), generator=generator)[place])]

    def optimizer_step(self) -> float:
        """`micro_steps` summed gradients and one AdamW step; returns the mean loss."""
        total = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        pairs = self.settings.trajectory_pairs
        for micro in range(self.settings.micro_steps):
            number = self.step * self.settings.micro_steps + micro
            draws = self.draws(self.step, micro)
            noisy = None
            if pairs > 1:  # one item for as long as its trajectory serves
                item = self.item(number // pairs)
                noisy = self._banked_sample(item, draws, fresh=number % pairs == 0)
            else:
                item = self.item(number)
            result = self.micro_step(item, draws, noisy)
            if not bool(torch.isfinite(result.loss)):
                raise InvalidOutputError(
                    f"the loss became {float(result.loss.detach())} at step {self.step}; load the pipeline in float32 "
                    "or bfloat16, or lower the learning rate"
                )
            result.loss.backward()
            total += float(result.loss.detach())
        self.optimizer.step()
        self.step += 1
        self.losses.append(total / self.settings.micro_steps)
        return self.losses[-1]

    def learn(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        checkpoint_every: int = 100,
        on_step: Callable[[int, float], None] | None = None,
        progress: bool = True,
    ) -> AttributeDelta:
        """Run to `settings.steps`.

        Args:
            checkpoint: file (`.pt`) that the state is written to; an existing one is resumed.
            checkpoint_every: steps between two writings.
            on_step: called with (step, loss).
            progress: show a bar where the output is a terminal.

        Returns:
            The learned delta.
        """
        if checkpoint is not None and Path(checkpoint).exists():
            self.load_checkpoint(checkpoint)
        network = self.denoiser.network
        frozen = [parameter for parameter in network.parameters() if parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            bar = tqdm(
                total=self.settings.steps,
                initial=self.step,
                desc="learning a direction",
                unit="step",
                disable=None if progress else True,
            )
            with bar:
                while self.step < self.settings.steps:
                    loss = self.optimizer_step()
                    bar.update()
                    bar.set_postfix(loss=f"{loss:.4g}")
                    if on_step is not None:
                        on_step(self.step, loss)
                    if checkpoint is not None and self.step % checkpoint_every == 0:
                        self.save_checkpoint(checkpoint)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            if checkpoint is not None:
                self.save_checkpoint(checkpoint)
        return self.delta

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write delta, optimiser, step and settings."""
        content = {
            "delta": {key: value.cpu() for key, value in self.delta.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
            "settings": {
                key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.settings).items()
            },
        }
        with atomic_path(path) as temporary:
            torch.save(content, temporary)

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: if it belongs to other encoders or was made with other settings.
        """
        content = read_state_dict(path)
        missing = [key for key in ("delta", "optimizer", "step", "settings") if key not in content]
        if missing:
            raise CheckpointError(f"{path} is no checkpoint of a learned direction: it has no {', '.join(missing)}")
        mine = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.settings).items()}
        other = {
            key: (content["settings"].get(key), value)
            for key, value in mine.items()
            if key != "steps" and content["settings"].get(key) != value
        }
        if other:
            listed = ", ".join(f"{key} {old} (now {new})" for key, (old, new) in other.items())
            raise CheckpointError(f"{path} was made with other settings: {listed}; use those, or another file")
        delta = AttributeDelta.from_state_dict(content["delta"], str(path))
        for vectors, loaded in ((self.vectors, delta.tokenwise), (self.pooled_vectors, delta.pooled)):
            if {key: tuple(value.shape) for key, value in vectors.items()} != {
                key: tuple(value.shape) for key, value in loaded.items()
            }:
                raise CheckpointError(f"{path} belongs to other text encoders: it holds {delta}")
            with torch.no_grad():
                for key, value in loaded.items():
                    vectors[key].copy_(value)
        self.optimizer.load_state_dict(content["optimizer"])
        self.step = int(content["step"])
        self.losses = [float(value) for value in content.get("losses", [])]
