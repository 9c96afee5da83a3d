"""`vistok reproduce compass` on random pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vistok
from vistok.controllers import Tenor
from vistok.metrics.spatial import Detection
from vistok.reproduce import CLAIMS, compass
from vistok.training.text_to_image import TextToImage

SAMPLING = {"num_inference_steps": 1, "guidance_scale": 1.0}


def pipelines() -> dict[str, Any]:
    torch.manual_seed(0)
    vae = vistok.load("kl.tiny")
    found = {arm: TextToImage.tiny().pipeline(vae) for arm in compass.ARMS}
    Tenor().attach(found[compass.FULL])
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("compass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compass, "FILTER_SCENES", 50)
        return folder, compass.run(folder, pipelines=pipelines(), sampling=SAMPLING, num_prompts=1)


def test_every_claim_gets_a_verdict(finished: tuple[Path, Any]) -> None:
    folder, report = finished
    assert report.complete
    assert len(report.findings) == 7
    assert set(report.figures["arms"]) == set(compass.ARMS)
    arm = report.figures["arms"][compass.FULL]
    assert {"OA", "VISOR_uncond", "VISOR_cond", "VISOR_1", "VISOR_4", "position", "compbench_spatial"} <= set(arm)
    assert arm["OA"]["total"] == compass.PICTURES
    # Random networks draw nothing: no direction may be claimed.
    assert all(finding.holds is not True for finding in report.findings[1:])
    saved = json.loads((folder / "compass.json").read_text())
    assert saved["complete"] is True
    with Image.open(folder / "compass.png") as picture:
        assert picture.width > 600


def test_prompts_take_the_relations_in_turn_and_differ() -> None:
    prompts = compass.spatial_prompts(16, 0)
    assert len({prompt.text for prompt in prompts}) == 16
    assert [prompt.relation for prompt in prompts[:4]] == ["left of", "right of", "above", "below"]
    for prompt in prompts:
        assert set(prompt.first.split()).isdisjoint(prompt.second.split())
    assert compass.spatial_prompts(16, 0) == prompts != compass.spatial_prompts(16, 1)


def test_verdicts_agree_with_visor() -> None:
    prompts = compass.spatial_prompts(2, 0)

    def at(name: str, x: float, y: float) -> Detection:
        return Detection(name, (x, y, x + 1, y + 1))

    one, two = prompts  # left of, right of
    seen = [[at(one.first, 0, 0), at(one.second, 5, 0)]] * 3 + [[at(one.first, 0, 0)]]
    seen += [[at(two.first, 0, 0), at(two.second, 5, 0)]] * 4
    scores = compass._scores(prompts, seen)
    right, there = compass._verdicts(prompts, seen)
    assert right.tolist() == [0.75, 0.0]
    assert there.tolist() == [0.75, 1.0]
    assert scores["VISOR_uncond"]["value"] == right.mean()
    assert scores["OA"]["value"] == there.mean()
    assert [scores[f"VISOR_{n}"]["correct"] for n in range(1, 5)] == [1, 1, 1, 0]


def test_an_interrupted_run_keeps_the_arms_that_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compass, "FILTER_SCENES", 50)
    monkeypatch.setattr(compass, "PICTURES", 1)

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("TENOR"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compass.run(tmp_path, pipelines=pipelines(), sampling=SAMPLING, num_prompts=1, on_progress=interrupt)
    saved = json.loads((tmp_path / "compass.json").read_text())
    assert saved["complete"] is False
    assert set(saved["figures"]["arms"]) == {"base", "unfiltered"}


def test_the_claim_is_listed_with_its_checkpoints() -> None:
    assert CLAIMS["compass"].models == tuple(compass.ARMS.values())
