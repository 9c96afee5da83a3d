"""Captions of the lab world as numbers: word-level tokenizers over the words of its grammar."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vistok.data.shapes.captions import VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["caption_tokenizer"]


def caption_tokenizer(max_length: int = 24, *, begin: bool = True) -> PreTrainedTokenizerFast:
    """A transformers tokenizer with one word each for `VOCABULARY`.

    Args:
        max_length: longest caption in words, marks included.
        begin: captions begin with `<s>`, whose output sums them up; otherwise there is no such word.

    Returns:
        Tokenizer that ends every caption with `</s>` and pads with `<pad>` (word 0).
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", *(["<s>"] if begin else [])]
    vocabulary = {word: index for index, word in enumerate([*special, *VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = ["<s>", "</s>"] if begin else ["</s>"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if begin else "$A </s>", special_tokens=[(mark, vocabulary[mark]) for mark in marks]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **({"bos_token": "<s>"} if begin else {}),
    )
