"""The position code, and the attention processors that add it to text queries and keys.

Letters: B batch, H heads, N text positions, I image positions, C width of the text states, K width of the projection.

TENOR adds a sinusoidal code to the text states on the query and key path only. Projections are linear, so
`W (c + PE) = W c + W PE`: the code enters as one constant [N, K] a layer, computed once, and the authors' second
projection of all text states disappears.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.nn import functional

from vistok.attach import Attachable, Handle
from vistok.errors import InvalidInputError

__all__ = ["AttentionMaps", "Tenor", "attention_layers", "position_code", "projected_code"]


def position_code(
    length: int, channels: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """The sinusoidal code [N, C] (section 2.1): sines in even columns, cosines in odd ones, computed in float32.

    Args:
        length: N.
        channels: C; an odd one is rounded up and the last column dropped.
        dtype: of the result.
        device: of the result.
    """
    if length < 1 or channels < 1:
        raise InvalidInputError(f"a position code needs at least one position and channel, got {length} and {channels}")
    even = channels + channels % 2
    frequencies = 1.0 / (10000 ** (torch.arange(0, even, 2, device=device).float() / even))
    angles = torch.arange(length, device=device).float()[:, None] * frequencies[None]
    code = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
    return code[:, :channels].to(dtype)


def projected_code(projection: nn.Module, length: int, channels: int, like: Tensor) -> Tensor:
    """`W PE` [N, K] of a linear layer, whatever adapters and hooks it carries (its bias taken off)."""
    code = position_code(length, channels, like.dtype, like.device)
    # One more row for the bias; a batch axis, because adapters may expect one.
    rows = projection(torch.cat([code, torch.zeros_like(code[:1])])[None])[0]
    return rows[:-1] - rows[-1:]


def _fingerprint(*modules: nn.Module | None) -> tuple[Any, ...] | None:
    """Changes whenever what these layers compute may have changed: weights, adapters, their scales, hooks.

    None if that cannot be seen: a hook of somebody else, which may compute anything.
    """
    marks: list[Any] = []

    def mark(value: Tensor) -> None:
        marks.append((value.data_ptr(), 0 if value.is_inference() else value._version, value.dtype))

    for module in modules:
        if module is None:
            continue
        for part in module.modules():
            for value in part.parameters(recurse=False):
                mark(value)
            for number, hook in part._forward_hooks.items():
                reads = getattr(hook, "reads", None)
                if reads is None:
                    return None
                marks.append(number)
                for value in reads:
                    mark(value)
            for name in ("scaling", "active_adapters", "disable_adapters", "merged_adapters"):
                setting = getattr(part, name, None)
                if setting is not None:
                    marks.append(str(setting))
    return tuple(marks)


class _Constants:
    """Projected codes of one layer, recomputed when its weights or adapters change."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Tensor, ...]] = {}
        self._marks: tuple[Any, ...] = ()

    def get(self, projections: list[nn.Module], length: int, channels: int, like: Tensor) -> tuple[Tensor, ...] | None:
        """One constant [N, K] a projection; None while the layer learns, when it changes with every step."""
        name = (length, channels, like.dtype, like.device)
        if torch.compiler.is_compiling() and name in self._kept:
            return self._kept[name]
        # Adapters that train outside of the module act through hooks.
        learning = torch.is_grad_enabled() and any(
            module._forward_hooks or any(value.requires_grad for value in module.parameters()) for module in projections
        )
        if learning:
            return None
        marks = _fingerprint(*projections)
        if marks is None:
            return tuple(projected_code(module, length, channels, like) for module in projections)
        if marks != self._marks:
            self._kept, self._marks = {}, marks
        if name not in self._kept:
            with torch.no_grad():
                self._kept[name] = tuple(projected_code(module, length, channels, like) for module in projections)
        return self._kept[name]


