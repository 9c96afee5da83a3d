"""Replay parity files recorded from the authors' code:  python tests/parity/check.py PATH...

PATH is a golden file (`*.safetensors`), a manifest (`manifest_*.json[.gz]`) or a folder of them. Each line says
`system/case  max_abs=... max_rel=... PASS|FAIL`; the exit code is 1 if any case fails or no adapter knows its kind.

Adapters live in `tests/parity/adapters/`: a module declares `SYSTEM`, `CASES` (case name -> function that takes a
`Golden` and returns our outputs under the file's names) and `MANIFESTS` (name prefix -> function of the name and of
`{official key: (shape, dtype)}` and raises if our published-size model expects anything else). The longest prefix wins.
`FILES` (file name prefix -> function that takes the path and raises on any difference) claims other recordings:
JSON tables, manifests of another layout, the authors' own files. It is asked first.
An adapter whose kernels add in another order than the authors' names those cases in `REORDERED`; they are compared at
`REORDERED_TOLERANCE`, or at the file's own tolerance where that is wider.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
if sys.path[0] != str(REPOSITORY):  # first: some packages install a folder named tests
    sys.path.insert(0, str(REPOSITORY))

ADAPTERS = "tests.parity.adapters"
# float32 convolutions whose sums run in another order differ by this much (rtol, atol); exact arithmetic does, too.
REORDERED_TOLERANCE = (1e-4, 1e-5)


@dataclass(frozen=True)
class Golden:
    """One recorded case."""

    path: Path
    system: str
    case: str
    config: dict[str, Any]
    call: dict[str, Any]
    metadata: dict[str, str]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    rtol: float
    atol: float

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Read a golden file."""
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "inputs": {}, "outputs": {}}
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118 - not a mapping
                part, name = key.split(".", 1)
                parts[part][name] = file.get_tensor(key)
        return cls(
            path=path,
            system=metadata.get("system", path.parent.name),
            case=metadata.get("case", path.stem),
            config=json.loads(metadata.get("config", "{}")),
            call=json.loads(metadata.get("call", "{}")),
            metadata=metadata,
            weights=parts["weights"],
            inputs=parts["inputs"],
            outputs=parts["outputs"],
            rtol=float(metadata.get("rtol", 1e-5)),
            atol=float(metadata.get("atol", 1e-6)),
        )


@dataclass(frozen=True)
class Result:
    """The outcome of one file."""

    name: str
    passed: bool
    max_abs: float = 0.0
    max_rel: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        line = (
            f"{self.name:<55} max_abs={self.max_abs:.2e} max_rel={self.max_rel:.2e} {'PASS' if self.passed else 'FAIL'}"
        )
        return f"{line}  {self.reason}" if self.reason else line


@cache
def tables() -> tuple[dict[str, dict[str, Callable]], dict[str, dict[str, Callable]]]:
    """(cases, manifests), each system -> name -> function, from every adapter module."""
    cases: dict[str, dict[str, Callable]] = {}
    manifests: dict[str, dict[str, Callable]] = {}
    package = importlib.import_module(ADAPTERS)
    for module in pkgutil.iter_modules(package.__path__):
        adapter = importlib.import_module(f"{ADAPTERS}.{module.name}")
        for table, entries in ((cases, adapter.CASES), (manifests, getattr(adapter, "MANIFESTS", {}))):
            known = table.setdefault(adapter.SYSTEM, {})
            twice = known.keys() & entries.keys()
            if twice:
                raise RuntimeError(f"{module.name} declares {sorted(twice)} of {adapter.SYSTEM} a second time")
            known.update(entries)
    return cases, manifests


@cache
def reordered() -> frozenset[tuple[str, str]]:
    """(system, case prefix) of the cases whose sums run in another order."""
    package = importlib.import_module(ADAPTERS)
    modules = [
        importlib.import_module(f"{ADAPTERS}.{module.name}") for module in pkgutil.iter_modules(package.__path__)
    ]
    return frozenset((module.SYSTEM, case) for module in modules for case in getattr(module, "REORDERED", ()))


@cache
def other_files() -> dict[str, dict[str, Callable]]:
    """system -> file name prefix -> function, of files that are neither golden tensors nor plain manifests."""
    found: dict[str, dict[str, Callable]] = {}
    package = importlib.import_module(ADAPTERS)
    for module in pkgutil.iter_modules(package.__path__):
        adapter = importlib.import_module(f"{ADAPTERS}.{module.name}")
        found.setdefault(adapter.SYSTEM, {}).update(getattr(adapter, "FILES", {}))
    return found


def system_of(path: Path) -> str:
    """The system that a file other than golden tensors belongs to: what it says itself, or its folder's name."""
    if path.name.endswith((".json", ".json.gz")):
        content = json.loads(read_text(path))
        if isinstance(content, dict) and isinstance(content.get("system"), str):
            return content["system"]
    return path.parent.name


def read_text(path: Path) -> str:
    """The text of a file, gzipped or not."""
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")


def find(table: Mapping[str, Callable], name: str) -> Callable | None:
    """The entry whose key is the longest prefix of `name`."""
    keys = [key for key in table if name.startswith(key)]
    return table[max(keys, key=len)] if keys else None


