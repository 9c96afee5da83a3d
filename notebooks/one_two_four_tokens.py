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
# # An image in 1, 2, 4 ... N tokens
#
# Most tokenizers cut a picture into a grid and spend as many tokens on an empty sky as on a crowd. **FlexTok** (Bachmann et
# al., arXiv 2502.13967) writes a picture as a *sequence*: the first token says the most, every further one adds detail, and
# any prefix is a whole picture, because a flow decoder draws whatever the tokens leave open.
#
# `flextok-shapes` ships with vistok: 64x64 pixels, 16 tokens of 1,000 codes (20 bytes). It works on the latents of
# `kl-shapes`, which `vistok.load` fetches along.

# %%
import matplotlib.pyplot as plt
import torch

import vistok
from vistok.data.photographs import open_photograph
from vistok.data.shapes import CLASS_NAMES, read_scene, render, sample_scene
from vistok.tokens import VisualTokens

torch.set_grad_enabled(False)
tokenizer = vistok.load("flextok-shapes")
lengths = [1, 2, 4, 8, 16]
print(
    f"{sum(value.numel() for value in tokenizer.parameters()) / 1e6:.2f} M parameters, "
    f"{tokenizer.num_registers} tokens of {tokenizer.codebook_size} codes"
)


def seeds(count, first=0):
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def table(rows, titles, size=1.15):
    _, axes = plt.subplots(len(rows), len(titles), figsize=(len(titles) * size, len(rows) * size * 1.1), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, image in zip(line, row, strict=True):
            axis.imshow((image.clamp(-1, 1).permute(1, 2, 0) + 1) / 2)
            axis.axis("off")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    plt.tight_layout()
    plt.show()


# %% [markdown]
# ## One picture, five budgets
#
# Scenes of one, two and three objects. All pictures of a row start from the same noise, so what changes is what the tokens
# say.

# %%
scenes = [sample_scene(2**41, index, 1 + index // 2) for index in range(6)]
images = torch.stack([torch.from_numpy(render(scene, 64)).permute(2, 0, 1) / 127.5 - 1 for scene in scenes])
tokens = tokenizer.encode(images)
drawn = tokenizer.decode_prefixes(tokens, lengths, generator=seeds(len(images)))
titles = ["original", *(f"{length} token{'s' if length > 1 else ''}" for length in lengths)]
table(torch.cat([images[:, None], drawn], dim=1), titles)
print("tokens of the first picture:", tokens.ids[0].tolist())

# %% [markdown]
# The same tokens, other noise: what stays the same is what the tokens hold, what changes is what the decoder makes up.

# %%
first = VisualTokens(ids=tokens.ids[:1])
again = torch.cat([tokenizer.decode_prefixes(first, lengths, generator=seeds(1, seed)) for seed in range(3)])
table(torch.cat([images[:1].expand(3, 1, -1, -1, -1), again], dim=1), titles)

# %% [markdown]
# ## Photographs
#
# The tokenizer was made for the lab world, and saw a few photographs only. `preprocess` takes a picture of any size and cuts
# out its middle square. 16 tokens are 20 bytes: light and colours survive, details are made up.

# %%
names = ["astronaut", "chelsea", "coffee"]
photographs = tokenizer.preprocess([open_photograph(name) for name in names])
tokens_of_photographs = tokenizer.encode(photographs)
drawn = tokenizer.decode_prefixes(tokens_of_photographs, lengths, generator=seeds(len(names)))
table(torch.cat([photographs[:, None], drawn], dim=1), titles)

# %% [markdown]
# ## As few tokens as a picture needs
#
# `tokens_for` tries 1, 2, 4, ... tokens and stops at the first prefix that is good enough.

# %%
for objects in (1, 2, 3):
    batch = torch.stack(
        [
            torch.from_numpy(render(sample_scene(2**41 + 5, index, objects), 64)).permute(2, 0, 1) / 127.5 - 1
            for index in range(12)
        ]
    )
    budget = tokenizer.tokens_for(batch, max_error=0.004, generator=seeds(len(batch)))
    print(
        f"{objects} object{'s' if objects > 1 else ' '}: {budget.lengths.float().mean():5.2f} tokens on average, "
        f"{int(budget.satisfied.sum())} of {len(batch)} within 24 dB"
    )

# %% [markdown]
# ## Writing them
#
# `flextok-ar-shapes` writes these tokens from a class, one after the other, as a language model writes words. Because each
# prefix is a picture, a strip shows how it makes up its mind.

# %%
pipe = vistok.load_pipeline("flextok-ar-shapes")
pipe.set_progress_bar_config(disable=True)
rows = []
for label in (0, 27, 54):
    written = pipe.generator.generate(torch.tensor([label]), generator=seeds(1), guidance_scale=1.5)
    rows.append(tokenizer.decode_prefixes(written, lengths, generator=seeds(1))[0])
    seen = read_scene(rows[-1][-1]).objects
    print(
        f"asked: {CLASS_NAMES[label]:<16} read in all 16 tokens: {', '.join(f'{one.colour} {one.shape}' for one in seen)}"
    )
table(rows, titles[1:])

# %% [markdown]
# `vistok reproduce flextok` measures all of this on many pictures, and compares with tokens that have no order;
# `vistok encode --tokens 1,4,16 photo.png` makes such a strip of your own picture.
