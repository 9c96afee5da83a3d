"""How a fused op picks its backend.

Every op is one `Op` with several backends, each a function over the same tensors:

- `"reference"`: the specification, short and never optimised;
- `"eager"`: the optimised path in plain PyTorch, the usual one on a CPU;
- `"triton"`: a hand-written GPU kernel;
- `"compile"`: plain PyTorch handed to `torch.compile` (never chosen on its own: its first call takes seconds).

`auto` takes the first backend that accepts the call, in an order given by the device. A backend *declines* by raising
`Declined(reason)` in its check; `auto` then goes on to the next one, while an explicit request re-raises the reason.
Ask for one with `vistok.kernels.use("eager")`, with `with use("reference"): ...`, or with the environment variable
`VISTOK_KERNELS`; `explain` says what would run, and why.

Each op is registered as `torch.ops.vistok.<name>` with a fake implementation, so `torch.compile(fullgraph=True)` keeps
it as one node; the backend is chosen when that node runs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vistok.errors import InvalidInputError, UnknownNameError

try:
    import triton
except ImportError:  # macOS, Windows and CPU-only installations have no Triton
    triton = None

__all__ = ["BACKENDS", "Backend", "Choice", "Declined", "Op", "current", "explain", "operations", "use"]

BACKENDS = ("auto", "reference", "eager", "triton", "compile")
"""What `use` and `VISTOK_KERNELS` accept."""

_AUTO_ORDER = {"cuda": ("triton", "eager", "reference")}
_AUTO_ORDER_ELSEWHERE = ("eager", "reference")

# Triton reads this flag when a kernel is decorated, so it is read once, like there.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on"}
_OLDEST_GPU = (7, 0)  # Triton supports no older compute capability


class Declined(InvalidInputError):
    """A backend cannot run this call; `reason` says why."""

    def __init__(self, reason: str, message: str | None = None) -> None:
        super().__init__(message or reason)
        self.reason = reason


# ---------------------------------------------------------------------------------------------- which one is asked for


def _checked_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise UnknownNameError(f"{source} asks for the kernel backend {name!r}; there are: {', '.join(BACKENDS)}")
    return name


_requested: str | None = None  # what `use` set; None: the environment variable, read at import
_FROM_ENVIRONMENT = os.environ.get("VISTOK_KERNELS", "auto") or "auto"


def current() -> str:
    """The backend asked for: by the last `use`, else by `VISTOK_KERNELS`, else `"auto"`.

    Raises:
        UnknownNameError: if `VISTOK_KERNELS` names no backend.
    """
    if _requested is not None:
        return _requested
    return _checked_name(_FROM_ENVIRONMENT, "the environment variable VISTOK_KERNELS")


class use:
    """Ask for one backend in every op of this process: `use("eager")`, or `with use("reference"): ...` for a while.

    Args:
        name: `"auto"`, `"reference"`, `"eager"`, `"triton"` or `"compile"`.

    Raises:
        UnknownNameError: for another name.
    """

    def __init__(self, name: str) -> None:
        global _requested
        self._previous = _requested
        _requested = _checked_name(name, "vistok.kernels.use")

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        global _requested
        _requested = self._previous


# ------------------------------------------------------------------------------------------------------------- the ops


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: `run(*tensors)`, and `check(*tensors)`, which raises `Declined` if it cannot."""

    run: Callable[..., Tensor]
    check: Callable[..., None]


@dataclass(frozen=True)
class Choice:
    """What `explain` answers: which backend runs, and why the ones before it do not."""

    op: str
    requested: str
    backend: str | None
    declined: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        because = "; ".join(f"{name} declined: {reason}" for name, reason in self.declined.items())
        runs = f"{self.op}: {self.backend or 'nothing'} runs (requested: {self.requested})"
        return f"{runs}; {because}" if because else runs


_OPERATIONS: dict[str, Op] = {}