def differences(ours: Tensor, theirs: Tensor, rtol: float, atol: float) -> tuple[float, float, str]:
    """(largest absolute difference, largest relative difference, reason of failure or an empty string)."""
    if tuple(ours.shape) != tuple(theirs.shape):
        return float("inf"), float("inf"), f"shape {list(ours.shape)} instead of {list(theirs.shape)}"
    if theirs.numel() == 0:
        return 0.0, 0.0, ""
    if not theirs.is_floating_point():
        wrong = int((ours.to(torch.int64) != theirs.to(torch.int64)).sum())
        absolute = float((ours.double() - theirs.double()).abs().max())
        return absolute, absolute, f"{wrong} of {theirs.numel()} values differ" if wrong else ""
    ours, theirs = ours.detach().double().cpu(), theirs.double()
    infinite = torch.isinf(theirs)
    if not torch.equal(ours[infinite], theirs[infinite]):
        return float("inf"), float("inf"), "infinities at other places"
    if not bool(torch.isfinite(ours[~infinite]).all()):
        return float("inf"), float("inf"), "NaN or infinity where the authors' code has none"
    delta = (ours - theirs)[~infinite].abs()
    size = theirs[~infinite].abs()
    if delta.numel() == 0:
        return 0.0, 0.0, ""
    outside = int((delta > atol + rtol * size).sum())
    # Relative to the tensor's own scale where an element is about zero.
    relative = float((delta / size.clamp_min(float(size.max()) * 1e-3 + 1e-30)).max())
    return float(delta.max()), relative, f"{outside} of {delta.numel()} outside the tolerance" if outside else ""


def check_golden(path: Path) -> Result:
    """Replay one golden file."""
    golden = Golden.read(path)
    name = f"{golden.system}/{golden.case}"
    run = find(tables()[0].get(golden.system, {}), golden.case)
    if run is None:
        return Result(name, False, reason="unknown kind: no adapter")
    try:
        ours = run(golden)
    except Exception as error:  # a failing case must not hide the others
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Result(
            name,
            False,
            float("nan"),
            float("nan"),
            f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})",
        )
    rtol, atol = golden.rtol, golden.atol
    if any(system == golden.system and golden.case.startswith(case) for system, case in reordered()):
        rtol, atol = max(rtol, REORDERED_TOLERANCE[0]), max(atol, REORDERED_TOLERANCE[1])
    reasons, absolute, relative = [], 0.0, 0.0
    for key, theirs in golden.outputs.items():
        if key not in ours:
            reasons.append(f"{key}: not computed")
            continue
        largest, largest_relative, reason = differences(ours[key], theirs, rtol, atol)
        absolute, relative = max(absolute, largest), max(relative, largest_relative)
        if reason:
            reasons.append(f"{key}: {reason}")
    if not golden.outputs:
        reasons.append("the file records no outputs")
    return Result(name, not reasons, absolute, relative, "; ".join(reasons))


def check_manifest(path: Path) -> Result:
    """Compare the key list of a published checkpoint with our model of the same configuration."""
    system = path.parent.name
    stem = path.name.removesuffix(".gz").removesuffix(".json").removeprefix("manifest_")
    name = f"{system}/manifest_{stem}"
    run = find(tables()[1].get(system, {}), stem)
    if run is None:
        return Result(name, False, reason="unknown kind: no adapter")
    keys = {key: (tuple(shape), dtype) for key, (shape, dtype) in json.loads(read_text(path)).items()}
    try:
        run(stem, keys)
    except Exception as error:  # a failing manifest must not hide the others
        return Result(name, False, reason=f"{type(error).__name__}: {error}")
    return Result(name, True)


def check_other(path: Path, run: Callable) -> Result:
    """Hand a file of another kind to the adapter that claims it."""
    name = f"{system_of(path)}/{path.name}"
    try:
        run(path)
    except Exception as error:  # a failing file must not hide the others
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Result(name, False, reason=f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})")
    return Result(name, True)


def check(path: Path) -> Result:
    """Check one file of any kind."""
    claimed = find(other_files().get(system_of(path), {}), path.name)
    if claimed is not None:
        return check_other(path, claimed)
    if path.name.startswith("manifest_"):
        return check_manifest(path)
    if path.suffix == ".safetensors":
        return check_golden(path)
    return Result(f"{path.parent.name}/{path.name}", False, reason="unknown kind of file")


def collect(paths: Iterable[Path]) -> list[Path]:
    """The golden files and manifests below the given files and folders."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += [item for item in sorted(path.rglob("*")) if item.is_file()]
        else:
            found.append(path)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Replay parity files recorded from the authors' code.")
    parser.add_argument("paths", nargs="+", type=Path, help="golden files, manifests, or folders of them")
    options = parser.parse_args(arguments)
    missing = [path for path in options.paths if not path.exists()]
    if missing:
        parser.error(f"no such file or folder: {', '.join(map(str, missing))}")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # the last digits of a sum depend on the number of threads
    failed = 0
    files = collect(options.paths)
    for path in files:
        result = check(path)
        failed += not result.passed
        print(result, flush=True)
    print(f"{len(files) - failed} passed, {failed} failed")
    return 1 if failed or not files else 0


if __name__ == "__main__":
    sys.exit(main())
