"""`vistok.load(name)`: shipped checkpoints, local folders, published checkpoints and the Hugging Face Hub.

What a name can be; the first that fits decides:

1. a shipped name: `nar-shapes`.
2. `system.tiny`: a random flavour that builds in milliseconds, always with the same weights.
3. a folder: `./my-model`, written by `save_pretrained` (ours, or diffusers' of an `AutoencoderKL`), by the export of a
   training run, or by transformers (texts).
4. a published name: `nar-l.imagenet256` downloads the authors' file (or takes `checkpoint=`) and loads it strictly.
5. `org/repository` or `hub:org/repository`: a repository on the Hub in the format of 3.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vistok.errors import CheckpointError, InvalidInputError, UnknownNameError
from vistok.files import PACKED_FILE, read_state_dict
from vistok.registry import HELPERS, SYSTEMS, Published, system_class, unknown_name

if TYPE_CHECKING:
    import torch

    from vistok.generators.pipeline import GenerationPipeline

__all__ = ["ASSETS", "list_models", "load", "load_pipeline", "model_info", "recommended_sampling"]

ASSETS = Path(__file__).parent / "assets"
FACTS_FILE = "vistok.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
WEIGHT_SUFFIXES = {".safetensors", ".ckpt", ".pth", ".pt", ".bin"}
PIPELINE_FILE = "model_index.json"
TEXT_TO_IMAGE = "text-to-image"
TEXT_ENCODER = "text-encoder"
HUB_PREFIX = "hub:"
TINY_SUFFIX = ".tiny"
# Tokenizers of the random flavours: 64 codes, or 4 channels, as the tiny generators write.
TINY_TOKENIZER = "vq.tiny"
TINY_TOKENIZERS = {"mar": "kl.tiny", "himar": "kl.tiny", "xar": "kl.tiny", "flextok-ar": "flextok.tiny"}
# Classes of diffusers that are one of ours: name in config.json -> system.
DIFFUSERS_CLASSES = {"AutoencoderKL": "kl"}
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt")


# ------------------------------------------------------------------------------------------------------------- listing
def shipped() -> dict[str, dict[str, Any]]:
    """Facts of the checkpoints inside the package, by name. Reads JSON only; imports no torch."""
    return {file.parent.name: _read_facts(file) for file in sorted(ASSETS.glob(f"*/{FACTS_FILE}"))}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object; it holds a {type(content).__name__}")
    return content


def _read_facts(file: Path) -> dict[str, Any]:
    facts = _read_json(file)
    if "system" not in facts:
        raise CheckpointError(f'{file} does not say which system it belongs to (a "system" entry)')
    return facts


@lru_cache(maxsize=1)
def published() -> dict[str, Published]:
    """Every published checkpoint of every system, by name. Imports the systems, and with them torch."""
    found: dict[str, Published] = {}
    for system in SYSTEMS:
        found.update(system_class(system).published)  # type: ignore[attr-defined]
    return found


def list_models(pattern: str = "*", *, include_published: bool = True) -> list[str]:
    """Names that `load` knows: shipped ones first, then published ones. (Every system also has a `SYSTEM.tiny`.)

    Args:
        pattern: shell wildcards, e.g. `"nar*"`.
        include_published: also those that have to be downloaded (looking them up imports torch).
    """
    names = list(shipped()) + (sorted(published()) if include_published else [])
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def model_info(name: str) -> dict[str, Any]:
    """What is known about a shipped or published checkpoint, ready for JSON.

    Returns:
        `name`, `shipped`, `system`, `kind` ("tokenizer", "generator", ...) and, where known, `paper`, `origin`,
        `licence`, `image_size`, `num_tokens`, `codebook_size`, `parameters`, `preprocessing`, `tokenizer`,
        `text_encoder`, `class_names`, `sampling`, `recipe`, `bytes` on disk (shipped) or `hub_id` and `hub_file`
        (published).

    Raises:
        UnknownNameError: if it is neither.
    """
    ours = shipped()
    if name in ours:
        size = sum(file.stat().st_size for file in (ASSETS / name).rglob("*") if file.is_file())
        return {"name": name, "shipped": True, **ours[name], "bytes": size}
    theirs = published()
    if name not in theirs:
        raise _unknown(name)
    entry = theirs[name]
    return {**asdict(entry), "shipped": False, "kind": _kind(entry.system)}


def _kind(system: str) -> str:
    room = SYSTEMS[system].split(".")[1]
    if room == "tokenizers" and not hasattr(system_class(system), "decode"):
        return "projector"
    return room.removesuffix("s")


def _unknown(name: str) -> UnknownNameError:
    known = [*list_models(), *(f"{system}{TINY_SUFFIX}" for system in SYSTEMS)]
    return unknown_name(
        "model", name, known, "`vistok models` lists all; a folder (./path) or a Hub repository (org/name) will do, too"
    )


# ------------------------------------------------------------------------------------------------------------- loading
def load(
    name: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a network; the module's documentation says what a name can be.

    Args:
        name: shipped or published name, folder, Hub repository, or `system.tiny`.
        checkpoint: for a published name, your copy of the authors' file (or the folder that holds it) instead of a
            download.
        device: where to put it; None is the CPU.
        dtype: floating point type; None is the checkpoint's own on an accelerator, and float32 on a CPU.

    Returns:
        The network in eval mode: `VQModel`, `NAR`, `LlamaGen`, ..., a `TextEncoder`, (a LLaVA) the model of
        transformers, or (`t2i-shapes`) the stock pipeline of diffusers.

    Raises:
        UnknownNameError: naming the nearest known names.
        CheckpointError: the files do not fit the network, cannot be read, or cannot be fetched.
        InvalidInputError: `checkpoint` for a name that is not published, the name of a file, or no such device.
    """
    import torch

    lab = None if checkpoint is not None else _lab_pipeline(os.fspath(name))
    if lab is not None:
        return _text_to_image(lab, device, dtype)
    target = _device(device)
    model = _find(os.fspath(name), None if checkpoint is None else Path(checkpoint).expanduser())
    if target.type == "cpu":
        # Half checkpoints save space on disk. A CPU computes float16 4 to 80 times slower than float32, and bf16 faster
        # only on some machines.
        half = torch.float16
        if dtype == half:
            warnings.warn("float16 is 4 to 80 times slower than float32 on a CPU: using bfloat16", stacklevel=2)
            dtype = torch.bfloat16
        elif dtype is None:
            if any(parameter.dtype == half for parameter in model.parameters()):
                warnings.warn(f"{name} holds float16 weights, which are slow on a CPU: using float32", stacklevel=2)
            dtype = torch.float32
    # A dtype of None would make diffusers speak of a cast.
    return (model.to(target) if dtype is None else model.to(target, dtype)).eval()


