"""Asking a vision-language model about pictures, pruned and not: what it says, and what that costs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vistok.errors import InvalidInputError
from vistok.metrics.pruning.methods import Method, Target, check_method, make_pruner
from vistok.pruners import Pruner, Report, find_host
from vistok.pruners.cost import DecoderShape, kv_bytes, prefill_flops

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["UNPRUNED", "Answer", "Asker", "load_lvlm"]

UNPRUNED = "unpruned"


def load_lvlm(name: str, *, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """A transformers model for pictures and text, and its processor.

    Args:
        name: a shipped name, a folder or a Hub id.
        device: `"cpu"`, `"cuda"` ...; default CPU.
        dtype: `"float32"`, `"bfloat16"`, `"float16"` or `"auto"` (as stored); default float32 on a CPU, else auto.

    Raises:
        InvalidInputError: if it cannot be loaded, its family has no pruner host, or the machine lacks the device.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vistok.hub import ASSETS, load

    if dtype not in (None, "float32", "bfloat16", "float16", "auto"):
        raise InvalidInputError(f"dtype is float32, bfloat16, float16 or auto, got {dtype!r}")
    try:
        target = torch.device(device or "cpu")
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidInputError(f"device {device!r} cannot be used here; use cpu") from error
    wanted = dtype or ("float32" if target.type == "cpu" else "auto")
    shipped = ASSETS / name
    source = str(shipped) if name and "/" not in name and shipped.is_dir() else name
    try:
        given = None if wanted == "auto" else getattr(torch, wanted)
        if (Path(source) / "projector" / "config.json").is_file():  # a LLaVA with a TokenPacker
            model = load(source, dtype=given)
        else:
            model = AutoModelForImageTextToText.from_pretrained(source, dtype=given or "auto")
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise InvalidInputError(
            f"{name} is no transformers model for pictures and text that can be loaded ({type(error).__name__}: "
            f"{reason}); give a folder or a Hub id that holds model and processor, such as llava-hf/llava-1.5-7b-hf"
        ) from error
    find_host(model)
    return model.to(target).eval(), processor


@dataclass(frozen=True)
class Answer:
    """An answer, and what it cost.

    Attributes:
        text: what the model said.
        prefill_seconds: from the processed inputs to the first token's logits, vision tower included.
        decode_seconds: the remaining tokens.
        new_tokens: how many were generated.
        prompt_tokens: tokens of the prompt before pruning.
        visual_tokens: of these, the visual ones.
        kept_tokens: visual tokens after the last stage.
        average_kept: share of visual tokens that a decoder layer sees on average.
        flops: operations of the decoder's prefill.
        kv_bytes: bytes of the prompt's keys and values, without padding.
        notes: warnings of the method.
    """

    text: str
    prefill_seconds: float
    decode_seconds: float
    new_tokens: int
    prompt_tokens: int
    visual_tokens: int
    kept_tokens: int
    average_kept: float
    flops: float
    kv_bytes: int
    notes: tuple[str, ...] = ()


