"""A small unCLIP denoiser: what `stable-diffusion-2-1-unclip` is to SEED, at a size that trains on a laptop.

The same parts as the published pipeline (diffusers' `StableUnCLIPImg2ImgPipeline`): a UNet on the latents of a KL
tokenizer, which is told the image embedding and its noise level in place of a class, a text encoder that only ever sees
the empty prompt, v-prediction (arXiv 2202.00512, section 4) under the schedule of Stable Diffusion.

Shape letters: B pictures, C latent channels, h, w latent rows and columns, E image embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

from vistok.errors import InvalidInputError
from vistok.nn.model import VistokModel
from vistok.tokenizers.kl import stock_autoencoder

from .unclip import UnCLIPDecoder

__all__ = ["UnCLIPDenoiser"]

TIMESTEPS = 1000
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WORDS = ("!", "<s>", "</s>")  # Stable Diffusion 2 pads with an exclamation mark


def empty_prompt_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """A tokenizer for the empty prompt: `<s> </s> ! !`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(word, vocabulary[word]) for word in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="!", model_max_length=length
    )


def stand_in_encoder(embedding_size: int) -> CLIPVisionModelWithProjection:
    """A CLIP of a few random weights."""
    small = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPVisionConfig(**small, image_size=8, patch_size=8, projection_dim=embedding_size)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        torch.manual_seed(0)
        return CLIPVisionModelWithProjection(config).eval()


