"""SEED as described by its authors (arXiv 2310.01218, section 3.1), on the weights of our model.

Biases are assembled at every call, attention keeps its scores, every picture runs through all of the Q-Former with a
mask, each layer projects the features of the picture for itself, and all distances to the codebook are kept.

Letters: B pictures, S patches and class token, n queries, D width, C channels of a code, K codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vistok.tokenizers.seed import SEED, QFormer

__all__ = ["decode_embeddings", "encode", "paint"]


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """[B, L, D] from queries, keys and values, with all scores in memory."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + (1 - mask.to(scores)) * -10000.0
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def vit_block(block: Any, x: Tensor) -> Tensor:
    """A block with its query and value bias joined at every call."""
    query_bias, _, value_bias = block.attn.qkv.bias.chunk(3)
    bias = torch.cat([query_bias, torch.zeros_like(query_bias), value_bias])
    qkv = functional.linear(block.norm1(x), block.attn.qkv.weight, bias)
    x = x + block.attn.proj(attend(*qkv.chunk(3, -1), heads=block.attn.num_heads))
    return x + block.mlp(block.norm2(x))


def qformer(model: QFormer, queries: Tensor, encoder_states: Tensor, causal: bool) -> Tensor:
    """Last states [B, n, D] of queries [B, n, D]."""
    x, n = model.embedding_norm(queries), queries.shape[1]
    mask = torch.ones(n, n).tril() if causal else None
    crossing = sum(layer.cross for layer in model.layers)
    weights = iter(model.cross_key_value.weight.chunk(2 * crossing))
    biases = iter(model.cross_key_value.bias.chunk(2 * crossing))
    for layer in model.layers:
        attended = attend(*layer.attention_qkv(x).chunk(3, -1), heads=layer.num_heads, mask=mask)
        x = layer.attention_norm(layer.attention_out(attended) + x)
        if layer.cross:
            key, value = (functional.linear(encoder_states, next(weights), next(biases)) for _ in range(2))
            x = layer.cross_norm(layer.cross_out(attend(layer.cross_query(x), key, value, layer.num_heads)) + x)
        x = layer.feed_forward(x, text=False)
    return x


def tasked(layers: nn.Sequential, x: Tensor) -> Tensor:
    """The layers one after the other."""
    for layer in layers:
        x = layer(x)
    return x


@torch.no_grad()
def encode(model: SEED, pixels: Tensor) -> Tensor:
    """CLIP-normalised pictures [B, 3, H, W] to ids int64 [B, n]."""
    vision = model.vision
    patches = vision.patch_embed(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([vision.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + vision.pos_embed
    for block in vision.blocks:
        x = vit_block(block, x)
    queries = model.query_tokens.expand(len(pixels), -1, -1)
    z = tasked(model.encode_task_layer, qformer(model.qformer, queries, model.vision_norm(x), model.config.causal))
    flat = z.flatten(0, 1)
    distances = flat.square().sum(1, keepdim=True) + model.codebook.square().sum(1) - 2 * flat @ model.codebook.t()
    return distances.argmin(1).view(z.shape[:2])


@torch.no_grad()
def decode_embeddings(model: SEED, ids: Tensor) -> Tensor:
    """Ids [B, n] to image embeddings [B, E]."""
    x = tasked(model.decode_task_layer, functional.embedding(ids, model.codebook)) + model.image_position
    for block in model.image_blocks:
        x = x + block.attn.proj(attend(*block.attn.qkv(block.norm1(x)).chunk(3, -1), heads=block.attn.num_heads))
        x = x + block.mlp(block.norm2(x))
    if model.config.head == "mlp":
        return model.embedding_proj(model.image_down(x).flatten(1))
    queries = model.reverse_tokens.expand(len(ids), -1, -1)
    answer = model.embedding_proj(qformer(model.reverse_qformer, queries, x, causal=False))
    return answer[:, 0] if model.config.head == "qformer" else answer


@torch.no_grad()
def paint(pipeline: Any, embeddings: Tensor, latents: Tensor, generator: torch.Generator, **settings: Any) -> Tensor:
    """Pictures [1, 3, H, W] in [-1, 1] from one embedding [1, E], through the stock pipeline."""
    latents = pipeline(
        image_embeds=embeddings,
        prompt="",
        latents=latents,
        generator=generator,
        output_type="latent",
        **settings,
    ).images
    return pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
