"""The schema of a training recipe: YAML in, frozen dataclasses out, with every mistake named.

A recipe says everything that changes the weights. `batch_size` counts samples an optimiser step over all processes and
accumulation steps, so the same recipe gives the same trajectory on one process or on several.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from vistok.errors import InvalidInputError

__all__ = [
    "DataRecipe",
    "DiscriminatorRecipe",
    "FolderRecipe",
    "ModelRecipe",
    "OptimizerRecipe",
    "Recipe",
    "SamplingRecipe",
    "ScheduleRecipe",
    "ShapesCaptionsRecipe",
    "ShapesImagesRecipe",
    "ShapesMeaningsRecipe",
    "ShapesSEEDRecipe",
    "ShapesPairsRecipe",
    "ShapesQuestionsRecipe",
    "ShapesTokensRecipe",
    "ShardsRecipe",
    "load_recipe",
    "parse_recipe",
    "recipe_differences",
    "recipe_to_dict",
    "save_recipe",
]

# Systems that can be trained against a discriminator.
ADVERSARIAL_SYSTEMS = ("vq", "kl")
# Systems that train their own text encoder.
OWN_TEXT_SYSTEMS = ("text-to-image",)

T = TypeVar("T")


def number(default: Any = dataclasses.MISSING, low: float = -math.inf, high: float = math.inf) -> Any:
    """A dataclass field whose value, or each of its values, must lie in `low..high` (inclusive)."""
    if default is dataclasses.MISSING:
        return field(metadata={"range": (low, high)})
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class ModelRecipe:
    """What is trained.

    Attributes:
        system: `vq`, `llamagen`, `nar`, ... (the registry's names).
        config: constructor arguments of that system.
        init_from: checkpoint folder, run folder or shipped name whose matching tensors are the starting point.
        codebook_embeddings: token embeddings and output heads start as random projections of the tokenizer's codebook,
            so that codes which look alike start alike (generators over discrete tokens).
        trained: parameters whose name begins with one of these learn, the others keep their values; none: all learn.
    """

    system: str
    config: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    codebook_embeddings: bool = False
    trained: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShapesImagesRecipe:
    """Scenes of the lab world, mixed with crops of the real photographs that scikit-image ships.

    Attributes:
        image_size: side of a training image in pixels.
        objects: least and greatest number of objects in a scene.
        scenes: number of distinct scenes, rendered once into memory; 0 renders a new scene for every sample. With a KL
            tokenizer in the recipe: number of distinct pictures, crops among them, that are encoded once; 0 encodes
            every sample.
        single_ratio: fraction of the scenes that show the least number of objects, before `objects` is asked.
        photo_ratio: fraction of the samples that are photograph crops.
        held_out_photos: photographs never used in training, by file name without suffix; validation reports on them.
        annotations: also give what each scene shows, as `objects` [B, 3, 6] (see `vistok.metrics.features`).
        teacher: network whose `feature_map` of each encoded picture a representation loss reads (`features-shapes`);
            needs `scenes` and a KL tokenizer.
    """

    source: Literal["shapes-images"]
    image_size: int = number(64, 8, 4096)
    objects: tuple[int, int] = number((1, 3), 1, 3)
    scenes: int = number(0, 0)
    single_ratio: float = number(0.0, 0.0, 1.0)
    photo_ratio: float = number(0.0, 0.0, 1.0)
    held_out_photos: tuple[str, ...] = ()
    annotations: bool = False
    teacher: str | None = None


@dataclass(frozen=True)
class ShapesTokensRecipe:
    """Scenes of the lab world, encoded once by the tokenizer, with their captions and classes.

    A tokenizer with a codebook leaves ids, a KL tokenizer the moments from which every step draws new latents.

    Attributes:
        image_size: side of a scene in pixels.
        objects: least and greatest number of objects in a scene.
        scenes: number of distinct scenes.
        condition: what the generator is told: `class` needs scenes of one object.
        pivot_size: also encode each scene at this side in pixels, for generators with low-resolution pivots; 0: none.
    """

    source: Literal["shapes-tokens"]
    condition: Literal["class", "caption"]
    scenes: int = number(low=1)
    image_size: int = number(64, 8, 4096)
    objects: tuple[int, int] = number((1, 1), 1, 3)
    pivot_size: int = number(0, 0, 4096)


@dataclass(frozen=True)
class ShapesCaptionsRecipe:
    """Scenes of the lab world, a new one for every sample, with their captions as words (SEED's first stage).

    Attributes:
        image_size: side of a scene in pixels.
        objects: least and greatest number of objects in a scene.
        full_captions: fraction of the captions that say everything; the others leave attributes out.
    """

    source: Literal["shapes-captions"]
    image_size: int = number(64, 8, 4096)
    objects: tuple[int, int] = number((1, 2), 1, 3)
    full_captions: float = number(0.75, 0.0, 1.0)


@dataclass(frozen=True)
class ShapesMeaningsRecipe:
    """Captions of lab scenes with what they say, without pictures (the lab's text encoder).

    Attributes:
        objects: least and greatest number of objects in a scene.
        bare: fraction of the captions that come without articles.
    """

    source: Literal["shapes-meanings"]
    objects: tuple[int, int] = number((1, 3), 1, 3)
    bare: float = number(0.15, 0.0, 1.0)


@dataclass(frozen=True)
class ShapesSEEDRecipe:
    """Scenes of the lab world as a SEED sees them, encoded once.

    Attributes:
        give: `embeddings`: causal embeddings and their teacher's image embedding (SEED's second stage); `latents`: that
            image embedding and the moments of the recipe's KL tokenizer (its unCLIP decoder); `sentences`: codes and
            captions as words of a language model.
        encoder: the SEED: shipped name or folder.
        image_size: side of a scene in pixels.
        objects: least and greatest number of objects in a scene.
        scenes: number of distinct scenes.
    """

    source: Literal["shapes-seed"]
    give: Literal["embeddings", "latents", "sentences"]
    encoder: str
    scenes: int = number(low=1)
    image_size: int = number(64, 8, 4096)
    objects: tuple[int, int] = number((1, 2), 1, 3)


@dataclass(frozen=True)
class ShapesQuestionsRecipe:
    """Scenes of the lab world, a new one for every sample, with questions and answers (see `vistok.training.lvlm`).

    Attributes:
        image_size: side of a scene in pixels.
        patch_size: side in pixels of the patches that the annotations describe.
        objects: least and greatest number of objects in a scene.
        text_tokens: words of questions and answers a scene; as many questions as fit.
        descriptions: fraction of the scenes whose first question asks for a list of all objects.
        relations: questions about relations, the hardest kind, for each one of the other kinds.
    """

    source: Literal["shapes-questions"]
    image_size: int = number(64, 8, 4096)
    patch_size: int = number(4, 1, 256)
    objects: tuple[int, int] = number((1, 3), 1, 3)
    text_tokens: int = number(96, 16, 4096)
    descriptions: float = number(0.0, 0.0, 1.0)
    relations: int = number(1, 1, 16)


@dataclass(frozen=True)
class ShapesPairsRecipe:
    """Pairs of objects in lab scenes, captioned by CoMPaSS' data engine (see `vistok.training.pairs`).

    Attributes:
        filtered: keep the pairs that pass all of its rules; false keeps every pair.
        image_size: side of a scene in pixels.
        objects: least and greatest number of objects in a scene.
        scenes: number of distinct scenes, encoded once by the recipe's KL tokenizer.
    """

    source: Literal["shapes-pairs"]
    filtered: bool
    scenes: int = number(low=1)
    image_size: int = number(64, 8, 4096)
    objects: tuple[int, int] = number((2, 3), 2, 3)


@dataclass(frozen=True)
class FolderRecipe:
    """A folder of images with classes or captions (see `vistok.data.folders.ImageFolder`).

    Attributes:
        path: the folder.
        image_size: side of a training crop in pixels.
        flip: mirror half of the samples.
        crop_ratio: images are resized so that their short side is image_size times a number in 1..crop_ratio, then
            cropped at random.
    """

    source: Literal["folder"]
    path: str
    image_size: int = number(256, 8, 4096)
    flip: bool = True
    crop_ratio: float = number(1.1, 1.0, 4.0)


@dataclass(frozen=True)
class ShardsRecipe:
    """webdataset shards with classes or captions (see `vistok.data.shards.ShardDataset`), read at random positions.

    Attributes:
        pattern: shard files, with brace or glob notation: `data/{000..127}.tar`.
        image_size, flip, crop_ratio: as in `FolderRecipe`.
    """

    source: Literal["shards"]
    pattern: str
    image_size: int = number(256, 8, 4096)
    flip: bool = True
    crop_ratio: float = number(1.1, 1.0, 4.0)


DataRecipe = (
    ShapesImagesRecipe
    | ShapesTokensRecipe
    | ShapesPairsRecipe
    | ShapesCaptionsRecipe
    | ShapesMeaningsRecipe
    | ShapesSEEDRecipe
    | ShapesQuestionsRecipe
    | FolderRecipe
    | ShardsRecipe
)


@dataclass(frozen=True)
class OptimizerRecipe:
    """How the weights are stepped.

    Attributes:
        name: `adamw`, or `muon`: orthogonalised momentum for the matrices between hidden states, AdamW for the rest.
        lr: learning rate of both.
        betas, eps: of AdamW.
        weight_decay: applies to tensors of two or more dimensions only.
        convolutions: `muon` also steps convolutions, as matrices [out, in * rows * columns].
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = number(1e-4, 0.0, 10.0)
    betas: tuple[float, float] = number((0.9, 0.95), 0.0, 1.0)
    weight_decay: float = number(0.05, 0.0, 10.0)
    eps: float = number(1e-8, 0.0, 1.0)
    convolutions: bool = False


@dataclass(frozen=True)
class ScheduleRecipe:
    """The learning rate over the steps, as a factor of `optimizer.lr`.

    Attributes:
        name: `constant`; `cosine` from 1 down to `final_ratio`; `step`, times `factor` at each of `milestones`.
        warmup_steps: linear rise from 0 before that.
        final_ratio: where `cosine` ends.
        milestones: fractions of the training at which `step` drops; NAR's are 1/2, 2/3 and 5/6.
        factor: what `step` multiplies by.
    """

    name: Literal["constant", "cosine", "step"] = "constant"
    warmup_steps: int = number(0, 0)
    final_ratio: float = number(0.0, 0.0, 1.0)
    milestones: tuple[float, ...] = number((0.5, 2 / 3, 5 / 6), 0.0, 1.0)
    factor: float = number(0.2, 0.0, 1.0)


@dataclass(frozen=True)
class DiscriminatorRecipe:
    """Adversarial training of a VQ or KL tokenizer. The defaults are LlamaGen's settings; latent diffusion's for KL are
    `start_step: 50001`, `adaptive_weight: true`, `betas: [0.5, 0.9]`.

    Attributes:
        start_step: reconstruction alone before that.
        weight: of the adversarial term.
        adaptive_weight: scale it by the ratio of the gradients at the decoder's last layer.
        perceptual_weight: of the perceptual term.
        perceptual_weights: files for `vistok.nn.perceptual.LPIPS.from_files`; none leaves the term out.
        lr, betas: of the second optimiser.
    """

    start_step: int = number(20000, 0)
    weight: float = number(0.5, 0.0, 100.0)
    adaptive_weight: bool = False
    perceptual_weight: float = number(1.0, 0.0, 100.0)
    perceptual_weights: tuple[str, ...] = ()
    lr: float = number(1e-4, 0.0, 10.0)
    betas: tuple[float, float] = number((0.9, 0.95), 0.0, 1.0)


@dataclass(frozen=True)
class SamplingRecipe:
    """How sample grids are drawn from a generator; exported as the checkpoint's defaults.

    Every field is an argument of the generator's `sample`; null leaves it at the generator's own default.
    """

    guidance_scale: float | None = number(None, 0.0, 100.0)
    guidance_schedule: Literal["linear", "constant"] | None = None
    temperature: float | None = number(None, 0.0, 100.0)
    top_k: int | None = number(None, 0)
    top_p: float | None = number(None, 0.0, 1.0)
    num_inference_steps: int | None = number(None, 1)
    num_diffusion_steps: int | None = number(None, 1)

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are not null."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Recipe:
    """One training, from start to exported checkpoint.

    Attributes:
        name: of the exported checkpoint.
        model, data, optimizer, schedule, discriminator, sampling: see their classes.
        steps: optimiser steps.
        batch_size: samples an optimiser step, over all processes and accumulation steps.
        gradient_accumulation: forward passes an optimiser step.
        seed: of the initial weights, the data order and every other draw.
        tokenizer: checkpoint that turns images into ids; for generators.
        text_encoder: checkpoint that turns captions into features; for text-conditional generators.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        precision: autocast type of the forward pass.
        ema_decay: the exported weights are this moving average; 0 keeps none and exports the weights themselves.
        channels_last: memory format of convolutional networks.
        log_every, validate_every, sample_every, checkpoint_every: intervals in steps; 0 switches the thing off.
        keep_checkpoints: newest ones that stay on disk.
        workers: processes that prepare batches; 0 prepares them in the training process.
    """

    name: str
    model: ModelRecipe
    data: DataRecipe
    steps: int = number(low=1)
    batch_size: int = number(low=1)
    gradient_accumulation: int = number(1, 1)
    seed: int = number(0, 0, 2**31 - 1)
    tokenizer: str | None = None
    text_encoder: str | None = None
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    max_grad_norm: float = number(1.0, 0.0)
    precision: Literal["no", "bf16", "fp16"] = "no"
    ema_decay: float = number(0.999, 0.0, 1.0)
    channels_last: bool = False
    discriminator: DiscriminatorRecipe | None = None
    sampling: SamplingRecipe = field(default_factory=SamplingRecipe)
    log_every: int = number(50, 1)
    validate_every: int = number(0, 0)
    sample_every: int = number(0, 0)
    checkpoint_every: int = number(500, 0)
    keep_checkpoints: int = number(2, 1)
    workers: int = number(0, 0, 256)


# Fields that leave the weights alone, so that a run may be resumed with other values.
HARMLESS = frozenset(
    {
        "log_every",
        "validate_every",
        "sample_every",
        "checkpoint_every",
        "keep_checkpoints",
        "workers",
        "name",
        "sampling.guidance_scale",
        "sampling.guidance_schedule",
        "sampling.temperature",
        "sampling.top_k",
        "sampling.top_p",
        "sampling.num_inference_steps",
        "sampling.num_diffusion_steps",
    }
)


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        return f"a list of {_type_name(inner[0])}" + ("" if inner[-1] is Ellipsis else f" of length {len(inner)}")
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    return names.get(hint, "a mapping" if hint is dict or typing.get_origin(hint) is dict else str(hint))


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`, or an InvalidInputError that names the field."""

    def refuse() -> InvalidInputError:
        return InvalidInputError(f"recipe field {where}: expected {_type_name(hint)}, got {value!r}")

    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        if len(options) == 1:
            return _convert(value, options[0], where)
        return _tagged(value, options, where)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), value, where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            if _is_off(value, arguments):  # YAML 1.1 reads a bare `no` as false
                return "no"
            raise refuse()
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise refuse()
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise refuse()
        return tuple(_convert(item, arguments[0], f"{where}[{position}]") for position, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise refuse()
        return dict(value)
    if hint is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a text
            try:
                value = float(value)
            except ValueError:
                raise refuse() from None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise refuse()
        return float(value)
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise refuse()
        return value
    if not isinstance(value, hint):
        raise refuse()
    return value


def _is_off(value: Any, choices: tuple[Any, ...]) -> bool:
    """Whether `value` is YAML's false standing for the choice `"no"`."""
    return value is False and "no" in choices


def _tagged(value: Any, options: list[Any], where: str) -> Any:
    """One of several dataclasses, chosen by their `source` field."""
    by_name = {typing.get_args(typing.get_type_hints(option)["source"])[0]: option for option in options}
    if not isinstance(value, Mapping) or value.get("source") not in by_name:
        given = value.get("source") if isinstance(value, Mapping) else value
        raise InvalidInputError(f"recipe field {where}.source: expected one of {', '.join(by_name)}; got {given!r}")
    return _build(by_name[value["source"]], value, where)


def _build(cls: type[T], values: Any, where: str = "") -> T:
    """Construct a recipe dataclass from a mapping, checking names, types and ranges."""
    label = where or "the recipe"
    if not isinstance(values, Mapping):
        raise InvalidInputError(f"{label}: expected a mapping of fields, got {values!r}")
    fields = {item.name: item for item in dataclasses.fields(typing.cast("Any", cls))}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), fields, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known: {', '.join(fields)}"
            raise InvalidInputError(f"unknown recipe field {f'{where}.' if where else ''}{key}; {hint}")
    arguments = {}
    for name, item in fields.items():
        path = f"{where}.{name}" if where else name
        if name not in values:
            if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                raise InvalidInputError(f"recipe field {path} is missing; expected {_type_name(hints[name])}")
            continue
        converted = _convert(values[name], hints[name], path)
        if "range" in item.metadata:
            low, high = item.metadata["range"]
            for number_given in converted if isinstance(converted, tuple) else (converted,):
                if number_given is not None and not low <= number_given <= high:
                    limits = f"at least {low}" if math.isinf(high) else f"between {low} and {high}"
                    raise InvalidInputError(f"recipe field {path}: expected {limits}, got {number_given}")
        arguments[name] = converted
    return cls(**arguments)


def _check(recipe: Recipe) -> None:
    """What no single field can tell."""
    if recipe.batch_size % recipe.gradient_accumulation:
        raise InvalidInputError(
            f"batch_size {recipe.batch_size} is not divisible by gradient_accumulation {recipe.gradient_accumulation}"
        )
    data = recipe.data
    with_images = (ShapesImagesRecipe, ShapesTokensRecipe, ShapesQuestionsRecipe, ShapesCaptionsRecipe)
    lab = (*with_images, ShapesMeaningsRecipe, ShapesSEEDRecipe)
    if isinstance(data, lab) and data.objects[0] > data.objects[1]:
        raise InvalidInputError(f"data.objects: expected [least, greatest], got {list(data.objects)}")
    if isinstance(data, ShapesPairsRecipe) and recipe.tokenizer is None:
        raise InvalidInputError("data.source shapes-pairs needs the field tokenizer: the checkpoint that encodes")
    if isinstance(data, ShapesTokensRecipe):
        if recipe.tokenizer is None:
            raise InvalidInputError("data.source shapes-tokens needs the field tokenizer: the checkpoint that encodes")
        if data.condition == "class" and data.objects != (1, 1):
            raise InvalidInputError(
                f"data.condition class describes scenes of one object; got data.objects {list(data.objects)}"
            )
        if data.condition == "caption" and recipe.text_encoder is None and recipe.model.system not in OWN_TEXT_SYSTEMS:
            raise InvalidInputError("data.condition caption needs the field text_encoder")
    if isinstance(data, ShapesImagesRecipe) and data.annotations and data.photo_ratio:
        raise InvalidInputError("data.annotations describes lab scenes only; set data.photo_ratio to 0")
    if isinstance(data, ShapesImagesRecipe) and data.teacher is not None and not data.scenes:
        raise InvalidInputError("data.teacher reads pictures that are encoded once: set data.scenes")
    if isinstance(data, ShapesImagesRecipe) and data.photo_ratio == 1.0 and data.scenes:
        raise InvalidInputError("data.scenes has no effect with data.photo_ratio 1")
    if recipe.schedule.warmup_steps > recipe.steps:
        raise InvalidInputError(
            f"schedule.warmup_steps {recipe.schedule.warmup_steps} exceeds the {recipe.steps} steps of the training"
        )
    if recipe.model.codebook_embeddings and recipe.tokenizer is None:
        raise InvalidInputError("model.codebook_embeddings needs the field tokenizer: the checkpoint with the codebook")
    if recipe.discriminator is not None and recipe.model.system not in ADVERSARIAL_SYSTEMS:
        raise InvalidInputError(
            f"discriminator belongs to the systems {' and '.join(ADVERSARIAL_SYSTEMS)}; this recipe trains "
            f"{recipe.model.system}"
        )


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InvalidInputError(f"override {override!r}: expected key=value, e.g. optimizer.lr=3e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidInputError(f"override {override!r}: the value is not valid YAML ({error})") from error
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        inner = target.get(parent)
        if inner is None:
            inner = {}
        if not isinstance(inner, Mapping):
            raise InvalidInputError(f"override {override!r}: {parent} is no group of fields")
        target[parent] = dict(inner)
        target = target[parent]
    target[last] = value


def parse_recipe(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe given as nested mappings.

    Args:
        values: as read from YAML.
        overrides: `"dotted.key=value"` texts applied first; values are YAML.

    Raises:
        InvalidInputError: unknown, missing, mistyped or contradictory fields, each named.
    """
    if not isinstance(values, Mapping):
        raise InvalidInputError(f"a recipe is a mapping of fields; got {type(values).__name__}")
    merged = dict(values)
    for override in overrides:
        _apply_override(merged, override)
    recipe = _build(Recipe, merged)
    _check(recipe)
    return recipe


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a YAML recipe.

    Raises:
        InvalidInputError: no such file, no YAML, or a field is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInputError(f"no recipe at {path}; expected a YAML file such as recipes/nar-shapes.yaml")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path} is not valid YAML: {error}") from error
    try:
        return parse_recipe(values, overrides)
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain nested mappings that `parse_recipe` accepts."""
    return _plain(dataclasses.asdict(recipe))


def save_recipe(path: str | os.PathLike[str], recipe: Recipe) -> None:
    """Write the recipe, every default spelled out, as YAML (atomically)."""
    from vistok.files import write_text_atomic

    write_text_atomic(path, yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def recipe_differences(before: Recipe, now: Recipe) -> list[str]:
    """Fields that change the weights and differ, each as `"field: old -> new"`."""
    old, new = _flatten(recipe_to_dict(before)), _flatten(recipe_to_dict(now))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in dict.fromkeys([*old, *new])
        if key not in HARMLESS and old.get(key) != new.get(key)
    ]
