"""Files: atomic writing, checkpoints that cannot run code, and pictures of every kind."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.errors import CheckpointError, InvalidInputError
from vistok.files import (
    atomic_path,
    open_image,
    pack_rows,
    read_state_dict,
    save_tensors,
    unpack_rows,
    write_text_atomic,
)


def write_half(target: Path, failure: BaseException) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("half of the n")
        raise failure


def test_a_failing_writer_leaves_the_old_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "notes.txt"
    write_text_atomic(target, "old")
    for failure in (OSError("No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(failure)):
            write_half(target, failure)
        assert target.read_text() == "old"
        assert os.listdir(tmp_path) == ["notes.txt"]
    write_text_atomic(target, "new")
    assert target.read_text() == "new"


def test_packed_rows_come_back_within_their_rounding(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = {
        "matrix": torch.randn(64, 80, generator=generator) * torch.logspace(-4, 2, 64)[:, None],
        "kernel": torch.randn(32, 16, 3, 3, generator=generator),
        "zeros": torch.zeros(64, 64),
        "bias": torch.randn(5000, generator=generator),
        "small": torch.randn(8, 8, generator=generator),
        "count": torch.arange(9000).view(90, 100),
    }
    packed = pack_rows(plain)
    assert packed["matrix"].dtype == packed["kernel"].dtype == torch.int8
    assert packed["bias"].dtype == packed["small"].dtype == torch.bfloat16
    save_tensors(tmp_path / "packed.safetensors", packed)
    back = read_state_dict(tmp_path / "packed.safetensors")
    assert back.keys() == plain.keys()
    assert torch.equal(back["count"], plain["count"])
    assert not back["zeros"].any()
    for name in ("matrix", "kernel"):
        rows, found = plain[name].flatten(1), back[name].float().flatten(1)
        # Half a step of int8, and bfloat16's rounding of the result.
        bound = rows.abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-8)
        assert bool(((rows - found).abs() <= bound).all())
    assert all(torch.equal(value, plain[name]) for name, value in unpack_rows(plain).items())


def test_tied_tensors_are_saved(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    save_tensors(tmp_path / "tied.safetensors", {"a": shared, "b": shared, "c": shared.view(2, 2).T})
    state = read_state_dict(tmp_path / "tied.safetensors")
    assert torch.equal(state["a"], state["b"])
    assert torch.equal(state["c"], shared.view(2, 2).T)


class Bomb:
    """Runs code when unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.witness,))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    torch.save({"model": {}, "bomb": Bomb(witness)}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        read_state_dict(tmp_path / "evil.pt")
    assert not witness.exists()


def test_training_checkpoints_with_a_namespace_are_read(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1e-4), "steps": 7}, tmp_path / "c.pt")
    assert torch.equal(read_state_dict(tmp_path / "c.pt")["model"]["w"], torch.ones(2))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_and_empty_checkpoints_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"w": torch.randn(1000)}, path)
    else:
        save_tensors(path, {"w": torch.randn(1000)})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        read_state_dict(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="empty"):
        read_state_dict(path)
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        read_state_dict(tmp_path / "absent.pt")


def test_unknown_suffixes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="suffix"):
        read_state_dict(tmp_path / "weights.npz")


def gradient(height: int = 6, width: int = 4) -> np.ndarray:
    return np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)


def test_rotation_in_the_metadata_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(gradient()).save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png").size == (6, 4)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30] * 256)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert open_image(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)


def test_deep_greys_are_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 65535], [32768, 16384]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    grey = np.asarray(open_image(tmp_path / "deep.png"))
    assert grey[..., 0].tolist() == [[0, 255], [128, 64]]
    Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32)).save(tmp_path / "float.tiff")
    assert np.asarray(open_image(tmp_path / "float.tiff"))[..., 0].tolist() == [[0, 255]]


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    red, green, blue = open_image(tmp_path / "moving.gif").getpixel((1, 1))
    assert red > 200
    assert blue < 50 and green < 50  # noqa: PT018


def test_unreadable_pictures_are_named(tmp_path: Path) -> None:
    Image.fromarray(gradient(64, 64)).save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 3])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    for name, message in (("cut.jpg", "damaged"), ("empty.png", "empty"), ("text.png", "known format")):
        with pytest.raises(InvalidInputError, match=message):
            open_image(tmp_path / name)
    with pytest.raises(InvalidInputError, match="no image file"):
        open_image(tmp_path / "absent.png")
