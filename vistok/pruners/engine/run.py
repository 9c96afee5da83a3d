"""The run itself: hooks on a stock transformers model.

Shape letters: B batch, S tokens now, q new tokens of this call, n cached columns of a level, D width.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from vistok.attach import Handle
from vistok.errors import InvalidInputError, InvalidOutputError
from vistok.pruners.cost import DecoderShape
from vistok.pruners.engine.flow import Flow, gather_rows
from vistok.pruners.engine.rows import AttentionRows
from vistok.pruners.engine.visuals import VisualFinder
from vistok.pruners.hosts import Host
from vistok.pruners.records import Level, PrunedCache, Record, held_length, pruned_class
from vistok.pruners.report import Report, StageReport, VisualReport
from vistok.pruners.stages import Context, Selection, Span, Stage

__all__ = ["Engine"]

_FULL_ATTENTION = "full_attention"


class Engine(VisualFinder, AttentionRows):
    """Hooks of one pruner on one model."""

    def __init__(self, pruner: Any, host: Host, stages: list[Stage]) -> None:
        super().__init__(host, stages)
        self.pruner = pruner
        self.early = [stage for stage in stages if stage.place != "decoder"]
        self.late = {stage.layer: stage for stage in stages if stage.place == "decoder" and stage.layer is not None}
        self.flow: Flow | None = None
        self.finished: Flow | None = None
        self.labels: Tensor | None = None
        self.remembered: set[int] = set()
        self.warned = False
        self.check()

    def check(self) -> None:
        """Refuse models and stages that cannot work."""
        host = self.host
        depth = len(host.layers)
        types = getattr(host.text_config, "layer_types", None)
        window = getattr(host.text_config, "sliding_window", None)
        if any(one != _FULL_ATTENTION for one in types or ()) or (types is None and window is not None):
            raise InvalidInputError(
                f"the decoder of {type(host.model).__name__} has layers with sliding windows; pruning supports full "
                "attention in every layer"
            )
        if getattr(host.model, "tp_size", None) not in (None, 1):
            raise InvalidInputError("tensor-parallel models cannot be pruned; load the model without tp_plan")
        # Parts kept on the CPU or on disk are brought to one device before they run, so they may be pruned.
        placed = {str(one) for one in (getattr(host.model, "hf_device_map", None) or {}).values()} - {"cpu", "disk"}
        if len(placed) > 1:
            raise InvalidInputError(
                f"the model is spread over several devices ({', '.join(sorted(placed))}), and what pruning shortens "
                "must stay together; load it on one (device_map={'': device}), parts of it offloaded if need be"
            )
        for layer, stage in self.late.items():
            if not isinstance(layer, int) or layer >= depth:
                raise InvalidInputError(
                    f"{stage.name or 'a stage'} prunes before decoder layer {layer}, and {type(host.model).__name__} "
                    f"has layers 0..{depth - 1}"
                )
            if layer < host.first_decoder_layer:
                raise InvalidInputError(
                    f"{stage.name or 'a stage'} prunes before decoder layer {layer}, and {host.name} adds tower "
                    f"features again after its first {host.first_decoder_layer} layers; prune before layer "
                    f"{host.first_decoder_layer} or later, or before the language model"
                )
        from transformers.masking_utils import create_causal_mask

        if "layer_idx" not in inspect.signature(create_causal_mask).parameters:
            raise InvalidInputError(
                "this transformers cannot make masks for layers of different lengths; upgrade it to 5.24 or newer"
            )
        for stage in self.stages:
            if stage.positions == "renumber" and host.several_axes:
                raise InvalidInputError(
                    f"{host.name} has rotary positions on three axes, which cannot be renumbered; use positions='keep'"
                )

    # ---------------------------------------------------------------------------------------------------------- hooks

    def install(self, handle: Handle) -> None:
        """Register every hook."""
        host = self.host
        for kind in host.kinds:
            self.listen(handle, kind)
        for number, stage in enumerate(self.stages):
            if stage.scorer is not None:
                stage.scorer.watch(host, handle, self)
            if stage.place == "tower" and stage.scorer is not None and stage.scorer.needs_tower:
                self.tap(handle, number, stage)
        handle.hook(host.model.register_forward_pre_hook(self.before_model, with_kwargs=True))
        handle.hook(host.model.register_forward_hook(self.after_model, with_kwargs=True))
        handle.hook(host.core.register_forward_pre_hook(self.before_core, with_kwargs=True))
        handle.hook(host.language_model.register_forward_pre_hook(self.before_language, with_kwargs=True))
        handle.hook(host.language_model.register_forward_hook(self.after_language, with_kwargs=True))
        first = min([*self.late, *self.remembered], default=len(host.layers))
        for index in range(first, len(host.layers)):
            hook = functools.partial(self.before_layer, index)
            handle.hook(host.layers[index].register_forward_pre_hook(hook, with_kwargs=True))

    def remember(self, layer: int) -> None:
        """Keep the input of a decoder layer during prefill, for scores by that layer's attention."""
        self.remembered.add(layer)

    def before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Take the labels away: they fit the unpruned sequence. `after_model` makes the loss."""
        self.labels = kwargs.get("labels")
        self.finished = None
        if self.labels is None:
            return None
        return args, {**kwargs, "labels": None}

    def after_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """The loss of the pruned sequence: labels go with their tokens."""
        labels, self.labels = self.labels, None
        if labels is None:
            return None
        if isinstance(output, tuple):
            raise InvalidInputError("labels with a pruner need return_dict=True; leave return_dict out")
        flow = self.finished
        if flow is not None and flow.source is not None:
            source = flow.source.to(labels.device)
            labels = labels.gather(1, source.clamp_min(0)).masked_fill(source < 0, -100)
        known = inspect.signature(module.forward).parameters
        extra = {name: value for name, value in kwargs.items() if name not in known}
        vocabulary = self.host.text_config.vocab_size
        output["loss"] = self.host.model.loss_function(
            logits=output.logits, labels=labels, vocab_size=vocabulary, **extra
        )
        return output

    def before_core(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note the inputs of this pass, from which the places of visual tokens are read."""
        given = dict(kwargs)
        if args:
            given |= dict(zip(inspect.signature(module.forward).parameters, args))
        self.inputs = given
        self.recent = []
        self.flow = None

    # -------------------------------------------------------------------------------------- before the language model

    def before_language(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Prune before the first layer, or prepare decoding on a pruned cache."""
        inputs, self.inputs = self.inputs, {}
        embeds = kwargs.get("inputs_embeds")
        if not inputs or embeds is None:
            return None
        self.inputs = inputs
        spans = self.locate(embeds)
        self.inputs = {}
        cache_name = "past_key_values" if "past_key_values" in kwargs else "cache"
        cache = kwargs.get(cache_name)
        record = getattr(cache, "vistok_record", None)
        if not spans and record is None:
            if embeds.shape[1] > 1 and held_length(cache, 0) == 0 and not self.warned:
                self.warned = True
                warnings.warn("there is no image in the prompt, so nothing is pruned", stacklevel=2)
            return None
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise InvalidInputError(
                "a pruner needs the plain 2-D attention mask [B, tokens]; masks prepared for compiled or static caches "
                "do not fit layers of different lengths. Use the default dynamic cache"
            )
        if cache is not None and any(getattr(layer, "is_compileable", False) for layer in cache.layers):
            raise InvalidInputError(
                "static caches give every layer the same length, which pruning changes; use the default dynamic cache "
                "(leave cache_implementation out)"
            )
        use_cache = kwargs.get("use_cache")
        if cache is None and (getattr(module.config, "use_cache", False) if use_cache is None else use_cache):
            # The model would make one later, where what is removed could not be noted on it.
            from transformers import DynamicCache

            cache = DynamicCache(config=module.config)
            kwargs = {**kwargs, cache_name: cache}
        flow = self.start(embeds, cache, cache_name, record, mask, kwargs.get("position_ids"), spans)
        self.flow = flow
        given = kwargs.get("attention_mask")
        if flow.pruning:
            kwargs = self.prune_early(flow, kwargs, embeds)
        level = flow.record.levels[0]
        if not level.pruned:
            if cache is None and given is None:
                # Without cache and mask the library would read gaps in position ids as packed sequences.
                kwargs = {**kwargs, "attention_mask": self.columns(flow, 0, always=True)}
            return args, kwargs
        kwargs = {**kwargs, "attention_mask": self.columns(flow, 0, always=cache is None)}
        if not flow.pruning and flow.base_positions is not None:
            kwargs["position_ids"] = flow.base_positions - level.shift[:, None]
        return args, kwargs

    def start(
        self,
        embeds: Tensor,
        cache: Any,
        cache_name: str,
        record: Record | None,
        mask: Tensor | None,
        positions: Tensor | None,
        spans: list[Span],
    ) -> Flow:
        """The state at the entry of the language model."""
        batch, length = embeds.shape[:2]
        device = embeds.device
        seen = cache.get_seq_length() if cache is not None else 0
        if mask is not None:
            mask = mask.to(device).bool()
        if record is None:
            valid = torch.ones(batch, seen, dtype=torch.bool, device=device) if mask is None else mask[:, :seen]
            zero = torch.zeros(batch, dtype=torch.int64, device=device)
            ragged = mask is not None and not bool(valid.all())
            firsts = [0, *sorted(self.late)]
            record = Record([Level(first, valid, zero, zero, ragged=ragged) for first in firsts], seen)
        else:
            record.repeated(batch)
            self.follow(record, cache, mask, spans)
        if positions is None and not self.host.several_axes:
            positions = torch.arange(seen, seen + length, device=device)[None]
        base = None
        if not self.host.several_axes:
            assert positions is not None
            base = positions.expand(batch, -1)
        flow = Flow(record, cache, cache_name, base, mask, seen, length, spans)
        if spans:
            valid = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask[:, -length:]
            flow.valid = valid
            flow.lengths = [length] * batch if mask is None else valid.sum(dim=1).tolist()
            flow.unpruned = list(flow.lengths)
            flow.positions = torch.arange(seen, seen + length, device=device)[None] if positions is None else positions
            if self.host.several_axes and flow.positions.ndim == 2:
                flow.positions = flow.positions[None].expand(3, batch, -1)
            flow.removed_before = torch.zeros(batch, length, dtype=torch.int64, device=device)
            flow.source = torch.arange(length, device=device).expand(batch, -1)
        return flow

    def follow(self, record: Record, cache: Any, mask: Tensor | None, spans: list[Span]) -> None:
        """Bring a record up to the columns that the cache gained or lost since."""
        gained = held_length(cache, 0) - record.levels[0].valid.shape[1]
        if gained < 0:
            for level in record.levels:
                level.valid = level.valid[:, :gained]
            record.full += gained
        elif gained > 0 and spans:
            for level in record.levels:
                rows = level.valid.shape[0]
                new = level.valid.new_ones(rows, gained)
                if mask is not None:
                    new = mask[:, record.full : record.full + gained]
                level.extend(new)
            record.full += gained

    def columns(self, flow: Flow, number: int, always: bool = False) -> Tensor | None:
        """The 2-D mask of all columns of a level, this call's included; None where all are real tokens."""
        level = flow.record.levels[number]
        if flow.pruning:
            return level.valid if always or level.ragged else None
        rows = level.valid.shape[0]
        total = held_length(flow.cache, level.first_layer)
        new = total - level.valid.shape[1]
        if flow.mask is not None:
            rest = flow.mask[:, flow.record.full :]
        else:
            rest = level.valid.new_ones(rows, new + flow.new)
        if not level.ragged and (flow.mask is None or flow.new == 1 or bool(rest.all())):
            return torch.cat([level.valid, rest], dim=1) if always else None
        return torch.cat([level.valid, rest], dim=1)

    def prune_early(self, flow: Flow, kwargs: dict[str, Any], embeds: Tensor) -> dict[str, Any]:
        """Stages before the language model."""
        changed = False
        for number, stage in enumerate(self.early):
            context = self.context(flow, embeds, stage, None)
            context.number = number
            if stage.scorer is not None and stage.scorer.needs_tower:
                context.readings = self.readings(flow, number, stage)
            selections = self.choose(flow, stage, context)
            if all(len(one.kept) == len(span) and one.values is None for one, span in zip(selections, flow.spans)):
                self.note_stage(flow, stage, selections, context)
                continue
            changed = True
            embeds = self.apply(flow, stage, selections, context, embeds)
        for span in flow.spans:
            span.first = len(span)  # stages inside the decoder count from what entered it
        level = flow.record.levels[0]
        assert flow.valid is not None
        self.settle(flow, 0)
        if not changed:
            return kwargs
        level.pruned = True
        kwargs = {**kwargs, "inputs_embeds": embeds, "position_ids": flow.positions}
        places = kwargs.get("visual_pos_masks")
        if places is not None and flow.source is not None:
            numbers = places.flatten().cumsum(0).view_as(places) - 1
            source = flow.source.to(places.device).clamp_min(0)
            alive = places.gather(1, source) & flow.valid.to(places.device)
            chosen = numbers.gather(1, source)[alive]
            kwargs["visual_pos_masks"] = alive
            kwargs["deepstack_visual_embeds"] = [
                one[chosen.to(one.device)] for one in kwargs["deepstack_visual_embeds"]
            ]
        return kwargs

    # ------------------------------------------------------------------------------------------- shared by all places

    def context(self, flow: Flow, hidden: Tensor, stage: Stage, layer: int | None) -> Context:
        assert flow.valid is not None
        return Context(flow.spans, hidden, flow.valid, self, layer, flow.carried)

    @torch.no_grad()
    def choose(self, flow: Flow, stage: Stage, context: Context) -> list[Selection]:
        """Selections of a stage; its scores are noted for the report and checked at the end of the pass."""
        selections, scores = stage.select(context)
        context.terms["score"] = scores
        if scores:
            flow.finite.append(torch.stack([score.isfinite().all() for score in scores]).all())
        starts = accumulate((len(span) for span in flow.spans), initial=0)
        kept = torch.cat([one.kept + start for one, start in zip(selections, starts)])
        flow.ascending.append((kept.diff() > 0).all() & ((kept >= 0) & (kept < sum(map(len, flow.spans)))).all())
        return selections

    def note_stage(self, flow: Flow, stage: Stage, selections: list[Selection], context: Context) -> None:
        visuals = []
        scores = context.terms.pop("score", [])
        for number, (span, selection) in enumerate(zip(flow.spans, selections)):
            visuals.append(
                VisualReport(
                    span.sample,
                    span.visual.kind,
                    span.visual.tokens,
                    self.identity(span, selection),
                    span.tokens,
                    scores[number] if scores else None,
                    {name: values[number] for name, values in context.terms.items()},
                    span.visual,
                )
            )
        flow.stages.append(StageReport(stage.name, stage.place, stage.layer, visuals))

    @staticmethod
    def identity(span: Span, selection: Selection) -> Tensor:
        """Which first tokens the kept ones stand for."""
        return span.tokens.index_select(0, selection.kept) if selection.tokens is None else selection.tokens

    def apply(self, flow: Flow, stage: Stage, selections: list[Selection], context: Context, hidden: Tensor) -> Tensor:
        """Drop what was not selected, from hidden states [B, S, D] and everything that goes with them."""
        self.note_stage(flow, stage, selections, context)
        assert flow.valid is not None
        assert flow.removed_before is not None
        assert flow.source is not None
        keep = flow.valid.clone()
        lengths = list(flow.lengths)
        replaced = any(selection.values is not None for selection in selections)
        if replaced:
            hidden = hidden.clone()
        for span, selection in zip(flow.spans, selections):
            keep[span.sample, span.index] = False
            places = span.index.index_select(0, selection.kept)
            keep[span.sample, places] = True
            lengths[span.sample] -= len(span) - len(places)
            if selection.values is not None:
                hidden[span.sample, places] = selection.values.to(hidden.dtype)
        dropped = flow.valid & ~keep
        size, longest = keep.shape[1], max(lengths)
        order = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)[:, size - longest :]
        valid = keep.gather(1, order)
        ranks = keep.to(torch.int64).cumsum(dim=1) - 1
        flow.spans = [
            Span(
                span.sample,
                span.visual,
                self.identity(span, selection),
                ranks[span.sample].index_select(0, span.index.index_select(0, selection.kept))
                + (longest - lengths[span.sample]),
                span.first,
            )
            for span, selection in zip(flow.spans, selections)
        ]
        flow.removed_before = (flow.removed_before + dropped.to(torch.int64).cumsum(dim=1)).gather(1, order)
        flow.source = flow.source.gather(1, order).masked_fill(~valid, -1)
        flow.carried = {name: values.gather(1, order) * valid for name, values in flow.carried.items()}
        flow.valid, flow.lengths, flow.order = valid, lengths, order
        renumber = stage.positions == "renumber" or (stage.positions == "auto" and not self.host.several_axes)
        removed_now = dropped.sum(dim=1)
        for level in flow.record.levels[flow.level :]:
            level.removed = level.removed + removed_now
            level.pruned = True
            if renumber:
                level.shift, level.moved = level.removed, level.moved or flow.level > 0
        if renumber:
            assert flow.base_positions is not None
            level = flow.record.levels[flow.level]
            earlier = level.removed - flow.removed_before[:, -1] if longest else level.removed
            base = flow.base_positions.gather(1, flow.source.clamp_min(0))
            flow.positions = (base - flow.removed_before - earlier[:, None]).masked_fill(~valid, 0)
        elif flow.positions is not None:
            positions = flow.positions.expand(*flow.positions.shape[:-2], *keep.shape)
            flow.positions = positions.gather(-1, order.expand_as(positions[..., :longest]))
        return gather_rows(hidden, order)

    def settle(self, flow: Flow, number: int) -> None:
        """The tokens of this call are now final for a level: add its columns."""
        assert flow.valid is not None
        level = flow.record.levels[number]
        level.extend(flow.valid)
        level.ragged = level.ragged or len(set(flow.lengths)) > 1 or max(flow.lengths) < flow.valid.shape[1]
        visual = [0] * len(flow.lengths)
        for span in flow.spans:
            visual[span.sample] += len(span)
        flow.counts.append((level.first_layer, list(flow.lengths), visual, flow.valid.shape[1]))

    # --------------------------------------------------------------------------------------------- inside the decoder

    def before_layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Prune before this layer, or give it the mask and the rotary tables of its level."""
        flow = self.flow
        if flow is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if index in self.late:
            number = 1 + sorted(self.late).index(index)
            flow.level = number
            if flow.pruning:
                hidden = self.prune_late(flow, self.late[index], number, hidden, kwargs)
        number = flow.level
        if flow.record.levels[number].pruned and number:
            if number not in flow.prepared:
                flow.prepared[number] = self.prepare(flow, number, hidden, kwargs)
            kwargs = {**kwargs, **flow.prepared[number]}
        if index in self.remembered and flow.pruning:
            flow.inputs[index] = (hidden, kwargs["position_embeddings"])
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def prune_late(self, flow: Flow, stage: Stage, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """One stage inside the decoder."""
        flow.tables = flow.tables or kwargs["position_embeddings"]
        context = self.context(flow, hidden, stage, stage.layer)
        selections = self.choose(flow, stage, context)
        flow.inputs = {}
        if all(len(one.kept) == len(span) and one.values is None for one, span in zip(selections, flow.spans)):
            self.note_stage(flow, stage, selections, context)
            flow.record.levels[number].pruned = flow.record.levels[number - 1].pruned
        else:
            size = hidden.shape[1]
            hidden = self.apply(flow, stage, selections, context, hidden)
            renumber = stage.positions == "renumber" or (stage.positions == "auto" and not self.host.several_axes)
            if renumber:
                assert flow.positions is not None
                flow.tables = self.host.rotary_tables(hidden, flow.positions)
            else:
                cos, sin = (one.expand(hidden.shape[0], size, -1) for one in flow.tables)
                flow.tables = gather_rows(cos, flow.order), gather_rows(sin, flow.order)
        self.settle(flow, number)
        return hidden

    def prepare(self, flow: Flow, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of all layers of a level: rotary tables, mask, position ids."""
        from transformers.masking_utils import create_causal_mask

        level = flow.record.levels[number]
        given: dict[str, Any] = {}
        if flow.pruning:
            given["position_embeddings"] = flow.tables
            positions = flow.positions
            if positions is not None and positions.ndim == 3:
                positions = positions[0] if positions.shape[0] == 4 else None
        else:
            positions = kwargs.get("position_ids")
            if flow.base_positions is not None:
                positions = flow.base_positions - level.shift[:, None]
                if level.moved:
                    given["position_embeddings"] = self.host.rotary_tables(hidden, positions)
        if kwargs.get("position_ids") is not None:
            given["position_ids"] = positions
        arguments = {
            "config": self.host.language_model.config,
            "inputs_embeds": hidden,
            "attention_mask": self.columns(flow, number, always=flow.cache is None),
            flow.cache_name if flow.cache_name == "cache" else "past_key_values": flow.cache,
            "position_ids": None,
            "layer_idx": level.first_layer,
        }
        given["attention_mask"] = create_causal_mask(**arguments)
        return given

    # ----------------------------------------------------------------------------------------------------- afterwards

    def after_language(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Store what was removed with the cache, and write the report."""
        flow, self.flow = self.flow, None
        if flow is None or not flow.pruning:
            return
        self.finished = flow
        if flow.finite and not bool(torch.stack(flow.finite).all()):
            raise InvalidOutputError(
                "the scores of visual tokens hold NaN or infinity; check the model's weights and dtype"
            )
        if flow.ascending and not bool(torch.stack(flow.ascending).all()):
            raise InvalidOutputError(
                "a stage chose tokens out of order, twice, or that are not there; selectors return int64 positions "
                "inside each visual, ascending"
            )
        assert flow.valid is not None
        assert flow.source is not None
        flow.record.full = flow.covered + flow.new
        if flow.cache is not None:
            flow.cache.vistok_record = flow.record
            if flow.record.levels[0].pruned and not isinstance(flow.cache, PrunedCache):
                flow.cache.__class__ = pruned_class(type(flow.cache))
        self.pruner.last_report = self.report(flow)
        for span in flow.spans:
            span.visual.capture = None  # the report must not keep pixels and tower features alive
        self.recent = []

    def report(self, flow: Flow) -> Report:
        shape = DecoderShape.from_config(self.host.text_config)
        bounds = [count[0] for count in flow.counts] + [shape.layers]
        tokens: list[list[int]] = [[] for _ in flow.unpruned]
        visual: list[list[int]] = [[] for _ in flow.unpruned]
        held: list[int] = []
        for (first, lengths, visuals, width), last in zip(flow.counts, bounds[1:]):
            held += [width] * (last - first)
            for row in range(len(lengths)):
                tokens[row] += [lengths[row]] * (last - first)
                visual[row] += [visuals[row]] * (last - first)
        unpruned_visual = [0] * len(flow.unpruned)
        for one in flow.stages[0].visuals:
            unpruned_visual[one.sample] += one.tokens
        assert flow.source is not None
        dtype = next(self.host.layers[0].self_attn.k_proj.parameters()).dtype
        return Report(
            flow.stages,
            tokens,
            visual,
            flow.unpruned,
            unpruned_visual,
            held,
            flow.source,
            shape,
            dtype.itemsize if dtype.is_floating_point else 2,
        )
