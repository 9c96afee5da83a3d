"""From a run folder to a checkpoint that ships: averaged weights in bf16, configuration, facts and a card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.errors import CheckpointError, InvalidInputError
from vistok.files import PACKED_FILE, pack_rows, read_state_dict, save_tensors, write_text_atomic
from vistok.nn.model import VistokModel, describe_mismatch
from vistok.registry import system_class

from .checkpoint import latest_checkpoint
from .logs import read_metrics
from .recipe import FolderRecipe, Recipe, ShapesTokensRecipe, load_recipe
from .sources import open_source

__all__ = ["MAX_BYTES", "export", "write_model"]

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
MAX_BYTES = 4 * 2**20
LICENCE = "apache-2.0"
MEASURED_IMAGES, MEASURED_BATCH = 512, 64  # of a KL tokenizer's latents


def export(
    run_dir: str | os.PathLike[str],
    name: str | None,
    assets_dir: str | os.PathLike[str],
    *,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write the newest checkpoint of a run as a folder that can ship and that `vistok.load` takes.

    Args:
        run_dir: folder of a run.
        name: of the new folder; None takes the recipe's.
        assets_dir: its parent.
        max_bytes: refuse larger weights.

    Returns:
        The folder: `config.json`, `packed.safetensors` (see `vistok.files.pack_rows`) or, where `is_packed` says no,
        `diffusion_pytorch_model.safetensors` (bf16), `vistok.json`, `README.md`.

    Raises:
        CheckpointError: the run has no whole checkpoint, or its weights do not fit the recipe's network.
        InvalidInputError: the weights are too large.
    """
    name = name or load_recipe(Path(run_dir) / "recipe.yaml").name
    folder = Path(assets_dir) / name
    write_model(run_dir, folder, name, dtype=torch.bfloat16, max_bytes=max_bytes)
    return folder


def write_model(
    run_dir: str | os.PathLike[str],
    folder: Path,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_bytes: int | None = None,
) -> None:
    """Write the averaged weights of a run's newest checkpoint as a folder for `vistok.load`.

    Args:
        run_dir: folder of a run.
        folder: to write.
        name: title of the card.
        dtype: type of the floating point tensors.
        max_bytes: refuse larger weights; None takes any.

    Raises:
        CheckpointError, InvalidInputError: as `export`.
    """
    run_dir = Path(run_dir)
    recipe = load_recipe(run_dir / "recipe.yaml")
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        raise CheckpointError(f"{run_dir} holds no whole checkpoint; train it first")
    averaged = checkpoint / "ema.safetensors"
    weights = read_state_dict(averaged if averaged.is_file() else checkpoint / "model.safetensors")
    model = system_class(recipe.model.system)(**recipe.model.config)
    problems = describe_mismatch(model.state_dict(), weights)
    if problems:
        raise CheckpointError(f"{checkpoint} does not fit the recipe's network: {'; '.join(problems)}")
    if hasattr(model, "remove_teacher_head"):
        model.remove_teacher_head()
        weights = {key: weights[key] for key in model.state_dict()}
    if hasattr(model, "measure_latents") and "scaling_factor" not in recipe.model.config:
        model.load_state_dict(weights)
        _normalise_latents(recipe, model.eval())
        weights = model.state_dict()
    tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()}
    if hasattr(model, "shipped_keys"):  # heads that only training needs stay behind
        tensors = {key: tensors[key] for key in model.shipped_keys()}
    form = str(dtype).removeprefix("torch.")
    packed = dtype == torch.bfloat16 and is_packed(model)
    shipped = tensors
    if packed:
        shipped, form = pack_rows(tensors), "int8 rows"
    size = largest_file(model, shipped)
    if max_bytes is not None and size > max_bytes:
        raise InvalidInputError(
            f"{recipe.name} takes {size / 2**20:.2f} MiB in {form}; at most "
            f"{max_bytes / 2**20:.2f} MiB may ship: train a smaller network"
        )
    if hasattr(model, "denoise"):  # a decoder that draws: the recipe's settings are its own
        model.register_to_config(**recipe.sampling.given)
    facts = _facts(recipe, model)
    step = int(json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))["step"])
    figures = _last_figures(read_metrics(run_dir))
    if hasattr(model, "save_pipeline"):  # a stock pipeline of diffusers
        model.load_state_dict(weights)
        # What ships names its tokenizer instead of holding it a second time.
        model.save_pipeline(folder, recipe.tokenizer, dtype, recipe.model.trained, shipped=dtype == torch.bfloat16)
    elif getattr(model, "is_stock", False):  # a stock model of transformers
        model.save_transformers(folder, tensors)
    else:
        model.save_config(folder)
        save_tensors(folder / (PACKED_FILE if packed else WEIGHTS_FILE), shipped, metadata={"format": "pt"})
    write_text_atomic(folder / "vistok.json", json.dumps(facts, indent=2) + "\n")
    card = _card(name, recipe, facts, step, f"{size / 2**20:.2f} MiB of {form}", figures)
    write_text_atomic(folder / "README.md", card)


def is_packed(model: VistokModel) -> bool:
    """Whether a network ships as int8 rows: our own do, and what says so (`ships_packed`).

    What a stock class of diffusers or transformers reads by itself cannot.
    """
    stock = hasattr(model, "save_pipeline") or hasattr(model, "is_stock")
    return bool(getattr(model, "ships_packed", not stock))


