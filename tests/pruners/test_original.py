"""Checkpoints in the original LLaVA layout load strictly into transformers' models."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vistok.errors import CheckpointError, InvalidInputError
from vistok.pruners.hosts.original import _PREFIXES, build, from_original, rename_original

CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "tie_word_embeddings": False,
}
CONFIG = {"llava_config": TEXT, "clip_vision_config": CLIP}
TOWER = "model.vision_tower.vision_tower.vision_model."


def original_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's weights under the original names."""
    names = {ours: theirs for theirs, ours in _PREFIXES.items() if theirs != "model.vision_tower.vision_tower."}
    state = {}
    for key, value in model.state_dict().items():
        ours = max((prefix for prefix in names if key.startswith(prefix)), key=len)
        state[names[ours] + key[len(ours) :]] = value
    return state


def test_round_trip_from_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = build(CONFIG)
    state = original_state(model)
    assert TOWER + "post_layernorm.weight" in state
    assert "model.mm_projector.2.bias" in state
    save_file(
        {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1)}, str(tmp_path / "model.safetensors")
    )
    loaded = from_original(tmp_path / "model.safetensors", CONFIG, image_token_id=7)
    assert loaded.config.image_token_id == 7
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_a_tower_may_come_from_its_own_file() -> None:
    state = original_state(build(CONFIG))
    tower = {f"vision_model.{key[len(TOWER) :]}": value for key, value in state.items() if key.startswith(TOWER)}
    rest = {key: value for key, value in state.items() if not key.startswith(TOWER)}
    with pytest.raises(CheckpointError, match=r"missing: model\.vision_tower"):
        from_original(rest, CONFIG)
    loaded = from_original(rest, CONFIG, tower={**tower, "logit_scale": torch.ones(())})
    weight = loaded.model.vision_tower.post_layernorm.weight
    assert torch.equal(weight, state[TOWER + "post_layernorm.weight"])


def test_strange_keys_shapes_and_names_are_named() -> None:
    state = original_state(build(CONFIG))
    with pytest.raises(CheckpointError, match="nonsense"):
        rename_original({**state, "nonsense.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight \[3\] instead of \[20, 16\]"):
        from_original({**state, "lm_head.weight": torch.ones(3)}, CONFIG)
    with pytest.raises(InvalidInputError, match=r"llava-v1\.5-7b"):
        from_original(state, "llava-v9")
    with pytest.raises(InvalidInputError, match="llava_config"):
        from_original(state, {"text": {}})
