"""Deltas: one vector an encoder that turns an attribute of the subject up or down, and where they come from.

Letters: D width of an encoder's token states, P width of its pooled vector, R rows, N token positions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vistok.errors import CheckpointError, InvalidInputError
from vistok.files import atomic_path, read_state_dict, save_tensors
from vistok.nn.prompts import PipelineText, encode_prompts
from vistok.nn.spans import covered_tokens, token_spans
from vistok.registry import Published

__all__ = [
    "AttributeDelta",
    "ContrastivePrompts",
    "PromptPair",
    "add_direction",
    "contrast_delta",
    "expand_combinations",
]

_TOKENWISE, _POOLED = "tokenwise_delta.", "pooled_delta."
_PUBLISHED = {
    "bed": "age price size",
    "bike": "age price size",
    "car": "age price",
    "chair": "age price",
    "person": "age bald colorful_outfit curly_hair elegant fitness freckled groomed height long_hair makeup pale "
    "pierced posture scarred smile surprised tattooed tired width",
    "table": "age price size",
    "truck": "price",
}


def add_direction(states: Tensor, direction: Tensor, mask: Tensor, scale: Tensor | float) -> Tensor:
    """`states + scale * mask * direction`: each token of the subject gets the whole direction.

    Args:
        states: [R, N, D].
        direction: [D], cast to the dtype of the states.
        mask: bool [R, N], the subject's tokens.
        scale: one number, or [R] (any sign; about [-2, 2] is useful).
    """
    weight = mask.to(device=states.device, dtype=states.dtype)
    if isinstance(scale, Tensor):
        scale = scale.to(device=states.device, dtype=states.dtype)
        scale = scale if scale.ndim == 0 else scale[:, None]
    return states + (scale * weight)[..., None] * direction.to(device=states.device, dtype=states.dtype)


class AttributeDelta:
    """A direction of an attribute in the text encoders' outputs.

    Deltas add, subtract and scale like vectors; encoders that only one of two deltas has keep that one's vector.

    Args:
        tokenwise: encoder key (`oai_clip_vit_l`, `openclip_g`, `openclip_h`, `t5_xxl`) -> [D], added to the subject's
            tokens.
        pooled: encoder key -> [P], added to the pooled vector (not in the paper; empty in the published files).

    Raises:
        InvalidInputError: for an empty delta, tensors that are no vectors, or values that are not finite.
    """

    published: ClassVar[dict[str, Published]] = {
        f"attribute-directions.{noun}_{attribute}": Published(
            name=f"attribute-directions.{noun}_{attribute}",
            system="attribute-directions",
            config={"tokenwise": {"oai_clip_vit_l": 768, "openclip_g": 1280}},
            hub_file=f"{noun}_{attribute}.pt",
            licence="MIT",
            paper="2403.17064",
            origin="https://github.com/CompVis/attribute-control",
            text_encoder="stabilityai/stable-diffusion-xl-base-1.0",
            parameters=2048,
        )
        for noun, attributes in _PUBLISHED.items()
        for attribute in attributes.split()
    }

    def __init__(self, tokenwise: Mapping[str, Tensor], pooled: Mapping[str, Tensor] | None = None) -> None:
        self.tokenwise = dict(tokenwise)
        self.pooled = dict(pooled or {})
        if not self.tokenwise and not self.pooled:
            raise InvalidInputError("a delta needs a vector for at least one text encoder")
        for key, vector in [*self.tokenwise.items(), *self.pooled.items()]:
            if vector.ndim != 1:
                raise InvalidInputError(f"the delta of {key} must be a vector, got shape {list(vector.shape)}")
            if not bool(torch.isfinite(vector).all()):
                raise InvalidInputError(f"the delta of {key} holds NaN or infinite values")

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], name: str = "the given state dict") -> AttributeDelta:
        """From the authors' layout: `tokenwise_delta.<encoder>`, inside `delta` or flat.

        Raises:
            CheckpointError: naming the keys that belong to no delta.
        """
        inner = state.get("delta", state)
        if not isinstance(inner, Mapping):
            raise CheckpointError(f"{name}: expected a dictionary under 'delta', got {type(inner).__name__}")
        parts: dict[str, dict[str, Tensor]] = {_TOKENWISE: {}, _POOLED: {}}
        strange = []
        for key, value in inner.items():
            prefix = next((prefix for prefix in parts if str(key).startswith(prefix)), None)
            if prefix is None or not isinstance(value, Tensor):
                strange.append(str(key))
            else:
                parts[prefix][str(key).removeprefix(prefix)] = value.detach()
        if strange or not (parts[_TOKENWISE] or parts[_POOLED]):
            raise CheckpointError(
                f"{name} is no attribute delta: expected keys such as tokenwise_delta.oai_clip_vit_l, "
                f"got {', '.join(strange[:6]) or 'none'}"
            )
        return cls(parts[_TOKENWISE], parts[_POOLED])

    def state_dict(self) -> dict[str, Tensor]:
        """The authors' layout."""
        return {
            **{_TOKENWISE + key: value for key, value in self.tokenwise.items()},
            **{_POOLED + key: value for key, value in self.pooled.items()},
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttributeDelta:
        """Read a delta: the published `.pt` files (without running code), or safetensors."""
        return cls.from_state_dict(read_state_dict(path), str(path))

    from_official = load

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `.safetensors`, or `.pt` in the layout of the published files."""
        if Path(path).suffix == ".safetensors":
            save_tensors(path, self.state_dict())
            return
        if Path(path).suffix != ".pt":
            raise InvalidInputError(f"a delta is saved as .safetensors or .pt, got {os.fspath(path)!r}")
        with atomic_path(path) as temporary:
            torch.save(
                {"delta": {key: value.cpu().contiguous() for key, value in self.state_dict().items()}}, temporary
            )

    @classmethod
    def tiny(cls, widths: Mapping[str, int], seed: int = 0) -> AttributeDelta:
        """A random delta of the given widths."""
        generator = torch.Generator().manual_seed(seed)
        return cls({key: torch.randn(width, generator=generator) for key, width in widths.items()})

    def norms(self) -> dict[str, float]:
        """Euclidean norm of each vector; the published ones have 4 to 12."""
        return {key: float(value.double().norm()) for key, value in self.state_dict().items()}

    def to(self, *args: Any, **kwargs: Any) -> AttributeDelta:
        """As `Tensor.to`."""
        return AttributeDelta(
            {key: value.to(*args, **kwargs) for key, value in self.tokenwise.items()},
            {key: value.to(*args, **kwargs) for key, value in self.pooled.items()},
        )

    def _joined(self, other: AttributeDelta, sign: float) -> AttributeDelta:
        def join(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            result = dict(mine)
            for key, value in theirs.items():
                if key in mine and mine[key].shape != value.shape:
                    raise InvalidInputError(
                        f"two deltas of {key} have {len(mine[key])} and {len(value)} numbers: made for other encoders"
                    )
                result[key] = mine[key] + sign * value if key in mine else sign * value
            return result

        return AttributeDelta(join(self.tokenwise, other.tokenwise), join(self.pooled, other.pooled))

    def __add__(self, other: AttributeDelta) -> AttributeDelta:
        return self._joined(other, 1.0)

    def __sub__(self, other: AttributeDelta) -> AttributeDelta:
        return self._joined(other, -1.0)

    def __mul__(self, factor: float) -> AttributeDelta:
        return AttributeDelta(
            {key: value * factor for key, value in self.tokenwise.items()},
            {key: value * factor for key, value in self.pooled.items()},
        )

    __rmul__ = __mul__

    def __neg__(self) -> AttributeDelta:
        return self * -1.0

    def __repr__(self) -> str:
        sizes = ", ".join(f"{key}[{len(value)}]" for key, value in self.state_dict().items())
        return f"AttributeDelta({sizes})"

    def orthogonal_to(self, others: Sequence[AttributeDelta]) -> AttributeDelta:
        """What is left of this delta without the span of others, encoder by encoder.

        Removes what it shares with attributes that should stay as they are (an age that also changes the hair).
        """

        def project(mine: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
            result = {}
            for key, value in mine.items():
                rows = [getattr(other, name)[key] for other in others if key in getattr(other, name)]
                left = value.double()
                if rows:
                    basis, sizes, _ = torch.linalg.svd(torch.stack(rows).double().T, full_matrices=False)
                    basis = basis[:, sizes > sizes.max() * 1e-9]
                    left = left - basis @ (basis.T @ left)
                result[key] = left.to(value.dtype)
            return result

        return AttributeDelta(project(self.tokenwise, "tokenwise"), project(self.pooled, "pooled"))


class PromptPair:
    """Three phrasings of one noun: plain, with the attribute, and with its opposite.

    Args:
        target: e.g. `"man"`.
        positive: e.g. `"old man"`.
        negative: e.g. `"young man"`.
        pattern: regular expression of the subject in the target prompt; None for the target itself as a whole word.
    """

    def __init__(self, target: str, positive: str, negative: str, pattern: str | None = None) -> None:
        self.target, self.positive, self.negative = target, positive, negative
        self.pattern = rf"\b{re.escape(target)}\b" if pattern is None else pattern


def expand_combinations(pattern: str) -> list[str]:
    """Every choice of alternatives: `"{a,b} c"` gives `["a c", "b c"]`, the first group varying slowest.

    Alternatives may be empty; groups do not nest.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    groups = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*groups)]


