"""Checkpoints are whole or absent; the moving average follows the weights."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from vistok.errors import CheckpointError
from vistok.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from vistok.training.ema import EMA
from vistok.training.logs import MetricsLog, read_metrics


def checkpoint(step: int) -> Checkpoint:
    weights = {"a": torch.full((2, 3), float(step)), "b": torch.arange(step)}
    return Checkpoint(step, weights, {"a": weights["a"] / 2}, step, {"optimizer": {"state": {0: {"x": weights["a"]}}}})


def test_what_is_saved_is_loaded_and_old_ones_go(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, checkpoint(step), {"width": 3}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]
    loaded = load_checkpoint(latest_checkpoint(tmp_path))
    assert loaded.step == loaded.ema_updates == 10
    assert torch.equal(loaded.model["b"], torch.arange(10))
    assert torch.equal(loaded.ema["a"], torch.full((2, 3), 5.0))
    assert torch.equal(loaded.extra["optimizer"]["state"][0]["x"], torch.full((2, 3), 10.0))


@pytest.mark.parametrize("failing", ["torch.save", "vistok.training.checkpoint.os.replace"])
def test_a_failed_save_leaves_the_old_ones(tmp_path, monkeypatch, failing):
    save_checkpoint(tmp_path, checkpoint(1), {}, keep=1)

    def full(*arguments, **options):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(failing, full)
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(tmp_path, checkpoint(2), {}, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert load_checkpoint(latest_checkpoint(tmp_path)).step == 1


def test_half_written_folders_are_ignored_and_cleared(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), {}, keep=3)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000001", folder / ".step-00000002.partial")
    torn = shutil.copytree(folder / "step-00000001", folder / "step-00000003")
    (torn / "progress.json").unlink()
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    save_checkpoint(tmp_path, checkpoint(3), {}, keep=3)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000003"]


def test_damage_is_reported(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(1), {}, keep=1)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        load_checkpoint(path)
    (path / "progress.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"progress\.json"):
        load_checkpoint(path)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.ones(2), persistent=False)


def test_the_average_is_the_exponential_one():
    model = Small()
    ema = EMA(model, decay=0.5)
    expected = torch.zeros(3)
    for step in range(1, 30):
        with torch.no_grad():
            model.weight.fill_(step)
            model.count += 2
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        ema.update(model)
    assert torch.allclose(ema.state_dict()["weight"], expected)
    assert ema.state_dict()["count"] == 58
    assert set(ema.state_dict()) == set(model.state_dict())
    with ema.applied(model):
        assert torch.equal(model.weight, ema.state_dict()["weight"])
    assert model.weight.tolist() == [29.0] * 3
    with pytest.raises(CheckpointError, match="other"):
        ema.load_state_dict({"weight": torch.zeros(3), "other": torch.zeros(1)}, 1)


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    for step in range(1, 5):
        log.write(step, {"loss": 1 / step})
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')  # cut off by a crash
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    MetricsLog(tmp_path, 3, tensorboard=False).write(4, {"loss": 9.0})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 0.5, 0.333333, 9.0]
