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
# # Images as words of a language model
#
# **SEED** (Ge et al., arXiv 2307.08041 and 2310.01218) turns a picture into a short sentence of code words. The words have
# an order: word *i* is written by a query that saw the queries before it and none after it, so a language model can read
# and write pictures from left to right, like text.
#
# Three small checkpoints play the parts of the published ones: `seed-shapes` (vision transformer, causal queries,
# codebook), `seed-unclip-shapes` (paints what the codes mean) and `seed-lm-shapes` (a stock Llama that knows the words of
# captions and of pictures).

# %%
import textwrap

import matplotlib.pyplot as plt
import torch

import vistok
from vistok.data.shapes import caption, render, sample_scene, scene_for
from vistok.data.shapes.words import caption_tokenizer
from vistok.training.seed import caption_words
from vistok.training.sources import image_batch

seed = vistok.load("seed-shapes")
language = vistok.load("seed-lm-shapes")
print(f"{seed.num_tokens} words a picture out of {seed.codebook_size}")


def show(images, titles, size=1.7):
    pictures = seed.postprocess(images) if torch.is_tensor(images) else images
    _, axes = plt.subplots(1, len(pictures), figsize=(len(pictures) * size, size * 1.3), squeeze=False)
    for axis, picture, title in zip(axes[0], pictures, titles, strict=True):
        axis.imshow(picture)
        axis.set_title(textwrap.fill(title, 26), fontsize=7)
        axis.axis("off")
    plt.tight_layout()
    plt.show()


def seeds(count, first=0):
    return [torch.Generator().manual_seed(first + number) for number in range(count)]


# %% [markdown]
# ## A picture in words, and back
#
# The codes say what is in the picture, not where every pixel is. What is painted from them therefore *means* the same: the
# same objects, perhaps at other places. Painting starts from noise, so every seed gives another picture of one meaning.

# %%
scenes = [sample_scene(7, number, (1, 2)) for number in range(6)]
captions = [caption(scene) for scene in scenes]
images = image_batch([render(scene, 64) for scene in scenes])
tokens = seed.encode(images)
print(" ".join(f"<img_{code:05d}>" for code in tokens.ids[0].tolist()))
painted = seed.decode(tokens, generator=seeds(6), num_inference_steps=10, guidance_scale=3.0)
show(images, captions)
show(painted, ["from its codes"] * 6)

# %% [markdown]
# ## The order of the words
#
# Queries are causal. If the last half of the words is replaced by those of another picture, the first half does not know:
# both pictures share it word for word. Below: how far the image embedding that the words predict moves towards the second
# picture as more and more of its words are taken.

# %%
first, second = tokens.ids[0], tokens.ids[1]
ends = seed.decode_embeddings(torch.stack([first, second]))
shares = []
for kept in range(seed.num_tokens + 1):
    mixed = torch.cat([first[:kept], second[kept:]])[None]
    embedding = seed.decode_embeddings(mixed)
    near = torch.cosine_similarity(embedding, ends)
    shares.append((near[0].item(), near[1].item()))
plt.figure(figsize=(5, 2.4))
plt.plot([share[0] for share in shares], label="likeness to the first picture")
plt.plot([share[1] for share in shares], label="likeness to the second picture")
plt.xlabel("words taken from the first picture")
plt.legend(fontsize=7)
plt.show()

# %% [markdown]
# ## Finding a picture by its words
#
# The first training stage brings pictures and captions together in one space. Codes alone are enough to find the caption.

# %%
words = caption_words(captions, caption_tokenizer())
with torch.no_grad():
    texts = seed.text_features(words["input_ids"], words["attention_mask"])
    likeness = seed.code_features(tokens.ids) @ texts.T
plt.figure(figsize=(3.2, 2.8))
plt.imshow(likeness, cmap="viridis")
plt.xlabel("caption")
plt.ylabel("codes of picture")
plt.colorbar()
plt.show()

# %% [markdown]
# ## A language model reads pictures
#
# A prompt may mix texts and pictures. After the codes of a picture the model writes its caption.

# %%
answers = language.generate([[ids] for ids in tokens.ids], allow_images=False, temperature=0.0, max_new_tokens=24)
for truth, answer in zip(captions, answers, strict=True):
    print(f"shown:   {truth}\nwritten: {''.join(answer)}\n")

# %% [markdown]
# ## ... and writes them
#
# While it generates, its output is held to whole pictures: after `<img>` nothing but codes, exactly as many as a picture
# has, then `</img>`. Whatever it writes can be painted.

# %%
wishes = [
    "a red circle",
    "a large blue star to the left of a small green ring",
    "a dark purple heart",
    "a yellow cross",
]
written = language.generate(
    wishes, force_image=True, max_new_tokens=seed.num_tokens + 1, temperature=0.7, top_p=0.9, seed=0
)
drawn = torch.cat(
    [seed.decode(answer[0], generator=seeds(1), num_inference_steps=10, guidance_scale=3.0) for answer in written]
)
show(drawn, wishes)

# %% [markdown]
# Reading what was written closes the circle: the picture goes through the tokenizer again, and the model says what it sees.

# %%
again = language.generate(
    [[ids] for ids in seed.encode(drawn.clamp(-1, 1)).ids], allow_images=False, temperature=0.0, max_new_tokens=24
)
for wish, answer in zip(wishes, again, strict=True):
    print(f"asked: {wish:<55} seen: {''.join(answer)}")

# %% [markdown]
# ## Any language model
#
# `extend_language_model` gives these words to any causal language model of transformers. Here a fresh, untrained Llama
# learns one picture by heart.

# %%
from transformers import LlamaConfig, LlamaForCausalLM

from vistok.tokenizers.seed import extend_language_model

torch.manual_seed(0)
tokenizer = caption_tokenizer(64)
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
fresh = extend_language_model(
    LlamaForCausalLM(config),
    tokenizer,
    codebook_size=seed.codebook_size,
    num_codes=seed.num_tokens,
    mean_resizing=False,
)
ids = seed.encode(image_batch([render(scene_for("a red star", seed=1), 64)])).ids
row = fresh.sequences(64).pair(ids, "a red star", image_first=False, mask_condition=True)
batch = {name: value[None] for name, value in row.items()}
optimizer = torch.optim.AdamW(fresh.parameters(), lr=3e-3)
for step in range(60):
    loss = fresh.training_loss(batch)["loss"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0 or step == 59:
        print(f"step {step:2d}: {loss.item():.3f} nats a word")
learnt = fresh.eval().generate(["a red star"], force_image=True, max_new_tokens=seed.num_tokens + 1, temperature=0.0)[
    0
][0]
print("the same words:", torch.equal(learnt.ids, ids))

# %% [markdown]
# `vistok reproduce seed` measures all of this on many pictures, with causal and with bidirectional queries.