def _device(device: torch.device | str | None) -> torch.device:
    """The device, or an InvalidInputError if this machine does not have it."""
    import torch

    try:
        target = torch.device(device or "cpu")
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise InvalidInputError(
            f"device {str(device)!r} cannot be used here; this machine has: {', '.join(found)}"
        ) from error
    return target


def _find(name: str, checkpoint: Path | None) -> Any:
    if checkpoint is not None:
        return _from_authors(name, checkpoint)
    if name in shipped():
        return _from_folder(ASSETS / name)
    if _is_tiny(name):
        return _tiny(name.removesuffix(TINY_SUFFIX))
    folder = _folder(name)
    if folder is not None:
        return _from_folder(folder)
    if name in published():
        return _from_authors(name, None)
    if not _is_repository(name):
        raise _unknown(name)
    held = _published_in(name)
    return _from_folder(_snapshot(name)) if held is None else _from_authors(held, None)


def _is_tiny(name: str) -> bool:
    return name.endswith(TINY_SUFFIX) and name.removesuffix(TINY_SUFFIX) in SYSTEMS


def _is_repository(name: str) -> bool:
    return name.startswith(HUB_PREFIX) or REPOSITORY.fullmatch(name) is not None


def _tiny(system: str) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        torch.manual_seed(0)
        return system_class(system).tiny()  # type: ignore[attr-defined]


