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
# # Near to far: an image grows
#
# Autoregressive image generators write a grid of tokens like text: row by row, one token a step. Neighbours in a picture,
# however, lie in two directions. **NAR** (He et al., arXiv 2503.10696) starts in the top left corner and writes all tokens
# at distance 1, then at distance 2, and so on: an anti-diagonal a step. A grid of R x C tokens then takes R + C - 1 steps
# instead of R C.
#
# Two small checkpoints that ship with vistok show both ways on the same classes: `llamagen-shapes-class` (raster order)
# and `nar-shapes-class` (near to far), of equal size and equally long trained.

# %%
import time

import matplotlib.pyplot as plt
import torch

import vistok
from vistok.tokens import VisualTokens

pipelines = {name: vistok.load_pipeline(name) for name in ("llamagen-shapes-class", "nar-shapes-class")}
for name, pipe in pipelines.items():
    pipe.set_progress_bar_config(disable=True)
    parameters = sum(value.numel() for value in pipe.generator.parameters())
    print(f"{name}: {parameters / 1e6:.2f} M parameters, grid {pipe.generator.grid}")


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


# %% [markdown]
# ## Film strips
#
# `pipe.stream` yields the picture after every model step. Grey places have no token yet.

# %%
for pipe in pipelines.values():
    previews = list(pipe.stream("a red circle", generator=seeds(1)))
    count = len(previews)
    chosen = sorted({round(index * (count - 1) / 11) for index in range(12)})
    strip([previews[index].images[0] for index in chosen], [f"step {index + 1}/{count}" for index in chosen])

# %% [markdown]
# ## The order itself

# %%
figure, axes = plt.subplots(1, 2, figsize=(6, 3))
for axis, (name, pipe) in zip(axes, pipelines.items(), strict=True):
    order = torch.zeros(64)
    for step in pipe.generator.sample(torch.tensor([0]), generator=seeds(1)):
        order[step.changed] = step.index
    axis.imshow(order.view(8, 8), cmap="viridis")
    axis.set_title(f"{name}\nstep of each token", fontsize=8)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Time

# %%
for name, pipe in pipelines.items():
    for batch in (1, 16):
        labels = torch.arange(batch)
        pipe.generator.generate(labels, guidance_scale=2.0)
        begun = time.perf_counter()
        pipe.generator.generate(labels, guidance_scale=2.0)
        spent = time.perf_counter() - begun
        print(f"{name:<24} batch {batch:2d}: {spent / batch * 1000:7.1f} ms an image")

# %% [markdown]
# ## Growing from a known corner
#
# The order makes continuation natural: any known region that reaches the top left corner can be grown further. Here the
# upper half of one picture is kept and the rest is written three times.

# %%
pipe = pipelines["nar-shapes-class"]
source = pipe("a blue star", generator=seeds(1, 5))
known = torch.zeros(1, 8, 8, dtype=torch.bool)
known[:, :4] = True
prefix = VisualTokens(ids=source.tokens.ids, grid=(8, 8), mask=known.flatten(1))
grown = [pipe("a blue star", generator=seeds(1, seed), prefix=prefix).images[0] for seed in (11, 12, 13)]
strip([source.images[0], *pipe.preview(prefix), *grown], ["source", "known", "grown 1", "grown 2", "grown 3"], size=1.6)

# %% [markdown]
# `vistok reproduce nar` measures steps, time and quality of both orders on many samples.
