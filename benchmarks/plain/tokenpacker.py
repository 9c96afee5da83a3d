"""TokenPacker as described by its authors (arXiv 2407.02392, section 3.1), on the weights of our model.

Every hidden state of the tower is kept, four levels are joined, keys and values pass through separate MLPs, the coarse
map is interpolated as a whole, and each cell is an attention problem of its own with the map of weights computed.

Letters: B crops, g side of the patch grid, N = g^2 patches, s scale factor, M tokens, E attention width, D width of
the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vistok.tokenizers.tokenpacker import TokenPacker

__all__ = ["project", "tower_features"]


def tower_features(tower: nn.Module, images: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(last level [B, N, C], all levels joined [B, N, L C]) from all hidden states, without the class token."""
    states = tower(images, output_hidden_states=True).hidden_states
    return states[levels[-1]][:, 1:], torch.cat([states[level][:, 1:] for level in levels], dim=-1)


def project(packer: TokenPacker, features: Tensor, multi_level: Tensor) -> Tensor:
    """Tokens [B, M, D] from features [B, N, C] and joined levels [B, N, L C]."""
    batch, patches, channels = features.shape
    side, width = round(patches**0.5), packer.config.embed_dim
    s, coarse = packer.scale_factor, side // packer.scale_factor
    key_in, value_in = packer.key_value_in.weight.chunk(2)
    key_bias, value_bias = packer.key_value_in.bias.chunk(2)
    key = packer.key_norm(packer.key_proj(functional.gelu(functional.linear(multi_level, key_in, key_bias))))
    value = packer.value_norm(packer.value_proj(functional.gelu(functional.linear(multi_level, value_in, value_bias))))
    image = features.float().transpose(1, 2).reshape(batch, channels, side, side)
    points = functional.interpolate(image, (coarse, coarse), mode="bilinear").flatten(2).transpose(1, 2)
    query = packer.query_norm(packer.query_proj(points.to(features.dtype)))

    def problems(x: Tensor, size: int) -> Tensor:
        """[B, size^2 coarse^2, E] as [size^2, M B, E]."""
        cells = x.reshape(batch, coarse, size, coarse, size, width).permute(2, 4, 1, 3, 0, 5)
        return cells.reshape(size * size, -1, width)

    attended, _ = functional.multi_head_attention_forward(
        problems(query, 1),
        problems(key, s),
        problems(value, s),
        width,
        packer.num_heads,
        packer.attention_in.weight,
        packer.attention_in.bias,
        None,
        None,
        False,
        0.0,
        packer.attention_out.weight,
        packer.attention_out.bias,
        need_weights=True,
    )
    tokens = attended.view(coarse * coarse, batch, width).transpose(0, 1)
    return packer.mlp_out(functional.gelu(packer.mlp_in(tokens)))
