"""Names, and what they load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from vistok import hub
from vistok.errors import CheckpointError, InvalidInputError, UnknownNameError
from vistok.generators.mar import MAR
from vistok.generators.nar import NAR
from vistok.generators.pipeline import SAMPLER_DEFAULTS, GenerationPipeline
from vistok.nn.sampling import check_sampling
from vistok.tokenizers.kl import KLModel
from vistok.tokenizers.vq import VQModel


def test_tiny_flavours_of_every_system_build() -> None:
    for system in hub.SYSTEMS:
        model = hub.load(f"{system}.tiny")
        assert not model.training
        assert sum(value.numel() for value in model.parameters()) < 1_000_000


def test_published_names_are_listed_with_their_facts() -> None:
    assert "nar-l.imagenet256" in hub.list_models("nar-*")
    info = hub.model_info("nar-l.imagenet256")
    assert info["hub_id"] == "chenfeng1271/NAR-imagenet-256-L"
    assert info["parameters"] == 372_536_320
    assert info["tokenizer"] in hub.list_models("vq*")
    assert hub.list_models("no-such-*") == []


@pytest.mark.parametrize("name", [name for name in hub.list_models(include_published=True) if "." in name])
def test_published_configurations_have_the_published_size(name: str) -> None:
    entry = hub.published()[name]
    with torch.device("meta"):
        model = hub.system_class(entry.system)(**entry.config)
    assert sum(value.numel() for value in model.parameters()) == entry.parameters


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"nar-l\.imagenet256"):
        hub.load("nar-l.imagenet")
    with pytest.raises(UnknownNameError, match="no folder at"):
        hub.load("./no-such-folder")
    with pytest.raises(UnknownNameError, match="vistok models"):
        hub.model_info("zzz")


def test_folders_round_trip(tmp_path: Path) -> None:
    model = NAR.tiny().eval()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "mine")
    again = hub.load(tmp_path / "mine")
    assert isinstance(again, NAR)
    assert {value.dtype for value in again.parameters()} == {torch.float32}
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].float()), name
    assert {value.dtype for value in hub.load(tmp_path / "mine", dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_float16_on_a_cpu_is_refused_with_a_warning(tmp_path: Path) -> None:
    NAR.tiny().save_pretrained(tmp_path / "mine")
    with pytest.warns(UserWarning, match="slower"):
        model = hub.load(tmp_path / "mine", dtype=torch.float16)
    assert torch.float16 not in {value.dtype for value in model.parameters()}


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hub.load(tmp_path / "empty")
    VQModel.tiny().save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        hub.load(tmp_path / "cut")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(CheckpointError, match="UNet2DModel"):
        hub.load(tmp_path / "foreign")
    with pytest.raises(InvalidInputError, match="is a file"):
        hub.load(tmp_path / "foreign" / "config.json")


def test_a_pipeline_needs_a_generator_that_names_its_tokenizer(tmp_path: Path) -> None:
    NAR.tiny().save_pretrained(tmp_path / "mine")
    with pytest.raises(InvalidInputError, match="does not say which tokenizer"):
        hub.load_pipeline(tmp_path / "mine")
    with pytest.raises(UnknownNameError, match="nearest known"):
        hub.load_pipeline("nar-shpes-x")


@pytest.mark.parametrize(
    ("system", "kind"),
    [
        ("vq", "tokenizer"),
        ("kl", "tokenizer"),
        ("nar", "generator"),
        ("tokenpacker", "projector"),
        ("tenor", "controller"),
    ],
)
def test_published_models_say_what_they_are(system, kind):
    names = [name for name in hub.list_models() if hub.model_info(name)["system"] == system]
    assert names
    assert {hub.model_info(name)["kind"] for name in names} == {kind}


def seeded(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize("system", ["nar", "llamagen", "mar", "himar", "xar"])
def test_tiny_generators_come_with_a_tokenizer_that_fits(system: str) -> None:
    pipe = hub.load_pipeline(f"{system}.tiny")
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4} if hasattr(pipe.generator, "token_size") else {}
    result = pipe(class_labels=[3, 3], generator=seeded(1, 2), **settings)
    assert [image.size for image in result.images] == [(8, 8)] * 2
    values = result.tokens.ids if result.tokens.features is None else result.tokens.features
    alone = pipe(class_labels=3, generator=seeded(2), output_type="latent", **settings).images
    again = alone.ids if alone.features is None else alone.features
    torch.testing.assert_close(again[0], values[1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(values[0], values[1])


def kl_folder(folder: Path) -> AutoencoderKL:
    """A folder as diffusers writes it."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    theirs = AutoencoderKL(**blocks, block_out_channels=(8, 16), norm_num_groups=4, scaling_factor=0.5).eval()
    theirs.save_pretrained(folder)
    return theirs


def test_a_kl_folder_of_diffusers_loads_as_our_tokenizer(tmp_path: Path) -> None:
    theirs = kl_folder(tmp_path / "vae")
    ours = hub.load(tmp_path / "vae")
    assert isinstance(ours, KLModel)
    images = torch.rand(1, 3, 8, 12) * 2 - 1
    tokens = ours.encode(images)
    assert tokens.grid == (4, 6)
    with torch.no_grad():
        latents = theirs.encode(images).latent_dist.mode()
        assert torch.equal(ours.latents_from_tokens(tokens), latents * 0.5)
        torch.testing.assert_close(ours.decode(tokens), theirs.decode(latents).sample)


