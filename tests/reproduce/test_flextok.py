"""`vistok reproduce flextok` on tiny random networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vistok.errors import InvalidInputError
from vistok.generators import FlexTokAR, GenerationPipeline
from vistok.metrics import ShapesFeatures
from vistok.reproduce import CLAIMS, flextok
from vistok.tokenizers import FlexTok

# 32x32 pixels, six tokens of 16 codes, two steps: the lengths are 1, 2, 4, 6.
CONFIG: dict[str, Any] = {
    "vae_block_out_channels": None,
    "latent_channels": 3,
    "patch_size": 8,
    "num_registers": 6,
    "levels": (4, 4),
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
}


def tiny(seed: int, **changes: Any) -> FlexTok:
    """A random tokenizer whose pictures are nearly flat: the oracle is slow on noise."""
    torch.manual_seed(seed)
    model = FlexTok.tiny(**{**CONFIG, **changes})
    inner = model.decode_latents
    object.__setattr__(model, "decode_latents", lambda latents: 0.02 * inner(latents))
    return model


def settings() -> dict[str, Any]:
    tokenizer = tiny(0)
    torch.manual_seed(2)
    writer = FlexTokAR.tiny(vocab_size=16, num_tokens=6, num_classes=64)
    return {
        "tokenizer": tokenizer,
        "unordered": tiny(1, nested_dropout="none"),
        "pipeline": GenerationPipeline(writer, tokenizer, sampling={"guidance_scale": 1.5}),
        "extractor": ShapesFeatures.tiny(),
        "num_scenes": 4,
        "num_samples": 4,
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, flextok.Report]:
    folder = tmp_path_factory.mktemp("flextok")
    return folder, flextok.run(folder, quick=True, **settings())


def test_every_claim_gets_a_verdict_and_random_networks_prove_none(finished: tuple[Path, flextok.Report]) -> None:
    _, report = finished
    assert report.complete
    assert len(report.findings) == 6
    verdicts = {finding.claim.split()[0]: finding.verdict for finding in report.findings}
    assert verdicts["the"] == "cannot tell"  # the first tokens say what matters: not even all of them do here
    assert verdicts["a"] == "cannot tell"  # a generator may stop
    assert "1: " in report.findings[0].measured
    assert "of 3 steps lower it" in report.findings[0].measured
    text = str(report)
    for part in ("evaluator ShapesFeatures", "quick run", "num inference steps 2", "guidance scale 1.5"):
        assert part in text
    assert report.settings["lengths"] == [1, 2, 4, 6]


def test_report_and_picture_are_on_disk(finished: tuple[Path, flextok.Report]) -> None:
    folder, report = finished
    saved = json.loads((folder / "flextok.json").read_text())
    assert saved["complete"] is True
    assert list(saved["figures"]["error"]["all"]) == ["1", "2", "4", "6"]
    assert saved["figures"]["agreement"]["3_objects"]["6"]["total"] == 4
    assert saved["figures"]["generation"].keys() == {"1", "4", "6"}
    assert [finding["verdict"] for finding in saved["findings"]] == [item.verdict for item in report.findings]
    with Image.open(folder / "flextok.png") as picture:
        assert picture.size[0] > 800
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 20


def test_what_is_not_trained_is_said_and_an_interrupted_run_keeps_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "no-such-checkpoint"
    monkeypatch.setattr(flextok, "UNORDERED", missing)
    monkeypatch.setattr(flextok, "GENERATOR", missing)
    given = {**settings(), "unordered": None, "pipeline": None, "num_scenes": 2}
    report = flextok.run(tmp_path / "without", **given)
    assert [finding.verdict for finding in report.findings[4:]] == ["cannot tell", "cannot tell"]
    assert f"recipes/{missing}.yaml is not trained here" in report.findings[5].measured

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("reading"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flextok.run(tmp_path / "cut", on_progress=interrupt, **given)
    saved = json.loads((tmp_path / "cut" / "flextok.json").read_text())
    assert saved["complete"] is False
    assert len(saved["findings"]) == 1


def test_tokens_that_an_image_needs() -> None:
    errors = torch.tensor([[0.5, 0.2, 0.1], [0.05, 0.2, 0.01], [0.9, 0.8, 0.7]])
    assert flextok.tokens_needed(errors, [1, 4, 16], 0.2).tolist() == [4, 1, 32]


def test_an_error_that_falls_holds_and_one_that_rises_does_not() -> None:
    falling = {count: torch.tensor([[0.4, 0.2, 0.1]] * 8) * torch.linspace(0.9, 1.1, 8)[:, None] for count in (1, 3)}
    for errors, verdict in ((falling, "holds"), ({k: v.flip(1) for k, v in falling.items()}, "does not hold")):
        report = flextok.Report("flextok", "", "")
        flextok._error_falls(errors, [1, 4, 16], report)
        assert report.findings[0].verdict == verdict
    report = flextok.Report("flextok", "", "")
    flextok._complex_needs_more({1: falling[1], 3: 4 * falling[3]}, [1, 4, 16], report)
    assert report.findings[0].verdict == "holds"


def test_tokenizers_of_different_lengths_are_refused(tmp_path: Path) -> None:
    given = {**settings(), "unordered": tiny(1, num_registers=5)}
    with pytest.raises(InvalidInputError, match="as many tokens; got 6 and 5"):
        flextok.run(tmp_path, **given)


def test_the_claim_is_listed() -> None:
    assert "flextok-shapes" in CLAIMS["flextok"].models
