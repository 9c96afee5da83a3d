"""The two training stages of LLaVA-TokenPacker (section 4.1 of arXiv 2407.02392; LLaVA-1.5's recipe)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vistok.errors import InvalidInputError

from .llava import parts_of_llava
from .model import TokenPacker

__all__ = ["STAGES", "TrainingStage"]


@dataclass(frozen=True)
class TrainingStage:
    """One stage: what learns, and how.

        with packer.attached(llava):
            optimizer, scheduler = STAGES["alignment"].prepare(llava, num_steps)
            for batch in loader:
                packer.training_loss(batch)["loss"].backward()
                optimizer.step(), scheduler.step(), optimizer.zero_grad()

    Attributes:
        name: "alignment" (captions) or "instruction" (conversations).
        train_language_model: whether the language model learns beside the projector; the vision tower never does.
        learning_rate: peak rate of AdamW.
        batch_size: pictures a step, over all devices.
        warmup_ratio: share of the steps with a rising rate; then it falls as a cosine to zero.
        weight_decay: of AdamW.
        epochs: passes over the data.
        data, high_resolution_data: what the paper used.
    """

    name: str
    train_language_model: bool
    learning_rate: float
    batch_size: int
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    epochs: int = 1
    data: str = ""
    high_resolution_data: str = ""

    def prepare(
        self, model: nn.Module, num_steps: int, *, projector_learning_rate: float | None = None
    ) -> tuple[torch.optim.Optimizer, Any]:
        """Freeze and thaw the model's parts, and make optimizer and schedule.

        Args:
            model: a LLaVA that a TokenPacker is attached to (or part of).
            num_steps: optimizer steps of the whole stage.
            projector_learning_rate: another rate for the projector; None is the same for all.

        Returns:
            AdamW over what learns, and its schedule (step it after each optimizer step).

        Raises:
            InvalidInputError: if no TokenPacker is attached.
        """
        core, _ = parts_of_llava(model)
        packer = core.multi_modal_projector
        if not isinstance(packer, TokenPacker):
            raise InvalidInputError("attach a TokenPacker to this model first: packer.attach(model)")
        if num_steps < 1:
            raise InvalidInputError(f"num_steps must be at least 1; got {num_steps}")
        model.requires_grad_(False)
        packer.requires_grad_(True)
        rate = self.learning_rate if projector_learning_rate is None else projector_learning_rate
        groups: list[dict[str, Any]] = [{"params": list(packer.parameters()), "lr": rate}]
        if self.train_language_model:
            parts = [core.language_model, model.get_output_embeddings()]
            language: dict[int, nn.Parameter] = {}
            for part in parts:
                if part is not None:
                    part.requires_grad_(True)
                    language.update({id(parameter): parameter for parameter in part.parameters()})
            groups.append({"params": list(language.values()), "lr": self.learning_rate})
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
        from transformers import get_cosine_schedule_with_warmup

        warmup = math.ceil(num_steps * self.warmup_ratio)
        return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup, num_steps)


STAGES = {
    "alignment": TrainingStage(
        "alignment",
        train_language_model=False,
        learning_rate=1e-3,
        batch_size=256,
        data="CC-558K (LLaVA-1.5)",
        high_resolution_data="1.2 M pairs of Mini-Gemini",
    ),
    "instruction": TrainingStage(
        "instruction",
        train_language_model=True,
        learning_rate=2e-5,
        batch_size=128,
        data="Mix-665K (LLaVA-1.5)",
        high_resolution_data="1.5 M conversations of Mini-Gemini",
    ),
}
