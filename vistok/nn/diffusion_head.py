"""MAR's diffusion head: a small MLP that denoises one token at a time, given a condition vector for each.

Source: Li et al., "Autoregressive Image Generation without Vector Quantization" (arXiv 2406.11838), section 3.
Letters: N rows (one token each), R condition rows (2 N with guidance), C token channels, D channels of the condition,
W width, S diffusion steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vistok.nn import diffusion
from vistok.nn.diffusion import TRAINING_STEPS, ancestral_step, cosine_process
from vistok.nn.sampling import Generators

__all__ = [
    "DiffusionHead",
    "DiffusionHeadSampler",
    "TimestepEmbedding",
    "modulated_steps",
    "modulation_of",
    "timestep_features",
]

FREQUENCIES = 256
MODULATION_BYTES = 2**26
NORM_EPS = 1e-6


def timestep_features(timesteps: Tensor, size: int = FREQUENCIES) -> Tensor:
    """Sinusoids float32 [N, size] of timesteps [N]: cosines first, frequencies from 1 down to 1 / 10,000."""
    half = size // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies.to(timesteps.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulation_of(layer: nn.Sequential, activated: Tensor, parts: int, scales: Sequence[int]) -> Tensor:
    """What `layer`, SiLU and a linear layer, makes of SiLU(condition): shifts, scales and gates side by side.

    Scales come with the 1 that they are added to: in the bias, where it costs nothing.

    Args:
        layer: `adaLN_modulation`.
        activated: [..., W].
        parts: how many vectors of W it makes.
        scales: which of these are scales.
    """
    linear = layer[1]
    ones = torch.zeros(parts, dtype=linear.bias.dtype, device=linear.bias.device)
    ones[list(scales)] = 1.0
    return functional.linear(activated, linear.weight, linear.bias + ones.repeat_interleave(len(linear.bias) // parts))


class TimestepEmbedding(nn.Module):
    """Sinusoids through two linear layers: [N] -> [N, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        """Timesteps int64 [N], 0..1000; of more rows than that, each different one is embedded once."""
        if len(timesteps) > TRAINING_STEPS + 1:
            every = torch.arange(TRAINING_STEPS + 1, device=timesteps.device)
            return functional.embedding(timesteps, self(every))
        return self.mlp(timestep_features(timesteps).to(self.mlp[0].weight.dtype))

    def initialise(self) -> None:
        """Normal(0, 0.02) weights."""
        nn.init.normal_(self.mlp[0].weight, std=0.02)
        nn.init.normal_(self.mlp[2].weight, std=0.02)


class ResidualBlock(nn.Module):
    """x + gate * mlp(modulated norm(x)); shift, scale and gate come from the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [N, W] and what `modulate` gives, [N, 3 W]."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, self.in_ln(x), scale)))

    def modulate(self, activated: Tensor) -> Tensor:
        """SiLU(condition) [..., W] to shift, scale and gate [..., 3 W] (see `modulation_of`)."""
        return modulation_of(self.adaLN_modulation, activated, 3, (1,))


class FinalLayer(nn.Module):
    """Modulated norm without weights, then a linear layer."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Input of the linear layer."""
        shift, scale = modulation.chunk(2, dim=-1)
        return torch.addcmul(shift, functional.layer_norm(x, (x.shape[-1],), eps=NORM_EPS), scale)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [..., W] and what `modulate` gives, [..., 2 W], to [..., size]."""
        return self.linear(self.modulated(x, modulation))

    def modulate(self, activated: Tensor) -> Tensor:
        """SiLU(condition) [..., W] to shift and scale [..., 2 W] (see `modulation_of`)."""
        return modulation_of(self.adaLN_modulation, activated, 2, (1,))


class MLPDenoiser(nn.Module):
    """The network of `DiffusionHead`: noise and variance logits of tokens."""

    def __init__(self, token_size: int, condition_size: int, num_layers: int, width: int) -> None:
        super().__init__()
        self.time_embed = TimestepEmbedding(width)
        self.cond_embed = nn.Linear(condition_size, width)
        self.input_proj = nn.Linear(token_size, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(num_layers))
        self.final_layer = FinalLayer(width, 2 * token_size)

    def forward(self, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Noisy tokens [N, C], timesteps int64 [N] and conditions to [N, 2 C]: eps, then variance logits.

        Conditions are [N, D], or fewer rows which are repeated in turn.
        """
        embedded = self.cond_embed(condition)
        embedded = embedded.repeat(len(x) // len(embedded), 1)
        *modulations, last = self.modulations(self.time_embed(timesteps) + embedded)
        x = self.input_proj(x)
        for block, modulation in zip(self.res_blocks, modulations, strict=True):
            x = block(x, modulation)
        return self.final_layer(x, last)

    def modulations(self, condition: Tensor) -> list[Tensor]:
        """What the layers make of embedded conditions [..., W]: [..., 3 W] a block and [..., 2 W] at the end."""
        activated = functional.silu(condition)
        return [layer.modulate(activated) for layer in (*self.res_blocks, self.final_layer)]

    def guided(self, x: Tensor, modulations: Sequence[Tensor], guidance_scale: float | None) -> tuple[Tensor, Tensor]:
        """(eps, variance logits), each [N, C], of states [N, C].

        With guidance, the modulations are those of the conditional rows and then of as many unconditional ones. Both
        see the same states, eps is guided and the variance is the conditional one, so the unconditional half of it is
        not computed.
        """
        size, rows = x.shape[-1], len(x)
        x = self.input_proj(x)
        if guidance_scale is not None:
            x = torch.cat([x, x])
        for block, modulation in zip(self.res_blocks, modulations):
            x = block(x, modulation)
        x = self.final_layer.modulated(x, modulations[-1])
        linear = self.final_layer.linear
        eps, logits = linear(x[:rows]).split(size, dim=-1)
        if guidance_scale is not None:
            without = functional.linear(x[rows:], linear.weight[:size], linear.bias[:size])
            eps = torch.lerp(without.float(), eps.float(), guidance_scale)
        return eps, logits


def modulated_steps(
    modulations: Callable[[Tensor], list[Tensor]], embedded: Tensor, times: Tensor
) -> Iterator[list[Tensor]]:
    """The modulations of each diffusion step in turn, computed for as many steps at once as `MODULATION_BYTES` hold.

    Args:
        modulations: of embedded conditions [..., W].
        embedded: conditions [..., W] without their timestep.
        times: embedded timesteps [S, W].
    """
    start, count = 0, 1  # the first step shows how much one takes
    while start < len(times):
        chosen = times[start : start + count].view(-1, *[1] * (embedded.ndim - 1), times.shape[1])
        made = modulations(embedded + chosen)
        for place in range(len(made[0])):
            yield [layer[place] for layer in made]
        start += len(made[0])
        taken = sum(layer[0].numel() * layer.element_size() for layer in made)
        count = max(1, MODULATION_BYTES // taken)


class DiffusionHead(nn.Module):
    """p(token | condition), learned by denoising ("DiffLoss").

    Args:
        token_size: C.
        condition_size: D.
        num_layers: residual blocks.
        width: W.
    """

    def __init__(self, token_size: int, condition_size: int, num_layers: int, width: int) -> None:
        super().__init__()
        self.token_size = token_size
        self.net = MLPDenoiser(token_size, condition_size, num_layers, width)

    def initialise(self) -> None:
        """Xavier matrices, zero biases; modulation and output start at zero, so that every block is the identity."""
        for module in self.net.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.net.time_embed.initialise()
        for block in self.net.res_blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.net.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.net.final_layer.linear.weight)

    def loss_terms(self, target: Tensor, condition: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(error of the noise, variational bound), float32 [N] each, at given timesteps [N] and noise [N, C].

        Conditions as in `MLPDenoiser.forward`.
        """
        process = cosine_process()
        noisy = process.add_noise(target, timesteps, noise)
        output = self.net(noisy.to(condition.dtype), timesteps, condition)
        eps, logits = output.split(self.token_size, dim=-1)
        return process.losses(target, timesteps, noise, eps, logits)

    def loss(
        self,
        target: Tensor,
        condition: Tensor,
        *,
        repeats: int = 1,
        weighting: str = "epsilon",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean loss of tokens [N, C] given conditions [N, D], each at `repeats` random noise levels.

        `weighting` is that of `diffusion.loss_weights`.
        """
        target = target.float().repeat(repeats, 1)
        timesteps = diffusion.uniform_timesteps(len(target), generator, target.device)
        noise = diffusion.gaussian_noise(tuple(target.shape), generator, target.device)
        error, bound = self.loss_terms(target, condition, timesteps, noise)
        return (error * diffusion.loss_weights(cosine_process(), timesteps, weighting) + bound).mean()

    def sampler(self, respacing: str | int) -> DiffusionHeadSampler:
        """What draws tokens; make one for a whole image, not one for each of its steps."""
        return DiffusionHeadSampler(self, respacing)


class DiffusionHeadSampler:
    """Draws tokens by ancestral sampling.

    What does not change is computed once: the embedding of every timestep for the sampler's life, that of the
    condition for a call. Nor does a layer's modulation depend on the state: it is computed for many steps in one
    product, which reads the largest weights once rather than in every step. The state stays float32 and holds the
    conditional half only; no step asks the device.

    Args:
        head: the head.
        respacing: diffusion steps (see `respaced_timesteps`).
    """

    def __init__(self, head: DiffusionHead, respacing: str | int) -> None:
        self.net, self.token_size = head.net, head.token_size
        self.steps = cosine_process(respacing).reverse_steps()
        device = self.net.cond_embed.weight.device
        timesteps = torch.tensor([step.timestep for step in self.steps], device=device)
        self.times = self.net.time_embed(timesteps)

    def __call__(
        self,
        condition: Tensor,
        *,
        num_images: int,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        generator: Generators = None,
    ) -> Tensor:
        """Tokens float32 [N, C], image by image.

        Args:
            condition: [R, D]: a row for each token; with guidance, as many unconditional rows follow.
            num_images: B, over which the N rows are divided evenly.
            guidance_scale: eps = u + s (c - u), the variance is not guided; None is no guidance.
            temperature: scales the noise of the steps, not that of the start.
            generator: one for all images, or one an image.
        """
        rows = len(condition) // (1 if guidance_scale is None else 2)
        shape = (num_images, rows // num_images, self.token_size)
        embedded = self.net.cond_embed(condition)
        x = diffusion.gaussian_noise(shape, generator, condition.device).flatten(0, 1)
        ahead = modulated_steps(self.net.modulations, embedded, self.times)
        for step, modulations in zip(self.steps, ahead):
            eps, logits = self.net.guided(x.to(embedded.dtype), modulations, guidance_scale)
            noise = None
            if step.number and temperature:
                noise = diffusion.gaussian_noise(shape, generator, condition.device).flatten(0, 1)
            x = ancestral_step(x, step, eps, noise, logits, temperature=temperature)
        return x
