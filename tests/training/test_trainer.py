"""The trainer: exact resume, interruption, accumulation, several processes, adversarial training."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from vistok.cli.train import train
from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.training.adversarial import AdversarialObjective, make_loss
from vistok.training.checkpoint import latest_checkpoint, load_checkpoint
from vistok.training.logs import read_metrics
from vistok.training.recipe import ScheduleRecipe, save_recipe
from vistok.training.trainer import Trainer, build_model, load_matching, lr_factor

from .common import KL, LLAMAGEN, VQ, generator_recipe, vq_recipe

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from vistok.training.recipe import load_recipe
from vistok.training.trainer import Trainer
trainer = Trainer(load_recipe(sys.argv[1]), sys.argv[2], device="cpu", tensorboard=False)
"""
DETERMINISTIC = {
    **LLAMAGEN,
    **dict.fromkeys(("condition_dropout", "token_dropout", "residual_dropout", "ffn_dropout"), 0.0),
}


@pytest.fixture(autouse=True)
def few_held_out_scenes(monkeypatch):
    monkeypatch.setattr("vistok.training.monitors.HELD_OUT_SCENES", 16)
    monkeypatch.setattr("vistok.training.monitors.SAMPLED", 16)
    monkeypatch.setattr("vistok.training.monitors.PHOTO_SIDE", 64)


def fit(recipe, run_dir, **options):
    return Trainer(recipe, run_dir, device="cpu", tensorboard=False).fit(**options)


def final(run_dir):
    return load_checkpoint(latest_checkpoint(run_dir))


