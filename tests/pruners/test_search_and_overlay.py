"""VFlowOpt's search goes on where it stopped and never does worse than its random points; overlays show what stayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pruners.models import build, greedy, prompt
from vistok.errors import CheckpointError, InvalidInputError
from vistok.pruners import DivPrune, FoPru, Settings, VFlowOpt, kept_grid, overlay
from vistok.pruners.vflowopt import average_kept
from vistok.pruners.vflowopt_search import SearchResult, box_for, search

pytest.importorskip("optuna")

BOX = {"first": (0.4, 0.6), "threshold": (0.8, 1.5), "cell_size": (3.0, 4.0), "entropy_weight": (0.0, 0.0)}


def test_search_resumes_and_repeats(tmp_path: Path) -> None:
    model = build("llava_onevision")
    samples = [prompt(model, "llava_onevision", seed) for seed in range(2)]
    options = {"target": 0.4, "random_trials": 3, "box": BOX, "layers": (1, 3)}
    journal = tmp_path / "new" / "journal"
    seen: list[int] = []
    first = search(model, samples, trials=2, storage=journal, on_trial=lambda done, *_: seen.append(done), **options)
    second = search(model, samples, trials=4, storage=journal, on_trial=lambda done, *_: seen.append(done), **options)
    assert seen == [1, 2, 3, 4]
    assert second.trials[: len(first.trials)] == first.trials
    assert second.objective == max(trial.objective for trial in second.trials) >= first.objective
    assert 0.3 < second.objective <= 1.0 + 1e-6
    best = VFlowOpt(second.settings, layers=second.layers)
    with torch.no_grad(), best.attached(model):
        kept = []
        for sample in samples:
            model(**sample)
            kept.append(best.last_report.average_kept)
    assert sum(kept) / 2 <= 1.1 * 0.4 + 1e-9, "the budget is that of the tokens really kept"
    assert all(average_kept(trial.settings.ratios, (1, 2, 1)) <= 0.4 + 1e-9 for trial in second.trials)
    second.save(tmp_path / "found.json")
    assert SearchResult.load(tmp_path / "found.json") == second
    assert "cosine" in str(second)
    # The objective is what attaching the pruner really does.
    held: list[torch.Tensor] = []
    hook = model.model.language_model.norm.register_forward_hook(lambda m, a, output: held.append(output[:, -1]))
    total = 0.0
    with torch.no_grad():
        for sample in samples:
            held.clear()
            model(**sample)
            with VFlowOpt(second.settings, layers=second.layers).attached(model):
                model(**sample)
            total += float(torch.cosine_similarity(held[0], held[1]))
    hook.remove()
    assert total / 2 == pytest.approx(second.objective, abs=1e-5)


def test_search_refuses_bad_input(tmp_path: Path) -> None:
    model = build("llava")
    sample = prompt(model, "llava")
    with pytest.raises(InvalidInputError, match="average share"):
        box_for(1.5)
    with pytest.raises(InvalidInputError, match="at least one sample"):
        search(model, [], box=BOX)
    with pytest.raises(InvalidInputError, match="unknown ranges"):
        search(model, [sample], box={"alpha": (0.0, 1.0)})
    with pytest.raises(InvalidInputError, match="no pictures"):
        search(model, [{"input_ids": sample["input_ids"]}], box=BOX)
    with pytest.raises(InvalidInputError, match="ascend"):
        search(model, [sample], layers=(3, 3))
    with pytest.raises(InvalidInputError, match="no point of the box"):
        search(model, [sample], target=0.1, box={**BOX, "first": (0.9, 0.9), "second": (1.0, 1.0)}, trials=1)
    with pytest.raises(InvalidInputError, match="fewer and larger cells"):  # sixteen cells leave sixteen tokens
        search(model, [sample], target=0.2, box={**BOX, "first": (0.2, 0.2), "cell_size": (1.0, 1.0)}, trials=1)
    (tmp_path / "odd.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no result"):
        SearchResult.load(tmp_path / "odd.json")


def test_overlay_darkens_dropped_tokens() -> None:
    from PIL import Image

    model = build("llava_next")
    pruner = FoPru(0.3)
    with torch.no_grad(), pruner.attached(model):
        greedy(model, prompt(model, "llava_next"), steps=2)
    (visual,) = pruner.last_report.stages[0].visuals
    base, whole = kept_grid(visual, 0), kept_grid(visual)
    assert base.shape == (4, 4)
    assert int(base.sum()) == 4
    assert whole.shape == (4, 8)
    drawn = overlay(Image.new("RGB", (80, 40), (200, 200, 200)), visual)
    pixels = torch.tensor(list(drawn.getdata())).view(40, 80, 3)[5::10, 5::10, 0]
    assert torch.equal(pixels == 200, whole)
    with pytest.raises(InvalidInputError, match="dim"):
        overlay(drawn, visual, dim=2)
    with pytest.raises(InvalidInputError, match="views"):
        kept_grid(visual, 7)


def test_settings_found_elsewhere_are_plain_data() -> None:
    assert VFlowOpt(Settings((0.5,), 1.0, 2.0)).plan(4, 100) == [50] * 4
    assert DivPrune(0.25).plan(2, 8) == [2, 2]
