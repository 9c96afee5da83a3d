"""What steering costs: time a denoising step, and of a whole call, with and without each controller attached.

    python -m benchmarks.controllers [--size lab sd1.5-widths] [--controller ...] [--batch 1] [--steps 20] [--repeats 7]

Controllers of the prompt (attribute directions, leakage fixes) edit text states before the first step; a step should
cost what it costs without them. The variants take turns on one pipeline, in another order each round; what counts is
processor time (`--wall` for the clock on the wall) and each variant's least round, which other work on the machine
disturbed least. `none, again` is the pipeline without a controller a second time: how far it is from `none` is the
error of the measurement. Timings do not depend on what the weights are: they are random. Latents are not decoded.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from benchmarks.timing import bars, save
from vistok.attach import Attachable
from vistok.controllers import (
    AttributeDelta,
    AttributeDirections,
    AttributeEdit,
    KeepOnly,
    LeakageFix,
    Tenor,
)
from vistok.nn.prompts import describe_pipeline
from vistok.training.text_to_image import TextToImage

RESULTS = Path(__file__).parent / "results"
PROMPT = "a large red circle to the left of a small blue star"
GOAL = 0.03  # of a step
AGAIN = "none, again"

# The shipped lab pipeline, and Stable Diffusion 1.5 at its published widths with one block a level in place of two and
# its whole text encoder, on latents of a quarter of its side: what a step costs falls with the latents, what a
# controller costs does not.
SIZES: dict[str, dict[str, Any]] = {
    "lab": {},
    "sd1.5-widths": {
        "latent_channels": 4,
        "sample_size": 16,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_heads": 8,
        "norm_num_groups": 32,
        "time_embedding_dim": 1280,
        "text_hidden_size": 768,
        "text_layers": 12,
        "text_heads": 12,
        "text_ffn_size": 3072,
        "max_length": 77,
    },
}


def _directions(pipe: Any) -> AttributeDirections:
    widths = {slot.key: slot.width for slot in describe_pipeline(pipe).encoders if slot.tokens}
    return AttributeDirections(AttributeEdit(AttributeDelta.tiny(widths), "star", 1.0), delay=0.2)


def _leakage(pipe: Any) -> Attachable:
    return LeakageFix(["large red circle", "small blue star"], drop="redundant")


def _both(pipe: Any) -> Attachable:
    return LeakageFix(["small blue star"]) & _directions(pipe)


CONTROLLERS: dict[str, Callable[[Any], Attachable]] = {
    "attribute directions": _directions,
    "leakage fix": _leakage,
    "both": _both,
    "keep only": lambda pipe: KeepOnly(["small blue star"]),
    "tenor": lambda pipe: Tenor(),
}


def build(size: str, **overrides: Any) -> Any:
    """A stock diffusers pipeline with random weights."""
    torch.manual_seed(0)
    model = TextToImage(**{**SIZES[size], **overrides}).eval()
    vae = AutoencoderKL(  # the smallest with a factor of 8; nothing is decoded
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=model.config.latent_channels,
    )
    return model.pipeline(vae)


class _Marks:
    """Times at which the denoiser is entered during one call."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.times: list[float] = []

    def __call__(self, module: Any, inputs: Any) -> None:
        self.times.append(self.clock())

    def step(self) -> float:
        """Median seconds from one entry to the next."""
        return statistics.median(after - before for before, after in zip(self.times, self.times[1:]))


def measure(
    pipe: Any,
    controllers: Sequence[str],
    *,
    batch: int,
    steps: int,
    repeats: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, dict[str, float]]:
    """Seconds a step and a call of every controller, and how much more that is than without one.

    Returns:
        For `none`, `none, again` and each controller: `step` (median of a call) and `call`, of the least round, and
        `step_overhead` and `call_overhead`, what that is more than for `none`, as a part of it.
    """
    made: dict[str, Attachable | None] = {
        "none": None,
        AGAIN: None,
        **{name: CONTROLLERS[name](pipe) for name in controllers},
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {"step": [], "call": []} for name in made}

    def call() -> tuple[float, float]:
        marks = _Marks(clock)
        hook = pipe.unet.register_forward_pre_hook(marks)
        begun = clock()
        pipe(
            PROMPT,
            num_images_per_prompt=batch,
            num_inference_steps=steps,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        spent = clock() - begun
        hook.remove()
        return marks.step(), spent

    for round_number in range(repeats + 1):
        turned = list(made)[round_number % len(made) :] + list(made)[: round_number % len(made)]
        for name in turned:
            controller = made[name]
            if controller is None:
                step, whole = call()
            else:
                with controller.attached(pipe):
                    step, whole = call()
            if round_number:  # the first round warms up
                seconds[name]["step"].append(step)
                seconds[name]["call"].append(whole)
    rows = {name: {unit: min(values) for unit, values in found.items()} for name, found in seconds.items()}
    for row in rows.values():
        for unit in ("step", "call"):
            row[f"{unit}_overhead"] = row[unit] / rows["none"][unit] - 1
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--controller", nargs="+", choices=list(CONTROLLERS), default=list(CONTROLLERS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--wall", action="store_true", help="the clock on the wall in place of processor time")
    parser.add_argument("--output", type=Path, default=RESULTS / "controllers")
    given = parser.parse_args(arguments)
    clock = time.perf_counter if given.wall else time.process_time
    found = []
    for size in given.size:
        pipe = build(size)
        parameters = sum(value.numel() for value in pipe.unet.parameters())
        for batch in given.batch:
            rows = measure(pipe, given.controller, batch=batch, steps=given.steps, repeats=given.repeats, clock=clock)
            found.append({"size": size, "batch": batch, "unet_parameters": parameters, "rows": rows})
            print(f"\n{size}, UNet of {parameters:,} parameters, batch {batch}, {given.steps} steps")
            for name, row in rows.items():
                print(
                    f"  {name:<22} {1000 * row['step']:>9.2f} ms a step {100 * row['step_overhead']:>+6.1f} %   "
                    f"{1000 * row['call']:>9.1f} ms a call {100 * row['call_overhead']:>+6.1f} %"
                )
        del pipe
    settings = {
        "steps": given.steps,
        "repeats": given.repeats,
        "guidance": True,
        "clock": "wall" if given.wall else "processor",
        "prompt": PROMPT,
        "goal": GOAL,
    }
    save(given.output.with_suffix(".json"), {"settings": settings, "measurements": found})
    bars(
        given.output.with_suffix(".png"),
        {
            f"{one['size']}, batch {one['batch']}": {
                name: 100 * row["step_overhead"] for name, row in one["rows"].items() if name != "none"
            }
            for one in found
        },
        "% more time a step",
        f"guidance on, {given.steps} steps, {settings['clock']} time, least of {given.repeats} rounds; "
        f"goal {100 * GOAL:.0f} %",
    )


if __name__ == "__main__":
    main()