def largest_file(model: VistokModel, tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the weights in one file; the parts of a pipeline are files of their own."""
    sizes: dict[str, int] = {}
    for key, value in tensors.items():
        part = key.partition(".")[0] if hasattr(model, "save_pipeline") else ""
        sizes[part] = sizes.get(part, 0) + value.numel() * value.element_size()
    return max(sizes.values())


def _facts(recipe: Recipe, model: VistokModel) -> dict[str, Any]:
    """Content of `vistok.json`."""
    config: Mapping[str, Any] = model.config
    tokenizer = hasattr(model, "decode")
    generator = hasattr(model, "generate")
    image_size = getattr(recipe.data, "image_size", None)
    facts: dict[str, Any] = {
        "system": recipe.model.system,
        "kind": "tokenizer" if tokenizer else "generator" if generator else "helper",
        "licence": LICENCE,
        "paper": next((entry.paper for entry in model.published.values() if entry.paper), None),
        "recipe": f"recipes/{recipe.name}.yaml",
        "image_size": image_size,
        "num_tokens": _num_tokens(model, image_size),
        "codebook_size": getattr(model, "codebook_size", None) or config.get("vocab_size"),
    }
    if hasattr(model, "is_stock"):  # a language model, whose vocabulary is words
        facts |= {"kind": model.kind, "codebook_size": None}
    if tokenizer and hasattr(model, "denoise"):
        facts["autoencoder"] = config.get("autoencoder")
        facts["sampling"] = recipe.sampling.given
    if hasattr(model, "save_pipeline"):
        facts |= {"kind": "pipeline", "tokenizer": recipe.tokenizer, "sampling": recipe.sampling.given}
        if recipe.model.trained:  # only these weights ship; the others are the base's
            facts |= {"base": recipe.model.init_from, "tenor": config.get("tenor", False)}
    if generator:
        facts["tokenizer"] = recipe.tokenizer
        facts["text_encoder"] = recipe.text_encoder
        facts["class_names"] = _class_names(recipe)
        facts["sampling"] = recipe.sampling.given
    if hasattr(model, "facts"):
        facts |= model.facts()
    return {key: value for key, value in facts.items() if value is not None}


def _num_tokens(model: Any, image_size: int | None) -> int | None:
    """Tokens of a training image; None for networks that neither make nor write tokens."""
    if hasattr(model, "num_registers"):  # ordered tokens: as many at any image size
        return int(model.num_registers)
    if isinstance(getattr(model, "num_tokens", None), int):
        return int(model.num_tokens)
    if image_size is not None and hasattr(model, "decode") and hasattr(model, "downsample_factor"):
        return (image_size // model.downsample_factor) ** 2
    grid = model.config.get("grid") or getattr(model, "grid", None)
    return None if grid is None else int(grid[0] * grid[1])


def _normalise_latents(recipe: Recipe, model: Any) -> None:
    """Bring the latents of the training data to mean 0 and deviation 1 in every channel, for generators."""
    source = open_source(recipe, tokenizer=None, cache=Path(), device=torch.device("cpu"))
    batches = (
        source.batch(np.arange(first, first + MEASURED_BATCH))["images"].float() / 127.5 - 1
        for first in range(0, MEASURED_IMAGES, MEASURED_BATCH)
    )
    model.absorb_statistics(model.measure_latents(batches, generator=torch.Generator().manual_seed(recipe.seed)))


def _class_names(recipe: Recipe) -> list[str] | None:
    data = recipe.data
    if recipe.text_encoder is not None:
        return None
    if isinstance(data, ShapesTokensRecipe):
        from vistok.data.shapes import CLASS_NAMES

        return list(CLASS_NAMES)
    if isinstance(data, FolderRecipe):
        from vistok.data.folders import ImageFolder

        return list(ImageFolder(data.path, data.image_size).class_names) or None
    return None


def _last_figures(lines: list[dict[str, float]]) -> dict[str, float]:
    """The newest value of every held-out and sampled figure."""
    newest: dict[str, float] = {}
    for line in lines:
        newest.update({key: value for key, value in line.items() if "/" in key})
    return newest


def _card(
    name: str, recipe: Recipe, facts: Mapping[str, Any], step: int, size: str, figures: Mapping[str, float]
) -> str:
    seen = step * recipe.batch_size
    lines = [
        f"# {name}",
        "",
        f"A small `{facts['system']}` {facts['kind']} of the vistok lab world, trained by `{facts['recipe']}`.",
        "",
        f"- {step} steps of {recipe.batch_size} samples ({seen:,} in all)",
        f"- {size} weights" + (f", exponential moving average {recipe.ema_decay}" if recipe.ema_decay else ""),
        f"- licence: {facts['licence']}",
    ]
    lines += [
        f"- {key.replace('_', ' ')}: `{facts[key]}`"
        for key in ("tokenizer", "autoencoder", "text_encoder")
        if key in facts
    ]
    if figures:
        lines += [
            "",
            "Figures during training, on held-out data (float32 weights):",
            "",
            "| figure | value |",
            "|---|---|",
        ]
        lines += [f"| {key} | {value:.4g} |" for key, value in figures.items()]
    lines += ["", f'```python\nimport vistok\n\nmodel = vistok.load("{name}")\n```', ""]
    return "\n".join(lines)
