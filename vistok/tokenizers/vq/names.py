"""Names of the authors' code (FoundationVision/LlamaGen) and ours: presets, constructor arguments, state-dict keys."""

from __future__ import annotations

__all__ = ["OFFICIAL_ARGUMENTS", "OFFICIAL_PRESETS", "OFFICIAL_TO_OURS", "OURS_TO_OFFICIAL", "VQ8", "VQ16"]

# Channel multipliers, finest level first.
VQ16 = (1, 1, 2, 2, 4)
VQ8 = (1, 2, 2, 4)
OFFICIAL_PRESETS = {"VQ-16": VQ16, "VQ-8": VQ8}
OFFICIAL_ARGUMENTS = {
    "ch": "base_channels",
    "encoder_ch_mult": "encoder_channel_multipliers",
    "decoder_ch_mult": "decoder_channel_multipliers",
    "codebook_embed_dim": "codebook_dim",
    "codebook_l2_norm": "l2_normalize",
    "commit_loss_beta": "commitment_weight",
    "entropy_loss_ratio": "entropy_weight",
    "dropout_p": "dropout",
}
OFFICIAL_TO_OURS = (
    (r"^(encoder|decoder)\.conv_blocks\.(\d+)\.res\.", r"\1.levels.\2.blocks."),
    (r"^(encoder|decoder)\.conv_blocks\.(\d+)\.attn\.", r"\1.levels.\2.attentions."),
    (r"^encoder\.conv_blocks\.(\d+)\.downsample\.", r"encoder.levels.\1.resample."),
    (r"^decoder\.conv_blocks\.(\d+)\.upsample\.", r"decoder.levels.\1.resample."),
    (r"^(encoder|decoder)\.mid\.", r"\1.middle."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.proj_out\.", ".proj."),
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
    (r"^quantize\.codebook_used$", "quantizer.usage_queue"),
)
OURS_TO_OFFICIAL = (
    (r"^(encoder|decoder)\.levels\.(\d+)\.blocks\.", r"\1.conv_blocks.\2.res."),
    (r"^(encoder|decoder)\.levels\.(\d+)\.attentions\.", r"\1.conv_blocks.\2.attn."),
    (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.conv_blocks.\1.downsample."),
    (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.conv_blocks.\1.upsample."),
    (r"^(encoder|decoder)\.middle\.", r"\1.mid."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.proj\.", ".proj_out."),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
    (r"^quantizer\.usage_queue$", "quantize.codebook_used"),
)
