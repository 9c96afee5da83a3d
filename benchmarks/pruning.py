"""Prefill time of LVLM decoders with visual tokens pruned, against what the FLOPs promise, and what selecting costs.

    OMP_NUM_THREADS=1 python -m benchmarks.pruning --size lab --batch 1 16
    OMP_NUM_THREADS=1 python -m benchmarks.pruning --size 7b --layers 16 --dtype bfloat16

`7b` has layers of LLaVA-1.5-7B's shape (4096 wide, 202 M weights each: sixteen are 6.5 GB in bfloat16), with 576 visual
and 64 text tokens; `lab` has the shape of a shipped lab model. Weights are random: times do not depend on them.

- Image features are made outside the measured prefill, so that tower and projector do not dilute the figures.
- *reached* is the share of the promised reduction: (1 - time share) / (1 - FLOPs share).
- *selection* is the time inside the pruner's hooks (scoring, choosing, compacting, the tower's attention map), as a
  share of the unpruned prefill.
- The variants take turns. With one thread on a CPU the clock counts seconds of this process, which other programs on a
  busy machine disturb far less than the wall clock's.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import bars, interleaved, save, summary
from vistok.errors import InvalidInputError
from vistok.kernels.attention_rows import attention_received, reference
from vistok.metrics.pruning import METHODS, Target, make_pruner
from vistok.pruners.cost import DecoderShape, kv_bytes

RESULTS = Path(__file__).parent / "results"
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}
SIZES: dict[str, dict[str, Any]] = {
    "lab": {
        "decoder": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
        "tower": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "patch_size": 4},
        "layers": 8,
        "side": 16,
        "text": 16,
    },
    "7b": {
        "decoder": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
        "tower": CLIP_L,
        "layers": 16,
        "side": 24,
        "text": 64,
    },
}
TOWER_LAYERS = 3  # the tower itself is not measured; the map that selection reads is
KEPT_ALIVE = "unpruned"


def build(size: str, layers: int, device: str, dtype: torch.dtype) -> Any:
    """A random LLaVA; weights are drawn in place, as the library's own drawing takes minutes at published width."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.initialization import no_init_weights

    shape = SIZES[size]
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 1000,
            "num_hidden_layers": layers,
            "max_position_embeddings": 8192,
            **shape["decoder"],
        },
        vision_config={
            "model_type": "clip_vision_model",
            "num_hidden_layers": TOWER_LAYERS,
            "projection_dim": 16,
            "image_size": shape["side"] * shape["tower"]["patch_size"],
            **shape["tower"],
        },
        image_token_index=999,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.uniform_(-1.0, 1.0).mul_(parameter.shape[-1] ** -0.5)
            else:
                parameter.fill_(1.0)
    return model.eval()


# -------------------------------------------------------------------------------------------------------------- clocks
def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch:
    """Seconds spent inside forward hooks that were registered while `listening`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds, self.depth, self.active = clock, 0.0, 0, False

    def timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.active or self.depth:  # scoring calls modules whose own hooks run inside
                return hook(*args, **kwargs)
            self.depth += 1
            synchronize()
            started = self.clock()
            try:
                return hook(*args, **kwargs)
            finally:
                synchronize()
                self.seconds += self.clock() - started
                self.depth -= 1

        return run

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Time the hooks that are registered in this block."""
        originals = {name: getattr(nn.Module, name) for name in ("register_forward_hook", "register_forward_pre_hook")}

        def registering(name: str) -> Callable[..., Any]:
            def register(module: nn.Module, hook: Callable[..., Any], **options: Any) -> Any:
                return originals[name](module, self.timed(hook), **options)

            return register

        for name in originals:
            setattr(nn.Module, name, registering(name))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(nn.Module, name, original)

    def of(self, run: Callable[[], Any]) -> float:
        """Seconds inside the hooks in one run."""
        self.seconds, self.active = 0.0, True
        try:
            run()
        finally:
            self.active = False
        return self.seconds


def clock_for(device: str) -> tuple[Callable[[], float], str]:
    """The clock, and what it counts."""
    if device == "cpu" and torch.get_num_threads() == 1:
        return time.process_time, "processor seconds of this process"
    return time.perf_counter, "wall clock"