def _folder(name: str) -> Path | None:
    """The local folder that a name means; None if it may mean something else."""
    prefix, separator, _ = name.partition(":")
    if separator and name.startswith(HUB_PREFIX):
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        _refuse_file(path)
    if separator and len(prefix) > 1:  # a single letter is a drive
        raise UnknownNameError(f"unknown prefix {prefix + ':'!r} in {name!r}; the only one is {HUB_PREFIX!r}")
    if name.startswith((".", "/", "~")) or name.endswith(os.sep):
        raise UnknownNameError(f"no folder at {name}")
    return None


def _refuse_file(path: Path) -> NoReturn:
    """A file alone does not say what it is."""
    held = {name: Path(entry.hub_file) for name, entry in published().items() if entry.hub_file is not None}
    names = [name for name, file in held.items() if file.name == path.name]
    names = names or [name for name, file in held.items() if file.stem == path.stem] or ["nar-l.imagenet256"]
    raise InvalidInputError(
        f"{path} is a file; say which published checkpoint it is: vistok.load({names[0]!r}, checkpoint={str(path)!r})"
        + (f" (or {', '.join(names[1:])})" if len(names) > 1 else "")
        + ", or give a folder written by save_pretrained"
    )


def _from_folder(folder: Path) -> Any:
    """A network from a folder with `config.json` and weights; strict, other than diffusers' own loading."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        if (folder / PIPELINE_FILE).is_file():
            _check_pipeline(folder)
            raise InvalidInputError(f"{folder} holds a whole pipeline: use vistok.load_pipeline")
        if (folder / "recipe.yaml").is_file():
            raise InvalidInputError(
                f"{folder} is a training run; export it first: vistok.training.export({str(folder)!r}, name, folder)"
            )
        raise CheckpointError(f"{folder} holds no config.json; expected a folder written by save_pretrained")
    config = _read_json(config_file)
    if config.get("model_type") == "llava":
        return _llava(folder)
    if "num_image_codes" in config:  # a language model that reads and writes pictures
        from vistok.tokenizers.seed import ImageLanguageModel

        return ImageLanguageModel.from_pretrained(folder, dtype="auto")
    if "model_type" in config:  # transformers' mark; ours and diffusers' is _class_name
        from vistok.generators.text import TextEncoder

        return TextEncoder.from_pretrained(folder, dtype="auto")
    systems = {target.split(":")[1]: system for system, target in {**SYSTEMS, **HELPERS}.items()} | DIFFUSERS_CLASSES
    class_name = config.get("_class_name")
    if class_name not in systems:
        raise CheckpointError(
            f"{config_file} describes {'no class' if class_name is None else repr(class_name)}; "
            f"vistok loads: {', '.join(sorted(systems))}"
        )
    cls: Any = system_class(systems[class_name])
    state = _read_weights(folder)
    if class_name in DIFFUSERS_CLASSES:
        state = cls.rename_diffusers(state)
    return _assemble(cls, config, state, str(folder))


def _lab_pipeline(name: str) -> Path | None:
    """The folder of a text-to-image pipeline of the lab, or of a fine-tuning of one, if the name means such."""
    folder = ASSETS / name if name in shipped() else None if _is_tiny(name) else _folder(name)
    if folder is None or not (folder / FACTS_FILE).is_file():
        return None
    return folder if _read_facts(folder / FACTS_FILE)["system"] == TEXT_TO_IMAGE else None


def _text_to_image(folder: Path, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    """A `StableDiffusionPipeline` as diffusers loads it, without its bars, in eval mode.

    A shipped one has no VAE: it names the KL tokenizer. A fine-tuning holds the weights of the UNet that it changed,
    and names its base; one that learned with TENOR has it attached.
    """
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    target = _device(device)
    facts = _read_facts(folder / FACTS_FILE)
    if "base" in facts:
        pipe = load(facts["base"], device=target, dtype=dtype)
        packed = folder / PACKED_FILE
        changed = read_state_dict(packed if packed.is_file() else folder / "unet.safetensors")
        own = pipe.unet.state_dict()
        strange = [key for key, value in changed.items() if key not in own or own[key].shape != value.shape]
        if strange:
            raise CheckpointError(f"{folder}: {', '.join(strange[:8])} do not fit the UNet of {facts['base']}")
        pipe.unet.load_state_dict(changed, strict=False)
        if facts.get("tenor"):
            from vistok.controllers import Tenor

            Tenor().attach(pipe)
        return pipe
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    parts = {}
    if not (folder / "vae").is_dir() and "tokenizer" in facts:
        from vistok.tokenizers.kl import stock_autoencoder

        parts["vae"] = stock_autoencoder(load(facts["tokenizer"], device="cpu", dtype=dtype))
    with warnings.catch_warnings():
        # Newer diffusers call this argument `dtype` and warn; the oldest that we take know only this name.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            pipe = DiffusionPipeline.from_pretrained(str(folder), torch_dtype=dtype or torch.float32, **parts)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder} holds no pipeline that can be loaded: {_reason(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(target)


def _llava(folder: Path) -> Any:
    """A LLaVA of transformers, with its own projector or a TokenPacker; strict."""
    from transformers import LlavaForConditionalGeneration

    if (folder / "projector" / "config.json").is_file():
        from vistok.tokenizers.tokenpacker.llava import load_llava

        return load_llava(folder)

    try:
        model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} holds no LLaVA that can be loaded: {_reason(error)}") from error
    if info["missing_keys"] or info["unexpected_keys"]:
        raise CheckpointError(
            f"{folder}: the weights do not fit: missing {sorted(info['missing_keys'])[:8]}, "
            f"unexpected {sorted(info['unexpected_keys'])[:8]}"
        )
    return model.eval()


def _check_pipeline(folder: Path) -> None:
    """Raise InvalidInputError unless the folder's pipeline is one of ours."""
    class_name = _read_json(folder / PIPELINE_FILE).get("_class_name")
    if class_name != "GenerationPipeline":
        tokenizer = f"; its image tokenizer alone: vistok.load({str(folder / 'vae')!r})"
        raise InvalidInputError(
            f"{folder} holds a {class_name} of diffusers: load it with diffusers.DiffusionPipeline.from_pretrained"
            + (tokenizer if (folder / "vae" / "config.json").is_file() else "")
        )


