"""Muon beside AdamW: who steps what, resume, and the codebook as a start."""

import copy

import pytest
import torch

from vistok.errors import InvalidInputError
from vistok.generators.nar import NAR
from vistok.training.optimizers import MuonWithAdamW, build_optimizer, hidden_matrices
from vistok.training.recipe import OptimizerRecipe, parse_recipe

CPU = torch.device("cpu")
RECIPE = {
    "name": "x",
    "model": {"system": "nar", "codebook_embeddings": True},
    "data": {"source": "shapes-images"},
    "steps": 1,
    "batch_size": 1,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return NAR.tiny().train()


def batch_of(model, seed=0):
    draws = torch.Generator().manual_seed(seed)
    tokens = model.grid[0] * model.grid[1]
    return {
        "ids": torch.randint(0, model.vocab_size, (4, tokens), generator=draws),
        "labels": torch.randint(0, model.num_classes, (4,), generator=draws),
    }


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    model.training_loss(batch_of(model, seed))["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def test_embeddings_and_heads_are_not_orthogonalised(model):
    chosen = {id(value) for value in hidden_matrices(model)}
    assert chosen
    for value in (model.output.weight, model.vertical_output.weight, model.tok_embeddings.weight):
        assert id(value) not in chosen
    assert id(model.layers[0].attention.wo.weight) in chosen


def test_every_parameter_is_stepped_once(model):
    optimizer = build_optimizer(model, OptimizerRecipe(name="muon", lr=1e-2), CPU)
    listed = [id(value) for group in optimizer.param_groups for value in group["params"]]
    assert sorted(listed) == sorted(id(value) for value in model.parameters())
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, 0)
    step(model, optimizer, 1)  # the heads of a fresh model are zero: the first step reaches only them
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert set(moved) == {name for name, _ in model.named_parameters()}


def test_learning_rate_of_the_groups_is_the_learning_rate_of_the_parts(model):
    optimizer = build_optimizer(model, OptimizerRecipe(name="muon", lr=1e-2, weight_decay=0.1), CPU)
    before = copy.deepcopy(model.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_restored_optimizer_goes_on_bit_for_bit(model):
    optimizer = build_optimizer(model, OptimizerRecipe(name="muon", lr=1e-2), CPU)
    for number in range(3):
        step(model, optimizer, number)
    twin = copy.deepcopy(model)
    restored = build_optimizer(twin, OptimizerRecipe(name="muon", lr=1e-2), CPU)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert isinstance(restored, MuonWithAdamW)
    for group in [*optimizer.param_groups, *restored.param_groups]:
        group["lr"] = 5e-3
    for number in range(3, 6):
        step(model, optimizer, number)
        step(twin, restored, number)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


def test_codes_that_are_alike_start_alike(model):
    codes = torch.nn.functional.normalize(torch.randn(model.vocab_size, 8), dim=-1)
    codes[1] = torch.nn.functional.normalize(codes[0] + 0.01 * torch.randn(8), dim=-1)
    model.embed_codebook(codes)
    for weight in (model.tok_embeddings.weight, model.output.weight, model.vertical_output.weight):
        near = (weight[0] - weight[1]).norm()
        assert near < 0.5 * (weight[0] - weight[2:]).norm(dim=1).median()
    with pytest.raises(InvalidInputError, match="codes"):
        model.embed_codebook(codes[:-1])


def test_codebook_embeddings_need_a_tokenizer():
    with pytest.raises(InvalidInputError, match="tokenizer"):
        parse_recipe(RECIPE)


def test_muon_steps_convolutions_as_matrices() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 32, 3), torch.nn.Conv2d(32, 4, 1))
    settings = OptimizerRecipe(name="muon", lr=0.1, weight_decay=0.0, convolutions=True)
    optimizer = build_optimizer(network, settings, CPU)
    hidden = network[1].weight
    before = hidden.detach().clone()
    network(torch.randn(2, 3, 9, 9)).square().mean().backward()
    gradient = hidden.grad.clone()
    optimizer.step()
    # What Muon does to the matrix that the weight is.
    matrix = torch.nn.Parameter(before.flatten(1).clone())
    matrix.grad = gradient.flatten(1)
    torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    assert torch.equal(hidden.detach().flatten(1), matrix.detach())
    assert not torch.equal(hidden.detach(), before)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in network.parameters())
    plain = build_optimizer(network, OptimizerRecipe(name="adamw", lr=0.1), CPU)
    assert not hasattr(plain, "convolutions")
    with pytest.raises(InvalidInputError, match="channels_last"):
        build_optimizer(network.to(memory_format=torch.channels_last), settings, CPU)
