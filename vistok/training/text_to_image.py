"""The lab's text-to-image pipeline: CLIP text encoder, UNet and noise schedule of a stock `StableDiffusionPipeline`.

Controllers are made for pipelines that others built, so this one is stock: a transformers `CLIPTextModel` with a
`CLIPTokenizer`, a diffusers `UNet2DConditionModel` and `DDIMScheduler`, and the KL tokenizer as its `AutoencoderKL`.
Only the sizes are small: 64x64 pixels, 8x8 latents of 8 channels, 32 text positions.

Text encoder and UNet are trained together. So small an encoder, taught by the denoiser alone, would take most of the
training to learn what the words mean; heads that read the caption's meaning from its states teach it within minutes
(they are left out of the pipeline).

Letters: B captions or images, N text positions, D text channels, C latent channels, h and w sides of the latents.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vistok.controllers import Tenor
from vistok.data.shapes import SHAPES, VOCABULARY, caption, parse_caption, render, sample_scene
from vistok.files import PACKED_FILE, pack_rows, save_tensors
from vistok.metrics.accuracy import caption_accuracy
from vistok.nn.model import VistokModel
from vistok.tokenizers.kl import stock_autoencoder

from .caption_encoder import ATTRIBUTES, MAX_OBJECTS, description_targets
from .monitors import EVALUATION_BATCH, HELD_OUT_SCENES, picture_grid
from .recipe import Recipe, ShapesPairsRecipe
from .sources import HELD_OUT_STREAM, draw_latents, encode_images, image_batch

__all__ = ["TextToImage", "TextToImageMonitor", "build_clip_tokenizer"]

PAD = -100  # targets that count for nothing
# What people and contrastive prompts put before a caption; its meaning stays.
OPENINGS = ("a photo of", "a picture of", "an image of")
OPENING_SHARE, SHORT_RELATION_SHARE = 0.2, 0.4
SAMPLED = 96
CHANGED_FILE = "unet.safetensors"
MARKS = ("<|startoftext|>", "<|endoftext|>")


def build_clip_tokenizer(max_length: int = 32) -> CLIPTokenizer:
    """A byte-pair `CLIPTokenizer` whose merges make one token of every word of the lab world; others are spelt.

    Args:
        max_length: tokens a prompt, both marks included.
    """
    known = list(dict.fromkeys([*VOCABULARY, *(word for opening in OPENINGS for word in opening.split())]))
    letters = [chr(code) for code in range(33, 127) if not "A" <= chr(code) <= "Z"]
    words = [[*word[:-1], f"{word[-1]}</w>"] for word in known]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in words):
        counts: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        tokens.append("".join(best))
        for word in words:
            place = 0
            while place < len(word) - 1:
                if (word[place], word[place + 1]) == best:
                    word[place : place + 2] = ["".join(best)]
                place += 1
    vocabulary = {token: number for number, token in enumerate([*dict.fromkeys(tokens), *MARKS])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


class TextToImage(VistokModel):
    """Text encoder, UNet and schedule, and what trains them. `pipeline(vae)` joins them with a KL tokenizer.

    Args:
        latent_channels: C of the KL tokenizer.
        sample_size: side of its latents.
        block_out_channels: width of each UNet level, finest first.
        down_block_types: an encoder block a level, finest first.
        up_block_types: a decoder block a level, coarsest first.
        layers_per_block: residual blocks an encoder level (the decoder has one more).
        attention_heads: in every attention layer of the UNet.
        norm_num_groups: groups of its normalisations.
        time_embedding_dim: width of its time embedding.
        text_hidden_size: D.
        text_layers, text_heads, text_ffn_size: of the CLIP text encoder.
        max_length: N.
        condition_dropout: share of captions replaced by the empty one, for classifier-free guidance.
        text_loss_weight: of the heads that read the caption's meaning; with 0 captions are taken as they are, in any
            words.
        tenor: attach `vistok.controllers.Tenor` for good: the UNet learns with the code of word order.
    """

    system: ClassVar[str] = "text-to-image"
    # Captions reach `training_loss` as they are: no frozen text encoder turns them into features before.
    reads_captions: ClassVar[bool] = True

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 8,
        sample_size: int = 8,
        block_out_channels: Sequence[int] = (64, 80),
        down_block_types: Sequence[str] = ("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types: Sequence[str] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block: int = 1,
        attention_heads: int = 4,
        norm_num_groups: int = 8,
        time_embedding_dim: int = 128,
        text_hidden_size: int = 128,
        text_layers: int = 2,
        text_heads: int = 4,
        text_ffn_size: int = 256,
        max_length: int = 32,
        condition_dropout: float = 0.1,
        text_loss_weight: float = 0.1,
        tenor: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = build_clip_tokenizer(max_length)
        end = self.tokenizer.convert_tokens_to_ids(MARKS[1])
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=text_hidden_size,
                intermediate_size=text_ffn_size,
                projection_dim=text_hidden_size,
                num_hidden_layers=text_layers,
                num_attention_heads=text_heads,
                max_position_embeddings=max_length,
                bos_token_id=self.tokenizer.convert_tokens_to_ids(MARKS[0]),
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=tuple(block_out_channels),
            down_block_types=tuple(down_block_types),
            up_block_types=tuple(up_block_types),
            layers_per_block=layers_per_block,
            attention_head_dim=attention_heads,  # diffusers' old name for the number of heads
            norm_num_groups=norm_num_groups,
            cross_attention_dim=text_hidden_size,
            time_embedding_dim=time_embedding_dim,
        )
        if tenor:
            Tenor().attach(self.unet)
        sizes = [len(values) + 1 for values in ATTRIBUTES.values()]
        # At the word that names an object: that object. At the end mark: the whole caption, relation included.
        self.object_heads = nn.ModuleList(nn.Linear(text_hidden_size, size) for size in sizes)
        self.caption_heads = nn.ModuleList(nn.Linear(text_hidden_size, size) for size in [*sizes * MAX_OBJECTS, 5])
        self.scheduler = build_scheduler()
        self.shape_tokens = self.tokenizer.convert_tokens_to_ids([f"{shape}</w>" for shape in SHAPES])

    @classmethod
    def tiny(cls, **overrides: Any) -> TextToImage:
        """A random flavour that builds in milliseconds: 16 x 16 pixels through `kl.tiny`."""
        small: dict[str, Any] = {
            "latent_channels": 4,
            "block_out_channels": (8, 16),
            "attention_heads": 2,
            "norm_num_groups": 4,
            "time_embedding_dim": 16,
            "text_hidden_size": 16,
            "text_layers": 1,
            "text_heads": 2,
            "text_ffn_size": 16,
        }
        return cls(**{**small, **overrides})

    # ---- objective

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """int64 [B, N], padded with the end mark as pipelines do it."""
        encoded = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.config.max_length
        )
        return torch.tensor(encoded["input_ids"], device=self.device)

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Mean squared error of the velocity at uniform times, and the cross-entropy of the text heads.

        Args:
            batch: `latents` [B, C, h, w], scaled as the pipeline scales them, and `captions`, B texts of the lab world.
            generator: of dropped captions, wordings, times and noise.

        Returns:
            `loss`; its parts `denoise` and `text`; `text_accuracy`, the share of right answers of the heads. The last
            two only with a `text_loss_weight`.
        """
        latents = batch["latents"]
        count = len(latents)
        draws = torch.rand(count, 4, generator=generator).tolist()
        texts = list(batch["captions"])
        if self.config.text_loss_weight:
            texts = [reworded(text, *row[1:]) for text, row in zip(texts, draws, strict=True)]
        dropped = [self.training and row[0] < self.config.condition_dropout for row in draws]
        ids = self.tokenize(["" if drop else text for text, drop in zip(texts, dropped, strict=True)])
        states = self.text_encoder(input_ids=ids).last_hidden_state
        # Evenly spread over the batch, which makes the mean less noisy than independent draws.
        steps = self.scheduler.config.num_train_timesteps
        spread = (torch.arange(count) / count + torch.rand(1, generator=generator)) % 1.0
        times = (spread * steps).long().clamp_max(steps - 1).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = self.scheduler.add_noise(latents, noise, times)
        predicted = self.unet(noisy, times, encoder_hidden_states=states, return_dict=False)[0]
        target = self.scheduler.get_velocity(latents, noise, times)
        denoise = functional.mse_loss(predicted.float(), target.float())
        if not self.config.text_loss_weight:
            return {"loss": denoise, "denoise": denoise}
        text, accuracy = self._text_loss(ids, states, ["" if d else c for c, d in zip(batch["captions"], dropped)])
        return {
            "loss": denoise + self.config.text_loss_weight * text,
            "denoise": denoise,
            "text": text,
            "text_accuracy": accuracy,
        }

    def _text_loss(self, ids: Tensor, states: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Cross-entropy and share of right answers of all heads; captions "" count for nothing."""
        kinds = len(ATTRIBUTES)
        answers = [[PAD] * len(self.caption_heads) if not text else self._targets(text) for text in captions]
        whole = torch.tensor(answers, device=ids.device)
        # The k-th word that names a shape names object k; causal attention shows it the adjectives before.
        named = torch.isin(ids, torch.tensor(self.shape_tokens, device=ids.device))
        order = (named.cumsum(1) - 1).clamp(0, MAX_OBJECTS - 1)
        rows, places = named.nonzero(as_tuple=True)
        objects = whole[:, : kinds * MAX_OBJECTS].unflatten(1, (MAX_OBJECTS, kinds))[rows, order[rows, places]]
        at_names = states[rows, places].float()
        at_end = states[torch.arange(len(ids), device=ids.device), (ids == ids[0, -1]).int().argmax(1)].float()
        losses, right, total = [], states.new_zeros(()), 0
        for heads, inputs, targets in (
            (self.object_heads, at_names, objects),
            (self.caption_heads, at_end, whole),
        ):
            for head, target in zip(heads, targets.unbind(1), strict=True):
                valid = target != PAD
                if bool(valid.any()):
                    logits = head(inputs[valid])
                    losses.append(functional.cross_entropy(logits, target[valid]))
                    right = right + (logits.detach().argmax(1) == target[valid]).sum()
                    total += int(valid.sum())
        if not losses:
            return states.sum() * 0.0, states.new_ones(())
        return torch.stack(losses).mean(), right / total

    @staticmethod
    def _targets(text: str) -> list[int]:
        return description_targets(parse_caption(text))

    # ---- the pipeline

    def pipeline(self, vae: Any) -> StableDiffusionPipeline:
        """The stock pipeline of these very weights.

        Args:
            vae: KL tokenizer, or a diffusers `AutoencoderKL`.
        """
        pipe = StableDiffusionPipeline(
            vae=stock_autoencoder(vae),
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def save_pipeline(
        self, folder: Path, tokenizer: str, dtype: torch.dtype, trained: Sequence[str] = (), *, shipped: bool = False
    ) -> None:
        """Write a folder for `DiffusionPipeline.from_pretrained`; changes the types of the own weights.

        Args:
            folder: where to.
            tokenizer: name of the KL tokenizer; written as a stock `AutoencoderKL`.
            trained: beginnings of the weights that a fine-tuning has changed; only those of the UNet are written then,
                for `vistok.load` to put into the base pipeline.
            dtype: of UNet and VAE. The text encoder stays float32: transformers, other than diffusers, keeps the type
                of the file when it loads.
            shipped: only for `vistok.load`: without the VAE, which is a checkpoint of its own, and with a fine-tuning's
                weights packed.
        """
        from vistok import hub

        if trained:
            changed = {
                key.removeprefix("unet."): value.to(dtype)
                for key, value in self.state_dict().items()
                if key.startswith("unet.") and key.startswith(tuple(trained))
            }
            file = folder / (PACKED_FILE if shipped else CHANGED_FILE)
            save_tensors(file, pack_rows(changed) if shipped else changed, metadata={"format": "pt"})
            return
        vae = stock_autoencoder(hub.load(tokenizer)).to(dtype)
        self.unet.to(dtype)
        self.text_encoder.float()
        quiet = logging.getLogger("diffusers")
        level = quiet.level
        quiet.setLevel(logging.ERROR)
        try:
            self.pipeline(vae).save_pretrained(folder, safe_serialization=True)
        finally:
            quiet.setLevel(level)
        if shipped:
            shutil.rmtree(folder / "vae")
        for file in folder.rglob("*.safetensors"):  # the libraries write weights for their owner alone
            file.chmod(0o644)


def build_scheduler() -> DDIMScheduler:
    """Cosine noise schedule that ends in pure noise, velocity prediction, steps counted from the noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def reworded(text: str, opening: float, which: float, relation: float) -> str:
    """A caption in one of the wordings that people use, chosen by three numbers in [0, 1)."""
    if relation < SHORT_RELATION_SHARE:
        text = text.replace("to the left of", "left of").replace("to the right of", "right of")
    return f"{OPENINGS[int(which * len(OPENINGS))]} {text}" if opening < OPENING_SHARE else text


class TextToImageMonitor:
    """Loss on held-out lab scenes, and pictures drawn by the stock pipeline, judged by the oracle."""

    def __init__(self, recipe: Recipe, vae: Any, device: torch.device) -> None:
        self.vae, self.device = vae, device
        self.settings = {"num_inference_steps": 25, "guidance_scale": 3.0, **recipe.sampling.given}
        data: Any = recipe.data
        stream = recipe.seed + HELD_OUT_STREAM
        # Fine-tunings on pairs are judged by scenes of just the two objects that the caption names.
        objects = (2, 2) if isinstance(data, ShapesPairsRecipe) else data.objects
        scenes = [sample_scene(stream, number, objects) for number in range(HELD_OUT_SCENES)]
        self.captions = [caption(scene) for scene in scenes]
        self.held_out: list[dict[str, Any]] = []
        for first in range(0, len(scenes), EVALUATION_BATCH):
            part = slice(first, first + EVALUATION_BATCH)
            images = image_batch([render(scene, data.image_size) for scene in scenes[part]]).to(device)
            batch: dict[str, Any] = {**encode_images(vae, images)}
            draw_latents(vae, batch)
            self.held_out.append({**batch, "captions": self.captions[part]})

    def validate(self, model: TextToImage) -> dict[str, float]:
        """`val/denoise` and, while the text encoder learns, `val/text_accuracy`."""
        with torch.no_grad():
            found = [model.training_loss(batch) for batch in self.held_out]
        names = [name for name in ("denoise", "text_accuracy") if name in found[0]]
        return {f"val/{name}": float(np.mean([float(part[name]) for part in found])) for name in names}

    def sample(self, model: TextToImage, seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """One picture a held-out caption, and the share of them that show what was asked."""
        captions = self.captions[:SAMPLED]
        pipe = model.pipeline(self.vae)
        with torch.no_grad():
            drawn = pipe(
                captions, generator=torch.Generator().manual_seed(seed), output_type="pt", **self.settings
            ).images
        images = drawn.float().cpu() * 2 - 1
        figures = {f"samples/{key}": share.value for key, share in caption_accuracy(images, captions).items()}
        for name, wanted in (("one_object", 1), ("two_objects", 2)):
            chosen = [number for number, text in enumerate(captions) if len(parse_caption(text).objects) == wanted]
            if chosen:
                shares = caption_accuracy(images[chosen], [captions[number] for number in chosen])
                figures[f"samples/{name}"] = shares["objects"].value
        return {"samples": picture_grid(images, 8)}, figures
