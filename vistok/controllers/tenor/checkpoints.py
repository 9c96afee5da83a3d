"""Published weights: fine-tuned UNets, the FLUX adapter in its own layout, and FLUX in its authors' layout.

Letters: r rank, h hidden size of FLUX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vistok.attach import Attachable, Handle
from vistok.errors import CheckpointError, InvalidInputError
from vistok.nn.model import VistokModel, describe_mismatch
from vistok.registry import Published, unknown_name

from .attention import network_of

__all__ = [
    "PUBLISHED_UNETS",
    "UNET_CONFIGS",
    "FluxLowRankAdapters",
    "flux_config_from_official",
    "flux_from_official",
    "load_unet",
]

_ORIGIN = "https://github.com/blurgyy/CoMPaSS"
_SD1: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
_SD2 = _SD1 | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
# Arguments of diffusers' UNet2DConditionModel.
UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "compass-unet.sd1.4": _SD1,
    "compass-unet.sd1.5": _SD1,
    "compass-unet.sd2.1": _SD2 | {"sample_size": 96, "upcast_attention": True},
}
PUBLISHED_UNETS: dict[str, Published] = {
    name: Published(
        name=name,
        system="tenor",
        config=config,
        hub_id=f"blurgy/CoMPaSS-SD{name.rsplit('sd', 1)[1]}",
        hub_file="unet/diffusion_pytorch_model.safetensors",
        licence="Apache-2.0",
        paper="2412.13195",
        origin=_ORIGIN,
        image_size=512,
        parameters=859_520_964 if config["cross_attention_dim"] == 768 else 865_910_724,
    )
    for name, config in UNET_CONFIGS.items()
}


def load_unet(name: str, **settings: Any) -> Any:
    """A fine-tuned UNet, to be given to its pipeline: `StableDiffusionPipeline.from_pretrained(..., unet=unet)`.

    Args:
        name: key of `PUBLISHED_UNETS`.
        **settings: of `from_pretrained`, such as `torch_dtype`.
    """
    from diffusers import UNet2DConditionModel

    if name not in PUBLISHED_UNETS:
        raise unknown_name("CoMPaSS UNet", name, PUBLISHED_UNETS)
    return UNet2DConditionModel.from_pretrained(PUBLISHED_UNETS[name].hub_id, subfolder="unet", **settings)


class _Pair(nn.Module):
    """`up(down(x))` without bias; `up` starts at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)


class _Block(nn.Module):
    def __init__(self, pairs: Mapping[str, _Pair]) -> None:
        super().__init__()
        self.processor = nn.ModuleDict(pairs)


