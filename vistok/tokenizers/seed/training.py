"""The two training stages of the tokenizer: what learns, and how (arXiv 2310.01218, section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["STAGES", "SEEDStage"]


@dataclass(frozen=True)
class SEEDStage:
    """Hyper-parameters of a training stage, as published.

    Attributes:
        init_rate, min_rate, warmup_rate: learning rates of AdamW. It rises from the last to the first over
            `warmup_steps` steps of epoch 0, and from epoch 1 on falls once an epoch as a cosine to the second.
        batch_size: pictures a step on each of 64 GPUs.
        epochs: passes over the data.
        prefixes: parameters that learn begin with one of these.
    """

    init_rate: float
    min_rate: float
    warmup_rate: float
    batch_size: int
    epochs: int
    prefixes: tuple[str, ...]
    warmup_steps: int = 2000
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)

    def learning_rate(self, epoch: int, step: int) -> float:
        """The rate at a step (from 0) of an epoch (from 0)."""
        if epoch == 0:
            rise = min(1.0, step / max(1, self.warmup_steps))
            return self.warmup_rate + (self.init_rate - self.warmup_rate) * rise
        return self.min_rate + 0.5 * (self.init_rate - self.min_rate) * (1 + math.cos(math.pi * epoch / self.epochs))

    def prepare(self, model: nn.Module) -> torch.optim.AdamW:
        """Freeze what does not learn (its dropout, too) and make the optimizer."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(self.prefixes) and not name.startswith("qformer.lm_"))
        model.train(model.training)
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                exempt = parameter.ndim < 2 or "bias" in name or "norm" in name
                (plain if exempt else decayed).append(parameter)
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.init_rate, betas=self.betas)


STAGES = {
    "contrastive": SEEDStage(
        3e-5, 3e-6, 3e-7, 64, 10, ("qformer.", "query_tokens", "vision_norm.", "text_proj.", "vision_proj.", "temp")
    ),
    "codebook": SEEDStage(
        1e-4,
        1e-5,
        1e-6,
        256,
        500,
        (
            "codebook",
            "encode_task_layer.",
            "decode_task_layer.",
            "reconstruction_",
            "image_",
            "reverse_",
            "embedding_proj.",
        ),
    ),
}