def _read_weights(folder: Path) -> dict[str, Any]:
    """The state dict of a folder, from one file or from shards."""
    if (folder / PACKED_FILE).is_file():
        return read_state_dict(folder / PACKED_FILE)
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if not index.is_file():
        return read_state_dict(folder / WEIGHTS_FILE)
    shards = _read_json(index).get("weight_map", {})
    state: dict[str, Any] = {}
    for shard in sorted(set(shards.values())):
        state.update(read_state_dict(folder / Path(shard).name))
    return state


def _assemble(cls: Any, config: Mapping[str, Any], state: dict[str, Any], source: str) -> Any:
    """A network of class `cls` with exactly these weights.

    `from_pretrained` would fill missing weights with random ones after a warning; here every difference is an error.
    """
    import torch

    from vistok.nn.model import describe_mismatch

    own = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            model = cls(**own)
    except TypeError as error:
        raise CheckpointError(f"{source}: config.json does not fit {cls.__name__}: {error}") from error
    problems = describe_mismatch(model.state_dict(), state)
    if problems:
        raise CheckpointError(f"{source}: the weights do not fit {cls.__name__}: {'; '.join(problems)}")
    if any(buffer.is_meta for name, buffer in model.named_buffers() if name not in state):
        model = cls(**own)  # tables outside the state dict need a real constructor
    model.load_state_dict(state, strict=True, assign=True)
    _give_autoencoder(model, source)
    unclip = own.get("unclip")
    if unclip is not None:  # what paints a SEED's embeddings; loaded when it is needed
        model.decoder = lambda *embeddings, **settings: load(unclip).decoder()(*embeddings, **settings)
    return model.eval()


