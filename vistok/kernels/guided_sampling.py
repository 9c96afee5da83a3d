"""Guided sampling: from the logits of one step to one token a row, in one go.

Shape letters: R rows (images, or images x positions), V vocabulary.

Order: guidance, temperature, top-k, top-p, softmax, choice. A token is drawn as `argmax(probs / noise)` with `noise`
from the exponential distribution: the race inside `torch.multinomial`, with the draws handed in by the caller.
So the result depends on nothing but its own row, and no backend needs a random generator.

The fast paths never sort. The race needs no normalised probabilities, and a token's place in the nucleus is one masked
sum: draw first, and if the winner lies outside, let only the tokens ranked above it race again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.kernels.dispatch import Op, check_triton, device_of, triton

if triton is not None:
    from triton import language as tl

__all__ = ["filter_logits", "guided_sampling", "reference"]

_COLDEST = 1e-5
_TINY = torch.finfo(torch.float32).tiny  # a draw of exactly 0 would turn a removed token into 0 / 0


def guided_sampling(
    logits: Tensor,
    noise: Tensor | None,
    *,
    uncond_logits: Tensor | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Choose one token a row from (guided, tempered, filtered) logits.

    Args:
        logits: conditional logits `[R, V]`, floating point; float16 and bfloat16 are computed in float32.
        noise: draws from the exponential distribution of rate 1, `[R, V]`, positive; None chooses the best token.
        uncond_logits: unconditional logits `[R, V]`. Guided logits are `uncond + guidance_scale * (cond - uncond)`.
        guidance_scale: classifier-free guidance; at exactly 1 `uncond_logits` is not read.
        temperature: logits are divided by `max(temperature, 1e-5)`; 0 chooses the best token.
        top_k: keep the k largest logits, and those equal to the k-th; 0 switches it off.
        top_p: keep the smallest set of best tokens whose probability exceeds this, in [0, 1]; 1 switches it off.

    Returns:
        int64 `[R]` in 0..V-1, the lowest index on ties; **-1 for a row whose guided logits hold NaN or +infinity, or
        nothing but -infinity**. The caller raises: a check here would make every step wait for the GPU.

    Raises:
        InvalidInputError: for other shapes, dtypes or devices, or a setting outside its range.
        Declined: if a backend was asked for with `vistok.kernels.use` and cannot run this.

    Source: LlamaGen (arXiv 2406.06525), its sampler; the race: Gumbel-max with `-log(noise)` as the Gumbel draw.
    """
    return _OP(
        logits,
        noise,
        uncond_logits=uncond_logits,
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set logits outside top-k, then outside the nucleus (top-p) of what is left, to -infinity.

    Args:
        logits: `[..., V]`; not changed.
        top_k: keep the k largest, and those equal to the k-th; 0 or >= V keeps all.
        top_p: keep the best tokens until their cumulative probability exceeds this, that token included, hence always
            the best one; 1 keeps all. Where the edge runs through equal logits, `torch.sort` decides which stay, as in
            the published sampler.

    Raises:
        InvalidInputError: if `top_k` is negative or `top_p` outside [0, 1].

    Source: LlamaGen (arXiv 2406.06525), its sampler.
    """
    _check_filters(top_k, top_p)
    return _filter(logits, top_k, top_p, stable=False)


def _filter(logits: Tensor, top_k: int, top_p: float, stable: bool) -> Tensor:
    """`filter_logits`; `stable` puts the lower index first among equals, an order that every backend can reproduce."""
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        values, order = torch.sort(logits, dim=-1, descending=True, stable=stable)
        cumulative = values.softmax(dim=-1).cumsum(dim=-1)
        beyond = torch.zeros_like(cumulative, dtype=torch.bool)
        beyond[..., 1:] = cumulative[..., :-1] > top_p  # shifted by one: the token that crosses the line stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -math.inf)
    return logits


def _check_filters(top_k: int, top_p: float) -> None:
    if top_k < 0:
        raise InvalidInputError(f"top_k is {top_k}; it must be 0 (off) or a positive number of tokens")
    if not 0 <= top_p <= 1:
        raise InvalidInputError(f"top_p is {top_p}; it must lie between 0 and 1 (off)")


def _prepare(
    logits: Tensor,
    noise: Tensor | None,
    *,
    uncond_logits: Tensor | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor | None, float, float, int, float]:
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise InvalidInputError(
            f"logits must be floating point [R, V] with V >= 1, got {logits.dtype} {tuple(logits.shape)}; "
            "take the last position and flatten other leading dimensions first"
        )
    for name, other in (("noise", noise), ("uncond_logits", uncond_logits)):
        if other is not None and (other.shape != logits.shape or other.device != logits.device):
            raise InvalidInputError(
                f"{name} is {tuple(other.shape)} on {other.device}; it must match logits, "
                f"{tuple(logits.shape)} on {logits.device}"
            )
    _check_filters(top_k, top_p)
    if not temperature >= 0:
        raise InvalidInputError(f"temperature is {temperature}; it must be 0 (best token) or positive")
    if not math.isfinite(guidance_scale):
        raise InvalidInputError(f"guidance_scale is {guidance_scale}; it must be a finite number")
    if guidance_scale != 1 and uncond_logits is None:
        raise InvalidInputError(
            f"guidance_scale is {guidance_scale}, which needs uncond_logits; pass them, or guidance_scale=1.0"
        )
    return (
        logits.detach(),
        None if noise is None or temperature == 0 else noise.detach(),
        None if uncond_logits is None or guidance_scale == 1 else uncond_logits.detach(),
        float(guidance_scale),
        max(float(temperature), _COLDEST),
        0 if top_k >= logits.shape[1] else int(top_k),
        float(top_p),
    )


_OP = Op(
    "guided_sampling",
    "(Tensor logits, Tensor? noise, Tensor? uncond_logits, float guidance_scale, float temperature, int top_k, "
    "float top_p) -> Tensor",
    prepare=_prepare,
    fake=lambda logits, *settings: logits.new_empty(logits.shape[0], dtype=torch.int64),
)


def _guide(logits: Tensor, uncond_logits: Tensor | None, guidance_scale: float) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.to(dtype)
    if uncond_logits is None:
        return logits
    uncond = uncond_logits.to(dtype)
    return uncond + guidance_scale * (logits - uncond)


@_OP.backend("reference")
def reference(
    logits: Tensor,
    noise: Tensor | None,
    uncond_logits: Tensor | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """The specification: every step in full, the nucleus by sorting."""
    logits = _guide(logits, uncond_logits, guidance_scale)
    valid = logits.amax(dim=1).isfinite()
    if noise is None:
        return torch.where(valid, logits.argmax(dim=1), -1)
    probs = _filter(logits / temperature, top_k, top_p, stable=True).softmax(dim=1)
    race = probs / noise.clamp_min(_TINY)
    valid &= ~race.amax(dim=1).isnan()
    return torch.where(valid, race.argmax(dim=1), -1)


_OP.backend("compile")(reference)


@_OP.backend("eager")
def _eager(
    logits: Tensor,
    noise: Tensor | None,
    uncond_logits: Tensor | None,
    guidance_scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:
    """Without a sort: top-k first, then everything on its survivors only. S below is their number, or V."""
    logits = _guide(logits, uncond_logits, guidance_scale)
    if noise is None:
        best, ids = logits.max(dim=1)
        return ids.masked_fill_(~best.isfinite(), -1)
    if temperature != 1:
        logits = logits / temperature
    columns = None
    if top_k > 0:
        logits, columns = _survivors(logits, top_k)
        noise = noise.gather(1, columns)
    best = logits.amax(dim=1, keepdim=True)
    weights = (logits - best).exp_()  # [R, S]: the race needs no normalised probabilities
    race = weights / noise.clamp_min(_TINY)
    winner, chosen = _fastest(race, columns)
    valid = best[:, 0].isfinite() & ~winner.isnan()
    if top_p < 1:
        _race_again_outside_nucleus(chosen, logits, weights, race, columns, top_p)
    ids = chosen if columns is None else columns.gather(1, chosen[:, None])[:, 0]
    return ids.masked_fill_(~valid, -1)


_TIES = 64


def _survivors(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The logits `[R, S]` that top-k keeps (others -infinity) and their columns `[R, S]`, in no particular order.

    A few more than k are fetched, because logits equal to the k-th stay as well; many more only if that was not enough.
    """
    count = min(top_k + _TIES, logits.shape[1])
    while True:
        values, columns = logits.topk(count, dim=1, sorted=False)
        kth = values.kthvalue(count - top_k + 1, dim=1, keepdim=True).values
        smaller = values < kth
        if count == logits.shape[1] or bool(smaller.any(dim=1).all()):
            return values.masked_fill_(smaller, -math.inf), columns
        count = min(4 * count, logits.shape[1])


def _fastest(race: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Value and position `[R]` of the winner; of equals the lowest column, whatever the order of `columns`."""
    winner, position = race.max(dim=1)
    if columns is None:
        return winner, position
    equal = race == winner[:, None]
    return winner, torch.where(equal, columns, torch.iinfo(torch.int64).max).argmin(dim=1)


def _race_again_outside_nucleus(
    chosen: Tensor, logits: Tensor, weights: Tensor, race: Tensor, columns: Tensor | None, top_p: float
) -> None:
    """Replace, in place, winners `chosen` `[R]` that lie outside the nucleus; other tensors `[R, S]`.

    A token is inside if those ranked above it (larger logit, or equal and lower column) weigh no more than `top_p` of
    all. If it is not, nothing ranked below it is either: the next winner is sought above. The best ends every race.
    """
    rows = torch.arange(logits.shape[0], device=logits.device)
    if columns is None:
        columns = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
    limit = top_p * weights.sum(dim=1)
    while True:
        position = chosen[rows, None]
        own = logits.gather(1, position)
        above = logits > own
        equal = logits == own
        if int(equal.sum()) > len(rows):
            above |= equal & (columns < columns.gather(1, position))
        outside = ((weights * above).sum(dim=1) > limit).nonzero()[:, 0]
        if len(outside) == 0:
            return
        rows, limit, above, columns = rows[outside], limit[outside], above[outside], columns[outside]
        logits, weights, race = logits[outside], weights[outside], race[outside].masked_fill_(~above, -1)
        chosen[rows] = _fastest(race, columns)[1]


# -------------------------------------------------------------------------------------------------------------- Triton

if triton is not None:

    @triton.jit
    def _load_logits(cond, uncond, column, vocabulary, scale, temperature, GUIDED: tl.constexpr):
        """Guided and tempered logits of one row's columns: -infinity beyond the vocabulary, +infinity for NaN."""
        inside = column < vocabulary
        logits = tl.load(cond + column, mask=inside, other=0.0).to(tl.float32)
        if GUIDED:
            base = tl.load(uncond + column, mask=inside, other=0.0).to(tl.float32)
            logits = base + scale * (logits - base)
        logits = tl.where(logits != logits, float("inf"), logits / temperature)  # a maximum drops NaN: let it be seen
        return tl.where(inside, logits, float("-inf"))

    @triton.jit
    def _ordered_key(logits):
        """An int32 that orders as the float does; both zeros get one key."""
        bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    @triton.jit
    def _guided_sampling_kernel(
        cond_logits,
        uncond_logits,
        exponential,
        ids,
        vocabulary,
        cond_stride,
        uncond_stride,
        noise_stride,
        scale,
        temperature,
        top_k,
        top_p,
        GUIDED: tl.constexpr,
        SAMPLED: tl.constexpr,
        HAS_TOP_K: tl.constexpr,
        HAS_TOP_P: tl.constexpr,
        TINY: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One row a program. Only the token is written: each pass reads the row's logits again, from the cache."""
        row = tl.program_id(0).to(tl.int64)
        cond = cond_logits + row * cond_stride
        uncond = uncond_logits + row * uncond_stride
        noise = exponential + row * noise_stride

        # First pass: the best logit and its index, and the range of keys.
        best = -float("inf")
        chosen = 0
        bad = 0
        high = -2147483647
        low = 2147483647
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            logits = _load_logits(cond, uncond, column, vocabulary, scale, temperature, GUIDED)
            block_best, block_id = tl.max(logits, axis=0, return_indices=True, return_indices_tie_break_left=True)
            if block_best > best:
                best = block_best
                chosen = start + block_id
            if HAS_TOP_K:
                key = _ordered_key(logits)
                high = tl.maximum(high, tl.max(key, axis=0))
                low = tl.minimum(low, tl.min(tl.where(column < vocabulary, key, 2147483647), axis=0))

        usable = (best > -float("inf")) & (best < float("inf"))
        best = tl.where(usable, best, 0.0)

        if SAMPLED:
            # Top-k: the largest key that at least k logits reach, by bisection over the bits of a float.
            if HAS_TOP_K:
                while low < high:
                    middle = (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow
                    reached = 0
                    for start in range(0, vocabulary, BLOCK):
                        column = start + tl.arange(0, BLOCK)
                        logits = _load_logits(cond, uncond, column, vocabulary, scale, temperature, GUIDED)
                        kept = (_ordered_key(logits) >= middle) & (column < vocabulary)
                        reached += tl.sum(kept.to(tl.int32), axis=0)
                    if reached >= top_k:
                        low = middle
                    else:
                        high = middle - 1

            # The race among the survivors of top-k, and their total weight.
            fastest = -1.0
            total = 0.0
            for start in range(0, vocabulary, BLOCK):
                column = start + tl.arange(0, BLOCK)
                logits = _load_logits(cond, uncond, column, vocabulary, scale, temperature, GUIDED)
                kept = column < vocabulary
                if HAS_TOP_K:
                    kept = kept & (_ordered_key(logits) >= low)
                draws = tl.load(noise + column, mask=kept, other=1.0).to(tl.float32)
                bad = tl.maximum(bad, tl.max((draws != draws).to(tl.int32), axis=0))
                weights = tl.where(kept, tl.exp(logits - best), 0.0)
                total += tl.sum(weights, axis=0)
                race = tl.where(kept, weights / tl.where(draws > TINY, draws, TINY), -1.0)
                block_best, block_id = tl.max(race, axis=0, return_indices=True, return_indices_tie_break_left=True)
                if block_best > fastest:
                    fastest = block_best
                    chosen = start + block_id

            # Top-p: a winner is in the nucleus if those ranked above it weigh no more than top_p of all. If not, they
            # race again without it and everything below; the best token ends it.
            if HAS_TOP_P:
                outside = 1
                while outside > 0:
                    own_logit = tl.load(cond + chosen).to(tl.float32)
                    if GUIDED:
                        own_base = tl.load(uncond + chosen).to(tl.float32)
                        own_logit = own_base + scale * (own_logit - own_base)
                    own_logit = own_logit / temperature
                    above_weight = 0.0
                    fastest = -1.0
                    runner_up = chosen
                    for start in range(0, vocabulary, BLOCK):
                        column = start + tl.arange(0, BLOCK)
                        logits = _load_logits(cond, uncond, column, vocabulary, scale, temperature, GUIDED)
                        above = (logits > own_logit) | ((logits == own_logit) & (column < chosen))
                        draws = tl.load(noise + column, mask=above, other=1.0).to(tl.float32)
                        weights = tl.where(above, tl.exp(logits - best), 0.0)
                        above_weight += tl.sum(weights, axis=0)
                        race = tl.where(above, weights / tl.where(draws > TINY, draws, TINY), -1.0)
                        block_best, block_id = tl.max(
                            race, axis=0, return_indices=True, return_indices_tie_break_left=True
                        )
                        if block_best > fastest:
                            fastest = block_best
                            runner_up = start + block_id
                    outside = ((above_weight > top_p * total) & (runner_up != chosen)).to(tl.int32)
                    if outside > 0:
                        chosen = runner_up

        tl.store(ids + row, tl.where(usable & (bad == 0), chosen, -1).to(tl.int64))


def _launch_settings(vocabulary: int) -> dict[str, int]:
    block = min(4096, max(128, 1 << (vocabulary - 1).bit_length()))
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4}


@_OP.backend("triton", check=check_triton)
def _triton(
    logits: Tensor,
    noise: Tensor | None,
    uncond_logits: Tensor | None,
    guidance_scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:
    ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if logits.shape[0] == 0:
        return ids
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    # An absent tensor is never read: any pointer will do.
    uncond = logits if uncond_logits is None else uncond_logits
    uncond = uncond if uncond.stride(1) == 1 else uncond.contiguous()
    draws = logits if noise is None else noise
    draws = draws if draws.stride(1) == 1 else draws.contiguous()
    with device_of(logits):
        _guided_sampling_kernel[(logits.shape[0],)](
            logits,
            uncond,
            draws,
            ids,
            logits.shape[1],
            logits.stride(0),
            uncond.stride(0),
            draws.stride(0),
            guidance_scale,
            1.0 if noise is None else temperature,
            top_k,
            top_p,
            GUIDED=uncond_logits is not None,
            SAMPLED=noise is not None,
            HAS_TOP_K=top_k > 0,
            HAS_TOP_P=top_p < 1,
            TINY=_TINY,
            **_launch_settings(logits.shape[1]),
        )
    return ids
