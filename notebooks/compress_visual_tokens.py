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
# # Compress an LVLM's visual tokens
#
# A vision-language model turns a picture into hundreds of tokens and runs every one of them through every layer, though a
# question is often about a handful. **Pruners** drop the others, from a stock transformers model, inside a `with` block.
# `llava-shapes` is a small but ordinary `LlavaForConditionalGeneration` that ships with vistok: 256 tokens a picture, eight
# decoder layers. The same code takes LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Qwen2/2.5/3-VL, InternVL and SmolVLM.

# %%
import tempfile

import matplotlib.pyplot as plt
import numpy as np

from vistok.metrics import evaluate_pruners
from vistok.metrics.pruning import KEEP_RATIOS, Asker, held_out_questions, load_lvlm, plot_pareto, winners
from vistok.pruners import FoPru, Pruner, RandomPruner, Scorer, Stage, TopK, TransPrune, overlay

model, processor = load_lvlm("llava-shapes")
parameters = sum(value.numel() for value in model.parameters())
print(f"{type(model).__name__}: {parameters / 1e6:.2f} M parameters")

questions = held_out_questions(60, model.config.vision_config.image_size)
asker = Asker(model, processor, max_new_tokens=2)
fig, axes = plt.subplots(1, 5, figsize=(11, 2.8))
for axis, one in zip(axes, questions[:5], strict=True):
    axis.imshow(one.picture())
    said = asker.ask(one.picture(), one.question).text
    axis.set_title(f"{one.question}\n{said} (true: {one.answers[0]})", fontsize=7, wrap=True)
    axis.axis("off")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## One pruner, one question
#
# Attach, generate, read the report. Afterwards the model is bit for bit what it was.

# %%
first = questions[0]
inputs = asker.inputs(first.picture(), first.question)
pruner = FoPru(0.25)
with pruner.attached(model):
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
print(
    first.question,
    "->",
    processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True),
)
print(pruner.last_report)

# %% [markdown]
# ## What stays
#
# Each method keeps 25 % of the tokens; what it drops is darkened. Methods inside the decoder are shown after their last
# stage.

# %%
methods = [
    "transprune",
    "fopru",
    "vflowopt",
    "fastv",
    "pyramiddrop",
    "sparsevlm",
    "fastervlm",
    "visionzip",
    "divprune",
    "random",
]
shown = questions[:3]
fig, axes = plt.subplots(len(shown), len(methods) + 1, figsize=(13, 4))
for row, one in zip(axes, shown, strict=True):
    picture = one.picture().resize((256, 256), 0)
    row[0].imshow(picture)
    row[0].set_title(f"{one.question}\n{one.answers[0]}", fontsize=5, wrap=True)
    for axis, method in zip(row[1:], methods, strict=True):
        answer = asker.ask(one.picture(), one.question, method, 0.25)
        axis.imshow(overlay(picture, asker.last_report.stages[-1].visuals[0]))
        axis.set_title(f"{method}\n{answer.text}", fontsize=6)
    for axis in row:
        axis.axis("off")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Accuracy against operations, every method
#
# 60 questions only, so that this runs in a minute: intervals are wide. `vistok eval pruners --model llava-shapes --data shapes`
# asks 1,000, and your own model and pictures are one command as well. Methods before the language model are cheaper at
# equal shares, because those inside it show the first layers everything: compare along the horizontal axis.

# %%
report = evaluate_pruners(
    model, processor, questions, batch_size=20, reuse_tower=True, max_new_tokens=2, model_name="llava-shapes"
)
names = list(dict.fromkeys(row["method"] for row in report["parts"]))
print(f"{'accuracy, %':<12}" + "".join(f"{100 * ratio:>7g} %" for ratio in KEEP_RATIOS))
for name in names:
    rows = {row["keep_ratio"]: row for row in report["parts"] if row["method"] == name}
    if None in rows:
        print(f"{name:<12}{100 * rows[None]['accuracy']['value']:>9.1f}")
        continue
    cells = [
        "skipped" if "skipped" in rows[ratio] else f"{100 * rows[ratio]['accuracy']['value']:.1f}"
        for ratio in KEEP_RATIOS
    ]
    print(f"{name:<12}" + "".join(f"{cell:>9}" for cell in cells))
for one in winners(report):
    print(one)

# %%
with tempfile.TemporaryDirectory() as folder:
    plot_pareto(report, f"{folder}/pareto.png")
    drawn = plt.imread(f"{folder}/pareto.png")
plt.figure(figsize=(9, 5.6))
plt.imshow(drawn)
plt.axis("off")
plt.show()

# %% [markdown]
# ## Which questions suffer
#
# Questions differ in what they need: a colour survives on few tokens, a count or a side of the picture does not.

# %%
kinds = sorted(report["parts"][0]["by_kind"])
chosen = [
    ("unpruned", None),
    ("fopru", 0.25),
    ("transprune", 0.25),
    ("random", 0.25),
    ("fopru", 0.05),
    ("random", 0.05),
]
table = np.array(
    [
        [row["by_kind"][kind]["value"] for kind in kinds]
        for wanted in chosen
        for row in report["parts"]
        if (row["method"], row["keep_ratio"]) == wanted
    ]
)
fig, axis = plt.subplots(figsize=(7, 3))
drawn = axis.imshow(100 * table, vmin=0, vmax=100, cmap="viridis", aspect="auto")
axis.set_xticks(range(len(kinds)), kinds)
axis.set_yticks(range(len(chosen)), [name if ratio is None else f"{name}, {100 * ratio:g} %" for name, ratio in chosen])
fig.colorbar(drawn, label="accuracy, %")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## They add up
#
# Half before the language model, then the rest inside it. Shares inside are counted from what entered.

# %%
for pruner in (FoPru(0.5) + TransPrune(prune=(2, 4), accumulate=(1, 2, 3, 4), ratios=(0.5, 0.25)), RandomPruner(0.1)):
    with pruner.attached(model):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    print(pruner.last_report, "\n")


# %% [markdown]
# ## A pruner of your own
#
# Most new methods are one scorer: a number for each token, and the largest stay. This one keeps what differs most from the
# picture's average token, and stands in the same comparison as the others.


# %%
class Unusual(Scorer):
    def score(self, context):
        features = [context.features(span) for span in context.spans]
        return [(one - one.mean(dim=0)).norm(dim=-1) for one in features]


def unusual(target):
    def count(now, first):
        return max(1, round(target.keep_ratio * first))

    return Pruner([Stage("embeddings", TopK(count), Unusual(), name="unusual", count=count)])


own = evaluate_pruners(
    model,
    processor,
    questions,
    methods=["random"],
    own={"unusual": unusual},
    batch_size=20,
    reuse_tower=True,
    max_new_tokens=2,
    model_name="llava-shapes",
)
for row in own["parts"]:
    share = "" if row["keep_ratio"] is None else f"{100 * row['keep_ratio']:g} %"
    print(f"{row['method']:<10}{share:>6}  {100 * row['accuracy']['value']:.1f} %")

# %% [markdown]
# `vistok reproduce transprune`, `fopru` and `vflowopt` put the papers' claims to the test on 1,000 questions.