def _give_autoencoder(model: Any, source: str) -> None:
    """Load the tokenizer whose latents a FlexTok works on, if its configuration names one, and hand it over."""
    named = model.config.get("autoencoder")
    if named is None or not hasattr(model, "set_autoencoder"):
        return
    try:
        model.set_autoencoder(load(named))
    except UnknownNameError as error:
        raise CheckpointError(f"{source}: config.json names the auto-encoder {named!r}: {error}") from error


def _from_authors(name: str, checkpoint: Path | None) -> Any:
    """A published checkpoint from the authors' file."""
    if name not in published():
        raise InvalidInputError(
            f"checkpoint= needs the name of the published checkpoint that the file is; {_unknown(name)}"
        )
    entry = published()[name]
    if checkpoint is None:
        path = _download(entry)
    elif checkpoint.is_dir() and entry.hub_file is not None:
        path = checkpoint / entry.hub_file
        others = sorted(file for file in checkpoint.glob(f"{path.stem}.*") if file.suffix in WEIGHT_SUFFIXES)
        if not path.is_file() and others:  # the same weights in another format: kl16.ckpt
            path = others[0]
    else:
        path = checkpoint
    return system_class(entry.system).from_official(path, name)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------------- the Hub
def _download(entry: Published) -> Path:
    if entry.hub_id is None or entry.hub_file is None:
        raise CheckpointError(f"the authors of {entry.name} have published no file; give checkpoint= if you have one")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(entry.hub_id, entry.hub_file))
    except (HfHubHTTPError, OSError) as error:  # OSError: no connection and no cached copy, or a full disk
        raise CheckpointError(
            f"{entry.name} could not be downloaded from {entry.hub_id} ({_reason(error)}); connect to the Hub, or give "
            f"your copy: vistok.load({entry.name!r}, checkpoint='.../{entry.hub_file}')"
        ) from error


def _published_in(name: str) -> str | None:
    """The published checkpoint that a Hub repository holds, if it is the authors' own."""
    repository = name.removeprefix(HUB_PREFIX)
    theirs = [entry.name for entry in published().values() if entry.hub_id == repository]
    if len(theirs) > 1:
        raise InvalidInputError(f"{repository} holds several checkpoints; load one of: {', '.join(theirs)}")
    return theirs[0] if theirs else None


