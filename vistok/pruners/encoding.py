"""Pictures encoded once for several pruners: ready features, together with the tower's attention that pruners read.

prompt = encode_pictures(model, inputs)
for pruner in pruners:
    with pruner.attached(model):
        model.generate(**prompt)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vistok.errors import InvalidInputError
from vistok.pruners.hosts import find_host
from vistok.pruners.hosts.base import Capture

__all__ = ["PIXELS", "encode_pictures"]

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@torch.no_grad()
def encode_pictures(model: Any, inputs: Mapping[str, Any], tower_layer: int | None = None) -> dict[str, Any]:
    """Run the vision tower once, for any number of pruned and unpruned passes.

    Args:
        model: a supported transformers LVLM.
        inputs: what its processor returns.
        tower_layer: whose queries and keys are kept for pruners that read the tower's attention (negative from the
            end); None: the layer that makes the features the model uses, which is what every method here reads by
            default.

    Returns:
        The inputs without pixels, with `mm_encoder_outputs`. Features, queries and keys of all pictures live as long.

    Raises:
        InvalidInputError: if the inputs hold no pictures, or the model is not supported.
    """
    host = find_host(model)
    given = {kind: name for kind, name in PIXELS.items() if kind in host.kinds and inputs.get(name) is not None}
    if not given:
        raise InvalidInputError(f"there are no pictures among the inputs ({', '.join(inputs)}); nothing to encode")
    layer = host.tower_layer(tower_layer)
    outputs: dict[str, Any] = {}
    for kind in given:
        function = getattr(host.core, f"get_{kind}_features")
        capture = Capture(kind, host.arguments_of(function, inputs))
        held = capture.attention.setdefault(layer, [])

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any], held: list = held) -> None:
            held.extend(host.read_attention(module, {**kwargs, **({"hidden_states": args[0]} if args else {})}))

        def after(module: nn.Module, args: tuple, output: Any, capture: Capture = capture) -> None:
            capture.outputs[layer] = output[0] if isinstance(output, tuple) else output

        hooks = [
            host.tower_attention(layer).register_forward_pre_hook(before, with_kwargs=True),
            host.tower_layers()[layer].register_forward_hook(after),
        ]
        try:
            outputs[kind] = function(**capture.arguments, return_dict=True)
        finally:
            for hook in hooks:
                hook.remove()
        capture.visuals = host.visuals(capture, outputs[kind])
        outputs[kind].vistok_capture = capture
    rest = {name: value for name, value in inputs.items() if name not in PIXELS.values()}
    return {**rest, "mm_encoder_outputs": outputs}
