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
# # Visual tokens in five minutes
#
# A language model reads words. To let a transformer read or write *pictures*, they are cut into **visual tokens**: a small
# grid of integers, each the number of an entry in a codebook. This notebook makes such tokens, looks at them, breaks them,
# and turns them back into pictures. Everything runs offline on a laptop.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from skimage import data

import vistok
from vistok.data import shapes

torch.manual_seed(0)
tokenizer = vistok.load("vq-shapes")
parameters = sum(value.numel() for value in tokenizer.parameters())
print(f"{parameters / 1e6:.2f} M parameters, codebook of {tokenizer.config.codebook_size} entries")


def show(pictures, titles=None, columns=8, size=1.5):
    rows = -(-len(pictures) // columns)
    _, axes = plt.subplots(rows, columns, figsize=(columns * size, rows * size), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, picture in enumerate(pictures):
        axes.flat[index].imshow(picture, vmin=0, vmax=255)
        if titles:
            axes.flat[index].set_title(titles[index], fontsize=8)
    plt.tight_layout()
    plt.show()


# %% [markdown]
# ## Pictures to tokens
#
# The lab world draws scenes that nobody has seen before. `encode` turns a batch of pictures in [-1, 1] into `VisualTokens`.

# %%
scenes = [shapes.sample_scene(seed=2024, index=index) for index in range(8)]
pictures = [shapes.render(scene) for scene in scenes]
images = torch.stack([shapes.image_to_tensor(picture) for picture in pictures])
tokens = tokenizer.encode(images)
print("ids", tuple(tokens.ids.shape), "on a grid of", tokens.grid)
print(tokens.ids[0].view(tokens.grid).numpy())
print(f"{int(tokens.bits(tokenizer.config.codebook_size)[0]) // 8} bytes instead of {pictures[0].size}")

# %% [markdown]
# ## And back

# %%
decoded = [np.asarray(picture) for picture in tokenizer.postprocess(tokenizer.decode(tokens))]
show(pictures + decoded, ["picture"] * 8 + ["from 64 tokens"] * 8)

# %% [markdown]
# How good is that? The lab world has an **oracle** that reads shapes and colours back from any picture, so nobody has to
# judge by eye.

# %%
agree = 0
for before, after in zip(pictures, decoded, strict=True):
    names = [
        sorted(f"{item.colour} {item.shape}" for item in shapes.read_scene(side).objects) for side in (before, after)
    ]
    agree += names[0] == names[1]
    print("same" if names[0] == names[1] else "OTHER", names)
print(f"{agree} of {len(pictures)} scenes are read the same")

# %% [markdown]
# ## A token is a place
#
# Replacing a single token changes the picture around its cell and little else. This is what makes it possible to generate
# pictures token by token, to prune tokens, or to continue a picture from a known part.

# %%
edited = []
for position in (9, 18, 27, 36):
    ids = tokens.ids[:1].clone()
    ids[0, position] = 123
    changed = tokenizer.decode(vistok.VisualTokens(ids=ids, grid=tokens.grid))
    edited.append(np.asarray(tokenizer.postprocess(changed)[0]))
show(
    [decoded[0], *edited],
    ["all tokens", *(f"token {position} replaced" for position in (9, 18, 27, 36))],
    columns=5,
    size=2,
)

# %% [markdown]
# ## Any picture, any size
#
# The network is convolutional: it takes any size. It was trained on scenes and on photographs, but never saw this cat. At
# 0.16 bits a pixel a photograph becomes a painting.

# %%
cat = data.chelsea()
result = np.asarray(tokenizer.reconstruct(Image.fromarray(cat)))
error = ((cat.astype(float) - result.astype(float)) ** 2).mean()
print(f"{cat.shape[1]}x{cat.shape[0]} pixels, PSNR {10 * np.log10(255**2 / error):.2f} dB")
show([cat, result], ["photograph", "from its tokens"], columns=2, size=5)

# %% [markdown]
# ## Which codes are used?

# %%
sample = torch.stack([shapes.image_to_tensor(shapes.render(shapes.sample_scene(7, index))) for index in range(128)])
report = tokenizer.codebook_report(tokenizer.encode(sample))
print(report)

# %% [markdown]
# Next: *near to far: an image grows* shows how a generator writes such grids.
