"""Adaptive normalisation: gate + residual + norm + modulate, the memory-bound seams of a transformer with adaLN.

    total = x + gate * branch
    normed = norm(total) * scale + shift

`scale` multiplies as it is (add the customary 1 where the modulation is made). The norm has no weight: root mean square
(xAR), or centred as LayerNorm (DiT). Statistics and sums are float32 whatever the inputs' type (float64 stays float64).
Both ops have gradients, in plain PyTorch.

Shape letters: R rows, T tokens, D channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.kernels.dispatch import Declined, Op, check_triton, device_of, triton

if triton is not None:
    from triton import language as tl

__all__ = ["gated_modulated_norm", "modulated_norm", "reference"]

WIDEST = 16384  # a row is held in registers


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, centred: bool = False) -> Tensor:
    """norm(x) * scale + shift.

    Args:
        x: `[R, T, D]`, floating point.
        scale, shift: broadcast to x, e.g. `[R, 1, D]`; same device.
        eps: inside the square root.
        centred: subtract the mean first (LayerNorm); else root mean square.

    Returns:
        `[R, T, D]` in the type of x.

    Raises:
        InvalidInputError: for other shapes, dtypes or devices.
        Declined: if a backend was asked for with `vistok.kernels.use` and cannot run this.
    """
    return _NORM(x, scale, shift, eps=eps, centred=centred)


def gated_modulated_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    centred: bool = False,
) -> tuple[Tensor, Tensor]:
    """total = x + gate * branch, and norm(total) * scale + shift.

    Args:
        x, branch: `[R, T, D]`, of one floating point type.
        gate, scale, shift: broadcast to x, e.g. `[R, 1, D]`; same device.
        eps, centred: as in `modulated_norm`.

    Returns:
        (total, normed), each `[R, T, D]` in the type of x.

    Raises:
        InvalidInputError: for other shapes, dtypes or devices.
        Declined: if a backend was asked for with `vistok.kernels.use` and cannot run this.
    """
    return cast(
        tuple[Tensor, Tensor], _GATED(x, branch, gate, scale, shift, eps=eps, centred=centred)
    )  # the op's schema says two tensors


def _check(x: Tensor, others: dict[str, Tensor]) -> None:
    if x.ndim != 3 or not x.shape[2]:
        raise InvalidInputError(f"x must be [R, T, D] with at least one channel; got {list(x.shape)}")
    for name, other in {"x": x, **others}.items():
        if not other.is_floating_point():
            raise InvalidInputError(f"{name} must be floating point; got {other.dtype}")
        if other.device != x.device:
            raise InvalidInputError(f"x is on {x.device} and {name} on {other.device}; move one of them")
        if name == "branch":
            fits = other.shape == x.shape and other.dtype == x.dtype
        else:
            fits = other.ndim <= 3 and all(
                side in (1, wanted) for side, wanted in zip(reversed(other.shape), reversed(x.shape))
            )
        if not fits:
            raise InvalidInputError(
                f"{name} {list(other.shape)} ({other.dtype}) does not fit x {list(x.shape)} ({x.dtype}); "
                + ("it must be like x" if name == "branch" else "it must broadcast to x, e.g. [R, 1, D]")
            )


def _prepare_norm(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float, centred: bool) -> tuple[Any, ...]:
    _check(x, {"scale": scale, "shift": shift})
    return x, scale, shift, eps, centred


def _prepare_gated(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *, eps: float, centred: bool
) -> tuple[Any, ...]:
    _check(x, {"branch": branch, "gate": gate, "scale": scale, "shift": shift})
    return x, branch, gate, scale, shift, eps, centred


_NORM = Op(
    "modulated_norm",
    "(Tensor x, Tensor scale, Tensor shift, float eps, bool centred) -> Tensor",
    prepare=_prepare_norm,
    fake=lambda x, scale, shift, eps, centred: x.new_empty(x.shape),
)
_GATED = Op(
    "gated_modulated_norm",
    "(Tensor x, Tensor branch, Tensor gate, Tensor scale, Tensor shift, float eps, bool centred) -> (Tensor, Tensor)",
    prepare=_prepare_gated,
    fake=lambda x, branch, gate, scale, shift, eps, centred: (x.new_empty(x.shape), x.new_empty(x.shape)),
)


def _working(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ----------------------------------------------------------------------------------------------------------- reference
def reference(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """The specification, (total, normed) before rounding to the inputs' type."""
    dtype = _working(x)
    total = x.to(dtype) + gate.to(dtype) * branch.to(dtype)
    deviation = total - total.mean(-1, keepdim=True) if centred else total
    normed = deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt()
    return total, normed * scale.to(dtype) + shift.to(dtype)


@_NORM.backend("reference")
def _reference_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, centred: bool) -> Tensor:
    nothing = x.new_zeros(1)
    return reference(x, nothing, nothing, scale, shift, eps, centred)[1].to(x.dtype).contiguous()


@_GATED.backend("reference")
def _reference_gated(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, centred: bool
) -> Any:
    total, normed = reference(x, branch, gate, scale, shift, eps, centred)
    return total.to(x.dtype).contiguous(), normed.to(x.dtype).contiguous()


# ------------------------------------------------------------------------------------------------------- plain PyTorch
def _normalised(total: Tensor, scale: Tensor, shift: Tensor, eps: float, centred: bool) -> Tensor:
    width = (total.shape[-1],)
    if centred:
        normed = functional.layer_norm(total, width, None, None, eps)
    else:
        normed = functional.rms_norm(total, width, None, eps)
    return torch.addcmul(shift.to(total.dtype), normed, scale.to(total.dtype))


def _plain_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, centred: bool) -> Tensor:
    dtype = _working(x)
    return _normalised(x.to(dtype).contiguous(), scale, shift, eps, centred).to(x.dtype)


