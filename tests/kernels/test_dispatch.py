"""Which backend runs, and what a refusal says."""

from __future__ import annotations

import pytest
import torch

from vistok import kernels
from vistok.errors import InvalidInputError, UnknownNameError
from vistok.kernels import dispatch

X, CODEBOOK = torch.randn(3, 4), torch.randn(5, 4)


def test_auto_takes_the_plain_path_on_a_cpu() -> None:
    choice = kernels.explain(kernels.nearest_code, X, CODEBOOK)
    assert (choice.op, choice.requested, choice.backend) == ("nearest_code", "auto", "eager")
    assert str(choice) == "nearest_code: eager runs (requested: auto)"


def test_use_is_a_context_and_a_call() -> None:
    with kernels.use("reference"):
        assert kernels.explain("guided_sampling", X, None).backend == "reference"
        with kernels.use("eager"):
            assert kernels.current() == "eager"
        assert kernels.current() == "reference"
    assert kernels.current() == "auto"
    previous = kernels.use("reference")
    assert kernels.current() == "reference"
    with previous:
        pass
    assert kernels.current() == "auto"


def test_an_explicit_request_carries_the_refusal() -> None:
    with kernels.use("triton"):
        choice = kernels.explain(kernels.nearest_code, X, CODEBOOK)
        assert choice.backend is None
        assert set(choice.declined) == {"triton"}
        with pytest.raises(kernels.Declined, match="triton declined") as refusal:
            kernels.nearest_code(X, CODEBOOK)
    assert refusal.value.reason == choice.declined["triton"]
    assert isinstance(refusal.value, InvalidInputError)


def test_wide_codes_are_not_worth_compiling() -> None:
    with kernels.use("compile"), pytest.raises(kernels.Declined, match="64 channels"):
        kernels.nearest_code(torch.randn(2, 64), torch.randn(3, 64))


def test_auto_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise kernels.Declined("it is a Tuesday")

    operation = kernels.operations()["nearest_code"]
    monkeypatch.setitem(operation.backends, "eager", dispatch.Backend(operation.backends["eager"].run, refuse))
    choice = kernels.explain(kernels.nearest_code, X, CODEBOOK)
    assert choice.backend == "reference"
    assert "eager declined: it is a Tuesday" in str(choice)
    assert kernels.nearest_code(X, CODEBOOK).shape == (3,)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="'cuda'; there are: auto, reference"):
        kernels.use("cuda")
    with pytest.raises(UnknownNameError, match=r"'softmax'; there are: attention_received, .*nearest_code"):
        kernels.explain("softmax", X)
    assert kernels.current() == "auto"


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_FROM_ENVIRONMENT", "fast")
    with pytest.raises(UnknownNameError, match="VISTOK_KERNELS asks for the kernel backend 'fast'"):
        kernels.nearest_code(X, CODEBOOK)
    monkeypatch.setattr(dispatch, "_FROM_ENVIRONMENT", "reference")
    assert kernels.explain(kernels.nearest_code, X, CODEBOOK).backend == "reference"


def test_the_compile_backend_traces_the_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, noise = torch.randn(4, 30), torch.empty(4, 30).exponential_()
    expected = kernels.guided_sampling(logits, noise, top_k=5), kernels.nearest_code(X, CODEBOOK)
    for operation in kernels.operations().values():
        plain = torch.compile(operation.backends["compile"].run, backend="eager")
        check = operation.backends["compile"].check
        monkeypatch.setitem(operation.backends, "compile", dispatch.Backend(plain, check))
    with kernels.use("compile"):
        assert torch.equal(kernels.guided_sampling(logits, noise, top_k=5), expected[0])
        assert torch.equal(kernels.nearest_code(X, CODEBOOK), expected[1])


def test_plain_calls_skip_the_registration_and_traced_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    operation = kernels.operations()["nearest_code"]
    seen: list[int] = []
    registered = operation.registered

    def noted(*arguments: object) -> torch.Tensor:
        seen.append(1)
        return registered(*arguments)

    monkeypatch.setattr(operation, "registered", noted)
    expected = kernels.nearest_code(X, CODEBOOK)
    assert not seen
    assert torch.equal(registered(X, CODEBOOK), expected)
    with FakeTensorMode() as mode:
        faked = kernels.nearest_code(mode.from_tensor(X), mode.from_tensor(CODEBOOK))
    assert seen == [1]
    assert (faked.shape, faked.dtype) == (expected.shape, expected.dtype)
