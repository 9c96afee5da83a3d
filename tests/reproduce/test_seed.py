from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vistok.data.shapes.words import caption_tokenizer
from vistok.reproduce import CLAIMS, seed
from vistok.tokenizers import KLModel
from vistok.tokenizers.seed import SEED, ImageLanguageModel, UnCLIPDenoiser
from vistok.training.image_language import ImageLanguage

ARMS = seed.ArmSettings(1, 1, 1, scenes=4, batch_size=4, layers=1, hidden_size=24, language_size=24)


def tiny_models() -> tuple[SEED, ImageLanguageModel]:
    torch.manual_seed(0)
    model = SEED.tiny(
        image_size=28,
        num_queries=4,
        codebook_size=16,
        text_vocab_size=len(caption_tokenizer()),
        max_text_length=24,
        contrastive_size=16,
        block_heads=2,
    ).eval()
    with torch.no_grad():
        model.codebook.normal_()
    autoencoder = KLModel.tiny()
    denoiser = UnCLIPDenoiser.tiny(sample_size=32 // autoencoder.downsample_factor)
    model.decoder = denoiser.eval().decoder(autoencoder)
    return model, ImageLanguage.tiny(codebook_size=16, num_codes=4).eval().language


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, seed.Report]:
    """All but the trainings, which have a test of their own."""
    folder = tmp_path_factory.mktemp("seed")
    model, language = tiny_models()
    patch = pytest.MonkeyPatch()
    patch.setattr(seed, "RETRIEVED", 8)

    def order(model, settings, seed_, output, report, progress):
        report.figures["order"] = {arm: {"nats_per_picture": 3.0} for arm in seed.ARMS}
        progress("causal queries", 1, 6)

    patch.setattr(seed, "_measure_order", order)
    report = seed.run(folder, quick=True, model=model, language=language, num_samples=4)
    patch.undo()
    return folder, report


def test_every_claim_gets_a_verdict_and_random_networks_win_none(measured: tuple[Path, seed.Report]) -> None:
    folder, report = measured
    assert report.complete
    assert [finding.verdict for finding in report.findings] == ["cannot tell", "does not hold", "does not hold"]
    text = str(report)
    for part in ("86.3 % by codes", "with the codes of another picture", "quick run", "captions of other pictures"):
        assert part in text
    saved = json.loads((folder / "seed.json").read_text())
    assert saved["figures"]["drawing"]["drawn"]["total"] == 4
    assert saved["figures"]["retrieval"]["scenes"] == 8
    with Image.open(folder / "seed.png") as picture:
        assert picture.size[0] > 800


def test_both_arms_are_trained_alike_but_for_the_mask(tmp_path: Path) -> None:
    model, _ = tiny_models()
    arms = [seed.arm_recipes(model, causal, seed.ArmSettings(), 0, tmp_path) for causal in (True, False)]
    for stage in ("queries", "codebook", "language"):
        one, other = (arm[stage] for arm in arms)
        assert (one.steps, one.batch_size, one.optimizer, one.schedule, one.seed) == (
            other.steps,
            other.batch_size,
            other.optimizer,
            other.schedule,
            other.seed,
        )
        differing = {name for name in one.model.config if one.model.config[name] != other.model.config[name]}
        assert differing == ({"causal"} if stage != "language" else set())


def test_an_arm_is_trained_judged_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_models()
    monkeypatch.setattr(seed, "RETRIEVED", 4)
    monkeypatch.setattr(seed, "ARMS", {"causal": True})
    report = seed.Report("seed", "", "")
    stages: list[str] = []

    def interrupt(what: str, done: int, total: int) -> None:
        stages.append(what)
        if len(stages) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seed._measure_order(model, ARMS, 0, tmp_path, report, interrupt)
    kept = (tmp_path / "arms" / "causal-queries" / "model" / "config.json").stat().st_mtime_ns
    with pytest.raises(KeyError, match="bidirectional"):  # one arm alone cannot be compared
        seed._measure_order(model, ARMS, 0, tmp_path, report, lambda what, done, total: stages.append(what))
    assert stages[-1] == "causal language"
    trained = tmp_path / "arms" / "causal-language"
    assert (trained / "model" / "config.json").is_file()
    lines = (tmp_path / "arms" / "causal-queries" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1  # finished trainings are not repeated
    assert kept


@pytest.mark.parametrize(
    ("gap", "retrieval", "holds"),
    [
        ((1.0, 0.5, 1.5), (0.9, 0.9), True),
        ((-1.0, -1.5, -0.5), (0.9, 0.9), False),
        ((0.1, -0.5, 0.7), (0.9, 0.9), None),
        ((1.0, 0.5, 1.5), (0.3, 0.9), None),
    ],
)
def test_fewer_nats_do_not_count_if_the_codes_say_less(
    gap: tuple[float, float, float], retrieval: tuple[float, float], holds: bool | None
) -> None:
    def share(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.05, "high": value + 0.05}

    arms = [
        {"nats_per_picture": 30.0, "retrieval": share(value), "drawn_retrieval": share(0.5), "captions": share(0.5)}
        for value in retrieval
    ]
    finding = seed._order_finding(arms[0], arms[1], seed.MeanInterval(*gap, 10), 16)
    assert finding.holds is holds
    assert "90.0 % [85.0, 95.0]" not in finding.claim


def test_the_claim_names_its_models() -> None:
    assert CLAIMS["seed"].models == ("seed-shapes", "seed-unclip-shapes", "kl-shapes", "seed-lm-shapes")