class _Clock:
    """A logits processor that changes nothing and notes when the first logits are there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.first = device, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if not self.first:
            self.first = self.now()
        return scores


class Asker:
    """Asks a model about pictures, with and without pruning, greedily.

    Args:
        model, processor: as `load_lvlm` returns them.
        max_new_tokens: longest answer.
        instruction: text after every question, such as "Answer with one word."
        own: pruners by names of one's own, beside `METHODS`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_new_tokens: int = 16,
        instruction: str = "",
        own: Mapping[str, Method] | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise InvalidInputError(f"max_new_tokens is a number from 1 on, got {max_new_tokens}")
        self.model, self.processor = model, processor
        self.max_new_tokens, self.instruction, self.own = max_new_tokens, instruction, dict(own or {})
        self.host = find_host(model)
        self.shape = DecoderShape.from_config(model.config)
        self.last_report: Report | None = None
        self._views: dict[int, int] = {}
        self._pruners: dict[tuple, Pruner] = {}

    def prompt(self, question: str) -> str:
        """The text of a prompt: by the model's chat template, or the image and then the question."""
        text = f"{question} {self.instruction}".strip()
        if not text:
            raise InvalidInputError("the question is empty")
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        return f"{self.processor.image_token}\n{text}"

    def inputs(self, picture: Image.Image, question: str) -> dict[str, Any]:
        """The processed prompt of one question."""
        return self.batch([(picture, question)])

    def batch(self, asked: Sequence[tuple[Image.Image, str]]) -> dict[str, Any]:
        """The processed prompts of several questions, padded on the left."""
        options = {"padding": True, "padding_side": "left"} if len(asked) > 1 else {}
        batch = self.processor(
            images=[picture for picture, _ in asked],
            text=[self.prompt(question) for _, question in asked],
            return_tensors="pt",
            **options,
        ).to(self.model.device)
        return {
            name: value.to(self.model.dtype) if torch.is_floating_point(value) else value
            for name, value in batch.items()
            if isinstance(value, torch.Tensor)
        }

    def pruner(self, inputs: Mapping[str, Any], method: str, keep_ratio: float | None = None) -> Pruner:
        """The pruner of a method for this prompt.

        Raises:
            InvalidInputError: see `make_pruner`.
        """
        counts = self.visual_tokens(inputs)
        visual = counts[0]
        if not visual:
            raise InvalidInputError("the prompt has no image tokens: the processor and the model do not fit together")
        if len(set(counts)) > 1:
            raise InvalidInputError(f"the pictures of a batch must have the same number of tokens, got {counts}")
        if (method, keep_ratio, visual) not in self._pruners:
            needs_view = method in self.own or {"visionzip", "pooling"} & set(check_method(method))
            view = self.view_tokens(inputs, visual) if needs_view else visual
            target = Target(keep_ratio, self.shape.layers, max(1, self.host.first_decoder_layer), visual, view)
            self._pruners[method, keep_ratio, visual] = make_pruner(method, target, self.own)
        return self._pruners[method, keep_ratio, visual]

    def visual_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        """Image placeholders of every prompt."""
        return (inputs["input_ids"] == self.host.token_ids("image")).sum(dim=1).tolist()

    def view_tokens(self, inputs: Mapping[str, Any], visual: int) -> int:
        """Tokens of one view of the image; found by one pass of the model."""
        if visual not in self._views:
            everything = make_pruner("random", Target(1.0, self.shape.layers, 1, visual, visual))
            with everything.attached(self.model), torch.no_grad():
                self.model(**inputs, logits_to_keep=1)
            assert everything.last_report is not None
            rows, columns = everything.last_report.stages[0].visuals[0].visual.grid
            self._views[visual] = rows * columns
        return self._views[visual]

    def ask(
        self, picture: Image.Image, question: str, method: str = UNPRUNED, keep_ratio: float | None = None
    ) -> Answer:
        """One answer. `last_report` holds what the pruner did, None without one."""
        return self.ask_all([(picture, question)], method, keep_ratio)[0]

    def ask_all(
        self, asked: Sequence[tuple[Image.Image, str]], method: str = UNPRUNED, keep_ratio: float | None = None
    ) -> list[Answer]:
        """Answers to several questions in one batch; pictures of differing numbers of tokens are asked one by one."""
        inputs = self.batch(asked)
        if len(set(self.visual_tokens(inputs))) == 1:
            return self.answers(inputs, method, keep_ratio)
        return [self.answers(self.batch([one]), method, keep_ratio)[0] for one in asked]

    def answer(self, inputs: Mapping[str, Any], method: str = UNPRUNED, keep_ratio: float | None = None) -> Answer:
        """The answer to one processed prompt."""
        return self.answers(inputs, method, keep_ratio)[0]

    def answers(
        self, inputs: Mapping[str, Any], method: str = UNPRUNED, keep_ratio: float | None = None
    ) -> list[Answer]:
        """The answers to a batch of processed prompts; times are each prompt's share of the batch."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            if method == UNPRUNED:
                self.last_report = None
                rows, prefill, decode = self._generate(inputs)
            else:
                pruner = self.pruner(inputs, method, keep_ratio)
                with pruner.attached(self.model):
                    rows, prefill, decode = self._generate(inputs)
                self.last_report = pruner.last_report
        notes = tuple(dict.fromkeys(str(one.message) for one in caught))
        return [self._costs(inputs, row, ids, prefill, decode, notes) for row, ids in enumerate(rows)]

    @torch.no_grad()
    def _generate(self, inputs: Mapping[str, Any]) -> tuple[list[list[int]], float, float]:
        clock = _Clock(self.model.device)
        tokenizer = self.processor.tokenizer
        end = tokenizer.eos_token_id
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        begun = clock.now()
        output = self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=padding,
            logits_processor=[clock],
        )
        done = clock.now()
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        # A row that ended before the others is filled up with padding.
        ended = [row[: row.index(end) + 1] if end in row else row for row in rows]
        return ended, (clock.first - begun) / len(rows), (done - clock.first) / len(rows)

    def _costs(
        self,
        inputs: Mapping[str, Any],
        row: int,
        ids: list[int],
        prefill: float,
        decode: float,
        notes: tuple[str, ...],
    ) -> Answer:
        mask = inputs.get("attention_mask")
        prompt = int(inputs["input_ids"].shape[1] if mask is None else mask[row].sum())
        visual = self.visual_tokens(inputs)[row]
        report = self.last_report
        layers = [prompt] * self.shape.layers if report is None else report.tokens_per_layer[row]
        width = self.model.dtype.itemsize if report is None else report.bytes_per_value
        kept, average = visual, 1.0
        if report is not None:
            kept = sum(len(one.kept) for one in report.stages[-1].visuals if one.sample == row)
            average = sum(report.visual_per_layer[row]) / (self.shape.layers * max(1, visual))
        return Answer(
            self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip(),
            prefill,
            decode,
            len(ids),
            prompt,
            visual,
            kept,
            average,
            prefill_flops(self.shape, layers),
            kv_bytes(self.shape, layers, width),
            notes,
        )