def assert_same_state(first, second):
    """Weights, average and optimiser, bit for bit."""
    assert first.step == second.step
    assert first.ema_updates == second.ema_updates
    for one, other in ((first.model, second.model), (first.ema, second.ema)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert str(first.extra) == str(second.extra)


def stop_at(monkeypatch, step, number=None):
    """Raise (or send a signal to this process) in the optimiser step after `step`."""
    original = Trainer._optimizer_step

    def stopping(trainer, batches):
        if trainer.step == step:
            if number is None:
                raise RuntimeError("stopped")
            os.kill(os.getpid(), number)
        return original(trainer, batches)

    monkeypatch.setattr(Trainer, "_optimizer_step", stopping)


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.timeout(300)  # a whole interpreter starts
def test_a_killed_training_continues_bit_for_bit(tmp_path):
    """Dropout, condition dropout, shuffled tokens, decaying rate: all of it after kill -9."""
    recipe = generator_recipe(schedule={"name": "cosine", "warmup_steps": 2})
    save_recipe(tmp_path / "recipe.yaml", recipe)
    script = tmp_path / "killed.py"
    script.write_text(
        RUN
        + """
import os, signal
original = trainer._optimizer_step
def step(batches):
    if trainer.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(batches)
trainer._optimizer_step = step
trainer.fit()
"""
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        died = subprocess.run(
            [sys.executable, str(script), str(tmp_path / "recipe.yaml"), str(tmp_path / "runs" / "killed")],
            env=environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert final(tmp_path / "runs" / "killed").step == 3
        assert read_metrics(tmp_path / "runs" / "killed")[-1]["step"] == 4  # past the checkpoint: must be redone
        fit(recipe, tmp_path / "runs" / "killed")
        fit(recipe, tmp_path / "runs" / "straight")
    finally:
        torch.set_num_threads(threads)
    assert_same_state(final(tmp_path / "runs" / "killed"), final(tmp_path / "runs" / "straight"))
    resumed, straight = (read_metrics(tmp_path / "runs" / name) for name in ("killed", "straight"))
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in resumed] == [line["loss"] for line in straight]


@pytest.mark.parametrize(
    ("system", "config", "bottleneck"),
    [("vq", {**VQ, "usage_window": 64}, "codebook"), ("kl", {**KL, "sample_size": 32}, "kl")],
)
def test_a_tokenizer_against_a_discriminator_resumes_bit_for_bit(system, config, bottleneck, tmp_path, monkeypatch):
    """Two optimisers, revived codes or a sampled posterior, running statistics, accumulation."""
    recipe = vq_recipe(
        discriminator={"start_step": 2, "adaptive_weight": True},
        gradient_accumulation=2,
        model={"system": system, "config": config},
        data={"source": "shapes-images", "image_size": 32, "scenes": 4},
        steps=5,
    )
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(RuntimeError, match="stopped"):
            fit(recipe, tmp_path / "resumed")
    assert final(tmp_path / "resumed").step == 3
    fit(recipe, tmp_path / "resumed")
    fit(recipe, tmp_path / "straight")
    assert_same_state(final(tmp_path / "resumed"), final(tmp_path / "straight"))
    lines = read_metrics(tmp_path / "straight")
    assert lines[0]["discriminator_loss"] == 0.0
    assert lines[-1]["discriminator_loss"] > 0.0
    assert lines[-1]["adaptive_weight"] > 0.0
    assert all(line[bottleneck] > 0.0 for line in lines)
    assert ("usage" in lines[0]) == (system == "vq")


def test_the_objective_against_a_discriminator_is_the_published_one_before_it_starts():
    """Same loss of the bottleneck as `training_loss`; the error of the pixels is squared for VQ, absolute for KL."""
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    for system, config in (("vq", VQ), ("kl", {**KL, "kl_weight": 0.1})):
        recipe = vq_recipe(discriminator={"start_step": 9}, model={"system": system, "config": config})
        model, twin, third = (build_model(recipe) for _ in range(3))  # a pass moves codes
        objective = AdversarialObjective(twin, make_loss(system, recipe.discriminator))
        torch.manual_seed(0)
        alone = model.training_loss({"images": images})
        torch.manual_seed(0)
        together = objective({"images": images, "step": 0})
        torch.manual_seed(0)
        error = (third(images).sample - images).detach()
        expected = error.square().mean() if system == "vq" else error.abs().mean()
        torch.testing.assert_close(together["reconstruction"].detach(), expected)
        bottleneck = (alone["loss"] - alone["reconstruction"]).detach()
        torch.testing.assert_close((together["loss"] - together["reconstruction"]).detach(), bottleneck)


def test_pictures_and_validation_change_nothing(tmp_path):
    plain = fit(vq_recipe(steps=4, checkpoint_every=0), tmp_path / "plain")
    watched = fit(vq_recipe(steps=4, checkpoint_every=0, validate_every=2, sample_every=2), tmp_path / "watched")
    assert_same_state(final(plain.run_dir), final(watched.run_dir))
    assert {"val/psnr", "val/psnr_coffee", "val/codebook_usage"} <= watched.metrics.keys()
    names = sorted(path.name for path in (tmp_path / "watched" / "samples").iterdir())
    assert names == [f"{name}-{step:08d}.png" for name in ("coffee", "reconstructions") for step in (2, 4)]


def test_training_lowers_the_loss_and_samples_are_judged(tmp_path):
    recipe = generator_recipe(
        model={"system": "llamagen", "config": {**DETERMINISTIC, "grid": [8, 8]}},
        data={"source": "shapes-tokens", "image_size": 16, "scenes": 48, "condition": "class"},
        steps=40,
        optimizer={"lr": 1e-2},
        validate_every=40,
        sample_every=40,
    )
    result = fit(recipe, tmp_path / "runs" / "one")
    losses = [line["loss"] for line in read_metrics(result.run_dir) if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert 0.0 < result.metrics["val/loss"] < losses[0]
    assert 0.0 <= result.metrics["samples/class"] <= 1.0
    assert (result.run_dir / "samples" / "samples-00000040.png").is_file()


def test_captions_reach_a_generator(tmp_path):
    from vistok.training.caption_encoder import CaptionEncoder

    encoder = CaptionEncoder.tiny()
    encoder.save_transformers(tmp_path / "text", encoder.state_dict())
    config = {**LLAMAGEN, "grid": [8, 8], "num_classes": None, "caption_dim": 16, "num_condition_tokens": 24}
    recipe = generator_recipe(
        model={"system": "nar", "config": config},
        data={"source": "shapes-tokens", "image_size": 16, "scenes": 16, "condition": "caption", "objects": [1, 2]},
        text_encoder=str(tmp_path / "text"),
        steps=2,
        validate_every=2,
        sample_every=2,
    )
    result = fit(recipe, tmp_path / "runs" / "one")
    assert result.metrics["val/loss"] > 0.0
    assert 0.0 <= result.metrics["samples/caption"] <= 1.0
    assert (tmp_path / "runs" / "one" / "samples" / "samples-00000002.png").is_file()


def test_users_own_folders_are_tokenized_on_the_way(tmp_path):
    from PIL import Image

    for name, colour in (("dark", 20), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 12), (colour, number, 0)).save(tmp_path / "images" / name / f"{number}.png")
    data = {"source": "folder", "path": str(tmp_path / "images"), "image_size": 8}
    model = {"system": "llamagen", "config": {**LLAMAGEN, "num_classes": 2}}
    result = fit(generator_recipe(model=model, data=data, steps=2, sample_every=2), tmp_path / "generator")
    assert result.step == 2
    assert (tmp_path / "generator" / "samples" / "samples-00000002.png").is_file()
    tokenizer = fit(vq_recipe(data=data, steps=2, validate_every=2), tmp_path / "tokenizer")
    assert tokenizer.metrics["val/psnr"] > 0.0


def test_ctrl_c_saves_and_ends_with_130(tmp_path, monkeypatch):
    app = typer.Typer()
    app.command()(train)
    save_recipe(tmp_path / "recipe.yaml", vq_recipe(checkpoint_every=0))
    arguments = [str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "run"), "--device", "cpu", "--no-tensorboard"]
    handlers = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_at(patch, 2, signal.SIGINT)
        ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 130, ended.output
    assert "interrupted at step 3 of 6" in ended.output
    assert final(tmp_path / "run").step == 3
    assert signal.getsignal(signal.SIGINT) is handlers
    assert CliRunner().invoke(app, [*arguments, "--no-resume"]).exit_code == 1
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "finished at step 6 of 6" in done.output
    fit(vq_recipe(checkpoint_every=0), tmp_path / "straight")
    assert_same_state(final(tmp_path / "run"), final(tmp_path / "straight"))


def test_another_recipe_is_refused_by_field(tmp_path):
    fit(vq_recipe(steps=1), tmp_path)
    with pytest.raises(InvalidInputError, match=r"seed: 0 -> 1; optimizer\.lr: 0\.0001 -> 0\.01|optimizer\.lr.*"):
        fit(vq_recipe(steps=1, seed=1, optimizer={"lr": 0.01}), tmp_path)
    with pytest.raises(InvalidInputError, match="already holds a run"):
        fit(vq_recipe(steps=1), tmp_path, resume=False)
    assert fit(vq_recipe(steps=1, log_every=9), tmp_path).step == 1


def test_accumulation_takes_the_same_steps(tmp_path):
    model = {"system": "llamagen", "config": DETERMINISTIC}
    for parts in (1, 4):
        fit(generator_recipe(model=model, gradient_accumulation=parts), tmp_path / "runs" / str(parts))
    whole, divided = (final(tmp_path / "runs" / str(parts)) for parts in (1, 4))
    for name, value in whole.model.items():
        torch.testing.assert_close(divided.model[name], value, atol=2e-5, rtol=1e-4)


@pytest.mark.timeout(300)  # three interpreters start
def test_two_processes_follow_the_same_trajectory(tmp_path):
    model = {"system": "llamagen", "config": DETERMINISTIC}
    recipe = generator_recipe(model=model, gradient_accumulation=2)
    fit(recipe, tmp_path / "runs" / "one")
    save_recipe(tmp_path / "recipe.yaml", recipe)
    (tmp_path / "run.py").write_text(RUN + "assert trainer.accelerator.num_processes == 2\ntrainer.fit()\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # accelerate has no launcher of its own for CPUs: --cpu asks for MPI, --multi_gpu is torchrun and takes any device.
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    command += [str(tmp_path / "run.py"), str(tmp_path / "recipe.yaml"), str(tmp_path / "runs" / "two")]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_metrics(tmp_path / "runs" / name) for name in ("one", "two"))
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    alone, together = final(tmp_path / "runs" / "one"), final(tmp_path / "runs" / "two")
    for name, value in alone.ema.items():
        torch.testing.assert_close(together.ema[name], value, atol=1e-5, rtol=1e-4)


def test_init_from_takes_what_fits(tmp_path):
    fit(generator_recipe(steps=1), tmp_path / "runs" / "first")
    config = {**LLAMAGEN, "num_classes": 70}
    start = {"system": "llamagen", "config": config, "init_from": str(tmp_path / "runs" / "first")}
    trainer = Trainer(
        generator_recipe(steps=1, model=start), tmp_path / "runs" / "second", device="cpu", tensorboard=False
    )
    trainer._claim_folder(True)
    trainer._set_up()
    given = final(tmp_path / "runs" / "first").ema
    own = trainer.model.state_dict()
    assert torch.equal(own["tok_embeddings.weight"], given["tok_embeddings.weight"])
    report = (tmp_path / "runs" / "second" / "init_from.txt").read_text()
    assert "[65, 16] in the checkpoint, not [71, 16], starts at random" in report
    assert len(report.splitlines()) == 1
    with pytest.raises(CheckpointError, match="no tensor"):
        load_matching(trainer.model, {"elsewhere": torch.zeros(1)})


def test_a_loss_that_is_no_number_ends_the_training(tmp_path, monkeypatch):
    from vistok.tokenizers.vq import VQModel

    monkeypatch.setattr(
        VQModel, "training_loss", lambda self, batch: {"loss": self.encoder.conv_in.weight.sum() * float("nan")}
    )
    with pytest.raises(InvalidOutputError, match=r"loss is nan at step 1; .*optimizer\.lr"):
        fit(vq_recipe(), tmp_path)
    assert latest_checkpoint(tmp_path) is None


def test_bad_wishes_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match=r"codebook_siz.*did you mean codebook_size"):
        build_model(vq_recipe(model={"system": "vq", "config": {"codebook_siz": 3}}))
    with pytest.raises(InvalidInputError, match="expected cpu or cuda"):
        Trainer(vq_recipe(), tmp_path, device="gpu")
    with pytest.raises(InvalidInputError, match="use bf16 or no"):
        Trainer(vq_recipe(precision="fp16"), tmp_path, device="cpu")
    wrong = {"system": "llamagen", "config": {**LLAMAGEN, "vocab_size": 99}}
    with pytest.raises(InvalidInputError, match=r"vocab_size is 99, but the tokenizer 'vq\.tiny' has 64"):
        fit(generator_recipe(model=wrong), tmp_path)


def test_workers_and_mixed_precision_run_and_log_to_tensorboard(tmp_path):
    recipe = vq_recipe(workers=1, precision="bf16", channels_last=True, steps=2, ema_decay=0.0, sample_every=2)
    result = Trainer(recipe, tmp_path, device="cpu").fit()
    assert result.status == "finished"
    assert final(tmp_path).ema is None
    assert any((tmp_path / "tensorboard").iterdir())


def test_schedules():
    steps = 100
    cosine = ScheduleRecipe(name="cosine", warmup_steps=10, final_ratio=0.1)
    assert lr_factor(cosine, 0, steps) == pytest.approx(0.1)
    assert lr_factor(cosine, 9, steps) == lr_factor(cosine, 10, steps) == 1.0
    assert lr_factor(cosine, 55, steps) == pytest.approx(0.55)
    assert lr_factor(cosine, 100, steps) == pytest.approx(0.1)
    drops = ScheduleRecipe(name="step")  # NAR: x0.2 at 50 %, 66.7 % and 83.3 %
    assert [round(lr_factor(drops, step, 300), 4) for step in (0, 149, 150, 200, 250)] == [1, 1, 0.2, 0.04, 0.008]
    assert lr_factor(ScheduleRecipe(), 5, steps) == 1.0
