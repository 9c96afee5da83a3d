"""Which visuals a call shows, where their tokens stand, and what stages read of the vision tower on the way."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from vistok.attach import Handle
from vistok.errors import InvalidInputError
from vistok.pruners.engine.flow import Flow
from vistok.pruners.hosts import Host
from vistok.pruners.hosts.base import Capture, Visual, concatenated
from vistok.pruners.stages import Span, Stage

__all__ = ["VisualFinder"]


class VisualFinder:
    """Listens to the calls that make image features, and finds the placeholders that they fill.

    Attributes:
        captures: calls whose outputs are still alive, so that features made earlier are recognised.
        capture: the call that runs now.
        recent: calls of this pass.
        inputs: arguments of this pass.
    """

    def __init__(self, host: Host, stages: list[Stage]) -> None:
        self.host, self.stages = host, stages
        self.captures: list[tuple[Any, Capture]] = []
        self.capture: Capture | None = None
        self.recent: list[Capture] = []
        self.inputs: dict[str, Any] = {}

    def listen(self, handle: Handle, kind: str) -> None:
        """Listen to the call that makes features of images or videos."""
        name = f"get_{kind}_features"
        original = getattr(self.host.core, name)

        @functools.wraps(original)
        def listening(*args: Any, **kwargs: Any) -> Any:
            if self.capture is not None:  # one kind is made through the other
                return original(*args, **kwargs)
            self.capture = capture = Capture(kind, self.host.bind(original, args, kwargs))
            try:
                output = original(*args, **kwargs)
            finally:
                self.capture = None
            if hasattr(output, "pooler_output"):
                capture.visuals = self.host.visuals(capture, output)
                for number in capture.readings:
                    capture.readings[number] = self.host.merge_patches(capture.readings[number], capture)
                self.captures = [(ref, old) for ref, old in self.captures if ref() is not None]
                self.captures.append((weakref.ref(output), capture))
                self.recent.append(capture)
            return output

        handle.replace(self.host.core, name, listening)

    def tap(self, handle: Handle, number: int, stage: Stage) -> None:
        """Reduce the attention of one tower layer to what the stage reads."""
        host, scorer = self.host, stage.scorer
        assert scorer is not None
        try:
            layer = host.tower_layer(stage.layer)
            host.tower_attention(layer)
        except AttributeError as error:
            raise InvalidInputError(
                f"{stage.name or 'this stage'} reads the attention of the vision tower, and {host.name} is not known "
                f"with the tower {type(host.tower).__name__} ({error}); use a method that acts later"
            ) from error

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.capture is None:
                return
            given = dict(kwargs)
            if args:
                given["hidden_states"] = args[0]
            with torch.no_grad():
                read = [scorer.read_tower(one) for one in host.read_attention(module, given)]
            self.capture.readings[number] = read

        handle.hook(host.tower_attention(layer).register_forward_pre_hook(before, with_kwargs=True))
        if getattr(scorer, "needs_features", False):

            def after(module: nn.Module, args: tuple, output: Any) -> None:
                if self.capture is not None:
                    self.capture.features[number] = output[0] if isinstance(output, tuple) else output

            handle.hook(host.tower_layers()[layer].register_forward_hook(after))

    def locate(self, embeds: Tensor) -> list[Span]:
        """The visuals of this call; an empty list if there are none."""
        given = self.inputs
        ids = given.get("input_ids")
        encoded = given.get("mm_encoder_outputs") or {}
        spans: list[Span] = []
        for kind in self.host.kinds:
            captures = [one for one in self.recent if one.kind == kind]
            precomputed = encoded.get(kind) if isinstance(encoded, dict) else None
            if precomputed is not None:
                captures = self.known(precomputed) or captures
            elif not captures:
                continue
            token = self.host.token_ids(kind)
            if ids is None:
                lookup = self.host.model.get_input_embeddings()
                example = lookup(torch.tensor(token, device=embeds.device))
                places = (given["inputs_embeds"] == example).all(-1)
            else:
                places = ids == token
            visuals = [visual for capture in captures[-1:] for visual in capture.visuals]
            spans += self.assign(places, visuals, captures[-1] if captures else None, kind)
        return sorted(spans, key=lambda span: (span.sample, int(span.index[0])))

    def known(self, features: Any) -> list[Capture]:
        """The call that made some features, if it was listened to, or kept what it read."""
        kept = getattr(features, "vistok_capture", None)
        if kept is not None:
            return [kept]
        alive = [(ref(), capture) for ref, capture in self.captures]
        return [capture for output, capture in alive if output is features] or [
            # Offloading rebuilds the arguments of a model on their way into it.
            capture
            for output, capture in alive
            if output is not None and _same(output.pooler_output, getattr(features, "pooler_output", None))
        ]

    def assign(self, places: Tensor, visuals: list[Visual], capture: Capture | None, kind: str) -> list[Span]:
        """Give each visual its placeholders; rows that beams repeat share their visuals."""
        rows = [row.nonzero()[:, 0] for row in places]
        if not visuals:  # features made elsewhere: every run of placeholders is one visual
            spans = []
            for sample, index in enumerate(rows):
                breaks = (index.diff() != 1).nonzero()[:, 0].add(1).tolist()
                for part in torch.tensor_split(index, breaks):
                    if len(part):
                        visual = Visual(kind, len(part), range(0), (1, len(part)), concatenated)
                        spans.append(Span(sample, visual, torch.arange(len(part), device=part.device), part))
            return spans
        tokens, total = sum(visual.tokens for visual in visuals), sum(map(len, rows))
        if total == 0:
            return []
        if total % tokens:
            raise InvalidInputError(
                f"the prompt has {total} {kind} placeholders and the {kind}s give {tokens} tokens; an image whose "
                "tokens are split over several calls cannot be pruned"
            )
        repeats = total // tokens
        spans, taken = [], 0
        for first in range(0, len(rows), repeats):
            members: list[tuple[Visual, int]] = []
            filled = 0
            while filled < len(rows[first]) and taken < len(visuals):
                members.append((visuals[taken], filled))
                filled += visuals[taken].tokens
                taken += 1
            for sample in range(first, min(first + repeats, len(rows))):
                for visual, start in members:
                    index = rows[sample][start : start + visual.tokens]
                    if len(index) != visual.tokens:
                        raise InvalidInputError(
                            f"{kind} placeholders of row {sample} do not fit its {kind}s; give every row its own"
                        )
                    spans.append(Span(sample, visual, torch.arange(visual.tokens, device=index.device), index))
        for visual in visuals:
            visual.capture = capture
        return spans

    def readings(self, flow: Flow, number: int, stage: Stage) -> list[list[Tensor]]:
        """What the stage read from the tower, view by view of every span."""
        assert stage.scorer is not None
        read: dict[int, list[Any]] = {}
        found = []
        for span in flow.spans:
            capture = span.visual.capture
            kept = None if capture is None else capture.attention.get(self.host.tower_layer(stage.layer))
            if capture is None or (kept is None and number not in capture.readings):
                raise InvalidInputError(
                    f"{stage.name or 'this stage'} reads the vision tower's attention, but the image features were "
                    "made before the pruner was attached; pass pixel_values instead of mm_encoder_outputs, or make the "
                    "features with vistok.pruners.encode_pictures"
                )
            if id(capture) not in read:
                read[id(capture)] = (
                    capture.readings[number]
                    if kept is None  # what is kept serves many pruners, and each reads it in its own way
                    else self.host.merge_patches([stage.scorer.read_tower(one) for one in kept], capture)
                )
            views = read[id(capture)]
            found.append([views[view] for view in span.visual.views])
        return found

    def tower_features(self, span: Span, stage_number: int = 0) -> Tensor | None:
        """Output [V, P, D] of the tapped tower layer for a span's views, where the stage asked for it."""
        capture = span.visual.capture
        features = None if capture is None else capture.features.get(stage_number)
        if features is None and capture is not None and capture.outputs:
            features = capture.outputs.get(self.host.tower_layer(self.stages[stage_number].layer))
        return None if features is None else features[span.visual.views.start : span.visual.views.stop]


def _same(one: Any, other: Any) -> bool:
    """Whether two features, tensors or lists of tensors, have the same values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one.to(other.device), other))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return False
