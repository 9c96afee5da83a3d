"""The trainer's optimisers: AdamW, and Muon for hidden matrices beside AdamW for everything else.

Source of Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the step size that
suits AdamW's learning rates is from Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982, equation 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vistok.errors import InvalidInputError

from .recipe import OptimizerRecipe

# Narrower convolutions read or write pictures or latents.
SMALLEST_HIDDEN = 16

__all__ = ["MuonWithAdamW", "build_optimizer", "decay_groups"]


def decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay on tensors of two or more dimensions only."""
    return [
        {"params": [value for value in parameters if value.ndim >= 2], "weight_decay": weight_decay},
        {"params": [value for value in parameters if value.ndim < 2], "weight_decay": 0.0},
    ]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights [out, in] of linear layers between hidden states: no embeddings, no layer that names a vocabulary.

    A square layer counts as hidden even where the vocabulary is as large as the width.
    """
    widest = getattr(getattr(model, "config", None), "vocab_size", None)
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and (module.out_features != widest or module.in_features == widest)
    ]


def hidden_convolutions(model: nn.Module) -> list[nn.Parameter]:
    """Weights [out, in, ...] of convolutions between hidden states: neither the first nor the last of the network."""
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.weight.requires_grad]
    return [module.weight for module in found if min(module.weight.shape[:2]) >= SMALLEST_HIDDEN]


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimisers that step together; `param_groups` are those of both.

    Args:
        muon: of the hidden matrices, and of the matrices that `convolutions` are seen as.
        adamw: of everything else.
        convolutions: pairs of a contiguous weight [out, in, ...] and the parameter [out, ...] that shares its memory.
    """

    def __init__(
        self,
        muon: torch.optim.Optimizer,
        adamw: torch.optim.Optimizer,
        convolutions: Sequence[tuple[nn.Parameter, nn.Parameter]] = (),
    ) -> None:
        self.parts = (muon, adamw)
        self.convolutions = tuple(convolutions)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._link()

    def _link(self) -> None:
        # The very dictionaries of the parts: whoever sets a learning rate here sets it there.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for weight, matrix in self.convolutions:
            matrix.grad = None if weight.grad is None else weight.grad.reshape(matrix.shape)
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters."""
        super().zero_grad(set_to_none)
        for weight, _ in self.convolutions:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """`muon` and `adamw`, each a state dict."""
        return {"muon": self.parts[0].state_dict(), "adamw": self.parts[1].state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for part, name in zip(self.parts, ("muon", "adamw"), strict=True):
            part.load_state_dict(state_dict[name])
        self._link()


def build_optimizer(model: nn.Module, settings: OptimizerRecipe, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser that a recipe names.

    Args:
        model: network whose parameters are trained.
        settings: name, learning rate, momenta and weight decay.
        device: where the network is.
    """

    def adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        fused = device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)

    trained = [value for value in model.parameters() if value.requires_grad]
    if settings.name == "adamw":
        return adamw(decay_groups(trained, settings.weight_decay))
    matrices = hidden_matrices(model)
    kernels = hidden_convolutions(model) if settings.convolutions else []
    if not all(weight.is_contiguous() for weight in kernels):
        raise InvalidInputError("optimizer.convolutions needs contiguous weights; set channels_last to false")
    # torch's Muon takes matrices only.
    pairs = [(weight, nn.Parameter(weight.detach().view(len(weight), -1))) for weight in kernels]
    known = {id(value) for value in [*matrices, *kernels]}
    rest = [value for value in trained if id(value) not in known]
    muon = torch.optim.Muon(
        [*matrices, *(matrix for _, matrix in pairs)],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonWithAdamW(muon, adamw(decay_groups(rest, settings.weight_decay)), pairs)
