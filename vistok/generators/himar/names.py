"""The authors' names: constructor arguments, keys, checkpoints."""

from __future__ import annotations

from vistok.nn.continuous import imagenet_checkpoint
from vistok.nn.masked import OFFICIAL_NAMES as OFFICIAL_MASKED_NAMES
from vistok.registry import Published

__all__ = ["OFFICIAL_IGNORED", "OFFICIAL_NAMES", "OFFICIAL_ONLY", "UNUSED_KEYS", "published_checkpoints"]

# name -> (width, layers of each stack, heads, layers and width of the pivot head, those and heads of the dense head)
SIZES = {
    "b": (768, 12, 12, (6, 1024), (6, 512, 8)),
    "l": (1024, 16, 16, (8, 1280), (8, 512, 8)),
    "h": (1280, 20, 16, (12, 1536), (12, 768, 12)),
}
PARAMETERS = {"b": 244_468_016, "l": 529_228_336, "h": 1_090_572_592}
# What the authors evaluate with: (steps of the dense phase, guidance scale of the image, of the pivots)
SAMPLING = {"b": (4, 2.5, 2.7), "l": (4, 3.5, 3.5), "h": (12, 3.2, 5.5)}
# The authors' constructor argument -> ours.
OFFICIAL_NAMES = {
    **OFFICIAL_MASKED_NAMES,
    "encoder_embed_dim": "hidden_size",
    "gdm_d": "dense_head_layers",
    "gdm_w": "dense_head_width",
    "head": "dense_head_heads",
    "ratio": "dense_head_mlp_ratio",
    "step_stage2_rate": "pivot_rate",
    "step_warmup": "pivot_warmup_epochs",
}
# Read by the authors' code without an effect, or by its trainer only.
OFFICIAL_IGNORED = {
    "grad_checkpointing",
    "cond_drop_prob",
    "diff_seqlen",
    "two_diffloss",
    "seq_len",
    "global_dm",
}
OFFICIAL_ONLY = (
    (OFFICIAL_NAMES.keys() - OFFICIAL_NAMES.values()) | {"img_size", "vae_stride", "cond_scale"} | OFFICIAL_IGNORED
)
UNUSED_KEYS = ("cond_diffloss.net.c_pos_embed",)  # zeros that nothing reads


def published_checkpoints() -> dict[str, Published]:
    """Every published checkpoint, by name."""
    entries = [
        imagenet_checkpoint(
            "himar",
            size,
            {
                "hidden_size": width,
                "encoder_layers": layers,
                "encoder_heads": heads,
                "decoder_layers": layers,
                "decoder_heads": heads,
                "head_layers": head[0],
                "head_width": head[1],
                "dense_head_layers": dense[0],
                "dense_head_width": dense[1],
                "dense_head_heads": dense[2],
            },
            hub_id="HiDream-ai/Hi-MAR",
            hub_file=f"Hi-MAR-{size.upper()}/checkpoint-last.pth",
            licence="none stated",
            paper="arXiv:2505.20288",
            origin="HiDream-ai/himar",
            sampling={
                "guidance_scale": SAMPLING[size][1],
                "pivot_guidance_scale": SAMPLING[size][2],
                "guidance_schedule": "linear",
                "temperature": 1.0,
                "num_inference_steps": SAMPLING[size][0],
                "num_diffusion_steps": 100,
            },
            parameters=PARAMETERS[size],
        )
        for size, (width, layers, heads, head, dense) in SIZES.items()
    ]
    return {entry.name: entry for entry in entries}
