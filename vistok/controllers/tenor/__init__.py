"""TENOR: token encoding ordering (CoMPaSS, Zhang et al., ICCV 2025, arXiv 2412.13195).

Text encoders hardly tell "A left of B" from "B left of A". TENOR adds a parameter-free position code to the text states
on the query and key path of every attention that reads text; a model is fine-tuned with it on unambiguous captions
(`vistok.controllers.scop`). In order of reading: `attention` (the code and the processors), `checkpoints` (published
weights and their layouts), `training` (objectives and loop).

Differences from the authors' code: the code is a constant computed once a layer, so text is projected once; UNets keep
text keys and values over the steps; self-attention keeps its own processor; works on SDXL and SD3 as well; everything
detaches without a trace.
"""

from __future__ import annotations

from vistok.controllers.tenor.attention import AttentionMaps, Tenor, attention_layers, position_code, projected_code
from vistok.controllers.tenor.checkpoints import (
    PUBLISHED_UNETS,
    UNET_CONFIGS,
    FluxLowRankAdapters,
    flux_config_from_official,
    flux_from_official,
    load_unet,
)
from vistok.controllers.tenor.training import (
    FineTuneSettings,
    FluxObjective,
    UNetObjective,
    fine_tune,
    flux_schedule,
    flux_training_times,
    pack_latents,
    pixel_loss,
    sample_flux,
    shift_of,
    token_loss,
)

__all__ = [
    "PUBLISHED_UNETS",
    "UNET_CONFIGS",
    "AttentionMaps",
    "FineTuneSettings",
    "FluxLowRankAdapters",
    "FluxObjective",
    "Tenor",
    "UNetObjective",
    "attention_layers",
    "fine_tune",
    "flux_config_from_official",
    "flux_from_official",
    "flux_schedule",
    "flux_training_times",
    "load_unet",
    "pack_latents",
    "pixel_loss",
    "position_code",
    "projected_code",
    "sample_flux",
    "shift_of",
    "token_loss",
]
