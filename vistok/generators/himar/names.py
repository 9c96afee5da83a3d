"""The authors' names: constructor arguments, keys, checkpoints."""

from __future__ import annotations

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
    "vae_embed_dim": "latent_channels",
    "encoder_embed_dim": "hidden_size",
    "encoder_depth": "encoder_layers",
    "encoder_num_heads": "encoder_heads",
    "decoder_depth": "decoder_layers",
    "decoder_num_heads": "decoder_heads",
    "mlp_ratio": "mlp_ratio",
    "norm_eps": "norm_eps",
    "class_num": "num_classes",
    "buffer_size": "num_condition_tokens",
    "label_drop_prob": "condition_dropout",
    "attn_dropout": "attention_dropout",
    "proj_dropout": "projection_dropout",
    "diffloss_d": "head_layers",
    "diffloss_w": "head_width",
    "gdm_d": "dense_head_layers",
    "gdm_w": "dense_head_width",
    "head": "dense_head_heads",
    "ratio": "dense_head_mlp_ratio",
    "num_sampling_steps": "num_diffusion_steps",
    "diffusion_batch_mul": "diffusion_repeats",
    "mask_ratio_min": "mask_ratio_min",
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
    entries = {}
    for size, (width, layers, heads, head, dense) in SIZES.items():
        name = f"himar-{size}.imagenet256"
        entries[name] = Published(
            name=name,
            system="himar",
            config={
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
                "scaling_factor": 0.2325,
            },
            hub_id="HiDream-ai/Hi-MAR",
            hub_file=f"Hi-MAR-{size.upper()}/checkpoint-last.pth",
            licence="none stated",
            paper="arXiv:2505.20288",
            origin="HiDream-ai/himar",
            image_size=256,
            num_tokens=256,
            preprocessing="centre crop, [-1, 1]",
            tokenizer="kl16.mar",
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
    return entries
