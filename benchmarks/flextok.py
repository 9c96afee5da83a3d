"""FlexTok: decoding prefixes and writing tokens, vistok against the plain way, on the same weights and draws.

    python -m benchmarks.flextok [--size d12|tiny] [--depth 12] [--lengths 1 8 32 128 256] [--steps 2] [--tokens 256]
                                 [--repeats 3]

The plain way carries every register in every pass, computes modulations in every step, runs two passes for guidance,
and reads the whole prefix again for each token. Results must agree; by how much they differ is part of the result.
Weights are random, which changes no timing. Without a GPU, seconds are CPU seconds of this process: other ones
count little then.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.plain import flextok as plain
from benchmarks.timing import bars, interleaved, save, summary
from vistok.generators import FlexTokAR
from vistok.tokenizers import FlexTok

RESULTS = Path(__file__).parent / "results"
# Published widths; the auto-encoder is left out of the timings and made small.
TOKENIZERS: dict[str, dict[str, Any]] = {
    "d12": {"vae_block_out_channels": (32, 32, 32, 32), "vae_layers_per_block": 1},
    "tiny": {},
}
GENERATORS: dict[str, dict[str, Any]] = {
    "d12": {"vocab_size": 64000, "hidden_size": 768, "num_heads": 12},
    "tiny": {},
}


def clock() -> Callable[[], float]:
    """What reads the time: of this process alone on a CPU."""
    return time.perf_counter if torch.cuda.is_available() else time.process_time


def tokenizer(size: str, depth: int) -> FlexTok:
    """A random network in eval mode whose modulations and heads are not zero."""
    torch.manual_seed(0)
    if size == "tiny":
        return FlexTok.tiny()
    model = FlexTok(**TOKENIZERS[size], encoder_depth=1, decoder_depth=depth).eval()  # nothing is encoded here
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if "modulation" in name or name.startswith("head"):
                parameter.normal_(std=0.02)
    return model


def decoding(
    size: str, depth: int, lengths: Sequence[int], steps: int, batch: int, repeats: int
) -> list[dict[str, Any]]:
    """Seconds to draw latents from prefixes of each length, with guidance."""
    model = tokenizer(size, depth)
    total = model.num_registers
    ids = torch.randint(model.codebook_size, (batch, total), generator=torch.Generator().manual_seed(1))
    noise = model.draw_noise(batch, generator=torch.Generator().manual_seed(2))
    found = []
    for length in lengths:
        kept = ids[:, :length]
        settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 7.5}

        def ours(kept: torch.Tensor = kept, settings: dict[str, Any] = settings) -> torch.Tensor:
            model.decoder._schedule = None  # every run pays for its modulations
            *_, latents = model.denoise(list(kept), noise=noise, **settings)
            return latents

        def theirs(kept: torch.Tensor = kept, settings: dict[str, Any] = settings) -> torch.Tensor:
            return plain.decode_latents(model, kept, [kept.shape[1]] * batch, noise, **settings)

        expected = theirs()  # these two also warm up
        difference = float((ours() - expected).abs().max() / expected.abs().max())
        seconds = interleaved({"plain": theirs, "vistok": ours}, repeats, warmup=0, clock=clock())
        rows = {name: summary(times) for name, times in seconds.items()}
        found.append(
            {
                "tokens": length,
                "rows": rows,
                "difference": difference,
                "times_plain": rows["plain"]["median"] / rows["vistok"]["median"],
            }
        )
    return found


def writing(size: str, depth: int, tokens: int, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds to write tokens with guidance."""
    torch.manual_seed(0)
    model = FlexTokAR.tiny() if size == "tiny" else FlexTokAR(**GENERATORS[size], num_layers=depth).eval()
    labels = torch.arange(batch) % int(model.num_classes or 1)
    settings: dict[str, Any] = {"guidance_scale": 1.5, "top_k": 50, "num_tokens": min(tokens, model.num_tokens)}

    def ours() -> torch.Tensor:
        return model.generate(labels, generator=torch.Generator().manual_seed(1), **settings).ids

    def theirs() -> torch.Tensor:
        return plain.generate(model, labels, generator=torch.Generator().manual_seed(1), **settings)

    found: dict[str, torch.Tensor] = {}

    def keep(name: str, run: Callable[[], torch.Tensor]) -> Callable[[], None]:
        return lambda: found.update({name: run()})

    variants = {"plain": keep("plain", theirs), "vistok": keep("vistok", ours)}
    seconds = interleaved(variants, repeats, warmup=0, clock=clock())
    same = float((found["vistok"] == found["plain"]).float().mean())
    rows = {name: summary(times) for name, times in seconds.items()}
    times = rows["plain"]["median"] / rows["vistok"]["median"]
    return {"tokens": settings["num_tokens"], "rows": rows, "same_tokens": same, "times_plain": times}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(TOKENIZERS), default="d12")
    parser.add_argument("--depth", type=int, default=12, help="blocks of either network (published: 12)")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1, 8, 32, 128, 256])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "flextok")
    given = parser.parse_args(arguments)
    drawn = decoding(given.size, given.depth, given.lengths, given.steps, given.batch, given.repeats)
    for one in drawn:
        print(
            f"decode {one['tokens']:>3} tokens, {given.steps} steps: {1000 * one['rows']['plain']['median']:.0f} -> "
            f"{1000 * one['rows']['vistok']['median']:.0f} ms, {one['times_plain']:.2f}x, "
            f"relative difference {one['difference']:.1e}"
        )
    written = writing(given.size, given.depth, given.tokens, given.batch, given.repeats)
    print(
        f"write {written['tokens']} tokens: {written['rows']['plain']['median']:.2f} -> "
        f"{written['rows']['vistok']['median']:.2f} s, {written['times_plain']:.2f}x, "
        f"{100 * written['same_tokens']:.1f} % same tokens"
    )
    save(
        given.output.with_suffix(".json"),
        {
            "size": given.size,
            "depth": given.depth,
            "steps": given.steps,
            "batch": given.batch,
            "decoding": drawn,
            "writing": written,
        },
    )
    bars(
        given.output.with_suffix(".png"),
        {
            "decoding, guided": {f"vistok, {one['tokens']} tokens": one["times_plain"] for one in drawn},
            "writing, guided": {f"vistok, {written['tokens']} tokens": written["times_plain"]},
        },
        "times as fast as the plain way",
        f"size {given.size} with {given.depth} blocks, batch {given.batch}",
    )


if __name__ == "__main__":
    main()