def _snapshot(name: str) -> Path:
    """Local copy of a Hub repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository = name.removeprefix(HUB_PREFIX)
    try:
        return Path(snapshot_download(repository, allow_patterns=[*HUB_PATTERNS, *(f"*/{p}" for p in HUB_PATTERNS)]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UnknownNameError(
            f"{repository!r} could not be fetched from the Hub ({_reason(error)})"
            + (
                ""
                if name.startswith(HUB_PREFIX)
                else f", and there is no such folder (for one, write './{repository}')"
            )
        ) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------------ pipelines
def load_pipeline(
    name: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | Any | None = None,
    text_encoder: str | os.PathLike[str] | Any | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GenerationPipeline:
    """A generator with the tokenizer and the text encoder that belong to it, or a text-to-image pipeline of diffusers.

    Args:
        name: shipped or published name of a generator, `system.tiny`, a folder (of a generator, or of a whole pipeline
            written by `save_pretrained`), or a Hub repository with either.
        checkpoint: as in `load`.
        tokenizer: another tokenizer, loaded or by name; None is the one that the generator was trained with.
        text_encoder: another text encoder (a `TextEncoder` or a name).
        device, dtype: as in `load`, for all parts.

    Raises:
        InvalidInputError: the name is not a generator's, does not say which tokenizer it writes for, or the parts do
            not fit each other.
    """
    from vistok.generators.pipeline import GenerationPipeline

    name = os.fspath(name)
    if checkpoint is None and (lab := _lab_pipeline(name)) is not None:
        if tokenizer is not None or text_encoder is not None:
            raise InvalidInputError(f"{name} is a whole pipeline; it takes no other tokenizer or text encoder")
        return _text_to_image(lab, device, dtype)
    folder = None
    if checkpoint is None and name not in shipped() and not _is_tiny(name):
        folder = _folder(name)
        if folder is None and name not in published() and _is_repository(name):
            held = _published_in(name)
            name, folder = (held, None) if held is not None else (name, _snapshot(name))
    if folder is not None and (folder / PIPELINE_FILE).is_file():
        _check_pipeline(folder)
        pipe = GenerationPipeline.from_pretrained(str(folder), **({} if dtype is None else {"torch_dtype": dtype}))
        _give_autoencoder(pipe.tokenizer, str(folder))
        return pipe.to(_device(device))
    facts = _pipeline_facts(name, folder)
    source = name if folder is None else folder
    generator = load(source, checkpoint=checkpoint, device=device, dtype=dtype)
    if not hasattr(generator, "sample"):
        raise InvalidInputError(
            f"{name} is a {type(generator).__name__}, which makes no pictures from a prompt; give the name of a "
            "generator (`vistok models` lists them)"
        )
    tokenizer = facts.get("tokenizer") if tokenizer is None else tokenizer
    if tokenizer is None:
        raise InvalidInputError(
            f"{name} does not say which tokenizer it writes for; give it: load_pipeline(..., tokenizer='vq-shapes')"
        )
    text = facts.get("text_encoder") if text_encoder is None else text_encoder
    if not generator.is_text_conditional:
        text = None
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load(tokenizer, device=device, dtype=dtype)
    if isinstance(text, str | os.PathLike):
        text = _load_text_encoder(os.fspath(text), device, dtype)
    return GenerationPipeline(
        generator=generator,
        tokenizer=tokenizer,
        text_encoder=None if text is None else text.model,
        text_tokenizer=None if text is None else text.tokenizer,
        class_names=facts.get("class_names"),
        sampling=facts.get("sampling"),
        image_size=facts.get("image_size"),
    )


def recommended_sampling(name: str) -> dict[str, Any]:
    """Keyword arguments of a lab text-to-image pipeline's call that its checkpoint recommends.

    Args:
        name: shipped name or folder.
    """
    folder = _lab_pipeline(name)
    return dict(_read_facts(folder / FACTS_FILE).get("sampling") or {}) if folder is not None else {}


def _pipeline_facts(name: str, folder: Path | None) -> dict[str, Any]:
    """What joins a generator with its tokenizer."""
    if folder is not None:
        file = folder / FACTS_FILE
        return _read_facts(file) if file.is_file() else {}
    if name in shipped():
        return shipped()[name]
    if _is_tiny(name):
        return {"tokenizer": TINY_TOKENIZERS.get(name.removesuffix(TINY_SUFFIX), TINY_TOKENIZER)}
    if name in published():
        facts = model_info(name)
        if facts["config"].get("num_classes", 1000) == 1000 and "imagenet" in name:
            facts["class_names"] = imagenet_class_names()
        return facts
    raise _unknown(name)


def _load_text_encoder(name: str, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    """A text encoder by shipped name, folder or Hub id (transformers does the download)."""
    if name in shipped() or Path(name).expanduser().is_dir():
        return load(name, device=device, dtype=dtype)
    import torch

    from vistok.generators.text import TextEncoder

    target = _device(device)
    return TextEncoder.from_pretrained(name, dtype=dtype or ("auto" if target.type != "cpu" else torch.float32)).to(
        target
    )


@lru_cache(maxsize=1)
def imagenet_class_names() -> list[str]:
    """The 1,000 class names of ImageNet by label; a class has several, separated by commas ("tench, Tinca tinca")."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_description(label) for label in range(info.num_classes())]
