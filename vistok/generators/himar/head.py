"""Hi-MAR's dense head: a diffusion transformer that denoises all tokens of an image jointly.

Source: Zheng et al., "Hierarchical Masked Autoregressive Models with Low-Resolution Token Pivots" (arXiv 2505.20288).
Letters: B images, R condition rows (2 B with guidance), C channels, H rows and W columns of latents, N tokens,
D channels of the condition, h width, S diffusion steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vistok.nn import diffusion
from vistok.nn.diffusion import ancestral_step, cosine_process
from vistok.nn.diffusion_head import FinalLayer, TimestepEmbedding, modulated_steps, modulation_of
from vistok.nn.masked import grid_places, patchify
from vistok.nn.positions import plane_sinusoids
from vistok.nn.sampling import Generators
from vistok.nn.vit import SelfAttention, ViTMLP

__all__ = ["DiffusionTransformer", "TransformerHead", "TransformerHeadSampler"]

NORM_EPS = 1e-6


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its size, as a linear layer of patches [..., C p p] (see `patchify`)."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """[..., C p p] -> [..., h]."""
        return functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the condition of the token."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = SelfAttention(width, num_heads)
        self.mlp = ViTMLP(width, int(width * mlp_ratio), approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [R, N, h] and what `modulate` gives, [R, N, 6 h]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(torch.addcmul(shift1, normalised(x), scale1)))
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, normalised(x), scale2)))

    def modulate(self, activated: Tensor) -> Tensor:
        """SiLU(condition) [..., h] to shift, scale and gate of both branches [..., 6 h] (see `modulation_of`)."""
        return modulation_of(self.adaLN_modulation, activated, 6, (1, 4))


def normalised(x: Tensor) -> Tensor:
    """LayerNorm without weights."""
    return functional.layer_norm(x, (x.shape[-1],), eps=NORM_EPS)


class DiffusionTransformer(nn.Module):
    """The network of `TransformerHead`: noise of latents, from the latents and one condition vector a token.

    Args:
        grid: (H, W) of latents.
        patch_size: p; a token is a patch of p x p latents.
        channels: C.
        condition_size: D.
        num_layers, width, num_heads, mlp_ratio: of the blocks.
    """

    pos_embed: Tensor

    def __init__(
        self,
        grid: tuple[int, int],
        patch_size: int,
        channels: int,
        condition_size: int,
        num_layers: int,
        width: int,
        num_heads: int,
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        self.tokens = (grid[0] // patch_size, grid[1] // patch_size)
        self.patch_size, self.channels = patch_size, channels
        self.x_embedder = PatchEmbedding(channels, width, patch_size)
        self.c_embedder = PatchEmbedding(condition_size, width, patch_size)
        self.t_embedder = TimestepEmbedding(width)
        self.register_buffer("pos_embed", plane_sinusoids(grid_places(self.tokens), width)[None])
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, mlp_ratio) for _ in range(num_layers))
        self.final_layer = FinalLayer(width, channels * patch_size**2)

    def initialise(self) -> None:
        """Xavier matrices, zero biases; modulation and output start at zero, so that every block is the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        self.t_embedder.initialise()
        for module in (*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(module.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def embed(self, x: Tensor) -> Tensor:
        """States [B, C, H, W] to the blocks' input [B, N, h]."""
        return self.x_embedder(patchify(x, self.patch_size).to(self.pos_embed.dtype)) + self.pos_embed

    def modulations(self, condition: Tensor) -> list[Tensor]:
        """What the layers make of embedded conditions [..., h]: [..., 6 h] a block and [..., 2 h] at the end."""
        activated = functional.silu(condition)
        return [layer.modulate(activated) for layer in (*self.blocks, self.final_layer)]

    def denoise(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """Embedded states [R, N, h] and what `modulations` gives, to noise [R, C, H, W]."""
        for block, modulation in zip(self.blocks, modulations):
            x = block(x, modulation)
        (rows, cols), side = self.tokens, self.patch_size
        cut = self.final_layer(x, modulations[-1]).unflatten(-1, (side, side, self.channels)).unflatten(1, (rows, cols))
        return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.channels, rows * side, cols * side)

    def forward(self, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Noise [R, C, H, W] from noisy latents of that shape, timesteps int64 [R] and conditions.

        Conditions are [R, N, D p p], or fewer rows which are repeated in turn.
        """
        embedded = self.c_embedder(condition)
        embedded = self.t_embedder(timesteps)[:, None] + embedded.repeat(len(x) // len(embedded), 1, 1)
        return self.denoise(self.embed(x), self.modulations(embedded))


class TransformerHead(nn.Module):
    """p(all unknown tokens | a condition for each token, known tokens), learned by denoising.

    Arguments as in `DiffusionTransformer`; the variance is not learned but fixed to the larger bound.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        channels: int,
        condition_size: int,
        num_layers: int,
        width: int,
        num_heads: int,
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        self.net = DiffusionTransformer(grid, 1, channels, condition_size, num_layers, width, num_heads, mlp_ratio)

    def initialise(self) -> None:
        """See `DiffusionTransformer.initialise`."""
        self.net.initialise()

    def loss(
        self,
        target: Tensor,
        condition: Tensor,
        mask: Tensor,
        *,
        repeats: int = 1,
        weighting: str = "epsilon",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean squared error of the noise of unknown latents, over *all* latents.

        Args:
            target: clean latents [B, C, H, W].
            condition: [B, N, D].
            mask: [B, 1, H, W], 1 where unknown.
            repeats: noise levels at which each image is trained; one level for all latents of an image, known ones too.
            weighting: of `diffusion.loss_weights`.
            generator: draws levels and noise.
        """
        target, mask = target.float().repeat(repeats, 1, 1, 1), mask.repeat(repeats, 1, 1, 1)
        timesteps = diffusion.uniform_timesteps(len(target), generator, target.device)
        noise = diffusion.gaussian_noise(tuple(target.shape), generator, target.device)
        error = denoising_error(self.net, target, condition, timesteps, noise, mask)
        return (error * diffusion.loss_weights(cosine_process(), timesteps, weighting)).mean()

    def sampler(self, respacing: str | int) -> TransformerHeadSampler:
        """What draws tokens; make one for a whole image, not one for each of its steps."""
        return TransformerHeadSampler(self.net, respacing)


def denoising_error(
    net: DiffusionTransformer, target: Tensor, condition: Tensor, timesteps: Tensor, noise: Tensor, mask: Tensor | None
) -> Tensor:
    """Squared error of the noise float32 [R], averaged over all latents; those with mask 0 count as without error."""
    noisy = cosine_process().add_noise(target, timesteps, noise)
    difference = noise - net(noisy, timesteps, condition).float()
    if mask is not None:
        difference = difference * mask
    return (difference**2).flatten(1).mean(1)


class TransformerHeadSampler:
    """Draws all unknown latents by ancestral sampling, while known ones are noised to the level of each step.

    What does not change is computed once: the embedding of every timestep for the sampler's life, that of the
    condition for a call. The state stays float32 and holds B images, also with guidance; no step asks the device.

    Args:
        net: the network.
        respacing: diffusion steps (see `respaced_timesteps`).
    """

    def __init__(self, net: DiffusionTransformer, respacing: str | int) -> None:
        self.net = net
        self.steps = cosine_process(respacing).reverse_steps()
        timesteps = torch.tensor([step.timestep for step in self.steps], device=net.pos_embed.device)
        self.times = net.t_embedder(timesteps)

    def __call__(
        self,
        condition: Tensor,
        shape: tuple[int, int, int, int],
        *,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        generator: Generators = None,
        known: Tensor | None = None,
        unknown: Tensor | None = None,
    ) -> Tensor:
        """Latents float32 [B, C, H, W]; what stands at known places means nothing.

        Args:
            condition: [R, N, D p p]: conditional rows; with guidance, as many unconditional ones follow.
            shape: (B, C, H, W).
            guidance_scale: u + s (c - u); None is no guidance.
            temperature: scales the noise of the steps, not that of the start.
            generator: one for all images, or one an image.
            known: [B, C, H, W], the values to keep; None if there are none.
            unknown: bool, broadcastable to [B, C, H, W], where they are missing.
        """
        net, device = self.net, condition.device
        embedded = net.c_embedder(condition)
        start = diffusion.gaussian_noise(shape, generator, device)
        x = start
        for step, modulations in zip(self.steps, modulated_steps(net.modulations, embedded, self.times)):
            if known is not None and unknown is not None:
                x = torch.where(unknown, x, torch.add(known * step.signal, start, alpha=step.noise))
            states = net.embed(x)
            if guidance_scale is not None:
                states = torch.cat([states, states])
            eps = net.denoise(states, modulations).float()
            if guidance_scale is not None:
                with_condition, without = eps.chunk(2)
                eps = torch.lerp(without, with_condition, guidance_scale)
            noise = diffusion.gaussian_noise(shape, generator, device) if step.number and temperature else None
            x = ancestral_step(x, step, eps, noise, temperature=temperature)
        return x
