"""The claim on leakage: in a world that leaks as told, and on a tiny random pipeline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.controllers.conftest import make_sd
from vistok.controllers.leakage import LeakageFix
from vistok.data.shapes import Description, Reading, image_to_tensor, parse_caption, read_scene, render, scene_for
from vistok.reproduce import leakage
from vistok.reproduce.leakage import KINDS, leak_prompts, run

COUNT = 24


class World:
    """Stands in for `drawing.draw`: rendered scenes in which every second prompt leaks until it is fixed.

    Args:
        fixed: whether the fix helps.
        kept: which single token of a long item keeps the object.
    """

    def __init__(self, fixed: bool = True, kept: str = "last") -> None:
        self.fixed, self.kept = fixed, kept
        self.prompts = {prompt.text: prompt for prompt in leak_prompts(COUNT, 0)}

    def __call__(
        self, pipe: Any, prompts: list[str], seeds: list[int], steer: Any = None, *, on_batch: Any = None, **_: Any
    ) -> Tensor:
        fix = None if steer is None else steer(range(len(prompts)))
        assert fix is None or isinstance(fix, LeakageFix)
        pictures = []
        for number, (text, seed) in enumerate(zip(prompts, seeds, strict=True)):
            description = parse_caption(text)
            if text in self.prompts:
                leaks = number // len(KINDS) % 2 == 0 and not (fix is not None and self.fixed)
                description = tainted(self.prompts[text], leaks)
            elif fix is not None and fix.representative != self.kept:
                description = Description((replace(description.objects[0], shape="ring", colour="pink"),))
            pictures.append(image_to_tensor(render(scene_for(description, seed=seed), 64)))
        if on_batch is not None:
            on_batch(len(prompts))
        return torch.stack(pictures)


def tainted(prompt: leakage.LeakPrompt, leaks: bool) -> Description:
    """What is drawn: the target with the source's attribute, or surely without it."""
    source, target = prompt.source, prompt.target
    if prompt.kind == "shade":
        target = replace(target, shade=source.shade if leaks else "light" if source.shade == "dark" else "dark")
    elif leaks:
        target = replace(target, colour=source.colour)
    elif target.colour is None:
        target = replace(target, colour="green" if source.colour != "green" else "red")
    return Description((source, target) if prompt.source_first else (target, source))


def findings(report: Any, words: str) -> list[Any]:
    return [finding for finding in report.findings if words in finding.claim]


def test_a_fix_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakage, "draw", World())
    report = run(tmp_path, pipeline=make_sd(), sampling={}, num_prompts=COUNT)
    assert report.complete
    for kind in KINDS:
        found = report.figures["leakage"][kind]
        assert found["target_found"]["before"]["value"] == 1.0
        assert found["before"]["correct"] == 3
        assert found["before"]["total"] == 6
        assert found["after"]["correct"] == 0
        assert found["change"]["value"] == pytest.approx(-0.5)
    stops = findings(report, "without their context stops")
    assert len(stops) == len(KINDS)
    # Three of six lie above 0 for sure, above 1 in 4 not for sure.
    assert [finding.verdict for finding in stops] == ["holds", "holds", "holds", "cannot tell"]
    assert report.figures["leakage"]["all"]["change"]["count"] == COUNT
    assert findings(report, "does not cost")[0].verdict == "holds"
    redundant = findings(report, "redundant: pictures keep")[0]
    assert report.figures["redundancy"]["agreement"]["last token"]["object"]["value"] == 1.0
    assert report.figures["redundancy"]["agreement"]["first token"]["object"]["value"] < 0.3
    assert report.figures["redundancy"]["share_dropped"] > 0.5
    assert "100.0 %" in redundant.measured
    saved = json.loads((tmp_path / "leakage.json").read_text())
    assert saved["complete"] is True
    with Image.open(tmp_path / "leakage.png") as picture:
        assert picture.size[0] > 800
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 20


def test_a_fix_that_does_nothing_and_the_wrong_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakage, "draw", World(fixed=False, kept="first"))
    report = run(tmp_path, pipeline=make_sd(), sampling={}, num_prompts=COUNT)
    stops = findings(report, "without their context stops")
    assert stops[0].verdict == "does not hold"
    assert "hardly leaks" in stops[3].measured
    assert findings(report, "redundant: pictures keep")[0].verdict == "does not hold"
    assert findings(report, "no worse without redundant")[0].verdict == "does not hold"


def test_a_random_pipeline_gets_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The oracle finds nothing in noise, and takes its time for that.
    monkeypatch.setattr(leakage, "read_scenes", lambda images: [Reading((), 0.0)] * len(images))
    stages: list[str] = []
    report = run(
        tmp_path,
        quick=True,
        pipeline=make_sd(),
        sampling={"num_inference_steps": 1, "guidance_scale": 1.0},
        num_prompts=4,
        on_progress=lambda what, done, total: stages.append(what),
    )
    assert report.complete
    assert {finding.verdict for finding in report.findings} == {"cannot tell"}
    assert set(stages) == {
        "before the fix",
        "after the fix",
        *(f"long items, {one} token{'s' if one == 'all' else ''}" for one in ("all", "last", "first")),
    }
    assert json.loads((tmp_path / "leakage.json").read_text())["figures"]["leakage"]["shade"]["before"]["value"] is None


def test_prompts_are_built_to_leak() -> None:
    prompts = leak_prompts(200, seed=1)
    assert len({prompt.text for prompt in prompts}) == 200
    for prompt in prompts:
        assert parse_caption(prompt.text) == prompt.description
        assert all(item in prompt.text for item in prompt.items)
        assert prompt.source.shape != prompt.target.shape
        if prompt.kind == "shade":
            assert prompt.source.shade in ("light", "dark")
            assert prompt.target.shade is None
        elif prompt.kind == "said colour":
            assert prompt.target.colour not in (None, prompt.source.colour)
        else:
            assert prompt.target.colour is None
    backwards = next(prompt for prompt in prompts if prompt.kind == "backwards")
    assert backwards.description.objects[0] == backwards.target


def test_leaks_are_read_from_pictures() -> None:
    for prompt in leak_prompts(8, seed=2):
        for leaks in (True, False):
            reading = read_scene(render(scene_for(tainted(prompt, leaks), seed=5)))
            assert prompt.leaked(reading) is leaks
    lonely = read_scene(render(scene_for(Description((prompt.source,)), seed=5)))
    assert prompt.leaked(lonely) is None