class AttentionMaps:
    """Cross-attention probabilities of one forward pass: `down_16`, `mid_8`, ... -> [B, H, rows, columns, N] a layer.

    Attributes:
        maps: place and resolution -> layers in order.
    """

    def __init__(self) -> None:
        self.maps: dict[str, list[Tensor]] = {}

    def clear(self) -> None:
        """Forget the last pass."""
        self.maps = {}

    def add(self, place: str, probabilities: Tensor, heads: int) -> None:
        """Keep [B * H, I, N] of one layer."""
        rows, positions, tokens = probabilities.shape
        side = round(positions**0.5)
        if side * side != positions:
            raise InvalidInputError(f"attention maps are kept for square latents; got {positions} positions")
        grid = probabilities.reshape(rows // heads, heads, side, side, tokens)
        self.maps.setdefault(f"{place}_{side}", []).append(grid)


class _UNetProcessor:
    """Cross-attention of a UNet with the code on its keys (section 2.2).

    Text keys and values do not change between steps: they are kept for as long as the very same text states come in.
    """

    def __init__(self, backend: Any, place: str, maps: AttentionMaps | None) -> None:
        self._attention_backend = backend
        self.place, self.maps = place, maps
        self._constants = _Constants()
        self._text: tuple[Tensor, int, tuple[Any, ...], Tensor, Tensor] | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query = attn.to_q(hidden_states)
        if encoder_hidden_states is None:  # a cross-attention layer used on itself: stock behaviour
            key, value = attn.to_k(hidden_states), attn.to_v(hidden_states)
        else:
            key, value = self._keys_and_values(attn, encoder_hidden_states)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[1], key.shape[0])
        if self.maps is not None:
            # The layer's own score function honours `upcast_attention`.
            split = [attn.head_to_batch_dim(part) for part in (query, key, value)]
            probabilities = attn.get_attention_scores(split[0], split[1], attention_mask)
            self.maps.add(self.place, probabilities, attn.heads)
            hidden_states = attn.batch_to_head_dim(torch.bmm(probabilities, split[2]))
        else:
            if attention_mask is not None:
                attention_mask = attention_mask.reshape(key.shape[0], attn.heads, -1, attention_mask.shape[-1])
            heads = [part.unflatten(-1, (attn.heads, -1)) for part in (query, key, value)]
            hidden_states = dispatch_attention_fn(
                *heads, attn_mask=attention_mask, backend=self._attention_backend
            ).flatten(2)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states.to(query.dtype)))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _keys_and_values(self, attn: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        fused = bool(getattr(attn, "fused_projections", False)) and hasattr(attn, "to_kv")
        projections = [attn.to_kv] if fused else [attn.to_k, attn.to_v]
        keep = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        marks = _fingerprint(*projections, attn.norm_cross, attn.norm_k) if keep else None
        # Inference tensors count no versions, so changes in place could not be seen.
        keep = keep and marks is not None and not states.is_inference()
        if keep and self._text is not None:
            seen, version, marks_then, key, value = self._text
            if seen is states and version == states._version and marks_then == marks:
                return key, value
        given = states
        if attn.norm_cross:
            states = attn.norm_encoder_hidden_states(states)
        length, channels = states.shape[1:]
        constants = self._constants.get(projections[:1], length, channels, states)
        if constants is None:
            coded = states + position_code(length, channels, states.dtype, states.device)
            key = attn.to_kv(coded).chunk(2, dim=-1)[0] if fused else attn.to_k(coded)
            value = attn.to_kv(states).chunk(2, dim=-1)[1] if fused else attn.to_v(states)
        elif fused:
            key, value = attn.to_kv(states).chunk(2, dim=-1)
            key = key + constants[0].chunk(2, dim=-1)[0]
        else:
            key, value = attn.to_k(states) + constants[0], attn.to_v(states)
        if attn.norm_k is not None:
            heads = key.unflatten(-1, (attn.heads, -1))
            key = attn.norm_k(heads).flatten(-2)
        self._text = (given, given._version, marks, key, value) if keep and marks is not None else None
        return key, value


class _JointProcessor:
    """Joint attention of FLUX (text first) and SD3 (image first) with the code on text queries and keys."""

    _parallel_config = None

    def __init__(self, backend: Any, text_first: bool) -> None:
        self._attention_backend = backend
        self.text_first = text_first
        self._constants = _Constants()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        if encoder_hidden_states is None:
            raise InvalidInputError("this attention layer got no text states; attach Tenor to a text-to-image model")
        fused = bool(getattr(attn, "fused_projections", False))
        image = (
            attn.to_qkv(hidden_states).chunk(3, dim=-1)
            if fused
            else (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        )
        length, channels = encoder_hidden_states.shape[1:]
        projections = [attn.to_added_qkv] if fused else [attn.add_q_proj, attn.add_k_proj]
        constants = self._constants.get(projections, length, channels, encoder_hidden_states)
        coded = encoder_hidden_states
        if constants is None:
            coded = coded + position_code(length, channels, coded.dtype, coded.device)
        if fused:
            text = list(attn.to_added_qkv(encoder_hidden_states).chunk(3, dim=-1))
            if constants is None:
                text[:2] = attn.to_added_qkv(coded).chunk(3, dim=-1)[:2]
            else:
                constants = constants[0].chunk(3, dim=-1)[:2]
        else:
            text = [attn.add_q_proj(coded), attn.add_k_proj(coded), attn.add_v_proj(encoder_hidden_states)]
        if constants is not None:
            text[0], text[1] = text[0] + constants[0], text[1] + constants[1]

        width = image[0].shape[-1] // attn.heads
        parts = []
        for index, name in enumerate(("q", "k", "v")):
            ours, theirs = image[index].unflatten(-1, (-1, width)), text[index].unflatten(-1, (-1, width))
            norm, added_norm = getattr(attn, f"norm_{name}", None), getattr(attn, f"norm_added_{name}", None)
            # Joint attention of SD3 normalises [B, H, N, D]; the norm acts on the last axis in either layout.
            ours = ours if norm is None else norm(ours)
            theirs = theirs if added_norm is None else added_norm(theirs)
            parts.append(torch.cat([theirs, ours] if self.text_first else [ours, theirs], dim=1))
        if image_rotary_emb is not None:
            parts[:2] = [apply_rotary_emb(part, image_rotary_emb, sequence_dim=1) for part in parts[:2]]
        joined = dispatch_attention_fn(
            *parts, attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        joined = joined.flatten(2).to(parts[0].dtype)
        if self.text_first:
            text_out, image_out = joined[:, :length], joined[:, length:]
        else:
            image_out, text_out = joined[:, : hidden_states.shape[1]], joined[:, hidden_states.shape[1] :]
        image_out = attn.to_out[1](attn.to_out[0](image_out.contiguous()))
        if not getattr(attn, "context_pre_only", False):
            text_out = attn.to_add_out(text_out.contiguous())
        return image_out, text_out


# Processors that compute plain attention, so that ours can stand in; -> the name of their backend.
_STOCK: dict[str, str | None] = {
    "AttnProcessor": None,
    "AttnProcessor2_0": None,
    "FusedAttnProcessor2_0": None,
    "XFormersAttnProcessor": "xformers",
    "FluxAttnProcessor": None,
    "JointAttnProcessor2_0": None,
    "FusedJointAttnProcessor2_0": None,
    "XFormersJointAttnProcessor": "xformers",
}


def attention_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """(place, layer) of every attention layer that reads text: `down`, `mid`, `up` in a UNet, `joint` in an MMDiT.

    Raises:
        InvalidInputError: for a network of another family.
    """
    name = type(network).__name__
    if name == "UNet2DConditionModel":
        for path, module in network.named_modules():
            if type(module).__name__ == "Attention" and getattr(module, "is_cross_attention", False):
                yield path.split("_")[0], module
    elif name in ("FluxTransformer2DModel", "SD3Transformer2DModel"):
        for block in network.transformer_blocks:
            yield "joint", block.attn
    else:
        raise InvalidInputError(
            f"Tenor knows UNet2DConditionModel, FluxTransformer2DModel and SD3Transformer2DModel, not {name}"
        )


def network_of(model: Any) -> nn.Module:
    """The denoiser of a pipeline, or the denoiser itself."""
    parts = getattr(model, "components", None)
    if isinstance(parts, dict):
        found = parts.get("unet") if parts.get("unet") is not None else parts.get("transformer")
        if found is None:
            raise InvalidInputError(f"{type(model).__name__} has neither unet nor transformer")
        return found
    return model


class Tenor(Attachable):
    """Token encoding ordering (CoMPaSS, ICCV 2025, arXiv 2412.13195): lets text attention know the order of the words.

        with Tenor().attached(pipe):
            image = pipe("a photo of a motorcycle right of a bear").images[0]

    Works on pipelines and denoisers of Stable Diffusion 1.x/2.x, SDXL, SD3 and FLUX. It helps models that were
    fine-tuned with it (`load_unet`, `FluxLowRankAdapters`); others it only perturbs.

    Args:
        maps: keeps the cross-attention probabilities of UNets; None uses the fused attention.
        training: UNets then compute every attention by the layers' own score function, as the authors' training does.
    """

    def __init__(self, maps: AttentionMaps | None = None, *, training: bool = False) -> None:
        self.maps, self.training = maps, training

    def _attach(self, model: Any, handle: Handle) -> None:
        network = network_of(model)
        layers = list(attention_layers(network))
        for place, layer in layers:
            before = layer.processor
            stock = type(before).__name__
            if stock not in _STOCK:
                what = (
                    "Tenor is attached already"
                    if isinstance(before, _UNetProcessor | _JointProcessor)
                    else (
                        f"a layer uses {stock}, whose computation Tenor does not know; unload what installed it "
                        "(IP-Adapter, PAG) first"
                    )
                )
                raise InvalidInputError(f"cannot attach to this {type(network).__name__}: {what}")
            backend = getattr(before, "_attention_backend", None) or _STOCK[stock]
            if place == "joint":
                if self.maps is not None:
                    raise InvalidInputError("attention maps are kept for UNets only")
                processor: Any = _JointProcessor(backend, type(network).__name__ == "FluxTransformer2DModel")
                processor._parallel_config = getattr(before, "_parallel_config", None)
            else:
                processor = _UNetProcessor(backend, place, self.maps)
            layer.processor = processor
            handle.undo_with(setattr, layer, "processor", before)
        if self.training:
            # Training runs in the layers' own score function throughout, as the authors' does: it honours
            # `upcast_attention`, which the fused attention of the other layers ignores.
            read_text = {id(layer) for _, layer in layers}
            for module in network.modules():
                if type(module).__name__ != "Attention" or id(module) in read_text:
                    continue
                if type(module.processor).__name__ in _STOCK:
                    handle.undo_with(setattr, module, "processor", module.processor)
                    module.processor = AttnProcessor()


def resized_mask(mask: Tensor, side: int) -> Tensor:
    """float [..., side, side] of {0, 1}: any overlap with the mask [..., H, W] counts (antialiased, > 0)."""
    small = functional.interpolate(
        mask.reshape(-1, 1, *mask.shape[-2:]).float(), size=(side, side), mode="bilinear", antialias=True
    )
    return (small > 0).float().reshape(*mask.shape[:-2], side, side)