class FluxLowRankAdapters(VistokModel, Attachable):
    """CoMPaSS' low-rank adapters for FLUX.1-dev, under the names of the published file (section 2.4).

        adapters = FluxLowRankAdapters.from_official("lora.safetensors", "compass-flux.dev")
        with adapters.attached(pipe), Tenor().attached(pipe):
            image = pipe("a photo of a motorcycle right of a bear").images[0]

    Attached through forward hooks of the projections, so the base weights stay as they are and the adapters can train.
    With `merge=True` they are added to the weights instead (no cost while sampling) and taken off exactly afterwards.

    Args:
        rank: r.
        hidden_size: h.
        mlp_ratio: of the single blocks.
        num_double_blocks: all double blocks carry adapters.
        single_block_indices: the single blocks that do.
    """

    system: ClassVar[str] = "tenor"
    published: ClassVar[dict[str, Published]] = {
        "compass-flux.dev": Published(
            name="compass-flux.dev",
            system="tenor",
            config={
                "rank": 16,
                "hidden_size": 3072,
                "mlp_ratio": 4.0,
                "num_double_blocks": 19,
                "single_block_indices": (1, 2, 3, 4),
            },
            hub_id="blurgy/CoMPaSS-FLUX.1",
            licence="Apache-2.0, and the FLUX.1-dev non-commercial licence",
            paper="2412.13195",
            origin=_ORIGIN,
            image_size=512,
            parameters=13_172_736,
        )
    }

    @register_to_config
    def __init__(
        self,
        rank: int = 16,
        hidden_size: int = 3072,
        mlp_ratio: float = 4.0,
        num_double_blocks: int = 19,
        single_block_indices: Sequence[int] = (1, 2, 3, 4),
    ) -> None:
        super().__init__()
        h, wide = hidden_size, int(hidden_size * (1 + mlp_ratio))
        self.double_blocks = nn.ModuleDict(
            {
                str(index): _Block(
                    {
                        name: _Pair(h, 3 * h if name.startswith("qkv") else h, rank)
                        for name in ("qkv_lora1", "proj_lora1", "qkv_lora2", "proj_lora2")
                    }
                )
                for index in range(num_double_blocks)
            }
        )
        self.single_blocks = nn.ModuleDict(
            {
                str(index): _Block({"qkv_lora": _Pair(h, 3 * h, rank), "proj_lora": _Pair(wide, h, rank)})
                for index in single_block_indices
            }
        )
        self.strength = 1.0
        self.merge = False

    @classmethod
    def rename_official(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # The code's frequency buffer appears in a training state dict, never in published files.
        return {key: value for key, value in state.items() if not key.endswith("pe.inv_freq")}

    @classmethod
    def config_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Constructor arguments from the shapes of a file."""
        downs = {key: value for key, value in state.items() if key.endswith(".down.weight")}
        double = {int(key.split(".")[1]) for key in downs if key.startswith("double_blocks.")}
        single = sorted({int(key.split(".")[1]) for key in downs if key.startswith("single_blocks.")})
        if not double or double != set(range(len(double))):
            raise CheckpointError(
                "this is no FLUX adapter in the XLabs layout: expected double_blocks.0.processor.qkv_lora1.down.weight "
                f"and its like, got {', '.join(sorted(state)[:3])}"
            )
        first = downs["double_blocks.0.processor.qkv_lora1.down.weight"]
        wide = next((value.shape[1] for key, value in downs.items() if key.endswith("proj_lora.down.weight")), None)
        return {
            "rank": int(first.shape[0]),
            "hidden_size": int(first.shape[1]),
            "mlp_ratio": 4.0 if wide is None else wide / first.shape[1] - 1,
            "num_double_blocks": len(double),
            "single_block_indices": tuple(single),
        }

    @classmethod
    def tiny(cls, **overrides: Any) -> FluxLowRankAdapters:
        """Fits a FLUX transformer of 2 double and 2 single blocks, 32 wide."""
        settings = {"rank": 2, "hidden_size": 32, "num_double_blocks": 2, "single_block_indices": (1,)}
        return cls(**(settings | overrides))

    def with_strength(
        self, strength: float, *, squared: bool = False, merge: bool | None = None
    ) -> FluxLowRankAdapters:
        """Sets how strongly the adapters act from the next attaching on.

        Args:
            strength: 1 as trained; linear.
            squared: the authors' loader scales both factors, so that 0.6 acts as 0.36; reproduce that.
            merge: add to the weights instead of the outputs.
        """
        self.strength = strength**2 if squared else float(strength)
        self.merge = self.merge if merge is None else merge
        return self

    def _sites(self, network: nn.Module) -> list[tuple[nn.Linear, _Pair, int, int]]:
        """(layer, pair, first output row, one after the last) of every projection that an adapter acts on."""
        if type(network).__name__ != "FluxTransformer2DModel":
            raise InvalidInputError(f"these adapters belong to FLUX, not to a {type(network).__name__}")
        double, single = network.transformer_blocks, network.single_transformer_blocks
        hidden = network.config.num_attention_heads * network.config.attention_head_dim
        last = max(map(int, self.single_blocks), default=-1)
        if (hidden, len(double)) != (self.config.hidden_size, self.config.num_double_blocks) or last >= len(single):
            raise InvalidInputError(
                f"adapters for {self.config.num_double_blocks} double blocks of width {self.config.hidden_size} and "
                f"single blocks up to {last} do not fit this FLUX of {len(double)} double blocks, {len(single)} single "
                f"blocks and width {hidden}"
            )
        sites: list[tuple[nn.Linear, _Pair, int, int]] = []

        def add_qkv(attn: Any, names: Sequence[str], fused: str, pair: Any) -> None:
            if getattr(attn, "fused_projections", False):
                sites.append((getattr(attn, fused), pair, 0, 3 * hidden))
                return
            sites.extend(
                (getattr(attn, name), pair, part * hidden, (part + 1) * hidden) for part, name in enumerate(names)
            )

        for index, block in self.double_blocks.items():
            attn, pairs = double[int(index)].attn, block.processor
            add_qkv(attn, ("to_q", "to_k", "to_v"), "to_qkv", pairs["qkv_lora1"])
            add_qkv(attn, ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv", pairs["qkv_lora2"])
            sites.append((attn.to_out[0], pairs["proj_lora1"], 0, hidden))
            sites.append((attn.to_add_out, pairs["proj_lora2"], 0, hidden))
        for index, block in self.single_blocks.items():
            target, pairs = single[int(index)], block.processor
            add_qkv(target.attn, ("to_q", "to_k", "to_v"), "to_qkv", pairs["qkv_lora"])
            sites.append((target.proj_out, pairs["proj_lora"], 0, hidden))
        return sites

    def _attach(self, model: Any, handle: Handle) -> None:
        shared: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, pair, first, last in self._sites(network_of(model)):
            if self.merge:
                before = layer.weight.data
                with torch.no_grad():
                    change = pair.up.weight[first:last].float() @ pair.down.weight.float()
                    layer.weight.data = before + (self.strength * change).to(before)
                handle.undo_with(setattr, layer.weight, "data", before)
            else:
                handle.hook(layer.register_forward_hook(self._hook(pair, first, last, shared)))
        handle.undo_with(shared.clear)

    def _hook(self, pair: _Pair, first: int, last: int, shared: dict[int, tuple[Tensor, Tensor]]) -> Any:
        strength = self.strength

        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            given = inputs[0]
            kept = shared.get(id(pair))
            if kept is None or kept[0] is not given:  # query, key and value share their input, and so `down` of it
                kept = (given, pair.down(given.to(pair.down.weight.dtype)))
                shared[id(pair)] = kept
            if last == pair.up.out_features:  # the last of them
                shared.pop(id(pair), None)
            change = nn.functional.linear(kept[1], pair.up.weight[first:last])
            return output + (strength * change).to(output.dtype)

        # Whoever keeps results of the layer sees by these that the adapters have changed.
        add.reads = (pair.down.weight, pair.up.weight)  # type: ignore[attr-defined]
        return add


def flux_config_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' arguments of a FLUX transformer from the names of its authors."""
    if config.get("mlp_ratio", 4.0) != 4.0 or not config.get("qkv_bias", True) or config.get("theta", 10000) != 10000:
        raise InvalidInputError("diffusers' FLUX has mlp_ratio 4, biases on the projections and theta 10000")
    return {
        "patch_size": 1,
        "in_channels": config["in_channels"],
        "num_layers": config["depth"],
        "num_single_layers": config["depth_single_blocks"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "num_attention_heads": config["num_heads"],
        "joint_attention_dim": config["context_in_dim"],
        "pooled_projection_dim": config["vec_in_dim"],
        "guidance_embeds": config.get("guidance_embed", False),
        "axes_dims_rope": tuple(config["axes_dim"]),
    }


_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_SINGLE = {
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}


def rename_flux(state: Mapping[str, Tensor], hidden_size: int) -> dict[str, Tensor]:
    """A FLUX state dict of its authors under diffusers' names (section 2.5)."""
    h = hidden_size
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, kind = key.rsplit(".", 1)
        kind = "weight" if kind == "scale" else kind
        parts = stem.split(".", 2)
        if parts[0] == "double_blocks":
            block, inner = f"transformer_blocks.{parts[1]}", parts[2]
            if inner in ("img_attn.qkv", "txt_attn.qkv"):
                names = (
                    ("to_q", "to_k", "to_v") if inner.startswith("img") else ("add_q_proj", "add_k_proj", "add_v_proj")
                )
                for name, piece in zip(names, value.split(h), strict=True):
                    result[f"{block}.attn.{name}.{kind}"] = piece
            else:
                result[f"{block}.{_DOUBLE.get(inner, inner)}.{kind}"] = value
        elif parts[0] == "single_blocks":
            block, inner = f"single_transformer_blocks.{parts[1]}", parts[2]
            if inner == "linear1":
                pieces = value.split([h, h, h, value.shape[0] - 3 * h])
                for name, piece in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), pieces, strict=True):
                    result[f"{block}.{name}.{kind}"] = piece
            else:
                result[f"{block}.{_SINGLE.get(inner, inner)}.{kind}"] = value
        elif stem == "final_layer.adaLN_modulation.1":  # (shift, scale) there, (scale, shift) in diffusers
            shift, scale = value.chunk(2)
            result[f"{_OUTER[stem]}.{kind}"] = torch.cat([scale, shift])
        else:
            result[f"{_OUTER.get(stem, stem)}.{kind}"] = value
    return result


def flux_from_official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Any:
    """diffusers' FLUX transformer from the authors' file, loaded strictly.

    Raises:
        CheckpointError: naming missing, unexpected and misshapen keys.
    """
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**flux_config_from_official(config))
    renamed = rename_flux(state, config["hidden_size"])
    problems = describe_mismatch(model.state_dict(), renamed)
    if problems:
        raise CheckpointError("the state dict does not fit FLUX: " + "; ".join(problems))
    model = FluxTransformer2DModel(**flux_config_from_official(config))
    model.load_state_dict(renamed, strict=True)
    return model.eval()
