"""Pictures as words of a language model: vocabulary, sequences, training and generation.

Source: SEED-LLaMA (arXiv 2310.01218, section 3.2). A picture is written `<img>`, its 32 codes as words, `</img>`. Any
causal language model of transformers learns these words; while generating, its output is held to that form, so that
every picture it writes can be painted.

Shape letters: B prompts, T ids of a prompt, n codes of a picture, V words.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vistok.errors import CheckpointError, InvalidInputError, require
from vistok.tokens import VisualTokens

__all__ = [
    "ImageLanguageModel",
    "ImageVocabulary",
    "Item",
    "SequenceBuilder",
    "extend_language_model",
]

BEGIN, END = "<img>", "</img>"
CODE_WORD = re.compile(r"<img_\d{5}>")
IGNORED = -100
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Item: TypeAlias = "str | VisualTokens | Tensor"


def code_word(code: int) -> str:
    """The word of a code: `<img_00042>`."""
    return f"<img_{code:05d}>"


@dataclass(frozen=True)
class ImageVocabulary:
    """Where the words of pictures lie in a vocabulary.

    Attributes:
        first_code_id: id of code 0; code c has this plus c (32000 in SEED-LLaMA).
        begin_id, end_id: ids of `<img>` and `</img>`.
        codebook_size: codes of the tokenizer, K.
        num_codes: codes of a picture, n.
    """

    first_code_id: int
    begin_id: int
    end_id: int
    codebook_size: int = 8192
    num_codes: int = 32

    @property
    def length(self) -> int:
        """Ids of a picture, with `<img>` and `</img>`."""
        return self.num_codes + 2

    def ids(self, codes: VisualTokens | Tensor) -> list[int]:
        """The ids of one picture.

        Args:
            codes: int64 [n] or [1, n], or tokens of one picture.

        Raises:
            InvalidInputError: another number of codes, or codes outside the codebook.
        """
        values = codes.ids if isinstance(codes, VisualTokens) else codes
        if values is None or values.numel() != self.num_codes or values.is_floating_point():
            raise InvalidInputError(
                f"expected the {self.num_codes} integer codes of one picture; got "
                f"{'none' if values is None else list(values.shape)}"
            )
        numbers = values.flatten().tolist()
        if min(numbers) < 0 or max(numbers) >= self.codebook_size:
            raise InvalidInputError(
                f"codes must lie in 0..{self.codebook_size - 1}; got {min(numbers)}..{max(numbers)}"
            )
        return [self.begin_id, *(self.first_code_id + number for number in numbers), self.end_id]

    def parse(self, ids: Sequence[int]) -> list[list[int] | VisualTokens]:
        """Generated ids as runs of text ids and whole pictures. Broken pictures are left out.

        Args:
            ids: one generated sequence.

        Returns:
            Text ids and tokens [1, n], in order.
        """
        parts: list[list[int] | VisualTokens] = []
        text: list[int] = []
        position, ids = 0, list(ids)
        while position < len(ids):
            if ids[position] == self.begin_id:
                body = ids[position + 1 : position + 1 + self.num_codes]
                codes = [one - self.first_code_id for one in body]
                whole = len(codes) == self.num_codes and all(0 <= code < self.codebook_size for code in codes)
                closed = ids[position + 1 + self.num_codes : position + 2 + self.num_codes] == [self.end_id]
                if whole and closed:
                    if text:
                        parts.append(text)
                        text = []
                    parts.append(VisualTokens(ids=torch.tensor([codes])))
                    position += self.length
                    continue
            if not self._is_image_word(ids[position]):
                text.append(ids[position])
            position += 1
        return [*parts, text] if text else parts

    def _is_image_word(self, word: int) -> bool:
        code = 0 <= word - self.first_code_id < self.codebook_size
        return code or word in (self.begin_id, self.end_id)


class _WholePictures:
    """Holds generation to whole pictures: after `<img>` n codes, then `</img>`; neither elsewhere.

    A logits processor of transformers. Only tensor operations: no step waits for the GPU.
    """

    def __init__(self, vocabulary: ImageVocabulary, allow_images: bool) -> None:
        self.vocabulary, self.allow_images = vocabulary, allow_images

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        words, n = self.vocabulary, self.vocabulary.num_codes
        tail = input_ids[:, -(n + 1) :]
        # Words since the last <img> in reach; larger than n outside of pictures.
        since = torch.arange(tail.shape[1] - 1, -1, -1, device=tail.device)
        age = torch.where(tail == words.begin_id, since, n + 1).amin(1, keepdim=True)
        number = torch.arange(scores.shape[1], device=scores.device)
        is_code = (number >= words.first_code_id) & (number < words.first_code_id + words.codebook_size)
        is_end, is_begin = number == words.end_id, number == words.begin_id
        outside = ~(is_code | is_end)
        if not self.allow_images:
            outside &= ~is_begin
        allowed = torch.where(age < n, is_code, torch.where(age == n, is_end, outside))
        return scores.masked_fill(~allowed, -float("inf"))


@dataclass(frozen=True)
class SequenceBuilder:
    """Training sequences of text and pictures, as SEED-LLaMA was trained on them.

    Attributes:
        vocabulary: the image words.
        encode_text: text to ids, without beginning and end marks.
        bos_id, eos_id, pad_id: marks (the published models pad with the unknown word); bos_id None has none.
        max_length: length of the sequences. What does not fit is cut off, but no picture is cut in two.
    """

    vocabulary: ImageVocabulary
    encode_text: Callable[[str], list[int]]
    bos_id: int | None
    eos_id: int
    pad_id: int
    max_length: int

    def ids_of(self, item: Item) -> list[int]:
        """Ids of a text or a picture."""
        return self.encode_text(item) if isinstance(item, str) else self.vocabulary.ids(item)

    def pair(
        self, codes: VisualTokens | Tensor, text: str, *, image_first: bool = True, mask_condition: bool = False
    ) -> dict[str, Tensor]:
        """A picture and its caption.

        Args:
            codes: of one picture.
            text: caption.
            image_first: the picture, then the caption (captioning), or the other way round (drawing).
            mask_condition: nothing is learnt from what comes first (and the `<img>` of a picture to draw).

        Returns:
            `input_ids`, `attention_mask`, `labels`, int64 [max_length] each.
        """
        parts = [self.ids_of(codes), self.ids_of(text)]
        condition = 0
        if mask_condition:
            condition = len(parts[0]) if image_first else len(parts[1]) + 1
        return self._pack(parts if image_first else parts[::-1], condition)

    def edit(self, source: VisualTokens | Tensor, instruction: str, target: VisualTokens | Tensor) -> dict[str, Tensor]:
        """A picture, what to change, and the changed picture; only the latter is learnt."""
        parts = [self.ids_of(source), self.ids_of(instruction), self.ids_of(target)]
        return self._pack(parts, len(parts[0]) + len(parts[1]))

    def interleaved(
        self, items: Sequence[Item], *, swap: bool | Sequence[bool] = False, max_images: int | None = None
    ) -> dict[str, Tensor]:
        """A document of texts and pictures.

        Args:
            items: in reading order.
            swap: write the item after a picture before it; for all pictures, or one value a picture.
            max_images: end after so many pictures and the text right after the last of them.
        """
        swaps = iter([swap] * len(items) if isinstance(swap, bool) else list(swap) + [False] * len(items))
        parts: list[list[int]] = []
        position = images = 0
        while position < len(items):
            here = items[position]
            if isinstance(here, str):
                parts.append(self.ids_of(here))
                position += 1
                continue
            images += 1
            following = items[position + 1] if position + 1 < len(items) else None
            last = max_images is not None and images >= max_images
            swapped = next(swaps) and following is not None
            if following is not None and (swapped or (last and isinstance(following, str))):
                pair = [self.ids_of(here), self.ids_of(following)]
                parts += pair[::-1] if swapped else pair
                images += not isinstance(following, str)
                position += 2
            else:
                parts.append(self.ids_of(here))
                position += 1
            if last:
                break
        return self._pack(parts, None)

    def _pack(self, parts: Sequence[Sequence[int]], condition: int | None) -> dict[str, Tensor]:
        """Join, mark, cut, pad.

        Args:
            parts: ids of the items.
            condition: ids after the beginning mark that are not learnt; 0 or None learns all, the mark included.
        """
        ids = [] if self.bos_id is None else [self.bos_id]
        hidden = len(ids) + condition if condition else 0
        room = self.max_length - 1
        for part in parts:
            if len(ids) + len(part) > room:
                if part and part[0] != self.vocabulary.begin_id:
                    ids += part[: room - len(ids)]
                break
            ids += part
        ids.append(self.eos_id)
        padding = self.max_length - len(ids)
        labels = [IGNORED] * min(hidden, len(ids)) + ids[hidden:]
        return {
            "input_ids": torch.tensor(ids + [self.pad_id] * padding),
            "attention_mask": torch.tensor([1] * len(ids) + [0] * padding),
            "labels": torch.tensor(labels + [IGNORED] * padding),
        }


class ImageLanguageModel:
    """A causal language model that reads and writes pictures. Made by `extend_language_model`.

    Attributes:
        model: the transformers model (or its LoRA version after `add_lora`).
        tokenizer: its tokenizer, which knows the image words.
        vocabulary: where they are.
    """

    def __init__(self, model: Any, tokenizer: Any, vocabulary: ImageVocabulary) -> None:
        self.model, self.tokenizer, self.vocabulary = model, tokenizer, vocabulary

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Any) -> ImageLanguageModel:
        """Load what `save_pretrained` wrote, or a published SEED-LLaMA.

        Args:
            source: folder or Hub id.
            options: of `AutoModelForCausalLM.from_pretrained`.

        Raises:
            CheckpointError: the files cannot be read, or do not fit the model.
            InvalidInputError: the tokenizer knows no image words.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name = os.fspath(source)
        try:
            model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CheckpointError(f"no language model could be loaded from {name!r}: {reason}") from error
        if report["missing_keys"]:  # transformers would go on with random weights
            raise CheckpointError(f"{name!r} lacks weights: {', '.join(sorted(report['missing_keys'])[:6])}")
        codes = sum(CODE_WORD.fullmatch(word) is not None for word in tokenizer.get_vocab())
        if not codes:
            raise InvalidInputError(f"the tokenizer of {name!r} knows no image words: use extend_language_model")
        number = int(getattr(model.config, "num_image_codes", 32))
        return extend_language_model(model.eval(), tokenizer, codebook_size=codes, num_codes=number)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model and tokenizer as transformers files, which its Auto classes take, too."""
        self.model.config.num_image_codes = self.vocabulary.num_codes
        self.model.save_pretrained(os.fspath(folder))
        self.tokenizer.save_pretrained(os.fspath(folder))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the model."""
        return self.model.parameters()

    def to(self, *arguments: Any, **options: Any) -> ImageLanguageModel:
        """Move or cast the model, as torch's `Module.to`."""
        self.model.to(*arguments, **options)
        return self

    def eval(self) -> ImageLanguageModel:
        """Put the model into eval mode."""
        self.model.eval()
        return self

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text, without marks."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def sequences(self, max_length: int) -> SequenceBuilder:
        """Builder of training sequences."""
        tokenizer = self.tokenizer
        pads = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
        if tokenizer.eos_token_id is None:
            raise InvalidInputError("the tokenizer has no end mark; set tokenizer.eos_token")
        pad = next(one for one in pads if one is not None)
        return SequenceBuilder(
            self.vocabulary, self.encode_text, tokenizer.bos_token_id, tokenizer.eos_token_id, pad, max_length
        )

    def prompt(self, items: Item | Sequence[Item], *, force_image: bool = False) -> Tensor:
        """Ids [T] of texts and pictures, after the beginning mark.

        Args:
            items: one, or several in reading order.
            force_image: end with `<img>`, so that the answer begins with a picture.
        """
        several = [items] if isinstance(items, str | VisualTokens | Tensor) else list(items)
        ids = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        for item in several:
            ids += self.encode_text(item) if isinstance(item, str) else self.vocabulary.ids(item)
        return torch.tensor(ids + ([self.vocabulary.begin_id] if force_image else []))

    def training_loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Next-word cross entropy over text and pictures.

        Args:
            batch: `input_ids`, `attention_mask`, `labels`, int64 [B, T] (see `sequences`).
        """
        return {"loss": self.model(**batch).loss}

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Item | Sequence[Item]],
        *,
        force_image: bool = False,
        allow_images: bool = True,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 0.5,
        seed: int | None = None,
        **settings: Any,
    ) -> list[list[str | VisualTokens]]:
        """Answers of text and pictures.

        Args:
            prompts: each a text, codes, or several of them in reading order.
            force_image: begin every answer with a picture.
            allow_images: whether pictures may be written; False for pure text.
            max_new_tokens: most new ids (a picture has n + 2).
            temperature: 0 takes the most likely word.
            top_p: keep the smallest set of words with this probability.
            seed: of the draws; None draws from torch's default generator.
            settings: further arguments of transformers' `generate` (`num_beams`, ...).

        Returns:
            One list an answer: texts, and tokens [1, n] ready for `SEED.decode`.

        Raises:
            InvalidInputError: no prompts, or settings out of range.
        """
        if not prompts:
            raise InvalidInputError("no prompts given")
        if force_image and not allow_images:
            raise InvalidInputError("force_image needs allow_images=True")
        if not 0.0 <= temperature < float("inf") or not 0.0 < top_p <= 1.0:
            raise InvalidInputError(
                f"expected temperature >= 0 and top_p in (0, 1]; got temperature={temperature}, top_p={top_p}"
            )
        if force_image and max_new_tokens < self.vocabulary.num_codes + 1:
            raise InvalidInputError(
                f"a picture needs {self.vocabulary.num_codes + 1} new tokens; max_new_tokens is {max_new_tokens}"
            )
        rows = [self.prompt(one, force_image=force_image) for one in prompts]
        length = max(len(row) for row in rows)
        device = next(self.model.parameters()).device
        pads = (self.tokenizer.pad_token_id, self.tokenizer.unk_token_id, self.tokenizer.eos_token_id, 0)
        pad = next(one for one in pads if one is not None)
        ids = torch.full((len(rows), length), pad)
        seen = torch.zeros(len(rows), length, dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, length - len(row) :] = row
            seen[number, length - len(row) :] = 1
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": top_p}
        # transformers draws from the default generators: they are seeded for this call, and put back after it.
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            made = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=seen.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=self.tokenizer.eos_token_id,
                logits_processor=[_WholePictures(self.vocabulary, allow_images)],
                **{**sampling, **settings},
            )
        start = length - 1 if force_image else length  # the forced <img> belongs to the answer
        return [self._answer(row.tolist()) for row in made[:, start:]]

    def _answer(self, ids: list[int]) -> list[str | VisualTokens]:
        if self.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        parts: list[str | VisualTokens] = []
        for part in self.vocabulary.parse(ids):
            if isinstance(part, VisualTokens):
                parts.append(part)
                continue
            text = self.tokenizer.decode(part, skip_special_tokens=True)
            if text:
                parts.append(text)
        return parts

    def add_lora(
        self,
        *,
        rank: int = 16,
        alpha: int = 32,
        dropout: float = 0.05,
        target_modules: Sequence[str] = LORA_TARGETS,
        train_embeddings: bool = True,
        train_norms: bool = True,
    ) -> Any:
        """Freeze the model but for low-rank updates, embeddings and norms: SEED-LLaMA's tuning.

        Args:
            rank, alpha, dropout: of the updates.
            target_modules: names of the linear layers that get one (those that the model has).
            train_embeddings: learn input and output embeddings in full; new words need it.
            train_norms: learn the norms in full.

        Returns:
            The PEFT model, which is also `self.model` from now on.

        Raises:
            MissingExtraError: without `peft`.
            InvalidInputError: if the model has none of the layers.
        """
        peft = require("peft", "lora")
        names = {name.rsplit(".", 1)[-1] for name, part in self.model.named_modules() if isinstance(part, nn.Linear)}
        targets = [name for name in target_modules if name in names]
        if not targets:
            raise InvalidInputError(
                f"the model has none of the layers {', '.join(target_modules)}; "
                f"name some of: {', '.join(sorted(names))}"
            )
        modules = dict(self.model.named_modules())
        whole: list[nn.Module | None] = []
        if train_embeddings:
            whole += [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        if train_norms:
            whole += [
                part
                for name, part in modules.items()
                if "norm" in name.rsplit(".", 1)[-1].lower() and not isinstance(part, nn.Linear)
            ]
        # Saved by PEFT beside the low-rank updates, which merely thawing them would not bring about.
        saved = {name.rsplit(".", 1)[-1] for name, part in modules.items() if any(part is one for one in whole)}
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=targets,
            modules_to_save=sorted(saved) or None,
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(self.model, config)
        return self.model


def extend_language_model(
    model: Any, tokenizer: Any, *, codebook_size: int = 8192, num_codes: int = 32, mean_resizing: bool = True
) -> ImageLanguageModel:
    """Give a causal language model the words of pictures.

    Words that the tokenizer has already (a SEED-LLaMA) are used as they are; new rows of the embeddings are random.

    Args:
        model: any causal language model of transformers; it is changed in place.
        tokenizer: its tokenizer; it is changed in place.
        codebook_size: codes of the image tokenizer, K.
        num_codes: codes of a picture, n.
        mean_resizing: draw new rows around the mean of the old ones.

    Returns:
        The model with its tokenizer: `prompt`, `sequences`, `training_loss`, `generate`, `add_lora`.

    Raises:
        InvalidInputError: a model without resizable embeddings or language head, or a tokenizer whose image words do
            not follow each other.
    """
    kind = type(model).__name__
    for name in ("resize_token_embeddings", "get_input_embeddings", "generate"):
        if not callable(getattr(model, name, None)):
            raise InvalidInputError(
                f"{kind} has no {name}: pictures become words, so a causal language model of transformers with "
                "resizable embeddings is needed"
            )
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding) or model.get_output_embeddings() is None:
        raise InvalidInputError(
            f"the embeddings of {kind} cannot be resized (found {type(table).__name__}, and "
            f"{'no' if model.get_output_embeddings() is None else 'a'} language head); give a model with "
            "nn.Embedding words and a language head"
        )
    if codebook_size < 1 or num_codes < 1:
        raise InvalidInputError(f"expected at least one code; got codebook_size={codebook_size}, num_codes={num_codes}")
    words = [*(code_word(code) for code in range(codebook_size)), BEGIN, END]
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([word for word in words if word not in known])
    ids = tokenizer.convert_tokens_to_ids(words)
    codes, first = ids[:codebook_size], ids[0]
    if codes != list(range(first, first + codebook_size)):
        raise InvalidInputError(
            "the tokenizer's image words do not follow each other: it knew some of them before; use a fresh tokenizer, "
            f"or the codebook_size that it was made for (asked: {codebook_size})"
        )
    if max(ids) >= table.num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=mean_resizing)
    return ImageLanguageModel(model, tokenizer, ImageVocabulary(first, ids[-2], ids[-1], codebook_size, num_codes))
