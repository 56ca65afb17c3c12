"""Pictures in every form that rows have them in."""

import io

import numpy as np
import pytest
from PIL import Image

from attnpack_fx.pictures import pictures

PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def in_forms(tmp_path):
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    return {
        "path": tmp_path / "a.png",
        "text": str(tmp_path / "a.png"),
        "bytes": file.getvalue(),
        "image": PICTURE,
        "array": np.asarray(PICTURE),
    }


@pytest.mark.parametrize("form", ["path", "text", "bytes", "image", "array"])
def test_one_alone_and_several(tmp_path, form):
    given = in_forms(tmp_path)[form]
    objects = np.empty(2, dtype=object)
    objects[:] = [given, given]
    for column, count in ((given, 1), ([given], 1), ([given, given], 2), (objects, 2)):
        opened = pictures(column)
        assert len(opened) == count
        for each in opened:
            assert each.mode == "RGB" and np.array_equal(np.asarray(each), np.asarray(PICTURE))


def test_arrays_of_a_data_set():
    stacked = np.stack([np.asarray(PICTURE)] * 3)
    assert len(pictures(stacked)) == 3 and len(pictures(stacked[0])) == 1
    grey = np.zeros((4, 5), dtype=np.uint8)
    assert pictures(grey)[0].size == (5, 4) and pictures(grey)[0].mode == "RGB"


def test_none_is_none():
    assert pictures(None) == pictures([]) == pictures(np.array([], dtype=object)) == []


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([PICTURE, "no.png"], r"image 2: no\.png: No such file"),
        ([b"nothing"], "image 1: bytes: not a picture that Pillow can read"),
        ([0.5], "image 1: got float, expected a path, the bytes of a picture"),
        ([np.zeros((4, 4, 3))], r"image 1: got ndarray, expected .* of uint8"),
        ([np.zeros((4, 4, 7), dtype=np.uint8)], "image 1: ndarray: "),
    ],
)
def test_what_cannot_be_read(column, message):
    with pytest.raises(ValueError, match=message):
        pictures(column)


def test_a_picture_that_is_cut_off(tmp_path):
    content = in_forms(tmp_path)["bytes"]
    with pytest.raises(ValueError, match="image 1: bytes: "):
        pictures([content[: len(content) // 2]])
