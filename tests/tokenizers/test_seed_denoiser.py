"""The small unCLIP denoiser: its objective, and the stock pipeline that it becomes."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, StableUnCLIPImg2ImgPipeline

from vistok.errors import InvalidInputError
from vistok.tokenizers import KLModel
from vistok.tokenizers.seed import UnCLIPDenoiser


def denoiser() -> UnCLIPDenoiser:
    torch.manual_seed(0)
    return UnCLIPDenoiser.tiny()


def test_the_loss_falls_and_a_generator_repeats_it() -> None:
    model = denoiser()
    batch = {"latents": torch.randn(4, 4, 4, 4), "image_embeds": torch.randn(4, 16)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model.training_loss(batch, generator=torch.Generator().manual_seed(1))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    assert not model.image_normalizer.mean.requires_grad
    with torch.no_grad():
        one, other = (model.training_loss(batch, generator=torch.Generator().manual_seed(2))["loss"] for _ in range(2))
    assert torch.equal(one, other)


def test_labels_are_those_of_the_pipeline() -> None:
    model = denoiser()
    embeds, noise = torch.randn(2, 16), torch.randn(2, 16)
    pipeline = model.pipeline(KLModel.tiny())
    with torch.no_grad():
        theirs = pipeline.noise_image_embeddings(embeds, 300, noise=noise)
        ours = model.class_labels(embeds, torch.tensor([300, 300]), noise)
    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_the_pipeline_is_stock_and_paints_what_the_decoder_paints() -> None:
    model, autoencoder = denoiser(), KLModel.tiny()
    pipeline = model.pipeline(autoencoder)
    assert type(pipeline) is StableUnCLIPImg2ImgPipeline
    assert type(pipeline.vae) is AutoencoderKL
    embeds, latents = torch.randn(1, 16), torch.randn(1, 4, 4, 4)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "latents": latents}
    theirs = pipeline(
        image_embeds=embeds, prompt="", generator=torch.Generator().manual_seed(0), output_type="pt", **settings
    ).images
    ours = model.decoder()(embeds, generator=torch.Generator().manual_seed(0), **settings)
    torch.testing.assert_close(ours.clamp(-1, 1) / 2 + 0.5, theirs, rtol=1e-3, atol=1e-3)
    tokens = autoencoder.tokens_from_latents(latents)
    torch.testing.assert_close(
        pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample, autoencoder.decode(tokens)
    )
    assert not any(name.startswith(("vae", "_autoencoder")) for name in model.state_dict())


def test_what_does_not_fit() -> None:
    model = denoiser()
    with pytest.raises(InvalidInputError, match="give the KL tokenizer"):
        model.pipeline()
    with pytest.raises(InvalidInputError, match="latents of 4 channels; this auto-encoder has 2"):
        model.set_autoencoder(KLModel.tiny(latent_channels=2))
    with pytest.raises(InvalidInputError, match="scale latents by one number"):
        model.set_autoencoder(KLModel.tiny(latents_mean=[0.0] * 4, latents_std=[1.0] * 4))
    with pytest.raises(InvalidInputError, match=r"image_embeds must be \[2, 16\]"):
        model.training_loss({"latents": torch.zeros(2, 4, 4, 4), "image_embeds": torch.zeros(2, 8)})
