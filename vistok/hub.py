"""`vistok.load(name)`: shipped checkpoints, local folders, the authors' files and the Hugging Face Hub.

A name is tried in this order; the first that fits decides:

1. `./...`, `/...` or an existing path: a folder written by `save_pretrained` or `vistok train`.
2. a shipped name: `nar-shapes`.
3. a published name: `nar-l.imagenet256` downloads the authors' file and loads it strictly.
4. `system.tiny`: a random flavour that builds in milliseconds.
5. `org/repository` (or `hub:org/repository`): a repository on the Hub in our format.
"""

from __future__ import annotations

import fnmatch
import json
import os
import warnings
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistok.errors import CheckpointError, InvalidInputError, UnknownNameError
from vistok.registry import HELPERS, SYSTEMS, Published, system_class, unknown_name

if TYPE_CHECKING:
    import torch

    from vistok.generators.pipeline import GenerationPipeline

__all__ = ["ASSETS", "list_models", "load", "load_pipeline", "model_info"]

ASSETS = Path(__file__).parent / "assets"
FACTS_FILE = "vistok.json"
TEXT_ENCODER = "text-encoder"


def shipped() -> dict[str, dict[str, Any]]:
    """Facts of the checkpoints inside the package, by name."""
    found = {}
    for file in sorted(ASSETS.glob(f"*/{FACTS_FILE}")):
        found[file.parent.name] = _read_facts(file)
    return found