def _compiled_when_called(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile(function)`, made at the first call: making it imports the compiler, which takes seconds."""
    compiled: Callable[..., Tensor] | None = None

    def run(*arguments: Any) -> Tensor:
        nonlocal compiled
        if compiled is None:
            compiled = torch.compile(function)
        return compiled(*arguments)

    return run


class Op:
    """A fused operation, registered as `torch.ops.vistok.<name>`.

    Args:
        name: the op's name, also that of its public function.
        schema: its signature in torch's language, e.g. `"(Tensor x, Tensor codebook) -> Tensor"`.
        prepare: takes the public function's arguments, validates them and returns the schema's arguments as a tuple.
            Tensors must be detached there: no op here has a gradient of its own.
        fake: takes the schema's arguments and returns an empty tensor of the result's shape and dtype.
    """

    def __init__(self, name: str, schema: str, prepare: Callable[..., tuple], fake: Callable[..., Tensor]) -> None:
        self.name = name
        self.prepare = prepare
        self.backends: dict[str, Backend] = {}
        self.registered = torch.library.custom_op(f"vistok::{name}", self._run, mutates_args=(), schema=schema)
        self.registered.register_fake(fake)
        _OPERATIONS[name] = self

    def backend(self, name: str, check: Callable[..., None] | None = None) -> Callable[[Callable], Callable]:
        """Decorator: make a function over the schema's arguments the backend `name`; `check` raises `Declined`."""

        def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            run = _compiled_when_called(function) if name == "compile" else function
            self.backends[name] = Backend(run, check or (lambda *arguments: None))
            return function

        return register

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        prepared = self.prepare(*arguments, **options)
        if current() == "compile" or _nobody_watches(prepared):
            # Outside the registered op: its body is opaque to torch.compile, so nothing inside it could be compiled;
            # and where nothing is traced, going through the registration costs as much as small ops themselves.
            return self._run(*prepared)
        return self.registered(*prepared)

    def choose(self, *prepared: Any) -> Choice:
        """Which backend takes these arguments (of the schema): the first one asked for that does not decline."""
        requested = current()
        auto = _AUTO_ORDER.get(prepared[0].device.type, _AUTO_ORDER_ELSEWHERE)
        declined: dict[str, str] = {}
        for name in auto if requested == "auto" else (requested,):
            if name not in self.backends:
                declined[name] = f"{self.name} has no such backend (it has: {', '.join(self.backends)})"
                continue
            try:
                self.backends[name].check(*prepared)
            except Declined as refusal:
                declined[name] = refusal.reason
                continue
            return Choice(self.name, requested, name, declined)
        return Choice(self.name, requested, None, declined)

    def _run(self, *prepared: Any) -> Tensor:
        choice = self.choose(*prepared)
        if choice.backend is None:
            raise Declined(
                "; ".join(choice.declined.values()), f'{choice}; vistok.kernels.use("auto") picks another backend'
            )
        # An ambient autocast would round the operands of a matmul to half precision, and flip indices.
        with torch.autocast(prepared[0].device.type, enabled=False):
            return self.backends[choice.backend].run(*prepared)


def _nobody_watches(prepared: tuple) -> bool:
    """Whether these are plain tensors with memory, and nothing traces, fakes or transforms the call."""
    return (
        not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(one) in (Tensor, nn.Parameter) and not one.is_meta for one in prepared if isinstance(one, Tensor))
    )


def operations() -> dict[str, Op]:
    """All fused ops by name."""
    return dict(_OPERATIONS)


def explain(op: str | Callable[..., Tensor], *arguments: Any, **options: Any) -> Choice:
    """Say which backend `op(*arguments, **options)` would run and why, without running it.

    Args:
        op: a public function of `vistok.kernels`, or its name.

    Raises:
        UnknownNameError: if there is no such op.
        InvalidInputError: if the op would refuse the arguments.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _OPERATIONS:
        raise UnknownNameError(f"no fused op is called {name!r}; there are: {', '.join(sorted(_OPERATIONS))}")
    operation = _OPERATIONS[name]
    return operation.choose(*operation.prepare(*arguments, **options))


# ------------------------------------------------------------------------------------------------- what backends share


def check_triton(*arguments: object) -> None:
    """Raise `Declined` if Triton cannot run here, or not on the tensors among these arguments (device, dtype)."""
    if triton is None:
        raise Declined("Triton is not installed")
    for tensor in arguments:
        if not isinstance(tensor, Tensor):
            continue
        if not tensor.is_cuda and not _INTERPRETED:
            raise Declined(f"the tensors are on {tensor.device.type!r}, and the kernel runs on CUDA tensors")
        if tensor.dtype == torch.float64:
            raise Declined("the kernel computes in float32, and float64 was given")
        if tensor.is_cuda and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(tensor.device)
            if capability < _OLDEST_GPU:
                raise Declined(f"the GPU's compute capability is {capability}, and Triton needs {_OLDEST_GPU} or newer")


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one, where Triton launches; nothing for other devices."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@contextlib.contextmanager
def full_precision_matmul(device: torch.device) -> Iterator[None]:
    """Keep float32 matmuls in float32: TF32 (GPU) or bfloat16 (CPU) operands would flip indices.

    The setting is the process's; it is changed only if it allows something else, and put back.
    """
    backend: Any = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn
    backend = getattr(backend, "matmul", backend)
    if hasattr(backend, "fp32_precision"):  # torch >= 2.9; it also reflects torch.set_float32_matmul_precision
        before = backend.fp32_precision
        if before == "ieee":
            yield
            return
        backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            backend.fp32_precision = before
    else:
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(legacy)
