"""Prefill time of a LLaVA-1.5 decoder of published width with visual tokens pruned, against what FLOPs promise.

    python -m benchmarks.pruners [--size 7b|lab] [--layers 32] [--side 24] [--device cuda] [--dtype bfloat16]

Weights are random: times do not depend on them. Image features are made once, outside the measurement, so that tower
and projector do not dilute the figures; their time stands beside. `overhead` is the time that scoring and selecting
add when everything is kept, as a share of the unpruned prefill. The variants take turns.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import bars, interleaved, save, summary
from vistok.pruners import DivPrune, FasterVLM, FastV, FoPru, Pruner, PyramidDrop, RandomPruner, TransPrune, VFlowOpt
from vistok.pruners.vflowopt import Settings

RESULTS = Path(__file__).parent / "results"
SIZES: dict[str, dict[str, Any]] = {
    "lab": {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
}
TOWER: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 14,
    "projection_dim": 16,
}
TEXT = 64


def build(size: str, layers: int, side: int, device: str, dtype: torch.dtype) -> Any:
    """A random model; the tower is small, as it is not measured."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 1000,
            "num_hidden_layers": layers,
            "max_position_embeddings": 8192,
            **SIZES[size],
        },
        vision_config={**TOWER, "image_size": side * TOWER["patch_size"]},
        image_token_index=999,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def methods(layers: int, ratio: float) -> dict[str, Pruner]:
    """Every kind of method at about one share of tokens over the depth; 1.0 scores everything and drops nothing."""
    three = (ratio,) if ratio == 1.0 else (min(1.0, 1.4 * ratio), 0.8, 0.8)
    share = min(1.0, ratio)
    late = 1.0 if ratio == 1.0 else max(0.01, (ratio * layers - 2) / (layers - 2))
    found: dict[str, Pruner] = {
        "FoPru": FoPru(share),
        "FasterVLM": FasterVLM(share),
        "DivPrune": DivPrune(share),
        "FastV": FastV(late, layer=2),
        "TransPrune-High": TransPrune("high", **({"ratios": (1.0, 1.0, 1.0)} if ratio == 1.0 else {})),
        "PyramidDrop": PyramidDrop(
            tuple(layers * part // 4 for part in (1, 2, 3)), (1.0,) * 3 if ratio == 1.0 else (0.5, 0.25, 0.125)
        ),
        "VFlowOpt": VFlowOpt(
            Settings(three if ratio < 1 else (1.0, 1.0, 1.0), 1.0, 6.0), layers=(layers // 3, 2 * layers // 3)
        ),
        "random": RandomPruner(share),
    }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="lab")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--side", type=int, default=24, help="patches along one side of the picture")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS / "pruners")
    given = parser.parse_args(arguments)
    model = build(given.size, given.layers, given.side, given.device, getattr(torch, given.dtype))
    visual = given.side**2
    words = torch.randint(0, 900, (given.batch, TEXT), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([words[:, : TEXT // 2], torch.full((given.batch, visual), 999), words[:, TEXT // 2 :]], dim=1)
    ids = ids.to(given.device)
    pixel = given.side * TOWER["patch_size"]
    pixels = torch.randn(given.batch, 3, pixel, pixel, device=given.device, dtype=model.dtype)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {visual} visual and {TEXT} text tokens")

    # Attached and plain models take turns, so there are two; they share their weights.
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})

    @torch.no_grad()
    def prefill(one: Any) -> Callable[[], Any]:
        """A prefill from ready features; attaching is outside, as a server would attach once."""
        features = one.get_image_features(pixel_values=pixels, return_dict=True)

        @torch.no_grad()
        def run() -> Any:
            return one(input_ids=ids, mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1)

        return run

    def measured(pruner: Pruner | None) -> tuple[list[float], list[float]]:
        """Seconds of the unpruned and the pruned prefill, turn by turn."""
        if pruner is None:
            return interleaved({"plain": prefill(model)}, given.repeats)["plain"], []
        with pruner.attached(twin):
            found = interleaved({"plain": prefill(model), "pruned": prefill(twin)}, given.repeats)
        return found["plain"], found["pruned"]

    rows: list[dict[str, Any]] = []
    for ratio in (None, *given.ratios):
        for name, pruner in ({"unpruned": None} if ratio is None else methods(given.layers, ratio)).items():
            # Those whose schedule is published do not follow the ratio: once is enough.
            if pruner is not None and ratio != given.ratios[0] and name in ("TransPrune-High", "PyramidDrop"):
                continue
            plain, pruned = measured(pruner)
            label = name if ratio is None or name in ("TransPrune-High", "PyramidDrop") else f"{name} {ratio:g}"
            row: dict[str, Any] = {"name": label, "seconds": summary(pruned or plain), "plain": summary(plain)}
            if pruner is None:
                shape = model.config.text_config
                heads = shape.num_key_value_heads * shape.hidden_size // shape.num_attention_heads
                count = given.layers * given.batch * (visual + TEXT)
                row |= {"flops_share": 1.0, "time_share": 1.0, "kv_bytes": 2 * count * heads * model.dtype.itemsize}
            else:
                report = pruner.last_report
                assert report is not None
                promised = report.flops / report.unpruned_flops
                share = row["seconds"]["median"] / row["plain"]["median"]
                keep = methods(given.layers, 1.0)[name]
                plain_again, scoring = measured(keep)
                overhead = summary(scoring)["median"] / summary(plain_again)["median"] - 1
                row |= {
                    "flops_share": promised,
                    "time_share": share,
                    "reached": (1 - share) / (1 - promised),
                    "overhead": overhead,
                    "kv_bytes": report.kv_bytes,
                    "average_kept": report.average_kept,
                }
            rows.append(row)
            text = (
                f"  {label:<18} {1000 * row['seconds']['median']:8.2f} ms  {100 * row['time_share']:5.1f} % of the time"
            )
            if "reached" in row:
                text += (
                    f"  {100 * row['flops_share']:5.1f} % of the FLOPs  {100 * row['reached']:5.1f} % of the promise  "
                    f"overhead {100 * row['overhead']:5.2f} %"
                )
            print(f"{text}  cache {row['kv_bytes'] / 2**20:.1f} MiB", flush=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    save(given.output.with_suffix(".json"), {"settings": settings, "rows": rows})
    bars(
        given.output.with_suffix(".png"),
        {
            "prefill, share of the unpruned time": {row["name"]: row["time_share"] for row in rows},
            "share of the FLOPs": {row["name"]: row["flops_share"] for row in rows},
        },
        "share",
        f"{given.size} width, {given.layers} layers, {visual} visual tokens, {given.dtype}",
    )


if __name__ == "__main__":
    main()