def _read_facts(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from error
    if not isinstance(facts, dict) or "system" not in facts:
        raise CheckpointError(f'{file} does not say which system it belongs to (a "system" entry)')
    return facts


@lru_cache(maxsize=1)
def published() -> dict[str, Published]:
    """Every published checkpoint of every system, by name."""
    found: dict[str, Published] = {}
    for system in SYSTEMS:
        found.update(system_class(system).published)  # type: ignore[attr-defined]
    return found


def list_models(pattern: str = "*", *, include_published: bool = True) -> list[str]:
    """Names that `load` knows: shipped ones first, then published ones.

    Args:
        pattern: shell wildcards, e.g. `"nar*"`.
        include_published: also those that have to be downloaded (looking them up imports torch).
    """
    names = list(shipped()) + (sorted(published()) if include_published else [])
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def model_info(name: str) -> dict[str, Any]:
    """What is known about a shipped or published checkpoint: system, paper, licence, sizes, origin.

    Raises:
        UnknownNameError: if it is neither.
    """
    ours = shipped()
    if name in ours:
        files = [file for file in (ASSETS / name).iterdir() if file.is_file()]
        return {
            "name": name,
            "shipped": True,
            **ours[name],
            "bytes": sum(file.stat().st_size for file in files),
        }
    theirs = published()
    if name in theirs:
        return {"shipped": False, **asdict(theirs[name])}
    raise _unknown(name)


def _unknown(name: str) -> UnknownNameError:
    known = [*list_models(), *(f"{system}.tiny" for system in SYSTEMS)]
    return unknown_name(
        "model", name, known, "`vistok models` lists all; a folder or a Hub repository (org/name) can be given, too"
    )


def load(
    name: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a network (see the module's documentation for what a name can be).

    Args:
        name: shipped or published name, folder, Hub repository, or `system.tiny`.
        device: where to put it; None is the CPU.
        dtype: floating point type; None keeps the checkpoint's, except that a CPU computes in float32.

    Returns:
        The network in eval mode: `VQModel`, `NAR`, `LlamaGen`, ... or a `TextEncoder`.

    Raises:
        UnknownNameError: naming the nearest known names.
        CheckpointError: the files do not fit the network, or cannot be read.
    """
    import torch

    model = _load(str(name))
    target = torch.device(device or "cpu")
    if dtype is None and target.type == "cpu":
        # bf16 saves space on disk, not time on every CPU; fp16 is many times slower there.
        dtype = torch.float32
    if dtype == torch.float16 and target.type == "cpu":
        warnings.warn("float16 is 4 to 80 times slower than float32 on a CPU; loading in float32", stacklevel=2)
        dtype = torch.float32
    model = model.to(device=target, dtype=dtype) if dtype is not None else model.to(target)
    return model.eval()


def _load(name: str) -> Any:
    folder = _folder(name)
    if folder is not None:
        return _from_folder(folder)
    if name.endswith(".tiny") and name.removesuffix(".tiny") in SYSTEMS:
        return system_class(name.removesuffix(".tiny")).tiny()  # type: ignore[attr-defined]
    if name in published():
        entry = published()[name]
        return system_class(entry.system).from_official(_download(entry), name)  # type: ignore[attr-defined]
    repository = name.removeprefix("hub:")
    if repository.count("/") == 1 and not name.startswith((".", "/")):
        return _from_folder(_snapshot(repository))
    raise _unknown(name)


def _folder(name: str) -> Path | None:
    """The local folder that a name means, if any."""
    if name in shipped():
        return ASSETS / name
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise InvalidInputError(
            f"{name} is a file; load the authors' files through their class, e.g. "
            f"NAR.from_official({name!r}, 'nar-l.imagenet256'), or give a folder"
        )
    if name.startswith((".", "/", "~")):
        raise UnknownNameError(f"no folder at {name}")
    return None


def _from_folder(folder: Path) -> Any:
    facts = _read_facts(folder / FACTS_FILE) if (folder / FACTS_FILE).is_file() else {}
    if facts.get("system") == TEXT_ENCODER:
        from vistok.generators.text import TextEncoder

        return TextEncoder.from_pretrained(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no readable config.json ({error}); expected a folder written by save_pretrained"
        ) from error
    names = {target.split(":")[1]: system for system, target in {**SYSTEMS, **HELPERS}.items()}
    class_name = config.get("_class_name")
    if class_name not in names:
        raise CheckpointError(f"{folder} holds a {class_name!r}; vistok loads: {', '.join(sorted(names))}")
    weights = folder / "diffusion_pytorch_model.safetensors"
    if weights.is_file():
        from vistok.files import read_state_dict

        read_state_dict(weights)  # names a truncated or empty file, which from_pretrained would not
    try:
        return system_class(names[class_name]).from_pretrained(str(folder), low_cpu_mem_usage=False)  # type: ignore[attr-defined]
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} does not fit {class_name}: {error}") from error


def _download(entry: Published) -> str:
    if entry.hub_id is None or entry.hub_file is None:
        raise CheckpointError(f"the authors of {entry.name} have published no file for it")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return hf_hub_download(entry.hub_id, entry.hub_file)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{entry.name} could not be downloaded from {entry.hub_id} ({type(error).__name__}); connect to the Hub, or "
            f"load your copy of {entry.hub_file} with from_official(path, {entry.name!r})"
        ) from error


def _snapshot(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UnknownNameError(
            f"{repository!r} is no shipped or published name, no folder, and could not be fetched from the Hub "
            f"({type(error).__name__})"
        ) from error


def load_pipeline(
    name: str | os.PathLike[str], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> GenerationPipeline:
    """A generator with the tokenizer and the text encoder that belong to it.

    Args:
        name: shipped or published name of a generator, or a folder with a `vistok.json`.
        device, dtype: as in `load`.

    Raises:
        InvalidInputError: if the name is not a generator's, or does not say which tokenizer it writes for.
    """
    from vistok.generators.pipeline import GenerationPipeline

    name = str(name)
    if name in published():
        facts = asdict(published()[name])
    else:
        folder = _folder(name)
        facts = _read_facts(folder / FACTS_FILE) if folder is not None and (folder / FACTS_FILE).is_file() else {}
        if folder is None and "/" not in name:
            raise _unknown(name)
    if facts.get("tokenizer") is None:
        raise InvalidInputError(
            f"{name} does not name the tokenizer that it writes for, so it is no generator that can make pictures alone; "
            "join the parts yourself: GenerationPipeline(generator=..., tokenizer=...)"
        )
    text_encoder = facts.get("text_encoder")
    text = load(text_encoder, device=device, dtype=dtype) if text_encoder in shipped() else None
    if text_encoder is not None and text is None:
        from vistok.generators.text import TextEncoder

        text = TextEncoder.from_pretrained(text_encoder).to(device or "cpu")
    return GenerationPipeline(
        generator=load(name, device=device, dtype=dtype),
        tokenizer=load(facts["tokenizer"], device=device, dtype=dtype),
        text_encoder=None if text is None else text.model,
        text_tokenizer=None if text is None else text.tokenizer,
        class_names=facts.get("class_names"),
        sampling=facts.get("sampling"),
    )
