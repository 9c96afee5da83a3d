from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vistok.errors import InvalidInputError, UnknownNameError
from vistok.generators import NAR, GenerationPipeline, LlamaGen
from vistok.metrics import ShapesFeatures
from vistok.reproduce import CLAIMS, nar, reproduce
from vistok.tokenizers import VQModel


def tiny_pipelines() -> dict[str, GenerationPipeline]:
    torch.manual_seed(0)
    tokenizer = VQModel.tiny().eval()
    shape: dict[str, Any] = {"vocab_size": tokenizer.codebook_size, "num_classes": 64, "grid": (8, 8)}
    return {
        "NAR": GenerationPipeline(NAR.tiny(**shape).eval(), tokenizer, sampling={"guidance_scale": 2.0}),
        "raster": GenerationPipeline(LlamaGen.tiny(**shape).eval(), tokenizer, sampling={"guidance_scale": 2.0}),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nar.Report]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nar")
    report = nar.run(
        folder,
        quick=True,
        pipelines=tiny_pipelines(),
        extractor=ShapesFeatures.tiny(),
        num_samples=10,
        repeats=2,
    )
    return folder, report


def test_every_claim_gets_a_verdict(finished: tuple[Path, nar.Report]) -> None:
    _, report = finished
    assert report.complete
    assert len(report.findings) == 5
    steps = report.findings[0]
    assert steps.verdict == "holds"
    assert "15 against 64 calls (4.3 times fewer) on 8x8 tokens" in steps.measured
    text = str(report)
    for part in (
        "claim",
        "paper",
        "measured",
        "verdict",
        "evaluator ShapesFeatures",
        "guidance scale 2.0",
        "quick run",
    ):
        assert part in text
    # Random networks draw nothing: no verdict may claim more than "not worse".
    assert report.figures["NAR"]["class"]["correct"] == 0


def test_report_and_picture_are_on_disk(finished: tuple[Path, nar.Report]) -> None:
    folder, report = finished
    saved = json.loads((folder / "nar.json").read_text())
    assert saved["complete"] is True
    assert saved["figures"]["NAR"]["steps"] == 15
    assert saved["settings"]["sampling"]["raster"]["guidance_scale"] == 2.0
    assert [finding["verdict"] for finding in saved["findings"]] == [item.verdict for item in report.findings]
    with Image.open(folder / "nar.png") as picture:
        assert picture.size[0] > 800
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 20


def test_film_strip_shows_known_cells_only(finished: tuple[Path, nar.Report]) -> None:
    pipeline = tiny_pipelines()["NAR"]
    frames = nar.film_strip(pipeline, {"guidance_scale": 2.0}, seed=0)
    assert len(frames) == 15
    hidden = [(frame == -0.6).all(0).float().mean().item() for frame in frames]
    assert hidden == sorted(hidden, reverse=True)
    assert hidden[0] == pytest.approx(63 / 64, abs=0.01)
    assert hidden[-1] < 0.01


def test_an_interrupted_run_keeps_the_stages_that_finished(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("NAR"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nar.run(
            tmp_path,
            pipelines=tiny_pipelines(),
            extractor=ShapesFeatures.tiny(),
            num_samples=4,
            repeats=1,
            on_progress=interrupt,
        )
    saved = json.loads((tmp_path / "nar.json").read_text())
    assert saved["complete"] is False
    assert len(saved["findings"]) == 3
    assert not (tmp_path / "nar.png").exists()
    assert "INCOMPLETE" in str(nar.Report(**{**saved, "findings": []}))


def test_same_seed_same_pictures_in_both_runs(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"extractor": ShapesFeatures.tiny(), "num_samples": 4, "repeats": 1}
    distances = []
    for run in range(2):
        report = nar.run(tmp_path / str(run), pipelines=tiny_pipelines(), **settings)
        distances.append([report.figures[arm]["fid"]["value"] for arm in ("NAR", "raster")])
    assert distances[0] == pytest.approx(distances[1], rel=1e-6)


def test_different_grids_are_refused(tmp_path: Path) -> None:
    pipelines = tiny_pipelines()
    other = LlamaGen.tiny(vocab_size=pipelines["raster"].tokenizer.codebook_size, num_classes=64, grid=(4, 4))
    pipelines["raster"] = GenerationPipeline(other.eval(), pipelines["raster"].tokenizer)
    with pytest.raises(InvalidInputError, match="same grid"):
        nar.run(tmp_path, pipelines=pipelines)


def test_unknown_claims_name_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="nar"):
        reproduce("nra", tmp_path)
    assert CLAIMS["nar"].models == ("nar-shapes-class", "llamagen-shapes-class", "features-shapes")