def _plain_gated(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, centred: bool
) -> Any:
    dtype = _working(x)
    total = torch.addcmul(x.to(dtype), gate.to(dtype), branch.to(dtype)).contiguous()
    return total.to(x.dtype), _normalised(total, scale, shift, eps, centred).to(x.dtype)


for _backend in ("eager", "compile"):
    _NORM.backend(_backend)(_plain_norm)
    _GATED.backend(_backend)(_plain_gated)


# ------------------------------------------------------------------------------------------------------------ gradients
def _norm_gradients(
    total: Tensor, scale: Tensor, shift: Tensor, gradient: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of total, scale and shift, in the working type, from that of the result."""
    dtype = _working(total)
    total, gradient = total.to(dtype), gradient.to(dtype)
    deviation = total - total.mean(-1, keepdim=True) if centred else total
    rate = (deviation.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, inner = deviation * rate, gradient * scale.to(dtype)
    through = inner - normed * (inner * normed).mean(-1, keepdim=True)
    if centred:
        through = through - inner.mean(-1, keepdim=True)
    return (
        through * rate,
        (gradient * normed).sum_to_size(scale.shape).to(scale.dtype),
        gradient.sum_to_size(shift.shape).to(shift.dtype),
    )


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift, ctx.eps, ctx.centred = inputs
    ctx.save_for_backward(x, scale, shift)


def _backward_norm(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift = ctx.saved_tensors
    of_x, of_scale, of_shift = _norm_gradients(x, scale, shift, gradient, ctx.eps, ctx.centred)
    return of_x.to(x.dtype), of_scale, of_shift, None, None


def _keep_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, branch, gate, scale, shift, ctx.eps, ctx.centred = inputs
    ctx.save_for_backward(branch, gate, scale, shift, output[0])


def _backward_gated(ctx: Any, of_total: Tensor, of_normed: Tensor) -> tuple[Tensor | None, ...]:
    branch, gate, scale, shift, total = ctx.saved_tensors
    through, of_scale, of_shift = _norm_gradients(total, scale, shift, of_normed, ctx.eps, ctx.centred)
    through = through + of_total
    of_gate = (through * branch).sum_to_size(gate.shape).to(gate.dtype)
    return through.to(total.dtype), (through * gate).to(branch.dtype), of_gate, of_scale, of_shift, None, None


_NORM.registered.register_autograd(_backward_norm, setup_context=_keep_norm)
_GATED.registered.register_autograd(_backward_gated, setup_context=_keep_gated)


# -------------------------------------------------------------------------------------------------------------- Triton
def _check_width(*arguments: Any) -> None:
    check_triton(*arguments)
    if arguments[0].shape[-1] > WIDEST:
        raise Declined(f"the kernel holds a row of at most {WIDEST} channels; got {arguments[0].shape[-1]}")


if triton is not None:

    @triton.jit
    def _adaptive_norm_kernel(
        x,
        branch,
        gate,
        scale,
        shift,
        total,
        normed,
        tokens,
        channels,
        gate_row,
        gate_token,
        scale_row,
        scale_token,
        shift_row,
        shift_token,
        eps,
        GATED: tl.constexpr,
        CENTRED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One token a program: its channels are read once, and stay in registers until both results are written."""
        place = tl.program_id(0).to(tl.int64)
        row, token = place // tokens, place % tokens
        channel = tl.arange(0, BLOCK)
        inside = channel < channels
        value = tl.load(x + place * channels + channel, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            opened = tl.load(gate + row * gate_row + token * gate_token + channel, mask=inside, other=0.0)
            added = tl.load(branch + place * channels + channel, mask=inside, other=0.0)
            value += opened.to(tl.float32) * added.to(tl.float32)
            tl.store(total + place * channels + channel, value, mask=inside)
        if CENTRED:
            value = tl.where(inside, value - tl.sum(value, axis=0) / channels, 0.0)
        rate = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / channels + eps)
        factor = tl.load(scale + row * scale_row + token * scale_token + channel, mask=inside, other=0.0)
        offset = tl.load(shift + row * shift_row + token * shift_token + channel, mask=inside, other=0.0)
        result = value * rate * factor.to(tl.float32) + offset.to(tl.float32)
        tl.store(normed + place * channels + channel, result, mask=inside)


def _launch(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, centred: bool, gated: bool
) -> tuple[Tensor, Tensor]:
    x, branch = x.contiguous(), branch.contiguous()
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if gated else normed
    if not x.numel():
        return total, normed
    block = max(16, 1 << (x.shape[2] - 1).bit_length())
    # Broadcast dimensions have stride 0: nothing is spread over the tokens.
    spread = [part.expand(x.shape) for part in (gate, scale, shift)]
    spread = [part if part.stride(2) == 1 or x.shape[2] == 1 else part.contiguous() for part in spread]
    with device_of(x):
        _adaptive_norm_kernel[(x.shape[0] * x.shape[1],)](
            x,
            branch,
            *spread,
            total,
            normed,
            x.shape[1],
            x.shape[2],
            *(part.stride(axis) for part in spread for axis in (0, 1)),
            eps,
            GATED=gated,
            CENTRED=centred,
            BLOCK=block,
            num_warps=min(16, max(1, block // 256)),
        )
    return total, normed


@_NORM.backend("triton", check=_check_width)
def _triton_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, centred: bool) -> Tensor:
    return _launch(x, x, scale, scale, shift, eps, centred, gated=False)[1]


@_GATED.backend("triton", check=_check_width)
def _triton_gated(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, centred: bool
) -> Any:
    return _launch(x, branch, gate, scale, shift, eps, centred, gated=True)