def test_a_kl_folder_of_early_diffusers_loads_and_a_cut_one_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs = kl_folder(tmp_path / "vae")
    file = tmp_path / "vae" / hub.WEIGHTS_FILE
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in load_file(file).items():
        for now, then in early.items():
            key = key.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        state[key] = value
    assert any(".proj_attn." in key for key in state)
    save_file(state, file)
    ours = hub.load(tmp_path / "vae")
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    del state["quant_conv.bias"]
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"1 missing: quant_conv\.bias"):
        hub.load(tmp_path / "vae")


def test_a_pipeline_of_diffusers_is_told_apart(tmp_path: Path) -> None:
    kl_folder(tmp_path / "theirs" / "vae")
    (tmp_path / "theirs" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    for load in (hub.load, hub.load_pipeline):
        with pytest.raises(InvalidInputError, match=r"StableDiffusionPipeline of diffusers.*theirs/vae"):
            load(tmp_path / "theirs")
    assert isinstance(hub.load(tmp_path / "theirs" / "vae"), KLModel)
    hub.load_pipeline("mar.tiny").save_pretrained(tmp_path / "ours")
    again = hub.load_pipeline(tmp_path / "ours")
    assert isinstance(again.generator, MAR)
    assert isinstance(again.tokenizer, KLModel)
    with pytest.raises(InvalidInputError, match=r"use vistok\.load_pipeline"):
        hub.load(tmp_path / "ours")


@pytest.mark.parametrize("system", ["llamagen", "nar", "mar", "himar", "xar"])
def test_published_generators_carry_settings_that_they_take(system: str) -> None:
    cls = hub.system_class(system)
    known = getattr(cls, "sampling_defaults", SAMPLER_DEFAULTS)
    entries = [entry for entry in hub.published().values() if entry.system == system]
    assert entries
    for entry in entries:
        settings = hub.model_info(entry.name)["sampling"]
        assert settings["guidance_scale"] > 1.0
        assert settings.keys() <= known.keys()
        if hasattr(cls, "check_settings"):
            cls.tiny().check_settings(None, 1, **settings)
        else:
            check_sampling(**{**known, **settings}, generator=None, batch=1)


@pytest.mark.parametrize(
    ("name", "scale", "steps"),
    [("mar-h", 3.2, 256), ("himar-b", 2.5, 4), ("himar-h", 3.2, 12), ("xar-b", 2.7, 40), ("xar-l", 2.3, 50)],
)
def test_the_authors_own_settings(name: str, scale: float, steps: int) -> None:
    settings = hub.model_info(f"{name}.imagenet256")["sampling"]
    assert (settings["guidance_scale"], settings["num_inference_steps"]) == (scale, steps)


def ship(folder: Path, model: object, **facts: object) -> None:
    """A checkpoint as the package holds them."""
    model.save_pretrained(folder)
    (folder / hub.FACTS_FILE).write_text(json.dumps(facts))


def test_a_shipped_generator_of_continuous_tokens_is_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ASSETS", tmp_path)
    names = [f"thing {number}" for number in range(10)]
    ship(tmp_path / "kl-lab", KLModel.tiny(scaling_factor=0.8), system="kl", kind="tokenizer", licence="mit")
    generator = {"system": "mar", "kind": "generator", "tokenizer": "kl-lab", "class_names": names, "image_size": 8}
    settings = {"guidance_scale": 2.0, "num_inference_steps": 3, "num_diffusion_steps": 2}
    ship(tmp_path / "mar-lab", MAR.tiny(scaling_factor=0.8), **generator, sampling=settings)
    ship(tmp_path / "mar-odd", MAR.tiny(scaling_factor=0.2325), **generator)
    assert hub.list_models("*-lab") == ["kl-lab", "mar-lab"]
    assert hub.model_info("mar-lab")["sampling"] == settings
    pipe = hub.load_pipeline("mar-lab")
    assert isinstance(pipe, GenerationPipeline)
    assert pipe.tokenizer.config.scaling_factor == 0.8
    assert pipe.config.sampling == settings
    pipe.set_progress_bar_config(disable=True)
    seen: list[int] = []

    def count(pipeline: GenerationPipeline, index: int, total: int, inputs: dict) -> dict:
        seen.append(total)
        return inputs

    pictures = pipe("a thing 4", generator=seeded(0), callback_on_step_end=count).images
    assert [picture.size for picture in pictures] == [(8, 8)]
    assert seen == [3, 3, 3]
    with pytest.raises(InvalidInputError, match=r"scaled by 0\.2325, but KLModel scales by 0\.8"):
        hub.load_pipeline("mar-odd")
    coarse = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    wrong = KLModel.tiny(scaling_factor=0.8, block_out_channels=(8, 8, 8), **coarse)
    with pytest.raises(InvalidInputError, match=r"8x8 pixels, but KLModel decodes them to 16x16 \(4 pixels a token\)"):
        hub.load_pipeline("mar-lab", tokenizer=wrong)
    with pytest.raises(InvalidInputError, match=r"MAR writes continuous tokens, but VQModel decodes ids"):
        hub.load_pipeline("mar-lab", tokenizer="vq.tiny")


def test_a_file_of_another_format_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(KLModel, "from_official", lambda source, config: asked.append(Path(source)) or KLModel.tiny())
    (tmp_path / "kl16.txt").touch()
    (tmp_path / "kl16.ckpt").touch()
    hub.load("kl16.mar", checkpoint=tmp_path)
    (tmp_path / "kl16.safetensors").touch()
    hub.load("kl16.mar", checkpoint=tmp_path)
    assert [path.name for path in asked] == ["kl16.ckpt", "kl16.safetensors"]
    for name in ("kl16.ckpt", "kl16.safetensors"):
        with pytest.raises(InvalidInputError, match=r"vistok\.load\('kl16\.mar', checkpoint="):
            hub.load(tmp_path / name)
