"""`vistok env`: versions and devices, for bug reports."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Annotated, Any

import typer

PACKAGES = ("torch", "torchvision", "timm", "diffusers", "transformers", "accelerate", "huggingface_hub", "safetensors")
OPTIONAL = ("triton", "xformers", "torchmetrics", "webdataset", "tensorboard", "scikit-image", "gradio")


def _allocator() -> str:
    preload = os.environ.get("LD_PRELOAD", "")
    return next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if name in preload), "system")


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, devices and settings."""
    import torch

    import vistok

    versions: dict[str, str] = {}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    facts: dict[str, Any] = {
        "vistok": vistok.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions,
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "allocator": _allocator(),
        "kernels": os.environ.get("VISTOK_KERNELS", "auto"),
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        typer.echo(f"{key:>16}  {value if value != [] else 'none'}")