class ContrastivePrompts:
    """The prompt set that a direction is found with: pairs times prefixes (paper, section 3).

    Item `i` is pair `i // len(prefixes)` with prefix `i % len(prefixes)`; a prompt is `prefix + " " + phrase`.

    Args:
        pairs: the phrasings.
        prefixes: a list, or one combination string such as `"{,a photo of} a {,beautiful}"`.
    """

    def __init__(self, pairs: Sequence[PromptPair], prefixes: str | Sequence[str] = ("a photo of a",)) -> None:
        self.pairs = list(pairs)
        self.prefixes = expand_combinations(prefixes) if isinstance(prefixes, str) else list(prefixes)
        if not self.pairs or not self.prefixes:
            raise InvalidInputError("a prompt set needs at least one pair and one prefix")

    @classmethod
    def from_entries(cls, entries: Sequence[Mapping[str, str]], prefixes: str | Sequence[str]) -> ContrastivePrompts:
        """From the authors' entries: `prompt_target`, `prompt_positive`, `prompt_negative`, `pattern_target`."""
        try:
            pairs = [
                PromptPair(
                    entry["prompt_target"], entry["prompt_positive"], entry["prompt_negative"], entry["pattern_target"]
                )
                for entry in entries
            ]
        except KeyError as error:
            raise InvalidInputError(f"an entry of the prompt set has no {error.args[0]!r}") from error
        return cls(pairs, prefixes)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> ContrastivePrompts:
        """Read the authors' YAML: `prompts`, and `prefixes` as a list (of combination strings) or one such string."""
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise InvalidInputError(f"{path} cannot be read as a prompt set: {error}") from error
        if not isinstance(content, Mapping) or "prompts" not in content or "prefixes" not in content:
            raise InvalidInputError(f"{path} is no prompt set: expected the keys prompts and prefixes")
        prefixes = content["prefixes"]
        patterns = [prefixes] if isinstance(prefixes, str) else prefixes
        return cls.from_entries(
            content["prompts"], [prefix for pattern in patterns for prefix in expand_combinations(pattern)]
        )

    def __len__(self) -> int:
        return len(self.pairs) * len(self.prefixes)

    def __getitem__(self, index: int) -> PromptPair:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._item(index // len(self.prefixes), index % len(self.prefixes))

    def _item(self, pair: int, prefix: int) -> PromptPair:
        phrases, start = self.pairs[pair], self.prefixes[prefix] + " "
        return PromptPair(start + phrases.target, start + phrases.positive, start + phrases.negative, phrases.pattern)


def _last_token(prompt: str, phrase: str, tokenizer: Any, length: int) -> int:
    """Position of the last sub-token of a phrase."""
    characters = [match.span() for match in re.finditer(re.escape(phrase), prompt)]
    return covered_tokens(token_spans(prompt, tokenizer), characters, length)[-1]


@torch.no_grad()
def contrast_delta(
    text: PipelineText, prompts: ContrastivePrompts, *, batch_size: int = 32, pooled: bool = False
) -> AttributeDelta:
    """The direction without optimisation: mean difference of encodings (equation 2).

    At the last sub-token of the phrase, positive minus negative, averaged over all pairs and prefixes; one encoder
    pass a prompt, no diffusion model.

    Args:
        text: the pipeline's encoders (`vistok.nn.prompts.describe_pipeline`).
        prompts: the prompt set.
        batch_size: prompts encoded together.
        pooled: also the difference of the pooled vectors.
    """
    sums: dict[str, Tensor] = {}
    pooled_sums: dict[str, Tensor] = {}
    rows = [
        (start + phrase, phrase, sign)
        for prefix in prompts.prefixes
        for pair in prompts.pairs
        for start in (prefix + " ",)
        for phrase, sign in ((pair.positive, 1.0), (pair.negative, -1.0))
    ]
    for begin in range(0, len(rows), batch_size):
        batch = rows[begin : begin + batch_size]
        encoded, _ = encode_prompts(text, [prompt for prompt, _, _ in batch])
        signs = torch.tensor([sign for _, _, sign in batch], dtype=torch.float64)
        for slot in text.encoders:
            if slot.tokens:
                index = [_last_token(prompt, phrase, slot.tokenizer, slot.length) for prompt, phrase, _ in batch]
                states = encoded.states[slot.key]
                chosen = states[torch.arange(len(batch)), torch.tensor(index)].double().cpu()
                sums[slot.key] = sums.get(slot.key, torch.zeros(())) + signs @ chosen
            if pooled and slot.pooled:
                vectors = encoded.pooled[slot.key].double().cpu()
                pooled_sums[slot.key] = pooled_sums.get(slot.key, torch.zeros(())) + signs @ vectors
    count = len(prompts)
    return AttributeDelta(
        {key: (value / count).float() for key, value in sums.items()},
        {key: (value / count).float() for key, value in pooled_sums.items()},
    )
