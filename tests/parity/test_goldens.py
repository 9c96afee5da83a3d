"""Every committed parity file, and every one of the shared folder beside the repository where that exists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.parity.check import REPOSITORY, check, collect, find, main, other_files, system_of, tables

COMMITTED = REPOSITORY / "tests" / "golden"
SHARED = REPOSITORY.parent / "shared" / "golden"
# What a file asks for but does not determine: the negative prompt of `sd15_sample` is an encoding of the empty prompt,
# and the file holds neither that nor the text encoder. Everything else in it is compared.
UNDETERMINED = {"sd15_sample": "cfg_default_negative.sample: not computed"}
MAX_COMMITTED_BYTES = 10 * 2**20


def replayable(folder: Path) -> list[Path]:
    """Files whose kind has an adapter: the systems that the package has so far."""
    cases, manifests = tables()
    files = []
    for path in collect([folder] if folder.is_dir() else []):
        if find(other_files().get(system_of(path), {}), path.name) is not None:
            files.append(path)
            continue
        if path.name.startswith("manifest_"):
            known, name = manifests.get(path.parent.name, {}), path.name.removeprefix("manifest_")
        elif path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
            known, name = cases.get(metadata.get("system", path.parent.name), {}), metadata.get("case", path.stem)
        else:
            continue
        if any(name.startswith(key) for key in known):
            files.append(path)
    return files


def test_a_claimed_file_that_differs_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(path for path in replayable(COMMITTED) if path.name == "text_spans.json")
    wrong = tmp_path / "attribute_directions"
    wrong.mkdir()
    (wrong / path.name).write_text(path.read_text(encoding="utf-8").replace('"matches": 1', '"matches": 2'))
    assert main([str(wrong)]) == 1
    assert "FAIL" in capsys.readouterr().out


def label(path: Path) -> str:
    return f"{'shared' if SHARED in path.parents else 'committed'}-{path.parent.name}-{path.stem}"


@pytest.mark.parametrize("path", [*replayable(COMMITTED), *replayable(SHARED)], ids=label)
def test_golden(path: Path) -> None:
    result = check(path)
    assert result.passed or result.reason == UNDETERMINED.get(path.stem), str(result)


def test_the_committed_files_stay_light() -> None:
    assert sum(path.stat().st_size for path in COMMITTED.rglob("*") if path.is_file()) <= MAX_COMMITTED_BYTES


def test_a_case_of_every_adapter_is_committed() -> None:
    cases, _ = tables()
    committed = {path.stem for path in replayable(COMMITTED)}
    for system, known in cases.items():
        assert any(name.startswith(tuple(known)) for name in committed), f"no golden of {system} in tests/golden"


def test_the_harness_fails_on_wrong_values_and_unknown_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(path for path in replayable(COMMITTED) if path.stem == "sampling_filters")
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors["outputs.sample_probs"] = tensors["outputs.sample_probs"] + 1e-3
    save_file(tensors, str(tmp_path / "wrong.safetensors"), metadata=metadata)
    save_file(
        {"outputs.x": torch.ones(1)}, str(tmp_path / "odd.safetensors"), metadata={"system": "llamagen", "case": "odd"}
    )
    assert main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "outside the tolerance" in printed
    assert "unknown kind" in printed
    assert "0 passed, 2 failed" in printed
    assert main([str(path)]) == 0
