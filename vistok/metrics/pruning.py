"""What pruning does to a model on somebody's own questions: answers, accuracy, operations, cache, time.

    model, processor = load_lvlm("llava-hf/llava-1.5-7b-hf")
    asker = Asker(model, processor)
    asker.ask(picture, "What colour is the car?", "transprune", 0.25)

    report = evaluate_pruners(model, processor, load_questions("pictures"), folder="evaluation")

Every method is asked for the same *keep ratio*: the share of the visual tokens that is left after its last stage.
Methods that act inside the decoder see all tokens until then, so at one keep ratio they cost more; compare accuracy
against operations (`pareto`), not against the ratio alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
import string
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from vistok.errors import InvalidInputError, require
from vistok.files import atomic_path, open_image, write_text_atomic
from vistok.metrics.accuracy import Accuracy
from vistok.pruners import (
    DivPrune,
    FasterVLM,
    FastV,
    FoPru,
    Pruner,
    PyramidDrop,
    RandomPruner,
    Report,
    Schedule,
    Settings,
    SparseVLM,
    Stage,
    TransPrune,
    UniformPooling,
    VFlowOpt,
    VisionZip,
    find_host,
)
from vistok.pruners.cost import DecoderShape, kv_bytes, prefill_flops
from vistok.pruners.sparsevlm import SETTINGS
from vistok.pruners.stages import check_ratio
from vistok.pruners.transprune import SCHEDULES
from vistok.pruners.vflowopt import PUBLISHED

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "METHODS",
    "UNPRUNED",
    "Answer",
    "Asker",
    "Question",
    "answers_agree",
    "evaluate_pruners",
    "load_lvlm",
    "load_questions",
    "make_pruner",
    "pareto",
    "plot_pareto",
]

UNPRUNED = "unpruned"
Match = Literal["exact", "contains"]


# ------------------------------------------------------------------------------------- every method at one keep ratio
@dataclass(frozen=True)
class Target:
    """What a method is built for.

    Attributes:
        keep_ratio: share of visual tokens after its last stage; None: the authors' own setting.
        depth: decoder layers.
        first: decoder stages act before this layer or later.
        visual: visual tokens of the image.
        view: tokens of one view (tile) of it.
    """

    keep_ratio: float | None
    depth: int
    first: int
    visual: int
    view: int

    def layers(self, wanted: Sequence[int], of: int = 32) -> tuple[int, ...]:
        """Layer numbers of a decoder of `of` layers, moved into this one: distinct, ascending, inside.

        Without a keep ratio they stay as published where the decoder is deep enough.

        Raises:
            InvalidInputError: if there are fewer layers to prune before than stages.
        """
        if self.depth - self.first < len(wanted):
            raise InvalidInputError(
                f"{len(wanted)} pruning layers do not fit a decoder of {self.depth} layers that can be pruned from "
                f"layer {self.first} on; use a method that acts before the language model"
            )
        published = self.keep_ratio is None and wanted[-1] < self.depth
        placed: list[int] = []
        for number, layer in enumerate(wanted):
            least = placed[-1] + 1 if placed else self.first
            most = self.depth - (len(wanted) - number)  # room for the stages to come
            placed.append(min(most, max(least, layer if published else round(layer * self.depth / of))))
        return tuple(placed)

    def powers(self, ratios: Sequence[float]) -> tuple[float, ...]:
        """Shares of the first tokens, raised to one power so that the last is the keep ratio."""
        if self.keep_ratio is None:
            return tuple(ratios)
        power = math.log(self.keep_ratio) / math.log(ratios[-1])
        return (*(min(1.0, ratio**power) for ratio in ratios[:-1]), self.keep_ratio)


def _transprune(target: Target) -> Pruner:
    high = SCHEDULES["high"]
    prune = target.layers(high.prune)
    begin = min(prune[0], target.layers(high.accumulate[:1])[0])
    return TransPrune(Schedule(tuple(range(begin, prune[-1] + 1)), prune, target.powers(high.ratios)))


def _vflowopt(target: Target) -> Pruner:
    wanted = 0.25 if target.keep_ratio is None else target.keep_ratio
    settings = PUBLISHED[min(PUBLISHED, key=lambda budget: abs(math.log(budget / wanted)))]
    ratios = settings.ratios
    if target.keep_ratio is not None:
        power = math.log(target.keep_ratio) / math.log(math.prod(ratios))
        ratios = tuple(ratio**power for ratio in ratios)
    settings = Settings(ratios, settings.threshold, settings.cell_size, settings.entropy_weight)
    return VFlowOpt(settings, layers=target.layers((9, 18), of=28))


def _fastv(target: Target) -> Pruner:
    return FastV(*_given(target, 0.5), layer=target.layers((2,))[0])


def _pyramiddrop(target: Target) -> Pruner:
    return PyramidDrop(target.layers((8, 16, 24)), target.powers((0.5, 0.25, 0.125)))


def _sparsevlm(target: Target) -> Pruner:
    layers = [layer - 1 for layer in target.layers((3, 7, 16))]  # its own count: layers that have run
    if target.keep_ratio is None:
        return SparseVLM(192, layers=layers)
    counts, now = [], target.visual
    for share in target.powers([count / 576 for count in SETTINGS[128]]):
        # A tenth of the best 30 % of the dropped tokens comes back as clusters, which are part of the share.
        number = round((share * target.visual - 0.03 * now - 1) / 0.97)
        counts.append(max(1, min(number, now - 1)))
        now = max(counts[-1], round(share * target.visual))
    return SparseVLM(counts=counts, layers=layers)


def _visionzip(target: Target) -> Pruner:
    if target.keep_ratio is None and target.view > 64:
        return VisionZip()
    total = min(target.view, max(2, round((target.keep_ratio or 1 / 9) * target.view)))
    contextual = max(1, round(total * 10 / 64))
    return VisionZip(total - contextual, contextual)


def _pooling(target: Target) -> Pruner:
    if target.keep_ratio is None:
        return UniformPooling()
    side = max(2, round(target.view**0.5))
    shares = {stride: (-(-side // stride)) ** 2 / side**2 for stride in range(2, side + 1)}
    stride = min(shares, key=lambda one: abs(math.log(shares[one] / target.keep_ratio)))
    if not 1 / 1.5 <= shares[stride] / target.keep_ratio <= 1.5:
        kept = ", ".join(f"{share:.3g}" for share in dict.fromkeys(shares.values()))
        raise InvalidInputError(
            f"pooling averages whole cells: of {target.view} tokens it can keep the shares {kept}, none of them near "
            f"{target.keep_ratio:g}"
        )
    return UniformPooling(stride)


def _given(target: Target, default: float) -> tuple[float]:
    return (default if target.keep_ratio is None else target.keep_ratio,)


METHODS: dict[str, Callable[[Target], Pruner]] = {
    "transprune": _transprune,
    "fopru": lambda target: FoPru(*_given(target, 0.25)),
    "vflowopt": _vflowopt,
    "fastv": _fastv,
    "pyramiddrop": _pyramiddrop,
    "sparsevlm": _sparsevlm,
    "fastervlm": lambda target: FasterVLM(*_given(target, 0.25)),
    "visionzip": _visionzip,
    "divprune": lambda target: DivPrune(*_given(target, 0.25)),
    "pooling": _pooling,
    "random": lambda target: RandomPruner(*_given(target, 0.25)),
}
"""The methods by name; `make_pruner` joins several with `+`."""

_INSIDE = {"transprune", "fastv", "pyramiddrop", "sparsevlm"}


def check_method(method: str) -> list[str]:
    """The names that a method is made of.

    Raises:
        InvalidInputError: for an unknown name.
    """
    names = [name.strip().lower() for name in method.split("+")]
    for name in names:
        if name not in METHODS:
            raise InvalidInputError(f"no pruning method is called {name!r}; there are: {', '.join(METHODS)}")
    return names


def make_pruner(method: str, target: Target) -> Pruner:
    """A method, or several joined by `+`, at a keep ratio.

    Of joined methods, those before the language model and those inside the decoder get equal shares of the work: with
    one of each, either keeps the square root of the ratio.

    Args:
        method: `"transprune"` or `"fopru+transprune"`.
        target: keep ratio and sizes of model and image.

    Raises:
        InvalidInputError: for an unknown method, a ratio outside (0, 1], one that the method cannot keep, or two
            methods that act at the same place.
    """
    names = check_method(method)
    if target.keep_ratio is not None:
        check_ratio("keep_ratio", target.keep_ratio)
    before = [name for name in names if name not in _INSIDE]
    groups = len(before) + (len(before) < len(names))
    share = None if target.keep_ratio is None else target.keep_ratio ** (1 / groups)
    visual = target.visual if share is None else max(1, round(target.visual * share ** len(before)))
    parts = []
    for name in names:
        entering = visual if name in _INSIDE else target.visual
        parts.append(METHODS[name](Target(share, target.depth, target.first, entering, target.view)))
    pruner = parts[0]
    for part in parts[1:]:
        pruner = pruner + part
    return pruner


# ----------------------------------------------------------------------------------------------------------- questions
@dataclass(frozen=True)
class Question:
    """One question about a picture.

    Attributes:
        image: file of the picture.
        question: what is asked.
        answers: the answers that count as right.
    """

    image: Path
    question: str
    answers: tuple[str, ...]


def load_questions(folder: str | Path, questions: str | Path | None = None, limit: int | None = None) -> list[Question]:
    """Questions about the pictures of a folder.

    Args:
        folder: where the pictures are.
        questions: JSON lines with `image` (path inside the folder), `question`, and `answer` (a text, a number, or a
            list of accepted ones); default `questions.jsonl` in the folder.
        limit: read only so many.

    Raises:
        InvalidInputError: for a missing file or picture, or a bad line, by its number.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidInputError(f"{folder} is no folder; give one with pictures and a questions.jsonl")
    file = Path(questions) if questions is not None else folder / "questions.jsonl"
    if not file.is_file():
        raise InvalidInputError(
            f"no questions at {file}; expected JSON lines such as "
            '{"image": "car.png", "question": "What colour is the car?", "answer": "red"}'
        )
    found: list[Question] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{file} is not UTF-8 text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if limit is not None and len(found) == limit:
            break
        found.append(_question(line, f"{file}, line {number}", folder))
    if not found:
        raise InvalidInputError(f"{file} holds no questions")
    return found


