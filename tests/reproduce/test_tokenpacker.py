from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vistok.errors import InvalidInputError
from vistok.reproduce import CLAIMS, tokenpacker
from vistok.training.lvlm import Answered, LabLlava


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model, folder = LabLlava.tiny(), tmp_path_factory.mktemp("base") / "llava"
    model.save_transformers(folder, model.state_dict())
    return folder


def measure(folder: Path, base: Path, **changes):
    settings = {"scale_factor": 2, "steps": (1, 1), "scenes": 6, "repeats": 1, "batch_size": 2, "projector_size": 16}
    return tokenpacker.run(folder, quick=True, base=base, shipped=None, **{**settings, **changes})


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenpacker")
    return folder, measure(folder, base)


def test_every_claim_gets_a_verdict(finished) -> None:
    folder, report = finished
    assert report.complete
    assert len(report.findings) == 4
    assert report.figures["TokenPacker"]["visual_tokens"] == 4
    assert report.figures["all tokens"]["visual_tokens"] == 16
    flops = {arm: report.figures[arm]["flops"] for arm in ("all tokens", *tokenpacker.ARMS)}
    assert len({flops[arm]["tower"] for arm in flops}) == 1
    assert flops["TokenPacker"]["decoder"] == flops["average pooling"]["decoder"] < flops["all tokens"]["decoder"]
    # A pooled grid passes through LLaVA's projector: a quarter of the tokens, a quarter of the operations.
    assert flops["average pooling"]["projector"] * 4 == flops["all tokens"]["projector"]
    assert flops["TokenPacker"]["projector"] > flops["average pooling"]["projector"]
    for part in ("claim", "table 1", "quick run", "parameters in the projector", "cannot tell"):
        assert part in str(report)
    saved = json.loads((folder / "tokenpacker.json").read_text())
    assert saved["complete"]
    assert saved["figures"]["TokenPacker"]["by_kind"]
    with Image.open(folder / "tokenpacker.png") as picture:
        assert picture.size[0] > 800


def test_a_second_run_trains_nothing_and_says_the_same(finished, base: Path) -> None:
    folder, report = finished
    before = {file: file.stat().st_mtime_ns for file in (folder / "runs").rglob("progress.json")}
    again = measure(folder, base)
    assert len(before) == 6
    assert before == {file: file.stat().st_mtime_ns for file in (folder / "runs").rglob("progress.json")}
    assert again.figures["TokenPacker"]["accuracy"] == report.figures["TokenPacker"]["accuracy"]


def test_arms_differ_in_the_projector_alone(base: Path, tmp_path: Path) -> None:
    from vistok import hub
    from vistok.training.recipe import recipe_differences

    llava = hub.load(base)
    lists = [
        tokenpacker.arm_recipes(arm, llava, base, tmp_path, 2, (3, 5), 0, 4, 16)
        for arm in ("TokenPacker", "average pooling")
    ]
    first, second = zip(*lists, strict=True)
    assert [recipe.steps for recipe in lists[0]] == [3, 5]
    assert len(recipe_differences(*first)) == 1
    assert "projector" in recipe_differences(*first)[0]
    assert {line.split(":")[0] for line in recipe_differences(*second)} == {
        "model.config.projector",
        "model.init_from",
    }


def test_differences_are_paired_and_resampled_by_scene() -> None:
    first = [Answered(scene, "count", True) for scene in range(50) for _ in range(3)]
    second = [Answered(one.scene, one.kind, one.scene % 2 == 0) for one in first]
    gain, low, high = tokenpacker.difference(first, second)
    assert gain == pytest.approx(0.5)
    assert 0.3 < low < 0.5 < high < 0.7
    assert tokenpacker.difference(first, first) == (0.0, 0.0, 0.0)
    with pytest.raises(InvalidInputError, match="same questions"):
        tokenpacker.difference(first, second[1:])


def test_only_a_llava_will_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="LLaVA of the lab"):
        tokenpacker.run(tmp_path, base="vq.tiny")
    assert "llava-shapes" in CLAIMS["tokenpacker"].models