# ------------------------------------------------------------------------------------------------------------- prefill
def measure(given: argparse.Namespace, model: Any, batch: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """One row a variant: seconds, shares, what the FLOPs promise."""
    shape = SIZES[given.size]
    visual, text = shape["side"] ** 2, shape["text"]
    words = torch.randint(0, 900, (batch, text), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([words[:, : text // 2], torch.full((batch, visual), 999), words[:, text // 2 :]], dim=1)
    ids = ids.to(given.device)
    pixel = shape["side"] * shape["tower"]["patch_size"]
    noise = torch.randn(batch, 3, pixel, pixel, generator=torch.Generator().manual_seed(1))
    pixels = noise.to(given.device, model.dtype)

    pruners: dict[str, Any] = {}
    for ratio in given.ratios:
        for method in given.methods:
            try:
                target = Target(ratio, given.layers, 1, visual, visual)
                pruners[f"{method} {ratio:g}"] = make_pruner(method, target)
            except InvalidInputError as error:
                print(f"  {method} at {ratio:g} is left out: {error}")
    runs: dict[str, Callable[[], Any]] = {}
    watches: dict[str, Stopwatch] = {}
    towers: dict[str, list[float]] = {}
    handles = []
    with torch.no_grad():
        for label in (KEPT_ALIVE, *pruners):
            # Each variant has a model of its own, all with the same weights; attaching once is what a server would do.
            twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
            watches[label] = Stopwatch(clock)
            if label in pruners:
                with watches[label].listening():
                    handles.append(pruners[label].attach(twin))

            @torch.no_grad()
            def features(twin: Any = twin) -> Any:
                return twin.get_image_features(pixel_values=pixels, return_dict=True)

            made = features()
            towers[label] = [watches[label].of(features) for _ in range(3)] if label in pruners else [0.0]

            @torch.no_grad()
            def run(twin: Any = twin, made: Any = made) -> Any:
                return twin(input_ids=ids, mm_encoder_outputs={"image": made}, use_cache=True, logits_to_keep=1)

            runs[label] = run
        inside: dict[str, list[float]] = {label: [] for label in runs}

        def noted(label: str) -> Callable[[], Any]:
            def both() -> None:
                inside[label].append(watches[label].of(runs[label]))

            return both

        if given.device == "cpu":  # reading a clock costs nothing there, so one pass gives both figures
            seconds = interleaved({label: noted(label) for label in runs}, given.repeats, clock=clock)
            inside = {label: times[-given.repeats :] for label, times in inside.items()}
        else:
            seconds = interleaved(runs, given.repeats, clock=clock)
            interleaved({label: noted(label) for label in runs}, given.repeats, clock=clock)
            inside = {label: times[-given.repeats :] for label, times in inside.items()}
    rows: list[dict[str, Any]] = []
    plain = summary(seconds[KEPT_ALIVE])
    decoder = DecoderShape.from_config(model.config)
    for label in runs:
        found = summary(seconds[label])
        row: dict[str, Any] = {"name": label, "batch": batch, "seconds": found}
        row["time_share"] = found["median"] / plain["median"]
        if label == KEPT_ALIVE:
            row |= {"flops_share": 1.0, "kv_bytes": batch * kv_bytes(decoder, [visual + text] * given.layers)}
            row["kv_bytes"] = row["kv_bytes"] // 2 * model.dtype.itemsize
        else:
            report = pruners[label].last_report
            promised = report.flops / report.unpruned_flops
            spent = summary(inside[label])["median"] + summary(towers[label])["median"]
            row |= {
                "flops_share": promised,
                "reached": (1 - row["time_share"]) / (1 - promised),
                "selection": spent / plain["median"],
                "kv_bytes": report.kv_bytes,
                "average_kept": report.average_kept,
            }
        rows.append(row)
    for handle in handles:
        handle.remove()
    return rows


def tell(row: dict[str, Any]) -> None:
    text = (
        f"  {row['name']:<18} {1000 * row['seconds']['median']:9.2f} ms  {100 * row['time_share']:5.1f} % of the time"
    )
    if "reached" in row:
        text += (
            f"  {100 * row['flops_share']:5.1f} % of the FLOPs  {100 * row['reached']:5.1f} % of the promise  "
            f"selection {100 * row['selection']:5.2f} %"
        )
    print(f"{text}  cache {row['kv_bytes'] / 2**20:.2f} MiB", flush=True)


# ---------------------------------------------------------------------------------------------------------------- rows
def measure_rows(given: argparse.Namespace, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Scores from a few attention rows, against the whole attention matrix of which they are taken."""
    shape = SIZES[given.size]
    decoder, tower = shape["decoder"], shape["tower"]
    dtype = getattr(torch, given.dtype)
    draw = torch.Generator().manual_seed(0)
    found = []
    for name, part, count, chosen in (
        ("last prompt token", decoder, shape["side"] ** 2 + shape["text"], 1),
        ("question", decoder, shape["side"] ** 2 + shape["text"], shape["text"] // 2),
        ("class token", tower, shape["side"] ** 2 + 1, 1),
        ("all patches", tower, shape["side"] ** 2 + 1, shape["side"] ** 2 + 1),
    ):
        heads, width = part["num_attention_heads"], part["hidden_size"] // part["num_attention_heads"]
        query, key = (torch.randn(1, heads, count, width, generator=draw).to(given.device, dtype) for _ in range(2))
        numbers = torch.arange(count - chosen, count, device=given.device)[None]
        causal = part is decoder
        weights = torch.zeros(1, count, device=given.device)
        weights[:, count - chosen :] = 1 / chosen
        every = torch.arange(count, device=given.device)[None] if causal else None

        def few(query: Tensor = query, key: Tensor = key, numbers: Tensor = numbers, causal: bool = causal) -> Tensor:
            return attention_received(query[:, :, -numbers.shape[1] :], key, rows=numbers if causal else None)

        def matrix(
            query: Tensor = query, key: Tensor = key, weights: Tensor = weights, every: Tensor | None = every
        ) -> Tensor:
            return reference(query, key, weights, query.shape[-1] ** -0.5, every, None)

        torch.testing.assert_close(few(), matrix(), rtol=1e-3, atol=1e-5)
        seconds = interleaved({"rows": few, "matrix": matrix}, max(5, given.repeats), clock=clock)
        one = {
            "name": name,
            "heads": heads,
            "tokens": count,
            "rows": chosen,
            "rows_seconds": summary(seconds["rows"]),
            "matrix_seconds": summary(seconds["matrix"]),
            "matrix_bytes": 4 * heads * count**2,
        }
        found.append(one)
        print(
            f"  {name:<18} {chosen:>4} of {count} rows, {heads} heads: {1000 * one['rows_seconds']['median']:8.3f} ms, "
            f"whole matrix {1000 * one['matrix_seconds']['median']:8.3f} ms and {one['matrix_bytes'] / 2**20:.1f} MiB",
            flush=True,
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="lab")
    parser.add_argument("--layers", type=int, default=None, help="decoder layers (default: 8 for lab, 16 for 7b)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.1], help="tokens left after the last stage")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=None, help="default: benchmarks/results/pruning-SIZE")
    given = parser.parse_args(arguments)
    given.layers = given.layers or SIZES[given.size]["layers"]
    given.output = given.output or RESULTS / f"pruning-{given.size}"
    clock, counted = clock_for(given.device)
    model = build(given.size, given.layers, given.device, getattr(torch, given.dtype))
    visual, text = SIZES[given.size]["side"] ** 2, SIZES[given.size]["text"]
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {visual} visual and {text} text tokens, "
        f"{given.dtype}, {counted}"
    )
    rows: list[dict[str, Any]] = []
    for batch in given.batch:
        print(f"prefill, batch {batch}")
        rows += measure(given, model, batch, clock)
        for row in rows:
            if row["batch"] == batch:
                tell(row)
    print("attention that tokens receive: needed rows against the whole matrix")
    attention = measure_rows(given, clock)
    settings = {name: value for name, value in vars(given).items() if not isinstance(value, Path)}
    save(
        given.output.with_suffix(".json"),
        {"settings": settings, "clock": counted, "rows": rows, "attention": attention},
    )
    shown = [row for row in rows if row["batch"] == given.batch[-1]]
    bars(
        given.output.with_suffix(".png"),
        {
            "prefill, share of the unpruned time": {row["name"]: row["time_share"] for row in shown},
            "share of the FLOPs": {row["name"]: row["flops_share"] for row in shown},
        },
        "share",
        f"{given.size}: {given.layers} layers, {visual} visual and {text} text tokens, batch {given.batch[-1]}, "
        f"{given.dtype}, median of {given.repeats} ({counted})",
    )


if __name__ == "__main__":
    main()
