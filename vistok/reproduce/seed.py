"""SEED: causal codes for a language model, retrieval by codes, pictures from captions, captions from pictures.

Ge et al., "Planting a SEED of Vision in Large Language Model" (arXiv:2307.08041) and "Making LLaMA SEE and Draw with
SEED Tokenizer" (arXiv:2310.01218).

Causal and bidirectional queries are trained here, side by side and alike: the vision transformer of `seed-shapes` stays
as it is, Q-Former, codebook and a small language model start anew. Each of the six trainings is a run of the common
trainer inside the output folder, so that an interrupted measurement goes on where it stopped.

Shape letters: B pictures, n codes of a picture, F contrastive space.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vistok.data.shapes import Scene, caption, read_scenes, render, sample_scene
from vistok.data.shapes.words import caption_tokenizer
from vistok.files import save_tensors, write_text_atomic
from vistok.metrics.accuracy import Accuracy, caption_accuracy
from vistok.metrics.language import same_objects, write_captions
from vistok.metrics.retrieval import retrieval_accuracy
from vistok.tokenizers.seed import SEED, ImageLanguageModel
from vistok.tokens import VisualTokens
from vistok.training.recipe import Recipe, parse_recipe
from vistok.training.seed import caption_words, held_out_scenes
from vistok.training.sources import image_batch

from . import CLAIMS
from .drawing import MeanInterval, mean_interval, new_figure, save_figure, show_strip
from .report import Finding, Report, environment

__all__ = ["ArmSettings", "run"]

ARMS = {"causal": True, "bidirectional": False}
RETRIEVED = 256
BATCH = 64
SHOWN = 8
STREAM = 2**41  # of the scenes that everything is measured on
PAPER_1, PAPER_2 = "arXiv:2307.08041", "arXiv:2310.01218"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ArmSettings:
    """How each of the two arms is trained.

    Attributes:
        queries_steps, codebook_steps, language_steps: optimiser steps of the three trainings.
        scenes: pictures whose codes the codebook and the language model learn from.
        batch_size: of all three.
        layers: of the Q-Former.
        hidden_size: of the Q-Former.
        language_size: width of the language model.
    """

    queries_steps: int = 300
    codebook_steps: int = 300
    language_steps: int = 400
    scenes: int = 6000
    batch_size: int = 64
    layers: int = 4
    hidden_size: int = 96
    language_size: int = 96


QUICK = ArmSettings(queries_steps=20, codebook_steps=20, language_steps=20, scenes=256, batch_size=32)


def run(
    output: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
    model: SEED | None = None,
    language: ImageLanguageModel | None = None,
    num_samples: int | None = None,
    arms: ArmSettings | None = None,
) -> Report:
    """Measure SEED's claims.

    Args:
        output: folder for `seed.json`, `seed.png`, and the trainings of the two arms.
        quick: a few steps and 16 pictures.
        seed: of all draws.
        on_progress: called with what is done, units done, units in all.
        model: a SEED with its decoder; None loads `seed-shapes`.
        language: a language model with its words; None loads `seed-lm-shapes`.
        num_samples, arms: override what `quick` decides.

    Raises:
        KeyboardInterrupt: after saving the stages that finished.
    """
    from vistok import hub

    count = num_samples or (16 if quick else 200)
    settings = arms or (QUICK if quick else ArmSettings())
    progress = on_progress or (lambda what, done, total: None)
    model = hub.load("seed-shapes") if model is None else model
    language = hub.load("seed-lm-shapes") if language is None else language
    claim = CLAIMS["seed"]
    report = Report("seed", claim.title, claim.paper)
    report.settings = {
        "quick": quick,
        "seed": seed,
        "num_samples": count,
        "arms": vars(settings),
        "environment": environment(),
    }
    if quick:
        report.notes.append("quick run: too few samples and steps to quote any figure of it")
    side = model.config.image_size
    scenes = [sample_scene(seed + STREAM, number, (1, 2)) for number in range(max(RETRIEVED, count))]
    captions = [caption(scene) for scene in scenes]
    ids = _codes(model, scenes, side)

    _measure_retrieval(model, scenes[:RETRIEVED], ids[:RETRIEVED], captions[:RETRIEVED], report)
    report.save(output)
    _measure_captions(language, ids[:count], captions[:count], report)
    report.save(output)
    progress("captions", 1, 1)
    pictures = _measure_drawing(model, language, ids[:count], captions[:count], seed, report, progress)
    report.save(output)
    _measure_order(model, settings, seed, Path(output), report, progress)
    report.picture = "seed.png"
    _draw(scenes[:SHOWN], pictures, captions[:SHOWN], side, report, Path(output) / report.picture)
    report.complete = True
    report.save(output)
    return report


def _images(scenes: Sequence[Scene], side: int) -> Tensor:
    return image_batch([render(scene, side) for scene in scenes])


@torch.no_grad()
def _codes(model: Any, scenes: Sequence[Scene], side: int) -> Tensor:
    """Codes int64 [B, n] of scenes."""
    parts = [scenes[first : first + BATCH] for first in range(0, len(scenes), BATCH)]
    return torch.cat([model.encode(_images(part, side)).ids for part in parts])


@torch.no_grad()
def _features(model: Any, captions: Sequence[str]) -> Tensor:
    """Unit features [B, F] of captions."""
    words = caption_words(captions, caption_tokenizer())
    return model.text_features(words["input_ids"], words["attention_mask"])


# ----------------------------------------------------------------------------------------------------------- retrieval
@torch.no_grad()
def _measure_retrieval(model: Any, scenes: Sequence[Scene], ids: Tensor, captions: list[str], report: Report) -> None:
    texts = _features(model, captions)
    parts = [scenes[first : first + BATCH] for first in range(0, len(scenes), BATCH)]
    images = torch.cat([model.image_features(_images(part, model.config.image_size)) for part in parts])
    whole = retrieval_accuracy(images, texts, captions)["image_to_text"]
    coded = retrieval_accuracy(model.code_features(ids), texts, captions)["image_to_text"]
    report.figures["retrieval"] = {"embeddings": whole.to_dict(), "codes": coded.to_dict(), "scenes": len(captions)}
    kept = coded.value / whole.value if whole.value else math.nan
    report.findings.append(
        Finding(
            f"a picture is found by its codes nearly as well as by what they stand for (top 1 of {len(captions)})",
            f"{PAPER_1}, Flickr30K image to text: 86.3 % by codes, 90.0 % by embeddings (COCO: 65.7 and 71.9 %)",
            f"{coded} by codes, {whole} by embeddings",
            None if whole.value < 0.5 else kept >= 0.9,
        )
    )


# ----------------------------------------------------------------------------------------------------- reading, drawing
def _measure_captions(language: Any, ids: Tensor, captions: list[str], report: Report) -> None:
    """Captions of codes, and of the codes of another picture: what the model says without looking."""
    figures = {}
    for name, given in (("codes", ids), ("codes_of_another", ids.roll(1, 0))):
        answers = write_captions(language, given)
        figures[name] = Accuracy.of(same_objects(one, other) for one, other in zip(answers, captions, strict=True))
    report.figures["captions"] = {name: accuracy.to_dict() for name, accuracy in figures.items()}
    right, blind = figures["codes"], figures["codes_of_another"]
    report.findings.append(
        Finding(
            "a language model reads pictures from their codes (exact shapes and colours, by the parser)",
            f"{PAPER_1}: CIDEr 119.0 on COCO with OPT-2.7B; {PAPER_2}: 124.5 with LLaMA-8B (another scale)",
            f"{right}; with the codes of another picture {blind}",
            right.interval[0] > blind.interval[1],
        )
    )


@torch.no_grad()
def _measure_drawing(
    model: Any, language: Any, ids: Tensor, captions: list[str], seed: int, report: Report, progress: Progress
) -> dict[str, Tensor]:
    """Pictures of captions, and of the codes of a scene that each caption describes, judged by the oracle."""
    n = language.vocabulary.num_codes
    written: list[Tensor] = []
    for first in range(0, len(captions), BATCH):
        answers = language.generate(
            captions[first : first + BATCH],
            force_image=True,
            max_new_tokens=n + 1,
            temperature=0.7,
            top_p=0.9,
            seed=seed + first,
        )
        written += [answer[0].ids for answer in answers]
    pictures: dict[str, Tensor] = {}
    for number, (name, codes) in enumerate((("drawn", torch.cat(written)), ("repainted", ids))):
        painted = []
        for first in range(0, len(codes), BATCH):
            part = codes[first : first + BATCH]
            draws = [torch.Generator().manual_seed(seed + first + row) for row in range(len(part))]
            tokens = VisualTokens(ids=part)
            painted.append(
                model.decode(tokens, generator=draws, num_inference_steps=10, guidance_scale=3.0).clamp(-1, 1)
            )
            progress("painting", number * len(codes) + first + len(part), 2 * len(codes))
        pictures[name] = torch.cat(painted).float()
    readings = {name: read_scenes(images) for name, images in pictures.items()}
    shares = {name: caption_accuracy(reading, captions)["objects"] for name, reading in readings.items()}
    blind = caption_accuracy(readings["drawn"], captions[1:] + captions[:1])["objects"]
    report.figures["drawing"] = {name: share.to_dict() for name, share in {**shares, "by_chance": blind}.items()}
    report.findings.append(
        Finding(
            "a language model draws what a caption says (count, shapes, colours and relation, by the oracle)",
            f"{PAPER_1}: CLIP similarity to COCO's pictures 68.23 %, Stable Diffusion 68.43 % (another scale)",
            f"{shares['drawn']}; codes of a real scene, painted the same way: {shares['repainted']}; captions of other "
            f"pictures: {blind}",
            shares["drawn"].interval[0] > blind.interval[1],
        )
    )
    return pictures


# --------------------------------------------------------------------------------------------------------------- order
def _recipe(
    name: str, system: str, config: Mapping[str, Any], data: Mapping[str, Any], steps: int, **more: Any
) -> Recipe:
    values: dict[str, Any] = {
        "name": name,
        "model": {"system": system, "config": dict(config), **more.pop("model", {})},
        "data": dict(data),
        "steps": steps,
        "optimizer": {"name": "muon", "lr": 5.0e-3, "weight_decay": 0.02},
        "schedule": {"name": "cosine", "warmup_steps": max(1, steps // 15), "final_ratio": 0.05},
        "ema_decay": 0.9,
        "log_every": max(1, steps // 10),
        "checkpoint_every": max(1, steps // 3),
        "keep_checkpoints": 1,
        **more,
    }
    return parse_recipe(values)


def arm_recipes(model: Any, causal: bool, settings: ArmSettings, seed: int, folder: Path) -> dict[str, Recipe]:
    """The three trainings of an arm, in order; each is given what the one before left in `folder`."""
    name = "causal" if causal else "bidirectional"
    own, side = model.config, model.config.image_size
    queries = {
        **{key: own[key] for key in ("image_size", "patch_size", "vision_size", "vision_layers", "vision_heads")},
        "vision_mlp_size": own.vision_mlp_size,
        "hidden_size": settings.hidden_size,
        "num_layers": settings.layers,
        "num_heads": 3,
        "ffn_size": 2 * settings.hidden_size,
        "dropout": 0.0,
        "num_queries": own.num_queries,
        "causal": causal,
        "text_vocab_size": len(caption_tokenizer()),
        "max_text_length": 24,
        "contrastive_size": 64,
    }
    codebook = {
        "head": "mlp",
        "codebook_size": own.codebook_size,
        "codebook_dim": own.codebook_dim,
        "revive_dead_codes": True,
        "embedding_size": 64,
        "num_blocks": 1,
        "block_heads": 3,
    }
    words = {
        "codebook_size": own.codebook_size,
        "num_codes": own.num_queries,
        "hidden_size": settings.language_size,
        "num_layers": 3,
        "num_heads": 3,
        "ffn_size": 2 * settings.language_size,
    }
    common: dict[str, Any] = {"seed": seed, "batch_size": settings.batch_size}
    seen = {"source": "shapes-seed", "image_size": side, "scenes": settings.scenes}
    return {
        "queries": _recipe(
            f"{name}-queries",
            "seed",
            {**queries, "head": None, "caption_weight": 1.0},
            {"source": "shapes-captions", "image_size": side, "full_captions": 1.0},
            settings.queries_steps,
            model={
                "init_from": str(folder / "vision"),
                "trained": ["vision_norm", "vision_proj", "query_tokens", "qformer", "text_proj"],
            },
            precision="bf16",
            **common,
        ),
        "codebook": _recipe(
            f"{name}-codebook",
            "seed",
            {**queries, **codebook},
            {**seen, "give": "embeddings", "encoder": str(folder / f"{name}-queries" / "model")},
            settings.codebook_steps,
            model={
                "init_from": str(folder / f"{name}-queries"),
                "trained": [
                    *("codebook", "encode_task_layer", "decode_task_layer", "reconstruction_", "image_"),
                    "embedding_proj",
                ],
            },
            **common,
        ),
        "language": _recipe(
            f"{name}-language",
            "image-language",
            words,
            {**seen, "give": "sentences", "encoder": str(folder / f"{name}-codebook" / "model")},
            settings.language_steps,
            precision="bf16",
            **common,
        ),
    }


def _measure_order(
    model: Any, settings: ArmSettings, seed: int, output: Path, report: Report, progress: Progress
) -> None:
    """Train both arms alike, and compare what a language model makes of their codes."""
    from vistok import hub
    from vistok.training.trainer import Trainer

    folder = output / "arms"
    vision = {name: value for name, value in model.state_dict().items() if name.startswith("vision")}
    vision = {name: value.contiguous() for name, value in vision.items() if not name.startswith("vision_proj")}
    (folder / "vision").mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "vision" / "diffusion_pytorch_model.safetensors", vision, metadata={"format": "pt"})
    write_text_atomic(folder / "vision" / "README.md", "The vision transformer that both arms share.\n")
    figures: dict[str, Any] = {}
    losses: dict[str, Tensor] = {}
    done = 0
    for arm, causal in ARMS.items():
        for stage, recipe in arm_recipes(model, causal, settings, seed, folder).items():
            trainer = Trainer(recipe, folder / recipe.name, device="cpu", tensorboard=False)
            if trainer.fit().status != "finished":
                raise KeyboardInterrupt
            done += 1
            progress(f"{arm} {stage}", done, 3 * len(ARMS))
        tokenizer = hub.load(folder / f"{arm}-codebook" / "model")
        words = hub.load(folder / f"{arm}-language" / "model")
        figures[arm], losses[arm] = _judge(tokenizer, words, recipe, seed)
    report.figures["order"] = figures
    gap = mean_interval((losses["bidirectional"] - losses["causal"]).tolist())
    report.figures["order"]["difference"] = gap.to_dict()
    causal, other = figures["causal"], figures["bidirectional"]
    report.findings.append(_order_finding(causal, other, gap, model.num_tokens))
    report.notes.append(
        f"causal and bidirectional queries: {settings.queries_steps}, {settings.codebook_steps} and "
        f"{settings.language_steps} steps of {settings.batch_size}, everything but the mask alike; retrieval by codes "
        f"{causal['retrieval']['value']:.0%} and {other['retrieval']['value']:.0%}, perplexity of the codes alone "
        f"{causal['code_perplexity']:.0f} and {other['code_perplexity']:.0f}"
    )


@torch.no_grad()
def _judge(tokenizer: Any, language: Any, recipe: Recipe, seed: int) -> tuple[dict[str, Any], Tensor]:
    """What a language model makes of held-out codes: figures, and its loss on each picture [B] in nats."""
    scenes = held_out_scenes(recipe, RETRIEVED)
    captions = [caption(scene) for scene in scenes]
    ids = _codes(tokenizer, scenes, tokenizer.config.image_size)
    texts = _features(tokenizer, captions)
    retrieval = retrieval_accuracy(tokenizer.code_features(ids), texts, captions)["image_to_text"]
    losses = torch.cat([_picture_losses(language, *part) for part in _batches(ids, captions)])
    # The same codes without a model: what each place holds by itself.
    places = [torch.bincount(column, minlength=tokenizer.codebook_size).float() for column in ids.t()]
    entropies = [float(torch.special.entr(counts / counts.sum()).sum()) for counts in places]
    drawn = []
    n = language.vocabulary.num_codes
    for first in range(0, len(captions), BATCH):
        answers = language.generate(
            captions[first : first + BATCH], force_image=True, max_new_tokens=n + 1, top_p=0.9, seed=seed + first
        )
        drawn += [answer[0].ids for answer in answers]
    found = retrieval_accuracy(tokenizer.code_features(torch.cat(drawn)), texts, captions)["image_to_text"]
    answers = write_captions(language, ids)
    said = Accuracy.of(same_objects(one, other) for one, other in zip(answers, captions, strict=True))
    figures = {
        "nats_per_picture": float(losses.mean()),
        "nats_without_a_model": float(np.sum(entropies)),
        "code_perplexity": float(np.exp(np.mean(entropies))),
        "retrieval": retrieval.to_dict(),
        "drawn_retrieval": found.to_dict(),
        "captions": said.to_dict(),
    }
    return figures, losses


def _batches(ids: Tensor, captions: list[str]) -> list[tuple[Tensor, list[str]]]:
    return [(ids[first : first + BATCH], captions[first : first + BATCH]) for first in range(0, len(ids), BATCH)]


def _picture_losses(language: Any, ids: Tensor, captions: list[str]) -> Tensor:
    """Nats [B] that the codes of pictures cost, given their captions."""
    builder = language.sequences(64)
    rows = [builder.pair(codes, text, image_first=False, mask_condition=True) for codes, text in zip(ids, captions)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    logits = language.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    targets = batch["labels"][:, 1:]
    first = language.vocabulary.first_code_id
    is_code = (targets >= first) & (targets < first + language.vocabulary.codebook_size)
    nats = functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets.clamp_min(0), reduction="none")
    return (nats * is_code).sum(1)


def _order_finding(causal: Mapping[str, Any], other: Mapping[str, Any], gap: MeanInterval, codes: int) -> Finding:
    """Fewer nats decide, unless they were bought with codes that say less."""
    poorer = causal["retrieval"]["high"] < other["retrieval"]["low"]
    holds = True if gap.low > 0 and not poorer else False if gap.high < 0 else None
    return Finding(
        "codes of causal queries suit a left-to-right language model better than those of bidirectional ones",
        f"{PAPER_1}, section 3: stated as the reason for causal queries; no figure that compares with these",
        f"{causal['nats_per_picture']:.1f} against {other['nats_per_picture']:.1f} nats for the {codes} codes of a "
        f"held-out picture given its caption, difference {gap}; of the pictures that the language models write, "
        f"{_share(causal['drawn_retrieval'])} against {_share(other['drawn_retrieval'])} lie nearest to their caption; "
        f"captions right {_share(causal['captions'])} against {_share(other['captions'])}",
        holds,
    )


def _share(entry: Mapping[str, Any]) -> str:
    return f"{100 * entry['value']:.1f} % [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"


# ------------------------------------------------------------------------------------------------------------- picture
def _draw(
    scenes: Sequence[Scene], pictures: Mapping[str, Tensor], captions: list[str], side: int, report: Report, path: Path
) -> None:
    """Scenes, their codes painted again, pictures drawn from their captions, and bars of the figures."""
    figure = new_figure(12, 7.5)
    grid = figure.add_gridspec(4, 4, height_ratios=(1, 1, 1, 1.7))
    scaled = functional.interpolate(_images(scenes, side), size=pictures["drawn"].shape[-2:])
    titles = [text.replace(" to the ", "\nto the ").replace(" and ", "\nand ") for text in captions]
    rows = (
        ("scene", scaled),
        ("its codes,\npainted", pictures["repainted"]),
        ("its caption,\ndrawn", pictures["drawn"]),
    )
    for row, (label, images) in enumerate(rows):
        show_strip(figure.add_subplot(grid[row, :]), list(images[: len(scenes)]), titles if row == 0 else [], label)
    figures, order = report.figures, report.figures["order"]
    bars: tuple[tuple[str, dict[str, Mapping[str, Any]]], ...] = (
        ("found among the captions, %", {name: figures["retrieval"][name] for name in ("embeddings", "codes")}),
        (
            "captions right, %",
            {"codes": figures["captions"]["codes"], "another\npicture's": figures["captions"]["codes_of_another"]},
        ),
        (
            "pictures right, %",
            {"from\ncaptions": figures["drawing"]["drawn"], "from\ncodes": figures["drawing"]["repainted"]},
        ),
    )
    for column, (title, entries) in enumerate(bars):
        axes = figure.add_subplot(grid[3, column])
        values = [100 * entry["value"] for entry in entries.values()]
        errors = [
            [100 * (entry["value"] - entry["low"]) for entry in entries.values()],
            [100 * (entry["high"] - entry["value"]) for entry in entries.values()],
        ]
        drawn = axes.bar(list(entries), values, yerr=errors, capsize=4, color="#0b7a75")
        axes.bar_label(drawn, labels=[f"{value:.1f}" for value in values], fontsize=8, label_type="center", color="w")
        axes.set_ylim(0, 105)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
    axes = figure.add_subplot(grid[3, 3])
    drawn = axes.bar(list(ARMS), [order[arm]["nats_per_picture"] for arm in ARMS], color=["#0b7a75", "#c8553d"])
    axes.bar_label(drawn, fmt="%.1f", fontsize=8)
    axes.set_title("nats for a picture's codes (lower is better)", fontsize=9)
    axes.tick_params(labelsize=8)
    save_figure(figure, path)
