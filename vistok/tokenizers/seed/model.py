"""SEED: an image becomes 32 words with an order, which a language model can read and write.

A frozen vision transformer sees the picture, 32 causal queries summarise it one after the other, each summary becomes
one of 8192 codes. The way back leads from codes to one CLIP image embedding, which an unCLIP diffusion model paints
(see `UnCLIPDecoder`). Reconstructions are semantic, not pixel by pixel.

Papers: "Planting a SEED of Vision in Large Language Model", arXiv 2307.08041 (SEED-1: codes to 77 text-like
embeddings), and "Making LLaMA SEE and Draw with SEED Tokenizer", arXiv 2310.01218 (SEED-2).
Origin of the weights: AILab-CVC/SEED (Apache-2.0); the vision transformer is EVA-CLIP's ViT-g as BLIP-2 uses it.

Top to bottom: configuration and network; pictures to codes and back; the authors' files. The training objectives are
those of the parent class. They, the networks, the stages' hyper-parameters, the unCLIP decoder and the language side
are the neighbours of this file.

Shape letters: B pictures, S patches and class token, n queries (and codes of a picture), D width of the Q-Former,
C channels of a code, K codes, E image embedding.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.files import open_image, read_state_dict
from vistok.kernels.nearest_code import nearest_code
from vistok.nn.vit import ViTBlock
from vistok.registry import Published
from vistok.tokenizers.pictures import check_pixels, postprocess_images
from vistok.tokenizers.transforms import to_tensor, to_uint8
from vistok.tokens import VisualTokens

from .names import QFORMERS, TEXT_HEAD_NAMES, seed_from_official, seed_to_official
from .objectives import SEEDObjectives
from .qformer import KeysValues, QFormer
from .vision import VisionTransformer, interpolate_positions

__all__ = ["SEED"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VISION_FILE = "eva_vit_g.pth"
VISION_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
MLP_HEAD = (256, 128, 32)
MAX_ASPECT = 100  # a narrower picture would be enlarged to gigabytes before it is cropped


def _published() -> dict[str, Published]:
    name = "seed-2.unclip"
    return {
        name: Published(
            name=name,
            system="seed",
            config={},
            hub_id="AILab-CVC/seed-tokenizer-2",
            hub_file="seed_quantizer.pt",
            licence="apache-2.0",
            paper="2310.01218",
            origin="https://github.com/AILab-CVC/SEED",
            image_size=224,
            num_tokens=32,
            codebook_size=8192,
            preprocessing="squashed to 224 x 224 (bilinear), CLIP mean and deviation",
            parameters=1_150_053_440,
        )
    }


class SEED(SEEDObjectives):
    """Causal, semantic image tokenizer. The defaults are SEED-2 as published.

    Args:
        image_size: side of the input in pixels.
        patch_size: side of a patch in pixels.
        vision_size, vision_layers, vision_heads, vision_mlp_size: the vision transformer.
        hidden_size: width D of the Q-Former.
        num_layers, num_heads, ffn_size: the causal Q-Former.
        cross_attention_every: its layers 0, c, 2c, ... look at the picture.
        dropout: of the Q-Formers, in training only.
        num_queries: codes n of a picture.
        causal: query i sees queries 0..i; False lets each see all.
        codebook_size: K.
        codebook_dim: C.
        codebook_weight: weight of the smaller one of the two codebook losses (see `quantize`).
        head: how codes become an embedding: "mlp" (the released tokenizer), "qformer" (the training script's default),
            "text" (SEED-1: text-like embeddings), or None for the causal Q-Former alone (first training stage).
        embedding_size: E.
        reverse_layers: layers of the Q-Former in the heads "qformer" and "text".
        num_reverse_tokens: embeddings that the head "text" gives (77); the head "qformer" gives one.
        num_blocks, block_heads: the plain transformers behind the codes.
        reconstruction: keep the transformer that rebuilds the causal embeddings (used in training only).
        text_vocab_size: words of the text branch of the first training stage; None builds none.
        max_text_length: longest text.
        contrastive_size: width of the contrastive space.
        caption_weight: weight of BLIP-2's caption loss in the first stage; SEED, which starts from BLIP-2, has 0.
        revive_dead_codes: in the second stage, move codes that are not used onto pictures; SEED does not.
        unclip: name of the `UnCLIPDenoiser` that paints its embeddings, which `vistok.load` loads when it is needed.

    Raises:
        InvalidInputError: if the arguments do not fit each other.
    """

    system: ClassVar[str] = "seed"
    published: ClassVar[dict[str, Published]] = _published()

    @register_to_config
    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        vision_size: int = 1408,
        vision_layers: int = 39,
        vision_heads: int = 16,
        vision_mlp_size: int = 6144,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        ffn_size: int = 3072,
        cross_attention_every: int = 2,
        dropout: float = 0.1,
        num_queries: int = 32,
        causal: bool = True,
        codebook_size: int = 8192,
        codebook_dim: int = 32,
        codebook_weight: float = 0.25,
        head: str | None = "mlp",
        embedding_size: int = 1024,
        reverse_layers: int = 4,
        num_reverse_tokens: int = 1,
        num_blocks: int = 4,
        block_heads: int = 12,
        reconstruction: bool = True,
        text_vocab_size: int | None = None,
        max_text_length: int = 512,
        contrastive_size: int = 256,
        caption_weight: float = 0.0,
        revive_dead_codes: bool = False,
        unclip: str | None = None,
    ) -> None:
        super().__init__()
        if head not in ("mlp", "qformer", "text", None):
            raise InvalidInputError(f"head must be 'mlp', 'qformer', 'text' or None; got {head!r}")
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise InvalidInputError(
                f"image_size must be a multiple of patch_size ({patch_size}) and hold one patch; got {image_size}"
            )
        self.vision = VisionTransformer(
            image_size, patch_size, vision_size, vision_layers, vision_heads, vision_mlp_size
        )
        self.vision_norm = nn.LayerNorm(vision_size, eps=1e-5)
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, hidden_size) * 0.02)
        self.qformer = QFormer(
            hidden_size,
            num_layers,
            num_heads,
            ffn_size,
            vision_size,
            cross_attention_every=cross_attention_every,
            dropout=dropout,
            text_vocab_size=text_vocab_size,
            max_positions=max_text_length,
            language_head=caption_weight > 0,
        )
        if text_vocab_size is not None:
            self.vision_proj = nn.Linear(hidden_size, contrastive_size)
            self.text_proj = nn.Linear(hidden_size, contrastive_size)
            self.temperature = nn.Parameter(torch.tensor(0.07))
        if head is not None:
            self.encode_task_layer = _task_layer(hidden_size, hidden_size, codebook_dim)
            self.decode_task_layer = _task_layer(codebook_dim, codebook_dim, hidden_size)
            self.codebook = nn.Parameter(
                torch.empty(codebook_size, codebook_dim).uniform_(-1.0 / codebook_size, 1.0 / codebook_size)
            )
            self.image_position = nn.Parameter(torch.zeros(1, num_queries, hidden_size))
            self.image_blocks = _blocks(num_blocks, hidden_size, block_heads)
            if reconstruction:
                self.reconstruction_position = nn.Parameter(torch.zeros(1, num_queries, hidden_size))
                self.reconstruction_blocks = _blocks(num_blocks, hidden_size, block_heads)
            if head == "mlp":
                first, second, third = MLP_HEAD
                self.image_down = nn.Sequential(
                    nn.Linear(hidden_size, first, bias=False),
                    nn.ReLU(),
                    nn.Linear(first, second, bias=False),
                    nn.ReLU(),
                    nn.Linear(second, third, bias=False),
                )
                self.embedding_proj = nn.Linear(num_queries * third, embedding_size)
            else:
                self.reverse_tokens = nn.Parameter(torch.randn(1, num_reverse_tokens, hidden_size) * 0.02)
                self.reverse_qformer = QFormer(
                    hidden_size,
                    reverse_layers,
                    num_heads,
                    ffn_size,
                    hidden_size,
                    cross_attention_every=cross_attention_every,
                    dropout=dropout,
                )
                self.embedding_proj = nn.Linear(hidden_size, embedding_size)
        revives = revive_dead_codes and head is not None
        self.register_buffer("codes_seen", torch.zeros(codebook_size, dtype=torch.bool) if revives else None)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64) if revives else None)
        self.decoder: Callable[..., Tensor] | None = None
        self._table: tuple[list[tuple[Any, ...]], Tensor, list[Tensor]] | None = None

    @classmethod
    def tiny(cls, **overrides: Any) -> SEED:
        """Random weights: pictures of 28 x 28, 8 codes out of 64."""
        arguments = {
            "image_size": 28,
            "vision_size": 16,
            "vision_layers": 2,
            "vision_heads": 2,
            "vision_mlp_size": 32,
            "hidden_size": 24,
            "num_layers": 4,
            "num_heads": 4,
            "ffn_size": 32,
            "num_queries": 8,
            "codebook_size": 64,
            "codebook_dim": 8,
            "embedding_size": 16,
            "reverse_layers": 2,
            "num_blocks": 1,
        }
        return cls(**{**arguments, **overrides})

    @property
    def codebook_size(self) -> int:
        """Number of codes, K."""
        return self.config.codebook_size

    @property
    def num_tokens(self) -> int:
        """Codes of a picture, n."""
        return self.config.num_queries

    def train(self, mode: bool = True) -> SEED:
        """As usual, but parts without a learning parameter stay in eval mode: frozen parts have no dropout."""
        super().train(mode)
        for part in (self.vision, self.vision_norm, self.qformer):
            if mode and not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    # ---- pictures to codes

    def normalize(self, images: Tensor) -> Tensor:
        """[-1, 1] to CLIP's mean and deviation."""
        mean = torch.tensor(CLIP_MEAN, device=images.device)[:, None, None]
        std = torch.tensor(CLIP_STD, device=images.device)[:, None, None]
        return ((images.float() + 1) / 2 - mean) / std

    def vision_features(self, pixels: Tensor) -> Tensor:
        """CLIP-normalised pictures [B, 3, H, W] to float32 [B, S, vision_size], class token first."""
        features = self.vision(pixels)
        norm = self.vision_norm
        return functional.layer_norm(
            features.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
        ).to(norm.weight.dtype)

    def causal_embeddings(self, pixels: Tensor, *, cache: list[KeysValues] | None = None) -> Tensor:
        """CLIP-normalised pictures to what the queries saw, [B, n, D]; `cache` collects their keys and values."""
        return self.queried(self.vision_features(pixels), cache=cache)

    def queried(self, features: Tensor, *, cache: list[KeysValues] | None = None) -> Tensor:
        """Features of pictures [B, S, vision_size] to what the queries saw in them, [B, n, D]."""
        return self.qformer(self.query_tokens, encoder_states=features, causal=self.config.causal, cache=cache)

    def project(self, embeddings: Tensor) -> Tensor:
        """[B, n, D] to the space of the codes [B, n, C], in float32: half precision flips close calls."""
        self._require_codebook()
        first, _, second = self.encode_task_layer
        with torch.autocast(embeddings.device.type, enabled=False):
            hidden = functional.linear(embeddings.float(), first.weight.float(), first.bias.float()).tanh()
            return functional.linear(hidden, second.weight.float(), second.bias.float())

    def nearest(self, z: Tensor) -> Tensor:
        """Ids int64 [B, n] of the codes nearest to [B, n, C], in plain Euclidean distance."""
        return nearest_code(z.detach().flatten(0, 1), self.codebook.float()).view(z.shape[:2])

    @torch.no_grad()
    def encode(self, images: Tensor) -> VisualTokens:
        """Pictures to codes.

        Args:
            images: float [B, 3, image_size, image_size] in [-1, 1] (see `preprocess`).

        Returns:
            ids [B, n]; their order matters, and there is no grid.

        Raises:
            InvalidInputError: wrong shape, size, type or range; NaN or infinite pixels.
            InvalidOutputError: if the encoder produces NaN.
        """
        self._check_images(images)
        ids = self.nearest(self.project(self.causal_embeddings(self.normalize(images))))
        if ids.numel() and int(ids.min()) < 0:
            raise InvalidOutputError("the encoder produced NaN or infinite features: check the model's weights")
        return VisualTokens(ids=ids)

    def _check_images(self, images: Tensor) -> None:
        side = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side) or not images.is_floating_point():
            raise InvalidInputError(
                f"images must be float [B, 3, {side}, {side}] in [-1, 1]; got {images.dtype} {list(images.shape)}: "
                "use preprocess()"
            )
        check_pixels(images)

    def _require_codebook(self) -> None:
        if self.config.head is None:
            raise InvalidInputError("this SEED has no codebook (head=None): it is for the first training stage only")

    # ---- codes to an embedding, and to pictures

    def decode_embeddings(self, ids: Tensor) -> Tensor:
        """Codes to the image embedding.

        Args:
            ids: int64 [B, n].

        Returns:
            [B, E]; for the head "text" [B, num_reverse_tokens, E].

        Raises:
            InvalidInputError: other shapes, or ids outside the codebook.
        """
        self._require_codebook()
        self._check_ids(ids)
        return self._head(functional.embedding(ids.to(self.device), self._decode_table()))

    def _check_ids(self, ids: Tensor) -> None:
        if ids.ndim != 2 or ids.shape[1] != self.num_tokens or ids.dtype != torch.int64:
            raise InvalidInputError(
                f"expected int64 ids [B, {self.num_tokens}]; got {ids.dtype} {list(ids.shape)}: a picture has exactly "
                f"{self.num_tokens} codes"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.codebook_size:
            raise InvalidInputError(
                f"ids must lie in 0..{self.codebook_size - 1}; got {int(ids.min())}..{int(ids.max())}"
            )

    def _decode_table(self) -> Tensor:
        """`decode_task_layer` of every code [K, D]: it depends on the code alone. Kept until a weight changes."""
        sources = [self.codebook, *self.decode_task_layer.parameters()]
        if torch.is_grad_enabled() or any(source.is_inference() for source in sources):
            return self.decode_task_layer(self.codebook)
        stamp = [(source.data_ptr(), source._version, source.dtype, source.device) for source in sources]
        if self._table is None or self._table[0] != stamp:
            self._table = (stamp, self.decode_task_layer(self.codebook), sources)
        return self._table[1]

    def _head(self, states: Tensor) -> Tensor:
        """[B, n, D] behind `decode_task_layer` to the embedding."""
        x = states + self.image_position
        for block in self.image_blocks:
            x = block(x)
        if self.config.head == "mlp":
            return self.embedding_proj(self.image_down(x).flatten(1))
        answer = self.embedding_proj(self.reverse_qformer(self.reverse_tokens, encoder_states=x))
        return answer[:, 0] if self.config.head == "qformer" else answer

    @torch.no_grad()
    def decode(
        self,
        tokens: VisualTokens,
        *,
        decoder: Callable[..., Tensor] | None = None,
        negative: VisualTokens | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Codes to pictures.

        Args:
            tokens: ids [B, n].
            decoder: what paints image embeddings [B, E], e.g. `UnCLIPDecoder(pipeline)`; None takes `self.decoder`.
            negative: codes of what to stay away from, [B, n] or [1, n].
            generator: one for all pictures, or one a picture.
            sampling: further arguments of the decoder (`num_inference_steps`, `guidance_scale`, ...).

        Returns:
            [B, 3, H, W], about [-1, 1].

        Raises:
            InvalidInputError: no ids, ids that fit no picture, or no decoder.
        """
        paint = self.decoder if decoder is None else decoder
        if tokens.ids is None:
            raise InvalidInputError("SEED.decode needs ids; these tokens are continuous features")
        if paint is None:
            raise InvalidInputError(
                "SEED's codes become an image embedding, which a diffusion model paints: give decoder=UnCLIPDecoder("
                "StableUnCLIPImg2ImgPipeline.from_pretrained('stabilityai/stable-diffusion-2-1-unclip')), or set "
                "model.decoder"
            )
        embeddings = self.decode_embeddings(tokens.ids)
        if negative is not None:
            if negative.ids is None:
                raise InvalidInputError("negative needs ids")
            avoided = self.decode_embeddings(negative.ids)
            sampling["negative"] = avoided.expand_as(embeddings) if len(avoided) == 1 else avoided
        return paint(embeddings, generator=generator, **sampling)

    # ---- pictures

    def preprocess(
        self,
        images: Image.Image | str | os.PathLike[str] | Sequence[Image.Image | str | os.PathLike[str]],
        size: int | None = None,
        *,
        mode: str = "bilinear",
    ) -> Tensor:
        """Pictures to float32 [B, 3, image_size, image_size] in [-1, 1]. The codes depend on the mode.

        Args:
            images: a picture, a path, or several.
            size: `image_size` or None: the tokenizer takes no other.
            mode: "bilinear" (squashed; what SEED-LLaMA was used with), "bicubic" (squashed; the tokenizer's training),
                or "crop" (shorter side, bilinear, and centre crop).

        Raises:
            InvalidInputError: unknown mode, another size, no pictures, or a picture that cannot be read.
        """
        if size not in (None, self.config.image_size):
            raise InvalidInputError(f"this SEED takes pictures of {self.config.image_size} pixels a side; got {size}")
        if mode not in ("bilinear", "bicubic", "crop"):
            raise InvalidInputError(f"mode must be 'bilinear', 'bicubic' or 'crop'; got {mode!r}")
        several = [images] if isinstance(images, Image.Image | str | os.PathLike) else list(images)
        if not several:
            raise InvalidInputError("no pictures given")
        side = self.config.image_size
        made = []
        for source in several:
            image = open_image(source)
            if mode == "crop":
                short, long = sorted(image.size)
                if long > MAX_ASPECT * short:
                    raise InvalidInputError(
                        f"a picture of {image.width}x{image.height} pixels is too narrow for mode 'crop'; cut it, or "
                        "squash it with mode 'bilinear'"
                    )
                longer = int(side * long / short)
                scaled = (side, longer) if image.width <= image.height else (longer, side)
                image = image.resize(scaled, Image.Resampling.BILINEAR)
                left, top = round((image.width - side) / 2), round((image.height - side) / 2)
                image = image.crop((left, top, left + side, top + side))
            else:
                filter_ = Image.Resampling.BILINEAR if mode == "bilinear" else Image.Resampling.BICUBIC
                image = image.resize((side, side), filter_)
            made.append(to_tensor(image))
        return torch.stack(made)

    def postprocess(self, images: Tensor, *, output_type: str = "pil") -> list[Image.Image] | np.ndarray | Tensor:
        """Decoded pictures for people.

        Args:
            images: [B, 3, H, W], about [-1, 1].
            output_type: "pil", "uint8" ([B, H, W, 3]), "np" (float [B, H, W, 3] in [0, 1]) or "pt" ([B, 3, H, W]).
        """
        return postprocess_images(images, output_type, to_uint8)

    # ---- the authors' files

    @classmethod
    def from_official(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any] | Sequence[str | os.PathLike[str] | Mapping[str, Any]],
        config: str | Mapping[str, Any],
        *,
        vision: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> SEED:
        """Load files of the authors strictly: all that the model has must be there, the rest is left out.

        Args:
            source: `seed_quantizer.pt`; or several files in the order in which they overwrite each other (first stage,
                then second); or their content.
            config: published name, or constructor arguments (the authors' names or ours).
            vision: `eva_vit_g.pth` of LAVIS, which the published tokenizer does not contain. None takes a file of that
                name beside the first source.
            dtype: floating point type of all weights (the files mix several); None keeps them.

        Raises:
            CheckpointError: naming every missing, unexpected or misshapen key.
        """
        arguments = cls.arguments_for(config)
        sources = [source] if isinstance(source, Mapping | str | os.PathLike) else list(source)
        state: dict[str, Any] = {}
        for one in sources:
            state |= cls.unwrap_official(one if isinstance(one, Mapping) else read_state_dict(one))
        if vision is None and sources and not isinstance(sources[0], Mapping):
            beside = Path(sources[0]).parent / VISION_FILE
            vision = beside if beside.is_file() else None
        if vision is not None:
            eva = cls.unwrap_official(vision if isinstance(vision, Mapping) else read_state_dict(vision))
            state |= {f"visual_encoder.{key.removeprefix('visual_encoder.')}": value for key, value in eva.items()}
        with torch.device("meta"):
            skeleton = cls(**arguments)
        kept = _relevant(state, skeleton)
        positions = kept.get("visual_encoder.pos_embed")
        if positions is not None and positions.shape != skeleton.vision.pos_embed.shape:
            kept["visual_encoder.pos_embed"] = interpolate_positions(positions, skeleton.vision.pos_embed.shape[1])
        if dtype is not None:
            kept = {key: value.to(dtype) if value.is_floating_point() else value for key, value in kept.items()}
        return super().from_official(kept, arguments)

    @classmethod
    def config_from_official(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our constructor arguments from the authors' (groups `vit`, `bert`, `quantizer`), or from ours."""
        if "vit" not in config and "bert" not in config:
            return dict(config)
        vit, bert, own = config.get("vit", {}), config.get("bert", {}), config.get("quantizer", {})
        width, hidden = vit.get("embed_dim", 1408), bert.get("hidden_size", 768)
        queries = own.get("num_query_token", config.get("num_query_token", 32))
        arguments = {
            "image_size": vit.get("img_size", 224),
            "vision_size": width,
            "vision_layers": vit.get("depth", 39),
            "vision_heads": vit.get("num_heads", 16),
            "vision_mlp_size": int(width * 4.3637),
            "hidden_size": hidden,
            "num_layers": bert.get("num_hidden_layers", 12),
            "num_heads": bert.get("num_attention_heads", 12),
            "ffn_size": bert.get("intermediate_size", 3072),
            "dropout": bert.get("hidden_dropout_prob", 0.1),
            "num_queries": queries,
            "causal": queries == 32,  # the authors' mask is causal for exactly 32 queries
            "codebook_size": own.get("n_embed", config.get("n_embed", 8192)),
            "codebook_dim": own.get("codebook_embed_dim", 32),
            "embedding_size": own.get("image_features_dim", 1024),
            "max_text_length": bert.get("max_position_embeddings", 512),
        }
        if own.get("use_qformer_image"):  # in this constructor the way back is as deep as the way in
            arguments |= {"head": "qformer", "reverse_layers": arguments["num_layers"]}
        return arguments

    @classmethod
    def unwrap_official(cls, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Take the state dict out of a training checkpoint, and strip wrapper prefixes."""
        for key in ("model", "state_dict", "module"):
            if isinstance(state.get(key), Mapping):
                return cls.unwrap_official(state[key])
        return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}

    @classmethod
    def rename_official(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official names to ours."""
        return seed_from_official(state)

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names (without their `position_ids` buffers)."""
        cross = {
            ours: [number for number, layer in enumerate(part.layers) if layer.cross]
            for _, ours in QFORMERS
            if (part := getattr(self, ours.removesuffix("."), None)) is not None
        }
        return seed_to_official(self.state_dict(), cross, text_head=self.config.head == "text")

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """The published file lacks the vision transformer."""
        if missing and all(key.startswith("vision.") for key in missing):
            return (
                f"The vision transformer is missing: give vision={VISION_FILE!r} (LAVIS publishes it at {VISION_URL}), "
                "or put that file beside the tokenizer's."
            )
        return None


def _task_layer(size: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, out))


def _blocks(number: int, size: int, heads: int) -> nn.ModuleList:
    return nn.ModuleList(ViTBlock(size, heads, 4 * size, norm_eps=1e-6) for _ in range(number))


def _relevant(state: Mapping[str, Any], model: SEED) -> dict[str, Tensor]:
    """The part of the authors' state dict that belongs to this configuration.

    Published files hold parts of other heads and of training; keys of parts that the model has are kept in any case, so
    that a strict comparison finds differences inside them.
    """
    config = model.config
    text_head, with_text = config.head == "text", config.text_vocab_size is not None
    own_head = [theirs for theirs, _ in TEXT_HEAD_NAMES] if text_head else [image for _, image in TEXT_HEAD_NAMES]
    roots = ["visual_encoder.", "ln_vision.", "query_tokens", "Qformer.bert."]
    if config.head is not None:
        roots += ["quantize.", "encode_task_layer.", "decode_task_layer.", *own_head]
        roots += ["image_down."] if config.head == "mlp" else ["Reverse_Qformer.bert.", "reverse_tokens"]
        roots += ["blocks.", "pos_embed"] if config.reconstruction else []
    if with_text:
        roots += ["vision_proj.", "text_proj.", "temp"]
    left_out = [r"position_ids$", r"^visual_encoder\.(norm|fc_norm|head)\.", r"^Reverse_Qformer\.cls\."]
    left_out += [r"^pos_embed_image$"] if text_head else [r"^pos_embed_text$"]
    if not with_text:
        left_out += [r"^Qformer\.bert\.embeddings\.(word|position)_embeddings\."]
        left_out += [r"^Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\."]
    left_out += [r"^Reverse_Qformer\.bert\.embeddings\.(word|position)_embeddings\."]
    left_out += [r"^Reverse_Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\."]
    kept = {}
    for key, value in state.items():
        block = re.match(r"visual_encoder\.blocks\.(\d+)\.", key)
        if block and int(block[1]) >= config.vision_layers:  # EVA's file has one block more than BLIP-2 uses
            continue
        if key.startswith(tuple(roots)) and not any(re.search(pattern, key) for pattern in left_out):
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{key} holds a {type(value).__name__}, not a tensor")
            kept[key] = value
    return kept
