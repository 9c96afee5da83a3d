"""The photographs that scikit-image ships."""

import pytest
from PIL import Image

from vistok.data.photographs import PHOTOGRAPHS, open_photograph, shipped_pictures
from vistok.errors import InvalidInputError


def test_shipped_photographs_are_found_and_others_refused():
    assert set(PHOTOGRAPHS) <= set(shipped_pictures())
    assert max(open_photograph("coffee", 100).size) == 100
    assert open_photograph("coffee").mode == "RGB"
    with pytest.raises(InvalidInputError, match="astronaut"):
        open_photograph("no such picture")


def test_a_file_is_a_photograph_too(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "own.png")
    assert open_photograph(str(tmp_path / "own.png")).size == (30, 20)
