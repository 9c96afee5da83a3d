"""NAR's image cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.parity.adapters.llamagen import condition, condition_states
from tests.parity.replay import check_meta_model, recorded_draws, sampler_settings
from vistok.generators.nar import NAR, Diagonals, diagonals_of
from vistok.nn.rope import grid_rotation
from vistok.nn.text import TextCondition, left_pad

SYSTEM = "nar"
CPU = torch.device("cpu")


def train(g: Any) -> dict[str, Tensor]:
    model = NAR.from_official(g.weights, g.config)
    cond = g.inputs["cond"]
    batch = {"ids": g.inputs["idx"], "valid": g.inputs.get("valid")}
    if cond.is_floating_point():
        # The last image row of the recorded mask shows which caption columns are open.
        cond = TextCondition(cond, g.inputs["mask"].flatten(0, -3)[:, -1, : cond.shape[1]])
        batch |= {"text_features": cond.features, "text_mask": cond.mask}
    else:
        batch["labels"] = cond
    if "drop_rand" in g.inputs:
        model.train()
    with recorded_draws(drop_rand=g.inputs.get("drop_rand")):
        logits = model(g.inputs["idx"], cond)
        loss = model.training_loss(batch)["loss"]
    loss.backward()
    gradients = {f"grad.{name.replace('vertical_', 'medusa_')}": value.grad for name, value in model.named_parameters()}
    return {"logits": logits, "loss": loss, **gradients}


def mixed_logits(model: NAR, states: tuple[Tensor, Tensor], diagonal: int, diagonals: Diagonals) -> Tensor:
    """Logits of a diagonal from the hidden states of the one before."""
    start, stop = diagonals.starts[diagonal : diagonal + 2]
    offset = diagonals.starts[diagonal - 1] if diagonal else -1
    logits = torch.zeros(())
    for state, neighbour, weight, head in (
        (states[0], diagonals.left, diagonals.left_weight, model.output),
        (states[1], diagonals.above, diagonals.above_weight, model.vertical_output),
    ):
        rows = (neighbour[start:stop] - offset).clamp_min(0)
        logits = logits + functional.linear(state, head.weight).float()[:, rows] * weight[start:stop]
    return logits


@torch.no_grad()
def cached(g: Any) -> dict[str, Tensor]:
    """Teacher-forced diagonals on the cache."""
    model = NAR.from_official(g.weights, g.config)
    tokens = g.inputs["tokens"]
    diagonals = diagonals_of(model.grid, CPU)
    (horizontal, vertical), cache, visible = condition_states(model, g)
    outputs = {"prefill_logits": mixed_logits(model, (horizontal[:, -1:], vertical[:, -1:]), 0, diagonals)}
    rotation = model.rotation_table(model.grid)[model.num_condition_tokens :][diagonals.order]
    for diagonal in range(len(diagonals.starts) - 2):
        start, stop = diagonals.starts[diagonal : diagonal + 2]
        x = model.tok_embeddings(tokens[:, diagonals.order[start:stop]])
        mask = None if visible is None else visible[..., : cache.length + stop - start]
        states = model.hidden_states(x, rotation[start:stop], mask, False, cache)
        outputs[f"logits_diag_{diagonal + 1}"] = mixed_logits(model, states, diagonal + 1, diagonals)
    return outputs


def generate(g: Any) -> dict[str, Tensor]:
    model = NAR.from_official(g.weights, g.config)
    logits: list[Tensor] = []
    if "raw_caption_embs" in g.inputs:
        features, mask = left_pad(g.inputs["raw_caption_embs"], g.inputs["raw_emb_masks"])
        assert torch.equal(features, g.inputs["cond"])
        assert torch.equal(mask, g.inputs["emb_masks"].bool())
    with recorded_draws(g.inputs.get("exp_noise"), logits=logits):
        tokens = model.generate(condition(g), **sampler_settings(g.call)).ids
    return {"tokens": tokens, "logits": torch.cat(logits, 1)}


def masks(g: Any) -> dict[str, Tensor]:
    """Our masks and rotary tables, brought from decoding order to the authors' raster order."""
    outputs = {}
    for total, side in g.call["settings"]:
        diagonals = diagonals_of((side, side), CPU)
        place = torch.cat([torch.arange(total), torch.argsort(diagonals.order) + total])
        mask = diagonals.mask(total)[place][:, place]
        length = len(mask)
        padded = -(-length // 8) * 8
        # The authors' cache has rows and columns beyond the sequence, plain causal and never used; ours has none.
        cache = torch.ones(padded, padded, dtype=torch.bool).tril()
        cache[:length, :length] = mask
        table = grid_rotation((side, side), g.call["head_dim"], g.call["rope_base"], num_condition_tokens=total)
        name = f"T{total}_n{side}"
        outputs |= {
            f"train_{name}": mask,
            f"cache_{name}": cache,
            f"freqs_cis_{name}": torch.view_as_real(table),
        }
    return outputs


CASES = {
    "nar_c2i_train": train,
    "nar_c2i_eval_naive": train,
    "nar_t2i_train": train,
    "nar_c2i_cache": cached,
    "nar_t2i_cache": cached,
    "nar_c2i_generate": generate,
    "nar_t2i_generate": generate,
    "nar_masks": masks,
}


def manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    size = name.removeprefix("imagenet_256_").removeprefix("t2i_").split(".")[0].lower()
    entry = f"nar-{size}.t2i256" if name.startswith("t2i_") else f"nar-{size}.imagenet256"
    check_meta_model(NAR, dict(NAR.published[entry].config), keys)


MANIFESTS = {"imagenet_256_": manifest, "t2i_": manifest}
