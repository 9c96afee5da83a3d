# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Next-X prediction
#
# A codebook is not the only way to write an image token by token. The generators here write *continuous* tokens, vectors
# of a KL auto-encoder, and draw each of them by a small diffusion or flow process. They differ in what they write next:
#
# - **MAR** ([arXiv 2406.11838](https://arxiv.org/abs/2406.11838)): a random set of single tokens, each denoised by an MLP;
# - **Hi-MAR** ([arXiv 2505.20288](https://arxiv.org/abs/2505.20288)): first the tokens of a small copy ("pivots"), then all
#   tokens in four steps;
# - **xAR** ([arXiv 2502.20388](https://arxiv.org/abs/2502.20388)): an *entity* X, such as a cell of neighbouring tokens,
#   which flows from noise to data as a whole.
#
# Three small checkpoints that ship with vistok draw one of 64 classes (a colour and a shape) on the same tokenizer.

# %%
import time

import matplotlib.pyplot as plt
import torch

import vistok
from vistok.generators.xar.entities import entity_layout
from vistok.metrics.accuracy import class_accuracy
from vistok.metrics.evaluate import sample_images, sampler_settings
from vistok.tokens import VisualTokens

pipelines = {name: vistok.load_pipeline(f"{name}-shapes") for name in ("mar", "himar", "xar")}
for name, pipe in pipelines.items():
    pipe.set_progress_bar_config(disable=True)
    parameters = sum(value.numel() for value in pipe.generator.parameters())
    print(f"{name}: {parameters / 1e6:.2f} M parameters, {sampler_settings(pipe)}")


def seeds(count, first=0):
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def strip(pictures, titles, size=1.2):
    _, axes = plt.subplots(1, len(pictures), figsize=(len(pictures) * size, size * 1.25))
    for axis, picture, title in zip(axes, pictures, titles, strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=7)
        axis.axis("off")
    plt.tight_layout()
    plt.show()


def evenly(items, count):
    return [items[round((index + 1) * len(items) / count) - 1] for index in range(min(count, len(items)))]


# %% [markdown]
# ## What can X be?
#
# An entity is a set of tokens that are made together. Each number says at which turn a token of an 8x8 grid is written.

# %%
kinds = {"token": {}, "cell": {"entity_size": 4}, "subsample": {"entity_size": 2}, "image": {}}
figure, axes = plt.subplots(1, 5, figsize=(10, 2.4))
for axis, (kind, options) in zip(axes, kinds.items()):
    layout = entity_layout((8, 8), kind, **options)
    turn = torch.empty(64, dtype=torch.int64)
    turn[layout.places] = layout.number
    axis.imshow(turn.view(8, 8), cmap="viridis")
    axis.set_title(f"{kind}: {layout.num_entities} turn{'s'[: layout.num_entities > 1]}", fontsize=8)
layout = entity_layout((8, 8), "scale")
sides = [rows for rows, _ in layout.scales]
axes[4].barh(range(len(sides)), [side**2 for side in sides], color="#0b7a75")
axes[4].set_yticks(range(len(sides)), [f"{side}x{side}" for side in sides], fontsize=7)
axes[4].invert_yaxis()
axes[4].set_title(f"scale: {layout.num_entities} turns (tokens)", fontsize=8)
for axis in axes[:4]:
    axis.axis("off")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## xAR: four cells, each a flow
#
# `pipe.stream` yields every call of the network. Within a cell the call shows where the flow is heading; a cell that is
# not begun is grey.

# %%
pipe = pipelines["xar"]
label = pipe.config.class_names.index("red circle")
steps = list(pipe.generator.sample(torch.tensor([label]), generator=seeds(1, 3), **sampler_settings(pipe)))
calls = len(steps) // 4
shown = [steps[cell * calls + call] for cell in range(4) for call in (calls // 3, calls - 1)]
whole = [VisualTokens(features=step.tokens.features, grid=step.tokens.grid) for step in shown]
finished = [step.tokens.mask[0].clone() for step in shown]
for step, mask in zip(shown, finished):  # the cell in the making is shown, too
    places = pipe.generator.layout.places.view(4, -1)[step.index // calls]
    mask[places] = True
frames = [
    pipe.preview(VisualTokens(features=one.features, grid=one.grid, mask=mask[None]))[0]
    for one, mask in zip(whole, finished)
]
strip(frames, [f"cell {step.index // calls + 1}, call {step.index % calls + 1}" for step in shown])

# %% [markdown]
# Known cells can be given: the first two are kept here, and the others made three times.

# %%
source = pipe(class_labels=[label], generator=seeds(1, 3))
known = torch.zeros(1, 8, 8, dtype=torch.bool)
known[:, :4] = True
prefix = VisualTokens(features=source.tokens.features, grid=(8, 8), mask=known.flatten(1))
grown = [pipe(class_labels=[label], generator=seeds(1, seed), prefix=prefix).images[0] for seed in (11, 12, 13)]
strip([source.images[0], *pipe.preview(prefix), *grown], ["source", "known", "made 1", "made 2", "made 3"], size=1.5)

# %% [markdown]
# ## MAR: tokens in a random order
#
# Few tokens first, many later (cosine schedule). Grey places have no token yet.

# %%
pipe = pipelines["mar"]
previews = list(pipe.stream(class_labels=[label], num_inference_steps=16, generator=seeds(1, 3)))
chosen = evenly(previews, 8)
strip(
    [preview.images[0] for preview in chosen],
    [f"step {preview.step.index + 1}: {int(preview.step.tokens.mask.sum())} tokens" for preview in chosen],
)

# %% [markdown]
# ## Hi-MAR: a small picture first
#
# The pivots are written on a grid of their own, one after the other; then all tokens of the image in four steps. The
# dense phase reads the hidden states behind the pivots, and its head, a diffusion transformer, draws all unknown tokens
# jointly.

# %%
pipe = pipelines["himar"]
previews = list(pipe.stream(class_labels=[label], generator=seeds(1, 3)))
small = [preview for preview in previews if preview.step.tokens.grid != pipe.generator.grid]
large = [preview for preview in previews if preview.step.tokens.grid == pipe.generator.grid]
chosen = [*evenly(small, 4), *large]
strip(
    [preview.images[0] for preview in chosen],
    [
        f"{'x'.join(map(str, preview.step.tokens.grid))}, {int(preview.step.tokens.mask.sum())} tokens"
        for preview in chosen
    ],
)

# %% [markdown]
# ## Side by side
#
# The same classes from each, how many of 64 pictures the oracle reads as asked, and the time.

# %%
for name, pipe in pipelines.items():
    begun = time.perf_counter()
    images = sample_images(pipe, list(range(64)), seed=1, batch_size=64)
    spent = time.perf_counter() - begun
    share = class_accuracy(images, range(64))["class"]
    pictures = pipe.tokenizer.postprocess(images[::8])
    strip(pictures, [pipe.config.class_names[index] for index in range(0, 64, 8)])
    print(f"{name}: class right {share}; {1000 * spent / 64:.0f} ms an image in a batch of 64")

# %% [markdown]
# `vistok reproduce xar` and `vistok reproduce himar` train small variants (tokens, cells, subsamples, scales; noisy or clean
# context; with and without pivots) and compare them on many samples.