def _question(line: str, where: str, folder: Path) -> Question:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{where}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InvalidInputError(f"{where}: expected an object with image, question and answer")
    for name in ("image", "question"):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            raise InvalidInputError(f"{where}: {name!r} must be a text, got {fields.get(name)!r}")
    answers = fields.get("answer")
    answers = answers if isinstance(answers, list) else [answers]
    if not answers or any(isinstance(one, bool) or not isinstance(one, (str, int, float)) for one in answers):
        raise InvalidInputError(f"{where}: 'answer' must be a text or a list of texts, got {fields.get('answer')!r}")
    image = folder / fields["image"]
    if not image.is_file():
        raise InvalidInputError(f"{where}: no picture at {image}")
    return Question(image, fields["question"], tuple(str(one) for one in answers))


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces, as visual question answering compares answers."""
    words = text.lower().translate(str.maketrans(string.punctuation, " " * len(string.punctuation))).split()
    return " ".join(word for word in words if word not in ("a", "an", "the")) or " ".join(words)


def answers_agree(given: str, accepted: Sequence[str], match: Match = "exact") -> bool:
    """Whether an answer is right: equal to an accepted one, or (`"contains"`) holding one as whole words."""
    said = normalised(given)
    if match == "exact":
        return any(said == normalised(one) for one in accepted)
    return any(re.search(rf"(?<!\S){re.escape(normalised(one))}(?!\S)", said) for one in accepted)


# --------------------------------------------------------------------------------------------------------------- asking
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

    from vistok.hub import ASSETS

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
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype="auto" if wanted == "auto" else getattr(torch, wanted)
        )
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
        kv_bytes: bytes of the prompt's keys and values.
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
    """Asks a model about pictures, with and without pruning, greedily and one at a time.

    Args:
        model, processor: as `load_lvlm` returns them.
        max_new_tokens: longest answer.
        instruction: text after every question, such as "Answer with one word."
    """

    def __init__(self, model: Any, processor: Any, *, max_new_tokens: int = 16, instruction: str = "") -> None:
        if max_new_tokens < 1:
            raise InvalidInputError(f"max_new_tokens is a number from 1 on, got {max_new_tokens}")
        self.model, self.processor = model, processor
        self.max_new_tokens, self.instruction = max_new_tokens, instruction
        self.host = find_host(model)
        self.shape = DecoderShape.from_config(model.config)
        self.last_report: Report | None = None
        self._views: dict[int, int] = {}
        self._pruners: dict[tuple, Pruner] = {}

    def inputs(self, picture: Image.Image, question: str) -> dict[str, Any]:
        """The processed prompt: by the model's chat template, or the image and then the question."""
        text = f"{question} {self.instruction}".strip()
        if not text:
            raise InvalidInputError("the question is empty")
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        else:
            prompt = f"{self.processor.image_token}\n{text}"
        batch = self.processor(images=[picture], text=[prompt], return_tensors="pt").to(self.model.device)
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
        visual = self.visual_tokens(inputs)
        if not visual:
            raise InvalidInputError("the prompt has no image tokens: the processor and the model do not fit together")
        if (method, keep_ratio, visual) not in self._pruners:
            needs_view = {"visionzip", "pooling"} & set(check_method(method))
            view = self.view_tokens(inputs, visual) if needs_view else visual
            target = Target(keep_ratio, self.shape.layers, max(1, self.host.first_decoder_layer), visual, view)
            self._pruners[method, keep_ratio, visual] = make_pruner(method, target)
        return self._pruners[method, keep_ratio, visual]

    def visual_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Placeholders of the image."""
        return int((inputs["input_ids"] == self.host.token_ids("image")).sum())

    def view_tokens(self, inputs: Mapping[str, Any], visual: int) -> int:
        """Tokens of one view of the image; found by one pass of the model."""
        if visual not in self._views:
            everything = Pruner([Stage("embeddings", lambda _, context: [_all(span) for span in context.spans])])
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
        return self.answer(self.inputs(picture, question), method, keep_ratio)

    def answer(self, inputs: Mapping[str, Any], method: str = UNPRUNED, keep_ratio: float | None = None) -> Answer:
        """The same for a processed prompt."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            if method == UNPRUNED:
                self.last_report = None
                ids, prefill, decode = self._generate(inputs)
            else:
                pruner = self.pruner(inputs, method, keep_ratio)
                with pruner.attached(self.model):
                    ids, prefill, decode = self._generate(inputs)
                self.last_report = pruner.last_report
        return self._costs(inputs, ids, prefill, decode, [str(one.message) for one in caught])

    @torch.no_grad()
    def _generate(self, inputs: Mapping[str, Any]) -> tuple[list[int], float, float]:
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
        return output[0, inputs["input_ids"].shape[1] :].tolist(), clock.first - begun, done - clock.first

    def _costs(
        self, inputs: Mapping[str, Any], ids: list[int], prefill: float, decode: float, notes: list[str]
    ) -> Answer:
        prompt, visual = int(inputs["input_ids"].shape[1]), self.visual_tokens(inputs)
        report = self.last_report
        if report is None:
            layers = [prompt] * self.shape.layers
            kept, average = visual, 1.0
            flops, cached = prefill_flops(self.shape, layers), kv_bytes(self.shape, layers, self.model.dtype.itemsize)
        else:
            kept = sum(len(one.kept) for one in report.stages[-1].visuals)
            average, flops, cached = report.average_kept, report.flops, report.kv_bytes
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Answer(
            text, prefill, decode, len(ids), prompt, visual, kept, average, flops, cached, tuple(dict.fromkeys(notes))
        )