class UnCLIPDenoiser(VistokModel):
    """Denoises latents towards an image embedding.

    Args:
        autoencoder: name of the KL tokenizer whose latents are denoised, for `vistok.load`; None leaves it to
            `set_autoencoder`.
        sample_size: side of the latents.
        latent_channels: C.
        block_out_channels: channels of the UNet's levels; all but the last have attention.
        layers_per_block: residual blocks of a level on the way down.
        num_heads: of every attention.
        norm_num_groups: of every group norm.
        embedding_size: E.
        text_size: width of the text encoder.
        text_length: positions of the empty prompt.
        condition_dropout: share of the training pictures that are denoised without their embedding, for guidance.
    """

    system: ClassVar[str] = "seed-unclip"

    @register_to_config
    def __init__(
        self,
        autoencoder: str | None = None,
        sample_size: int = 8,
        latent_channels: int = 8,
        block_out_channels: Sequence[int] = (48, 96),
        layers_per_block: int = 1,
        num_heads: int = 2,
        norm_num_groups: int = 8,
        embedding_size: int = 64,
        text_size: int = 16,
        text_length: int = 4,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        self.unet = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            cross_attention_dim=text_size,
            attention_head_dim=num_heads,  # diffusers' name for the number of heads
            use_linear_projection=True,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * embedding_size,
        )
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(WORDS),
                hidden_size=text_size,
                intermediate_size=2 * text_size,
                num_hidden_layers=1,
                num_attention_heads=1,
                max_position_embeddings=text_length,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
        # The embeddings of the lab's teacher have unit variance by construction.
        self.image_normalizer = StableUnCLIPImageNormalizer(embedding_size).requires_grad_(False)
        self.image_noising_scheduler = DDPMScheduler(TIMESTEPS, beta_schedule="squaredcos_cap_v2")
        self.noising_scheduler = DDPMScheduler(TIMESTEPS, **BETAS, prediction_type="v_prediction")
        self.text_tokenizer = empty_prompt_tokenizer(text_length)
        self._autoencoder: list[Any] = []  # a list, so that its weights are not taken for this network's

    @classmethod
    def tiny(cls, **overrides: Any) -> UnCLIPDenoiser:
        """Random weights for latents of 4 channels."""
        arguments = {
            "sample_size": 4,
            "latent_channels": 4,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "embedding_size": 16,
            "text_size": 8,
        }
        return cls(**{**arguments, **overrides})

    def set_autoencoder(self, autoencoder: Any) -> None:
        """Give the KL tokenizer on whose latents this network works.

        Raises:
            InvalidInputError: its latents have another number of channels, or are not scaled by one number alone.
        """
        channels = autoencoder.config.latent_channels
        if channels != self.config.latent_channels:
            raise InvalidInputError(
                f"the denoiser was made for latents of {self.config.latent_channels} channels; this auto-encoder has "
                f"{channels}"
            )
        if any(autoencoder.config.get(name) is not None for name in ("latents_mean", "latents_std", "shift_factor")):
            raise InvalidInputError("unCLIP pipelines scale latents by one number; this auto-encoder has more")
        self._autoencoder = [stock_autoencoder(autoencoder)]

    # ---- objective

    def class_labels(self, image_embeds: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
        """Noised embeddings and their noise levels, [B, 2 E], each with a level of its own (int64 [B])."""
        normalizer = self.image_normalizer
        noised = self.image_noising_scheduler.add_noise(normalizer.scale(image_embeds), noise, levels)
        told = get_timestep_embedding(levels, image_embeds.shape[-1], flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([normalizer.unscale(noised), told.to(noised)], dim=1)

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Squared error of the predicted velocity.

        Args:
            batch: scaled `latents` [B, C, h, w] and `image_embeds` [B, E].
            generator: of noise, times and dropout.

        Returns:
            `loss`.

        Raises:
            InvalidInputError: for embeddings of another width.
        """
        latents, embeds = batch["latents"], batch["image_embeds"]
        if embeds.shape != (len(latents), self.config.embedding_size):
            raise InvalidInputError(
                f"image_embeds must be [{len(latents)}, {self.config.embedding_size}]; got {list(embeds.shape)}"
            )

        def uniform() -> Tensor:
            return torch.rand(len(latents), generator=generator, device=latents.device)

        def normal(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

        # Mostly little noise on the embedding: codes lead near it, and pictures are painted at level 0.
        levels = (uniform() ** 3 * TIMESTEPS).long()
        labels = self.class_labels(embeds, levels, normal(embeds))
        labels = labels * (uniform() >= self.config.condition_dropout)[:, None]
        times, noise = (uniform() * TIMESTEPS).long(), normal(latents)
        noised = self.noising_scheduler.add_noise(latents, noise, times)
        target = self.noising_scheduler.get_velocity(latents, noise, times)
        text = self.text_states().expand(len(latents), -1, -1)
        velocity = self.unet(noised, times, encoder_hidden_states=text, class_labels=labels, return_dict=False)[0]
        return {"loss": functional.mse_loss(velocity.float(), target.float())}

    def text_states(self) -> Tensor:
        """What the text encoder makes of the empty prompt, [1, text_length, text_size]."""
        length = self.config.text_length
        ids = self.text_tokenizer("", padding="max_length", max_length=length, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.device))[0]

    # ---- inference

    def pipeline(self, autoencoder: Any = None) -> Any:
        """A stock `StableUnCLIPImg2ImgPipeline` of these weights, to be called with `image_embeds`.

        Its image encoder is a random stand-in, of which the pipeline reads the type alone: embeddings come from a SEED.

        Args:
            autoencoder: KL tokenizer; None takes the one of `set_autoencoder`.

        Raises:
            InvalidInputError: there is none.
        """
        from diffusers import StableUnCLIPImg2ImgPipeline

        if autoencoder is not None:
            self.set_autoencoder(autoencoder)
        if not self._autoencoder:
            raise InvalidInputError("the denoiser paints latents: give the KL tokenizer that makes pictures of them")
        pipeline = StableUnCLIPImg2ImgPipeline(
            feature_extractor=None,
            image_encoder=stand_in_encoder(self.config.embedding_size).to(self.device, self.dtype),
            image_normalizer=self.image_normalizer,
            image_noising_scheduler=self.image_noising_scheduler,
            tokenizer=self.text_tokenizer,
            text_encoder=self.text_encoder.eval(),
            unet=self.unet.eval(),
            scheduler=PNDMScheduler(
                TIMESTEPS, **BETAS, skip_prk_steps=True, steps_offset=1, prediction_type="v_prediction"
            ),
            vae=self._autoencoder[0],
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def decoder(self, autoencoder: Any = None) -> UnCLIPDecoder:
        """What `SEED.decode` paints with; arguments as in `pipeline`."""
        return UnCLIPDecoder(self.pipeline(autoencoder))
