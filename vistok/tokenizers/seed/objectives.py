"""What SEED learns from: captions in the first stage, its own queries and a teacher in the second.

Sources: arXiv 2310.01218, section 3.1; the caption loss is that of BLIP-2's first stage (arXiv 2301.12597, section
3.1), from whose checkpoint SEED starts. Where nothing pretrained exists, as in the lab, it is part of the first stage.

Shape letters: B pictures, T words, n queries (and codes of a picture), D width of the Q-Former, C channels of a code,
K codes, E image embedding, F contrastive space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.nn.model import VistokModel

from .qformer import KeysValues, QFormer

__all__ = ["SEEDObjectives"]

LABEL_SMOOTHING = 0.1
REVIVAL_INTERVAL = 50


class SEEDObjectives(VistokModel):
    """The training half of `SEED`, which brings the networks and `causal_embeddings`, `project`, `nearest`."""

    qformer: QFormer
    query_tokens: nn.Parameter
    codebook: nn.Parameter
    temperature: nn.Parameter
    vision_proj: nn.Linear
    text_proj: nn.Linear
    decode_task_layer: nn.Sequential
    reconstruction_position: nn.Parameter
    reconstruction_blocks: nn.ModuleList
    codes_seen: Tensor | None
    passes: Tensor | None

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The objective of the stage that the batch is for.

        Args:
            batch: `images` [B, 3, H, W] in [-1, 1], and
                for the contrastive stage `input_ids` int64 [B, T] (first position: the summary) and `attention_mask`;
                for the codebook stage `image_embeds` [B, E] of a CLIP teacher (or 77 text features for SEED-1).
                What the codebook stage needs of the pictures is frozen: `causal_embeddings` [B, n, D] may stand for
                them.
            generator: accepted for symmetry; dropout draws from torch's default.

        Returns:
            `loss` and its parts.

        Raises:
            InvalidInputError: if the batch fits neither stage.
        """
        if "causal_embeddings" in batch and "image_embeds" in batch:
            return self.rebuilding_loss(batch["causal_embeddings"], batch["image_embeds"])
        images = batch["images"]
        self._check_images(images)
        if "input_ids" in batch:
            return self.contrastive_loss(self.normalize(images), batch["input_ids"], batch.get("attention_mask"))
        if "image_embeds" not in batch:
            raise InvalidInputError(
                "the batch needs input_ids (contrastive stage) or image_embeds of a CLIP teacher (codebook stage); "
                f"it has {', '.join(batch)}"
            )
        return self.codebook_loss(self.normalize(images), batch["image_embeds"])

    # ---- first stage

    def _require_text(self) -> None:
        if self.config.text_vocab_size is None:
            raise InvalidInputError("this SEED has no text branch; build it with text_vocab_size (BERT's has 30523)")

    def contrastive_features(
        self,
        pixels: Tensor,
        text_ids: Tensor,
        text_mask: Tensor | None = None,
        *,
        cache: list[KeysValues] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors of all queries [B, n, F] and of the texts [B, F].

        `cache` collects the queries' keys and values, one pair a layer.
        """
        self._require_text()
        images = functional.normalize(self.vision_proj(self.causal_embeddings(pixels, cache=cache)), dim=-1)
        return images, self.text_features(text_ids, text_mask)

    def text_features(self, text_ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Unit vectors [B, F] of texts, int64 [B, T] (first position: the summary)."""
        self._require_text()
        texts = self.qformer(text_ids=text_ids, text_mask=text_mask)[:, 0]
        return functional.normalize(self.text_proj(texts), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors [B, F] of pictures [B, 3, H, W] in [-1, 1], by their last query, which saw all others."""
        self._require_text()
        self._check_images(images)
        return functional.normalize(self.vision_proj(self.causal_embeddings(self.normalize(images))[:, -1]), dim=-1)

    def code_features(self, ids: Tensor) -> Tensor:
        """Unit vectors [B, F] of pictures by their codes alone, int64 [B, n]: codes rebuild the last query.

        The objective of `rebuild` sees directions only; the queries' norm is that of a LayerNorm's output.
        """
        self._require_text()
        self._check_ids(ids)
        states = functional.embedding(ids.to(self.device), self._decode_table())
        last = functional.normalize(self.rebuild(states)[:, -1], dim=-1) * math.sqrt(self.config.hidden_size)
        return functional.normalize(self.vision_proj(last), dim=-1)

    def contrastive_loss(self, pixels: Tensor, text_ids: Tensor, text_mask: Tensor | None = None) -> dict[str, Tensor]:
        """First stage: pictures (by their last query, which saw all others) and captions find each other.

        Features of other processes join as negatives, without gradient.
        """
        cache: list[KeysValues] | None = [] if self.config.caption_weight else None
        queries, texts = self.contrastive_features(pixels, text_ids, text_mask, cache=cache)
        images = queries[:, -1]
        every_image, first = _gathered(images)
        every_text, _ = _gathered(texts)
        targets = torch.arange(len(images), device=images.device) + first
        losses = [
            functional.cross_entropy(one @ other.t() / self.temperature, targets, label_smoothing=LABEL_SMOOTHING)
            for one, other in ((images, every_text), (texts, every_image))
        ]
        contrastive = (losses[0] + losses[1]) / 2
        found = ((images.detach() @ every_text.t()).argmax(1) == targets).float().mean()
        if cache is None:
            return {"loss": contrastive, "accuracy": found}
        caption = self.caption_loss(cache, text_ids, text_mask)
        loss = contrastive + self.config.caption_weight * caption
        return {"loss": loss, "contrastive": contrastive.detach(), "caption": caption.detach(), "accuracy": found}

    def caption_loss(self, cache: list[KeysValues], text_ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Cross entropy of every word, told from the words before it and from the queries' keys and values."""
        mask = torch.ones_like(text_ids) if text_mask is None else text_mask
        batch = len(text_ids)
        past = [(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)) for key, value in cache]
        states = self.qformer(text_ids=text_ids[:, :-1], text_mask=mask[:, :-1], past=past)
        targets = text_ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        logits = self.qformer.language_logits(states).float()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=LABEL_SMOOTHING)

    # ---- second stage

    @torch.no_grad()
    def teacher_embeddings(self, causal_embeddings: Tensor) -> Tensor:
        """What stands for CLIP's image embedding where no CLIP exists: the contrastive feature of the last query.

        Args:
            causal_embeddings: [B, n, D] of a SEED that went through the first stage.

        Returns:
            [B, F] of norm sqrt(F), so that a coordinate has about unit variance, as CLIP's have.
        """
        self._require_text()
        feature = functional.normalize(self.vision_proj(causal_embeddings[:, -1]), dim=-1)
        return feature * math.sqrt(feature.shape[-1])

    @torch.no_grad()
    def revive(self, z: Tensor) -> None:
        """Move codes that no recent picture used onto random ones of z [M, C]; every `REVIVAL_INTERVAL` passes."""
        assert self.codes_seen is not None
        assert self.passes is not None
        if int(self.passes) % REVIVAL_INTERVAL == 0:
            dead = ~self.codes_seen
            source = z.float()[torch.randint(len(z), (self.codebook_size,), device=z.device)]
            self.codebook.copy_(torch.where(dead[:, None], source.to(self.codebook), self.codebook))
            self.codes_seen.zero_()
        self.passes += 1

    def quantize(self, z: Tensor, *, legacy: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Nearest codes with gradients passed straight through.

        Args:
            z: [B, n, C].
            legacy: the published way: weight 1 on what pulls the encoder, `codebook_weight` on what pulls the codes.
                False is the other way round, as in VQ-VAE.

        Returns:
            Codes [B, n, C], loss, ids int64 [B, n].
        """
        ids = self.nearest(z)
        # Features that are not finite have no nearest code (-1); code 0 keeps the loss NaN instead of failing here.
        chosen = functional.embedding(ids.clamp_min(0), self.codebook).to(z.dtype)
        small = self.config.codebook_weight
        pull_encoder, pull_codes = (1.0, small) if legacy else (small, 1.0)
        loss = pull_encoder * functional.mse_loss(z, chosen.detach())
        loss = loss + pull_codes * functional.mse_loss(chosen, z.detach())
        return z + (chosen - z).detach(), loss, ids

    def rebuild(self, states: Tensor) -> Tensor:
        """Codes behind `decode_task_layer`, [B, n, D], to the causal embeddings that they stand for, [B, n, D]."""
        if not self.config.reconstruction:
            raise InvalidInputError("this SEED cannot rebuild its queries: it needs reconstruction=True")
        rebuilt = states + self.reconstruction_position
        for block in self.reconstruction_blocks:
            rebuilt = block(rebuilt)
        return rebuilt

    def codebook_loss(self, pixels: Tensor, image_embeds: Tensor) -> dict[str, Tensor]:
        """Second stage: codes rebuild the causal embeddings, and lead to the teacher's image embedding."""
        training = self.qformer.training
        self.qformer.eval()  # frozen in this stage: dropout would only blur the target
        with torch.no_grad():
            target = self.causal_embeddings(pixels)
        self.qformer.train(training)
        return self.rebuilding_loss(target, image_embeds)

    def rebuilding_loss(self, target: Tensor, image_embeds: Tensor) -> dict[str, Tensor]:
        """Second stage on causal embeddings [B, n, D]."""
        self._require_codebook()
        z = self.project(target)
        if self.codes_seen is not None and self.training:
            self.revive(z.detach().flatten(0, 1))
        quantized, embed, ids = self.quantize(z)
        states = self.decode_task_layer(quantized.to(target.dtype))
        rebuilt = self.rebuild(states)
        likeness = functional.cosine_similarity(rebuilt.float(), target.float(), dim=-1)
        answer = self._head(states)
        if answer.shape != image_embeds.shape:
            raise InvalidInputError(f"image_embeds must be {list(answer.shape)}; got {list(image_embeds.shape)}")
        parts = {
            "codebook": 5.0 * embed,
            "reconstruction": 2.0 * (1 - likeness.mean()),
            "embedding": 0.5 * functional.mse_loss(answer.float(), image_embeds.float()),
        }
        if self.codes_seen is not None and self.training:
            self.codes_seen[ids.clamp_min(0).flatten()] = True
        counts = torch.bincount(ids.clamp_min(0).flatten(), minlength=self.codebook_size).float()
        shares = counts / counts.sum()
        entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
        reports = {"usage": (counts > 0).float().mean(), "perplexity": entropy.exp()}
        return {"loss": sum(parts.values(), torch.zeros((), device=answer.device)), **parts, **reports}


def _gathered(features: Tensor) -> tuple[Tensor, int]:
    """Features of all processes, own ones with gradient, and the position of the first own one."""
    import torch.distributed as distributed

    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return features, 0
    parts = [torch.empty_like(features) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, features.detach().contiguous())
    return torch.cat(parts), distributed.get_rank() * len(features)