def _all(span: Any) -> Any:
    return torch.arange(len(span), device=span.index.device)


# ----------------------------------------------------------------------------------------------------------- evaluation
def evaluate_pruners(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    folder: str | Path,
    methods: Sequence[str] = tuple(METHODS),
    keep_ratios: Sequence[float] = (0.5, 0.25, 0.11, 0.05),
    max_new_tokens: int = 16,
    instruction: str = "",
    match: Match = "exact",
    model_name: str = "",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask every question without pruning and with every method at every keep ratio.

    Each answer is written to `folder/answers/` as soon as it is there, so a run that was interrupted goes on where it
    stopped; answers of other settings, questions or models are asked anew.

    Args:
        model, processor: as `load_lvlm` returns them.
        questions: as `load_questions` returns them.
        folder: of the answers; `report` is yours to write.
        methods: names of `METHODS`, or several joined by `+`.
        keep_ratios: shares in (0, 1].
        match: see `answers_agree`.
        model_name: tells models apart when a run goes on.
        on_progress: called with a label, answers so far, and their total.

    Returns:
        `{"model", "questions", "parts": [row ...], "interrupted"}`. Each row has `method`, `keep_ratio`, `accuracy`
        (with its 95 % interval), means of `flops`, `kv_bytes`, `average_kept`, medians of the times, shares of the
        unpruned figures, and `pareto`; or `skipped`, the reason why a method cannot do this. Ctrl-C ends the run and
        returns the rows of the parts that are whole.

    Raises:
        InvalidInputError: for no questions, unknown methods, or a ratio outside (0, 1].
    """
    if not questions:
        raise InvalidInputError("there are no questions")
    if match not in ("exact", "contains"):
        raise InvalidInputError(f"match is 'exact' or 'contains', got {match!r}")
    if not methods or not keep_ratios:
        raise InvalidInputError("give at least one method and one keep ratio")
    for method in methods:
        check_method(method)
    for share in keep_ratios:
        check_ratio("keep_ratio", share)
    asker = Asker(model, processor, max_new_tokens=max_new_tokens, instruction=instruction)
    settings = {
        "model": model_name or model.config.name_or_path,
        "dtype": str(model.dtype),
        "device": str(model.device.type),
        "max_new_tokens": max_new_tokens,
        "instruction": instruction,
        "questions": _fingerprint(questions),
    }
    kinds = [(UNPRUNED, None), *((method, ratio) for method in methods for ratio in dict.fromkeys(keep_ratios))]
    rows: list[dict[str, Any]] = []
    interrupted = False
    for method, ratio in dict.fromkeys(kinds):
        part = _Part(Path(folder) / "answers", method, ratio, settings)
        try:
            for done in part.run(asker, questions):
                if on_progress is not None:
                    on_progress(part.label, done, len(questions))
        except InvalidInputError as error:
            if method == UNPRUNED:
                raise
            rows.append({"method": method, "keep_ratio": ratio, "skipped": str(error)})
            continue
        except KeyboardInterrupt:
            interrupted = True
            break
        rows.append(_row(method, ratio, part.answers, questions, match))
    _compare(rows)
    return {
        **settings,
        "questions": len(questions),
        "match": match,
        "interrupted": interrupted,
        "parts": rows,
    }


def _fingerprint(questions: Sequence[Question]) -> str:
    """Of the questions and the bytes of their pictures."""
    digest = hashlib.sha256()
    pictures: dict[Path, str] = {}
    for one in questions:
        if one.image not in pictures:
            pictures[one.image] = hashlib.sha256(one.image.read_bytes()).hexdigest()
        digest.update(json.dumps([pictures[one.image], one.question]).encode())
    return digest.hexdigest()[:16]


class _Part:
    """The answers of one method at one keep ratio, one JSON line each, after a line with the settings."""

    def __init__(self, folder: Path, method: str, ratio: float | None, settings: Mapping[str, Any]) -> None:
        self.method, self.ratio = method, ratio
        self.label = method if ratio is None else f"{method} {ratio:g}"
        self.path = folder / f"{self.label.replace(' ', '-')}.jsonl"
        self.settings = {**settings, "method": method, "keep_ratio": ratio}
        self.answers: list[Answer] = self._read()

    def _read(self) -> list[Answer]:
        if not self.path.is_file():
            return []
        found: list[Answer] = []
        try:
            first, *lines = self.path.read_text(encoding="utf-8").splitlines() or [""]
            if json.loads(first) != self.settings:
                return []
            for line in lines:
                fields = json.loads(line)
                found.append(Answer(**{**fields, "notes": tuple(fields["notes"])}))
        except (ValueError, TypeError, KeyError):  # a line that was cut off ends what can be used
            pass
        return found

    def run(self, asker: Asker, questions: Sequence[Question]) -> Iterator[int]:
        """Ask what is missing; yields how many answers there are."""
        yield len(self.answers)
        if len(self.answers) >= len(questions):
            return
        first = questions[len(self.answers)]
        # The first pass of a method is slower than the others; it is not counted.
        asker.ask(open_image(first.image), first.question, self.method, self.ratio)
        lines = [json.dumps(self.settings), *(json.dumps(asdict(one)) for one in self.answers)]
        write_text_atomic(self.path, "\n".join(lines) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            for one in questions[len(self.answers) :]:
                answer = asker.ask(open_image(one.image), one.question, self.method, self.ratio)
                file.write(json.dumps(asdict(answer)) + "\n")
                file.flush()
                self.answers.append(answer)
                yield len(self.answers)


def _row(
    method: str, ratio: float | None, answers: Sequence[Answer], questions: Sequence[Question], match: Match
) -> dict[str, Any]:
    right = [answers_agree(answer.text, one.answers, match) for answer, one in zip(answers, questions, strict=True)]
    decoded = [one.decode_seconds / (one.new_tokens - 1) for one in answers if one.new_tokens > 1]
    return {
        "method": method,
        "keep_ratio": ratio,
        "accuracy": Accuracy.of(right).to_dict(),
        "kept_tokens": statistics.fmean(one.kept_tokens for one in answers),
        "visual_tokens": statistics.fmean(one.visual_tokens for one in answers),
        "average_kept": statistics.fmean(one.average_kept for one in answers),
        "flops": statistics.fmean(one.flops for one in answers),
        "kv_bytes": statistics.fmean(one.kv_bytes for one in answers),
        "prefill_seconds": statistics.median(one.prefill_seconds for one in answers),
        "decode_seconds_per_token": statistics.median(decoded) if decoded else None,
        "notes": sorted({note for one in answers for note in one.notes}),
    }


def _compare(rows: list[dict[str, Any]]) -> None:
    """Add shares of the unpruned figures, and who is on the Pareto front of accuracy and operations."""
    measured = [row for row in rows if "skipped" not in row]
    if not measured:
        return
    base = measured[0]
    for row in measured:
        for name in ("flops", "kv_bytes", "prefill_seconds"):
            row[f"{name}_share"] = row[name] / base[name]
    front = pareto([(row["flops"], row["accuracy"]["value"]) for row in measured])
    for row, best in zip(measured, front, strict=True):
        row["pareto"] = best


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (cost, value) no other point beats: none costs at most as much and is worth at least as much."""
    return [
        not any((c <= cost and v >= value) and (c < cost or v > value) for c, v in points) for cost, value in points
    ]


def plot_pareto(report: Mapping[str, Any], path: str | Path) -> None:
    """Write accuracy against the share of operations, a line a method, and the Pareto front, as a picture.

    Raises:
        MissingExtraError: without matplotlib.
        InvalidInputError: if nothing was measured.
    """
    require("matplotlib", "eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in report["parts"] if "skipped" not in row]
    if not rows:
        raise InvalidInputError("there is nothing to plot: no method was measured")
    figure = Figure(figsize=(8, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    markers = "osD^v<>Pphd*X"
    names = list(dict.fromkeys(row["method"] for row in rows))
    for number, name in enumerate(names):
        own = sorted((row for row in rows if row["method"] == name), key=lambda row: row["flops"])
        across = [100 * row["flops_share"] for row in own]
        up = [100 * row["accuracy"]["value"] for row in own]
        below = [value - 100 * row["accuracy"]["low"] for value, row in zip(up, own)]
        above = [100 * row["accuracy"]["high"] - value for value, row in zip(up, own)]
        axes.errorbar(
            across,
            up,
            yerr=[[max(0.0, one) for one in below], [max(0.0, one) for one in above]],
            label=name,
            color={UNPRUNED: "black", "random": "dimgrey"}.get(name, f"C{(number - 1) % 10}"),
            linestyle="--" if name == "random" else "-",
            marker=markers[number % len(markers)],
            markersize=5,
            linewidth=1.2,
            elinewidth=0.6,
        )
    front = sorted((100 * row["flops_share"], 100 * row["accuracy"]["value"]) for row in rows if row["pareto"])
    axes.step(*zip(*front), where="post", color="grey", linewidth=5, alpha=0.25, label="Pareto front")
    axes.set_xlabel("operations of the prefill, % of unpruned")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"{report['model']}: {report['questions']} questions, bars: 95 % intervals", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    with atomic_path(path) as temporary:
        canvas.print_figure(temporary, dpi=130)
