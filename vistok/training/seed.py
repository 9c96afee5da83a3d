"""SEED in the lab: captioned scenes for its first stage, what it made of scenes for all later ones, and its monitor.

Shape letters: B samples, H rows and W columns of pixels, T words, n codes of a picture, D width of its queries,
E image embedding, C channels of a latent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.shapes import Scene, caption, render, sample_scene
from vistok.data.shapes.words import caption_tokenizer
from vistok.errors import InvalidInputError
from vistok.files import atomic_path
from vistok.metrics.accuracy import caption_accuracy
from vistok.metrics.language import same_objects, write_captions
from vistok.metrics.retrieval import retrieval_accuracy

from .monitors import picture_grid
from .recipe import Recipe, ShapesCaptionsRecipe, ShapesSEEDRecipe
from .sources import ATTRIBUTE_DROPOUT, HELD_OUT_STREAM, Epochs, fingerprint, image_batch

__all__ = [
    "SEEDMonitor",
    "SentenceMonitor",
    "ShapesCaptions",
    "ShapesSEED",
    "UnCLIPMonitor",
    "caption_words",
    "encode_with_seed",
    "held_out_scenes",
    "seed_monitor",
    "seed_outputs",
]

HELD_OUT_SCENES = 256
PAINTED = 32
EVALUATION_BATCH = 64
LEFT_OUT = 0.25  # share of the attributes that a caption which does not say everything leaves out
ARRAYS = {
    "embeddings": ("causal_embeddings", "image_embeds"),
    "latents": ("image_embeds", "moments"),
    "sentences": ("ids",),
}


def caption_words(captions: Sequence[str], tokenizer: Any) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 [B, T], of captions."""
    encoded = tokenizer(list(captions), padding=True, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


class ShapesCaptions:
    """New lab scenes with the words of their captions (see `ShapesCaptionsRecipe`)."""

    def __init__(self, recipe: ShapesCaptionsRecipe, seed: int) -> None:
        self.recipe, self.seed = recipe, seed
        self.tokenizer = caption_tokenizer()

    def batch(self, numbers: np.ndarray) -> dict[str, Any]:
        """uint8 `images` [B, 3, H, W], `input_ids` and `attention_mask` int64 [B, T]."""
        pictures, texts = [], []
        for number in numbers.tolist():
            scene = sample_scene(self.seed, number, self.recipe.objects)
            rng = np.random.default_rng((self.seed, number))
            full = rng.random() < self.recipe.full_captions
            pictures.append(render(scene, self.recipe.image_size))
            texts.append(caption(scene, None if full else rng, attribute_dropout=LEFT_OUT))
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        return {"images": images, **caption_words(texts, self.tokenizer)}


@torch.no_grad()
def seed_outputs(give: str, model: Any, images: Tensor, autoencoder: Any = None) -> dict[str, Tensor]:
    """What the later trainings take from a picture.

    Args:
        give: as in `ShapesSEEDRecipe`.
        model: the SEED.
        images: [B, 3, H, W] in [-1, 1].
        autoencoder: KL tokenizer, for `latents`.

    Returns:
        `causal_embeddings` [B, n, D], `image_embeds` [B, E], `moments` [B, 2 C, h, w] or `ids` int64 [B, n]: those of
        `give`.
    """
    if give == "sentences":
        return {"ids": model.encode(images).ids}
    embeddings = model.causal_embeddings(model.normalize(images))
    found = {"causal_embeddings": embeddings, "image_embeds": model.teacher_embeddings(embeddings)}
    if give == "latents":
        found["moments"] = autoencoder.moments(images)
    return {name: found[name] for name in ARRAYS[give]}


def encode_with_seed(
    recipe: ShapesSEEDRecipe,
    model: Any,
    stream: int,
    cache: Path,
    *,
    autoencoder: Any = None,
    device: torch.device | str = "cpu",
    batch_size: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Show the scenes of a recipe to a SEED, once.

    The folder's name depends on scenes and weights, so that a changed network never meets what an old one made.

    Args:
        recipe: which scenes, and what to keep.
        model: the SEED.
        stream: seed of the scenes.
        cache: folder of all such folders.
        autoencoder: KL tokenizer, for `latents`.
        device: where the networks are.
        batch_size: scenes a forward pass.
        on_progress: called with (scenes done, scenes).

    Returns:
        Folder with one `.npy` file for each array of `seed_outputs` (float16 or int32), and `captions.json` (lists of
        wordings, the first of which says everything).

    Raises:
        InvalidInputError: `latents` without a KL tokenizer.
    """
    if recipe.give == "latents" and not hasattr(autoencoder, "moments"):
        raise InvalidInputError("data.give latents needs the field tokenizer: a KL tokenizer such as kl-shapes")
    networks = [fingerprint(one) for one in (model, autoencoder) if one is not None]
    key = json.dumps([asdict(recipe) | {"encoder": None}, stream, networks], sort_keys=True)
    folder = cache / f"seed-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if (folder / "captions.json").is_file():  # written last
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[np.ndarray]] = {}
    texts = []
    for first in range(0, recipe.scenes, batch_size):
        numbers = range(first, min(first + batch_size, recipe.scenes))
        scenes = [sample_scene(stream, number, recipe.objects) for number in numbers]
        images = image_batch([render(scene, recipe.image_size) for scene in scenes]).to(device)
        for name, value in seed_outputs(recipe.give, model, images, autoencoder).items():
            kept = value.to(torch.int32 if name == "ids" else torch.float16)
            parts.setdefault(name, []).append(kept.cpu().numpy())
        for number, scene in zip(numbers, scenes, strict=True):
            rng = np.random.default_rng((stream, number))
            texts.append([caption(scene)] + [caption(scene, rng, attribute_dropout=p) for p in ATTRIBUTE_DROPOUT[1:]])
        if on_progress is not None:
            on_progress(len(texts), recipe.scenes)
    for name, values in parts.items():
        with atomic_path(folder / f"{name}.npy") as path:
            np.save(path, np.concatenate(values))
    with atomic_path(folder / "captions.json") as path:
        path.write_text(json.dumps(texts), encoding="utf-8")
    return folder


class ShapesSEED:
    """Lab scenes as a SEED sees them, read from memory maps (see `ShapesSEEDRecipe`).

    Args:
        folder: of `encode_with_seed`.
        recipe: the same that it was given.
        seed: of the order, and of which way round a sentence is.
        write: makes training sequences of codes and captions, for `sentences`
            (see `vistok.training.image_language.SentenceWriter`).
    """

    def __init__(self, folder: Path, recipe: ShapesSEEDRecipe, seed: int, write: Callable[..., Any] | None) -> None:
        self.folder, self.recipe, self.seed, self.write = folder, recipe, seed, write
        self.captions: list[list[str]] = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        self.order = Epochs(recipe.scenes, seed)
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:  # workers map the files themselves instead of receiving a copy
        return {**self.__dict__, "_maps": {}}

    def encoded(self, name: str) -> np.ndarray:
        """One of the arrays, of all scenes."""
        if name not in self._maps:
            self._maps[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._maps[name]

    def batch(self, numbers: np.ndarray) -> dict[str, Any]:
        """The arrays of `seed_outputs` as float32; for `sentences` `input_ids`, `attention_mask`, `labels` int64."""
        chosen = self.order(numbers)
        if self.recipe.give != "sentences":
            names = ARRAYS[self.recipe.give]
            return {name: torch.from_numpy(self.encoded(name)[chosen].astype(np.float32)) for name in names}
        assert self.write is not None
        ids = torch.from_numpy(self.encoded("ids")[chosen].astype(np.int64))
        draws = np.random.default_rng((self.seed, int(numbers[0]))).random((len(numbers), 2))
        # A caption to draw may leave things out; a caption of a picture says everything.
        image_first = (draws[:, 0] < 0.5).tolist()
        wording = (draws[:, 1] * len(ATTRIBUTE_DROPOUT)).astype(int).tolist()
        texts = [
            self.captions[scene][0 if first else which]
            for scene, first, which in zip(chosen.tolist(), image_first, wording, strict=True)
        ]
        return self.write(ids, texts, image_first)


def open_seed(
    data: ShapesSEEDRecipe,
    seed: int,
    autoencoder: Any,
    cache: Path,
    *,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> ShapesSEED:
    """The source of a recipe; its SEED is loaded, used and let go.

    Args:
        data: the recipe's data.
        seed: of scenes and order.
        autoencoder: KL tokenizer, for `latents`.
        cache: where encoded scenes are kept.
        device: where the networks run.
        on_progress: called with (scenes done, scenes).
    """
    from vistok import hub

    model = hub.load(data.encoder, device=device)
    folder = encode_with_seed(data, model, seed, cache, autoencoder=autoencoder, device=device, on_progress=on_progress)
    write = None
    if data.give == "sentences":
        from .image_language import SentenceWriter

        write = SentenceWriter(model.codebook_size, model.num_tokens)
    return ShapesSEED(folder, data, seed, write)


def held_out_scenes(recipe: Recipe, count: int = HELD_OUT_SCENES) -> list[Scene]:
    """Scenes of the recipe's kind that its training never draws."""
    objects = getattr(recipe.data, "objects", (1, 2))
    return [sample_scene(recipe.seed + HELD_OUT_STREAM, number, objects) for number in range(count)]


def seed_monitor(recipe: Recipe, source: Any, device: torch.device) -> SEEDMonitor | UnCLIPMonitor | SentenceMonitor:
    """What watches the training of a part of SEED."""
    if recipe.model.system == "seed":
        return SEEDMonitor(recipe, device)
    kind = UnCLIPMonitor if recipe.model.system == "seed-unclip" else SentenceMonitor
    return kind(recipe, source, device)


class SEEDMonitor:
    """Retrieval of held-out scenes by their captions: by the queries, by the codes, and by the image embedding."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.device = device
        scenes = held_out_scenes(recipe)
        self.captions = [caption(scene) for scene in scenes]
        self.words = caption_words(self.captions, caption_tokenizer())
        side = getattr(recipe.data, "image_size", 64)
        self.images = image_batch([render(scene, side) for scene in scenes])

    @torch.no_grad()
    def validate(self, model: Any) -> dict[str, float]:
        """`val/retrieval` (the nearest caption is right), `val/retrieval_codes`, `val/retrieval_embedding` and
        `val/codebook_usage`, as fractions."""
        if model.config.text_vocab_size is None:
            return {}
        texts = model.text_features(*(value.to(self.device) for value in self.words.values())).cpu()
        found: dict[str, list[Tensor]] = {}
        used: set[int] = set()
        for part in self.images.to(self.device).split(EVALUATION_BATCH):
            found.setdefault("retrieval", []).append(model.image_features(part))
            if model.config.head is not None:
                ids = model.encode(part).ids
                used.update(ids.flatten().tolist())
                found.setdefault("retrieval_codes", []).append(model.code_features(ids))
                if model.config.embedding_size == model.config.contrastive_size:
                    found.setdefault("retrieval_embedding", []).append(model.decode_embeddings(ids))
        figures = {
            f"val/{name}": retrieval_accuracy(torch.cat(parts).cpu(), texts, self.captions)["image_to_text"].value
            for name, parts in found.items()
        }
        if model.config.head is not None:
            figures["val/codebook_usage"] = len(used) / model.codebook_size
        return figures

    def sample(self, model: Any, seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Nothing: pictures need the unCLIP decoder, which is trained afterwards."""
        return {}, {}


class UnCLIPMonitor:
    """Pictures painted from the embeddings of held-out scenes, beside the scenes."""

    def __init__(self, recipe: Recipe, source: ShapesSEED, device: torch.device) -> None:
        from vistok import hub

        scenes = held_out_scenes(recipe, PAINTED)
        self.captions = [caption(scene) for scene in scenes]
        self.images = image_batch([render(scene, source.recipe.image_size) for scene in scenes])
        model = hub.load(source.recipe.encoder, device=device)
        self.embeds = seed_outputs("embeddings", model, self.images.to(device))["image_embeds"]
        self.settings = recipe.sampling.given

    def validate(self, model: Any) -> dict[str, float]:
        """Nothing: see `sample`."""
        return {}

    def sample(self, model: Any, seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """A grid of scenes above what their embeddings are painted as, and the share whose objects are right."""
        draws = [torch.Generator().manual_seed(seed + number) for number in range(len(self.embeds))]
        painted = model.decoder()(self.embeds, generator=draws, **self.settings).float().cpu().clamp(-1, 1)
        rows = [part for pair in zip(self.images.split(8), painted.split(8), strict=True) for part in pair]
        share = caption_accuracy(painted, self.captions)["objects"].value
        return {"painted": picture_grid(torch.cat(rows), 8)}, {"samples/objects": share}


class SentenceMonitor:
    """The loss of held-out sentences, and how many captions of held-out pictures name the right objects."""

    def __init__(self, recipe: Recipe, source: ShapesSEED, device: torch.device) -> None:
        from vistok import hub

        assert source.write is not None
        scenes = held_out_scenes(recipe)
        self.captions = [caption(scene) for scene in scenes]
        images = image_batch([render(scene, source.recipe.image_size) for scene in scenes]).to(device)
        self.ids = hub.load(source.recipe.encoder, device=device).encode(images).ids.cpu()
        self.sentences = {
            name: source.write(self.ids, self.captions, [first] * len(scenes))
            for name, first in (("caption", True), ("picture", False))
        }
        self.device = device

    @torch.no_grad()
    def validate(self, model: Any) -> dict[str, float]:
        """`val/caption_loss` and `val/picture_loss` in nats a word, `val/caption_objects`."""
        figures = {}
        for name, batch in self.sentences.items():
            moved = {key: value.to(self.device) for key, value in batch.items()}
            figures[f"val/{name}_loss"] = model.training_loss(moved)["loss"].item()
        answers = write_captions(model.language, self.ids)
        pairs = zip(answers, self.captions, strict=True)
        figures["val/caption_objects"] = float(np.mean([same_objects(one, other) for one, other in pairs]))
        return figures

    def sample(self, model: Any, seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Nothing: pictures need the unCLIP decoder."""
        return {}, {}
